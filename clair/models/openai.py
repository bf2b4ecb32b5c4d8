"""Any OpenAI-compatible endpoint: one client per event loop, typed errors, no retries of its own."""

from __future__ import annotations

import email.utils
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from clair.models import Refused, RequestFailed, TooMany, Unreachable, encodable, reply_of
from clair.models.turns import turns_at
from clair.recipe import one_line
from clair.urls import endpoint_of, environment_headers, environment_values, filled, public_url

T = TypeVar("T")
_CONNECT_SECONDS = 15.0
_LONGEST_WAIT = 86_400.0
_SHORTEST_SECRET = 8  # what is shorter stands in ordinary words
_OURS = ("messages", "tools")  # what the rows say: `${NAME}` in them is text


class OpenAIModel:
    """A model behind an OpenAI-compatible URL. Construct it inside the event loop that uses it."""

    def __init__(
        self,
        url: str,
        name: str,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        id: str | None = None,
        secrets: Iterable[str] = (),
        timeout: float = 600.0,
        role: str = "model",
    ) -> None:
        from openai import AsyncOpenAI, Timeout

        from clair.models.wire import GuardedClient, origin_of

        logging.getLogger("httpx2").addFilter(_WITHOUT_QUERIES)
        endpoint = endpoint_of(url)
        self.name = name
        self.role = role
        self.url = endpoint.public
        self.identity = id or f"{name}@{self.url}"
        self.timeout = timeout
        secrets = (key or "", *endpoint.secrets, *environment_values(headers or {}), *secrets)
        self._secrets = {secret for secret in secrets if len(secret) >= _SHORTEST_SECRET}
        authorization = {"Authorization": endpoint.authorization} if endpoint.authorization else {}
        self._turns = turns_at(origin_of(endpoint.base))
        self._answered = False
        limit = Timeout(timeout, connect=_CONNECT_SECONDS)
        self._without_limit = Timeout(None, connect=_CONNECT_SECONDS)
        self._client = AsyncOpenAI(
            base_url=endpoint.base,
            api_key=key or "none",
            default_headers=authorization | environment_headers(headers or {}),
            default_query=filled(endpoint.query, f"the query of {self.url}"),
            max_retries=0,
            timeout=limit,
            http_client=GuardedClient(endpoint.base, timeout=limit, limits=_no_limits()),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def check(self) -> None:
        """List the models; where that does not show ours, ask for a single token. Raises Refused."""
        try:
            response = await self._request("GET", "/models", None)
            names = [entry["id"] for entry in json.loads(response)["data"]]
        except (RequestFailed, TooMany, NotListed, Elsewhere, Unreachable, ValueError, KeyError, TypeError):
            names = []  # many servers list nothing, or fail at it (`transformers serve` without a hub answers 500)
        if self.name in names:
            return
        for last in (False, True):  # after an error, a server may close the connection just as we use it again
            try:
                await self.complete({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1})
                return
            except (RequestFailed, TooMany):
                return  # it understood who was asked: that is all we wanted to know
            except Unreachable as error:
                if last:
                    told = f"{self.role}: cannot reach {self.url} ({error}); check the url in the recipe"
                    raise Refused(told) from error

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """The raw JSON text of one chat completion."""
        try:
            raw = await self._request("POST", "/chat/completions", {"model": self.name, **request})
        except Elsewhere as error:
            if self._answered:  # it answers others: this one is sent to a page for logging in, or the like
                raise RequestFailed("redirected", f"{self.url} {error}; it was not followed") from error
            raise Refused(
                f"{self.role}: {self.url} {error}; headers and prompts were not sent there: if that is right, put its "
                f"address into the recipe as url"
            ) from error
        except NotListed as error:
            raise Refused(
                f"{self.role}: {self.url} has no model {self.name!r}, or is not the base URL of an OpenAI-compatible "
                f"API (404: {error}); check model and url"
            ) from error
        self._answered = True
        return raw

    async def call(self, ask: Callable[[Any], Awaitable[T]]) -> T:
        """What `ask` gets from the openai client, its errors as ours: Refused, RequestFailed, NotListed ..."""
        import httpx2
        import openai

        from clair.models.wire import Redirected, TooLarge, without_queries

        try:
            return await ask(self._client)
        except Redirected as error:
            raise Elsewhere(str(error)) from error
        except TooLarge as error:
            beginning = self.redacted(error.beginning.decode("utf-8", "replace"))
            raise RequestFailed("malformed_reply", str(error), beginning) from error
        except openai.RateLimitError as error:
            if error.code == "insufficient_quota":
                raise Refused(f"{self.role}: {self.url} has no quota left: {self._words(error)}") from error
            raise TooMany(retry_after(error.response.headers)) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise Refused(
                f"{self.role}: {self.url} refuses the key ({error.status_code}: {self._words(error)}); "
                f"check api_key_env and the variable it names"
            ) from error
        except openai.NotFoundError as error:
            raise NotListed(self._words(error)) from error
        except openai.APIConnectionError as error:  # timeouts are of this kind too
            cause = error.__cause__ or error
            timed_out = isinstance(cause, httpx2.ReadTimeout | httpx2.WriteTimeout | TimeoutError)
            words = "timeout" if timed_out else encodable(self.redacted(without_queries(str(cause)))[:200])
            raise Unreachable(words, billed=not _never_sent(error), timeout=timed_out) from error
        except openai.APIStatusError as error:
            words = f"{error.status_code}: {self._words(error)}"
            if error.status_code >= 500 or error.status_code in (408, 409, 425):
                raise Unreachable(words) from error
            raise RequestFailed(f"http_{error.status_code}", words) from error

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> str:
        import httpx2

        from clair.models.wire import without_queries

        # Headers belong to all requests of the endpoint, the first look at its models included.
        sent = None if body is None else self.body(body)

        async def ask(client: Any) -> Any:
            options = {"timeout": self._without_limit}  # that is ours: the client's would begin anew with each read
            if method == "GET":
                return await client.get(path, cast_to=httpx2.Response, options=options)
            return await client.post(path, cast_to=httpx2.Response, body=sent, options=options)

        try:
            async with self._turns.within(self.timeout):
                response = await self.call(ask)
        except TimeoutError as error:
            raise Unreachable("timeout", billed=True, timeout=True) from error
        except (Refused, RequestFailed, TooMany, NotListed, Elsewhere, Unreachable):
            raise
        except Exception as error:  # what a library does with an answer that nobody foresaw
            words = encodable(self.redacted(one_line(without_queries(str(error)), 200)))
            raise Unreachable(f"no HTTP answer: {type(error).__name__}: {words}", billed=True) from error
        try:
            text = response.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raw = self.redacted(response.content.decode("utf-8", "replace"))
            raise RequestFailed("malformed_reply", f"the reply is not UTF-8: {raw[:200]!r}", raw) from error
        return self.as_said(text)

    def body(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What is sent of a request: without the headers, and `${NAME}` filled in where it is not a row's text."""
        sent = {name: value for name, value in request.items() if name != "headers"}
        return sent | filled({name: value for name, value in sent.items() if name not in _OURS}, "extra")

    def as_said(self, text: str) -> str:
        """What came with status 200: a model's words as they are; what is no completion, without our secrets."""
        if not any(secret in text for secret in self._secrets):
            return text
        try:
            reply_of(text, tools=True)
        except RequestFailed:
            return self.redacted(text)
        return text

    def _words(self, error: Any) -> str:
        """What the server said, in one line and without our secrets."""
        body = error.body if isinstance(error.body, dict) else {}
        message = body.get("message") or error.message or ""
        return encodable(one_line(self.redacted(str(message)), 300))

    def redacted(self, text: str) -> str:
        """The text without our secrets, which a careless server may repeat."""
        for secret in self._secrets:
            text = text.replace(secret, "[secret]")
        return text


def _never_sent(error: BaseException | None) -> bool:
    """Whether a request failed before it left: no connection was made. A reset one may have carried it there.

    Asked of aiohttp's own errors, because the layer above calls a reset a connect timeout too.
    """
    import aiohttp

    while error is not None:
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return True
        error = error.__cause__
    return False


class _WithoutQueries(logging.Filter):
    """httpx2 logs the URL of every request, to whoever turns logging on; a query may hold a secret."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(public_url(str(a)) if type(a).__name__ == "URL" else a for a in record.args)
        return True


_WITHOUT_QUERIES = _WithoutQueries()


class NotListed(Exception):
    """404."""


class Elsewhere(Exception):
    """A redirect to another server."""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by `retry-after-ms` or `Retry-After` (seconds or a date); None where there is none to read."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds is not None:
            seconds = float(milliseconds) / 1000
        elif value is None:
            return None
        elif value.strip().replace(".", "", 1).isdigit():
            seconds = float(value)
        else:  # by the server's own clock where it tells it: ours may be wrong, or jump
            now = headers.get("date")
            told = email.utils.parsedate_to_datetime(now).timestamp() if now else time.time()
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - told
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, seconds), _LONGEST_WAIT)


def _no_limits() -> Any:
    """The limiter decides how many connections there are; a second limit here would only hide its effect.

    0 is what aiohttp calls no limit; None would leave it at its default of 100.
    """
    import httpx2

    return httpx2.Limits(max_connections=0, max_keepalive_connections=None)
