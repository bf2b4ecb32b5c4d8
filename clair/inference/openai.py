"""Any OpenAI-compatible endpoint: one client per event loop, typed errors, no retries of its own."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from clair.core.errors import one_line
from clair.core.urls import (
    SECRET,
    environment_headers,
    environment_names,
    environment_values,
    expand_environment,
    parse_endpoint,
    public_url,
    secrets_pattern,
    without_secrets,
)
from clair.inference.model import (
    Refused,
    RequestFailed,
    TooMany,
    Unpaid,
    Unreachable,
    as_completion,
    encodable,
    reply_of,
)
from clair.inference.server_queue import Overtaken, turns_at

T = TypeVar("T")
_STARTING = (502, 503, 504, 529)
_STATUS_NAMES = {"insufficient_quota": 402, "rate_limit_exceeded": 429, "invalid_api_key": 401}
_FILTERED = re.compile(  # the codes and the words of a content filter, of which no other refusal speaks
    r"content.?(?:filter|policy|moderation|exists risk)|responsible.?ai.?policy|data.?inspection|prohibited.?content"
    r"|(?:flagged|blocked|rejected)\b.{0,60}(?:polic|safety|risk|moderation|guardrail)|(?:usage|safety) polic"
    r"|inappropriate content|guardrail.{0,20}(?:interven|block)|敏感内容|sensitive (?:content|words)",
    re.IGNORECASE,
)
_MESSAGES = ("message", "msg", "detail", "error", "errors", "error_description", "title")
_MODERATED = re.compile(r"flagged|moderat|safety|\"reasons\"", re.IGNORECASE)
_OF_A_PARAMETER = re.compile(
    r"(?:unsupported|unknown|unrecogni[sz]ed|unexpected|invalid|extra)[ _-](?:\w+ )?(?:para|field|arg|key|input)",
    re.IGNORECASE,
)
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

        from clair.inference.http import GuardedClient, origin_of

        logging.getLogger("httpx2").addFilter(_WITHOUT_QUERIES)
        endpoint = parse_endpoint(url)
        self.name = name
        self.role = role
        self.url = endpoint.public
        self.identity = id or f"{name}@{self.url}"
        self.timeout = timeout
        secrets = (key or "", *endpoint.secrets, *environment_values(headers or {}), *secrets)
        self._secrets = secrets_pattern(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)
        authorization = {"Authorization": endpoint.authorization} if endpoint.authorization else {}
        self._turns = turns_at(origin_of(endpoint.base))
        self._answered = False
        limit = Timeout(timeout, connect=_CONNECT_SECONDS)
        self._without_limit = Timeout(None, connect=_CONNECT_SECONDS)
        self._client = AsyncOpenAI(
            base_url=endpoint.base,
            api_key=key or "none",
            default_headers=authorization | environment_headers(headers or {}),
            default_query=expand_environment(endpoint.query, f"the query of {self.url}"),
            max_retries=0,
            timeout=limit,
            http_client=GuardedClient(endpoint.base, timeout=limit, limits=_no_limits()),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def check(self) -> None:
        """List the models; where that does not show ours, ask for a single token.

        Raises Refused, and Unreachable with `starting` where the server is there and not ready.
        """
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
                if error.starting:
                    raise
                if last:
                    told = f"{self.role}: cannot reach {self.url} ({error}); check the url in the recipe"
                    raise Refused(told) from error

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """The raw JSON text of one chat completion."""
        try:
            raw = await self._request("POST", "/chat/completions", {"model": self.name, **request})
        except Elsewhere as error:
            if not self._answered:
                raise
            raise RequestFailed("redirected", str(error)) from error  # to a page for logging in, or the like
        except NotListed as error:
            raise Refused(
                f"{self.role}: {self.url} has no model {self.name!r}, or is not the base URL of an OpenAI-compatible "
                f"API (404: {error}); check model and url"
            ) from error
        self._answered = True
        return raw

    async def call(self, ask: Callable[[Any], Awaitable[T]]) -> T:
        """What `ask` gets from the openai client, its errors as ours: Refused, RequestFailed, NotListed ..."""
        import aiohttp
        import httpx2
        import openai

        from clair.inference.http import Redirected, TooLarge, without_queries

        try:
            return await ask(self._client)
        except Redirected as error:
            raise Elsewhere(
                f"{self.role}: {self.url} {error}; headers and prompts were not sent there: if that is right, put its "
                f"address into the recipe as url"
            ) from error
        except TooLarge as error:
            beginning = self.redacted(error.beginning.decode("utf-8", "replace"))
            raise RequestFailed("malformed_reply", str(error), beginning) from error
        except openai.APIConnectionError as error:  # timeouts are of this kind too
            cause = error.__cause__ or error
            unconnected = _caused_by(error, aiohttp.ConnectionTimeoutError)
            timed_out = unconnected or isinstance(cause, httpx2.ReadTimeout | httpx2.WriteTimeout | TimeoutError)
            words = "timeout" if timed_out else encodable(self.redacted(without_queries(str(cause)))[:200])
            never_sent = unconnected or _caused_by(error, aiohttp.ClientConnectorError)
            raise Unreachable(words, billed=not never_sent, busy=timed_out) from error
        except openai.APIStatusError as error:
            raise self._failure(error.status_code, error.body, error.response.headers) from error

    def _failure(self, status: int, body: Any, headers: Mapping[str, str]) -> Exception:
        """What an error of a server means. `body` is its `error` object, or else all that it sent."""
        words = encodable(one_line(self.redacted(_words_of(body, self.redacted)), 300))
        whole = json.dumps(body, ensure_ascii=False)
        told = f"{status}: {words}" if words else str(status)
        if status == 429 and "insufficient_quota" in whole:
            return Unpaid(f"{self.role}: {self.url} has no quota left: {words}")
        if status == 429:
            return TooMany(retry_after(headers), words)
        if status == 401:
            return Refused(
                f"{self.role}: {self.url} refuses the key ({told}); check api_key_env and the variable it names"
            )
        if status == 402:
            return Unpaid(f"{self.role}: {self.url} wants to be paid ({told}); every reply so far is kept")
        if status == 404:
            return NotListed(words)
        if status >= 500 or status in (408, 409, 425):
            return Unreachable(told, starting=status in _STARTING)
        of_a_parameter = bool(_OF_A_PARAMETER.search(words))
        filtered = not of_a_parameter and bool(_FILTERED.search(whole))
        if filtered and status in (400, 422, 451):
            return Filtered("content_filter", told)
        moderated = filtered or (not of_a_parameter and bool(_MODERATED.search(whole)))
        return RequestFailed(f"http_{status}", told, moderated=moderated)

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> str:
        import httpx2

        from clair.inference.http import without_queries

        # Headers belong to all requests of the endpoint, the first look at its models included.
        sent = None if body is None else self.body(body)

        async def ask(client: Any) -> Any:
            options = {"timeout": self._without_limit}  # that is ours: the client's would begin anew with each read
            if method == "GET":
                return await client.get(path, cast_to=httpx2.Response, options=options)
            return await client.post(path, cast_to=httpx2.Response, body=sent, options=options)

        sent_at = asyncio.get_running_loop().time()
        try:
            async with self._turns.within(self.timeout):
                response = await self.call(ask)
        except Filtered:
            return as_completion("", "content_filter", self.name, 0, 0)
        except TimeoutError as error:
            raise Unreachable("timeout", billed=True, busy=not isinstance(error, Overtaken)) from error
        except Unreachable as error:
            error.waiting = error.busy and not error.billed and self._turns.last_answer > sent_at
            raise
        except (Refused, RequestFailed, TooMany, NotListed):
            raise
        except Exception as error:  # what a library does with an answer that nobody foresaw
            words = encodable(self.redacted(one_line(without_queries(str(error)), 200)))
            raise Unreachable(f"no HTTP answer: {type(error).__name__}: {words}", billed=True) from error
        try:
            text = response.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raw = self.redacted(response.content.decode("utf-8", "replace"))
            raise RequestFailed("malformed_reply", f"the reply is not UTF-8: {raw[:200]!r}", raw) from error
        if '"error"' in text:
            self._raise_error(text, response.headers)
        return self.as_said(text)

    def _raise_error(self, raw: str, headers: Mapping[str, str]) -> None:
        """Raise the error that came with status 200, where it says which status it would be."""
        try:
            body = json.loads(raw)
            error = body["error"]
            if body.get("choices"):
                return
            status = _STATUS_NAMES.get(error["code"]) or int(error["code"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        failure = self._failure(status, error, headers)
        if isinstance(failure, TooMany):
            raise TooMany(failure.retry_after, str(failure).removeprefix("429: "), in_body=True)
        if isinstance(failure, Refused | Unreachable):
            raise failure

    def body(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What is sent of a request: without the headers, and `${NAME}` filled in where it is not a row's text."""
        sent = {name: value for name, value in request.items() if name != "headers"}
        return sent | expand_environment({name: value for name, value in sent.items() if name not in _OURS}, "extra")

    def references(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a request that hold secrets, as they may be written down: `${NAME}`, or `[secret]`."""
        options = {name: value for name, value in request.items() if name not in (*_OURS, "headers")}
        public = without_secrets(options)
        hidden = (name for name in options if public[name] != options[name] or environment_names(options[name]))
        return {name: public[name] for name in hidden}

    def as_said(self, text: str) -> str:
        """What came with status 200: a model's words as they are; what is no completion, without our secrets."""
        if not self._secrets.search(text):
            return text
        try:
            reply_of(text, tools=True)
        except RequestFailed:
            return self.redacted(text)
        return text

    def redacted(self, text: str) -> str:
        """The text without our secrets, which a careless server may repeat."""
        return self._secrets.sub(SECRET, text)


def _words_of(body: Any, redacted: Callable[[str], str]) -> str:
    """What an error says: its message, under whatever name; a text without the tags of HTML."""
    if isinstance(body, Mapping):
        named = (body.get(name) for name in _MESSAGES)
        return _words_of(
            next((value for value in named if value), None) or (json.dumps(body) if body else ""), redacted
        )
    if isinstance(body, list):  # FastAPI lists what it refuses, with the whole request in it
        return "; ".join(words for inner in body if (words := _words_of(inner, redacted)))
    if isinstance(body, str):  # a secret may look like a tag
        return re.sub(r"(?s)<(style|script|head)\b.*?</\1>|</?[a-zA-Z!][^>]*>", " ", redacted(body))
    return "" if body is None else str(body)


def _caused_by(error: BaseException | None, kind: type[Exception]) -> bool:
    """Whether an error of aiohttp's own is behind this one; the layer between calls a reset a connect timeout too."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__
    return error is not None


class _WithoutQueries(logging.Filter):
    """httpx2 logs the URL of every request, to whoever turns logging on; a query may hold a secret."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(public_url(str(a)) if type(a).__name__ == "URL" else a for a in record.args)
        return True


_WITHOUT_QUERIES = _WithoutQueries()


class NotListed(Exception):
    """404."""


class Filtered(RequestFailed):
    """The prompt is refused by a content filter, today and at every other time: that is the outcome of its row."""


class Elsewhere(Refused):
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
