"""A model behind an OpenAI-compatible URL: one client per event loop, typed errors, no retries.

Requests for chat completions are our own (`http/requests`); the Batch API uses the openai library.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from clair.core.errors import find_cause, one_line
from clair.core.urls import (
    SECRET,
    environment_headers,
    environment_names,
    environment_values,
    expand_environment,
    parse_endpoint,
    secrets_pattern,
    without_secrets,
)
from clair.data.records import replace_surrogates
from clair.inference.model import (
    PaymentRequired,
    RateLimited,
    Refused,
    RequestFailed,
    Unreachable,
    completion_json,
    parse_reply,
)
from clair.inference.rate_limit import Overtaken, queue_of_server

if TYPE_CHECKING:
    from clair.inference.http.requests import HttpResponse

T = TypeVar("T")
_STARTING_STATUSES = (502, 503, 504, 529)
_STATUS_OF_CODE = {"insufficient_quota": 402, "rate_limit_exceeded": 429, "invalid_api_key": 401}
_FILTERED = re.compile(  # codes and phrases of content filters that no other refusal contains
    r"content.?(?:filter|policy|moderation|exists risk)|responsible.?ai.?policy|data.?inspection|prohibited.?content"
    r"|(?:flagged|blocked|rejected)\b.{0,60}(?:polic|safety|risk|moderation|guardrail)|(?:usage|safety) polic"
    r"|inappropriate content|guardrail.{0,20}(?:interven|block)|敏感内容|sensitive (?:content|words)",
    re.IGNORECASE,
)
_MESSAGE_KEYS = ("message", "msg", "detail", "error", "errors", "error_description", "title")
_MODERATED = re.compile(r"flagged|moderat|safety|\"reasons\"", re.IGNORECASE)
_PARAMETER_ERROR = re.compile(
    r"(?:unsupported|unknown|unrecogni[sz]ed|unexpected|invalid|extra)[ _-](?:\w+ )?(?:para|field|arg|key|input)",
    re.IGNORECASE,
)
_MAX_WAIT = 86_400.0
_MIN_SECRET_LENGTH = 8  # a shorter text occurs in ordinary words
_ROW_KEYS = ("messages", "tools")  # content of the rows: `${NAME}` in them is text
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


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
        from clair.inference.http.requests import HttpClient, openai_headers, origin_of

        endpoint = parse_endpoint(url)
        self.name = name
        self.role = role
        self.url = endpoint.public
        self.identity = id or f"{name}@{self.url}"
        self.timeout = timeout
        secrets = (key or "", *endpoint.secrets, *environment_values(headers or {}), *secrets)
        self._secrets = secrets_pattern(secret for secret in secrets if len(secret) >= _MIN_SECRET_LENGTH)
        self._queue = queue_of_server(origin_of(endpoint.base))
        self._answered = False
        authorization = {"Authorization": endpoint.authorization} if endpoint.authorization else {}
        self._base, self._key = endpoint.base, key or "none"
        self._headers = authorization | environment_headers(headers or {})
        self._query = expand_environment(endpoint.query, f"the query of {self.url}")
        bearer = {"Authorization": f"Bearer {self._key}"}
        self._http = HttpClient(self._base, [bearer, openai_headers(), self._headers], self._query)
        self._openai: Any = None

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()
        if self._openai:
            await self._openai.close()

    async def model_names(self) -> list[str]:
        """The names of the models that the server lists. Raises ValueError, KeyError or TypeError for another reply."""
        return [str(entry["id"]) for entry in json.loads(await self._request("GET", "/models"))["data"] or ()]

    async def check(self) -> None:
        """Check that the server has the model. Raises Refused, and Unreachable with `starting` if it is not ready."""
        try:
            await self.probe()
        except Unreachable as error:
            if error.starting:
                raise
            raise Refused(f"{self.role}: cannot reach {self.url} ({error}); check the url in the recipe") from error

    async def probe(self) -> None:
        """List the models; if this one is not listed, request a single token. Raises Refused or Unreachable."""
        try:
            names = await self.model_names()
        except (
            RequestFailed,
            RateLimited,
            NotFound,
            CrossServerRedirect,
            Unreachable,
            ValueError,
            KeyError,
            TypeError,
        ):
            names = []  # many servers list nothing, or fail (`transformers serve` without a hub answers 500)
        if self.name in names:
            return
        for last in (False, True):  # after an error, a server may close the connection just as it is used again
            try:
                await self.complete({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1})
                return
            except (RequestFailed, RateLimited):
                return  # the server knows the model: that is all that is checked
            except Unreachable as error:
                if error.starting or last:
                    raise

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """Return the raw JSON text of one chat completion."""
        try:
            raw = await self._request("POST", "/chat/completions", {"model": self.name, **request})
        except CrossServerRedirect as error:
            if not self._answered:
                raise
            raise RequestFailed("redirected", str(error)) from error  # to a login page, or the like
        except NotFound as error:
            raise Refused(
                f"{self.role}: {self.url} has no model {self.name!r}, or is not the base URL of an OpenAI-compatible "
                f"API (404: {error}); check model and url"
            ) from error
        self._answered = True
        return raw

    async def call(self, send: Callable[[Any], Awaitable[T]]) -> T:
        """Call the openai client; its errors become ours: Refused, RequestFailed, NotFound ..."""
        import httpx2
        import openai

        from clair.inference.http.openai_library import openai_client

        if self._openai is None:
            self._openai = openai_client(
                self._base, key=self._key, headers=self._headers, query=self._query, timeout=self.timeout
            )
        try:
            with self._guard_errors():
                return await send(self._openai)
        except openai.APIConnectionError as error:  # a timeout is one too
            cause = error.__cause__ or error
            timed_out = isinstance(cause, httpx2.ReadTimeout | httpx2.WriteTimeout | TimeoutError)
            raise self._connection_failure(cause, timed_out=timed_out) from error
        except openai.APIStatusError as error:
            raise self._failure(error.status_code, error.body, error.response.headers) from error

    async def _send(self, method: str, path: str, content: bytes | None) -> HttpResponse:
        """The response of status 2xx to one request. Raises our errors, as `call` does."""
        import aiohttp

        try:
            with self._guard_errors():
                response = await self._http.request(method, path, content)
        except aiohttp.ClientError as error:
            raise self._connection_failure(error) from error
        if not 200 <= response.status < 300:
            raise self._failure(response.status, response.error(), response.headers)
        return response

    @contextmanager
    def _guard_errors(self) -> Iterator[None]:
        """Turn a redirect to another server and a reply that is too large into our errors."""
        from clair.inference.http.requests import Redirected, TooLarge

        try:
            yield
        except Redirected as error:
            raise CrossServerRedirect(
                f"{self.role}: {self.url} {error}; headers and prompts were not sent there: if that is right, put its "
                f"address into the recipe as url"
            ) from error
        except TooLarge as error:
            beginning = self.redacted(error.beginning.decode("utf-8", "replace"))
            raise RequestFailed("malformed_reply", str(error), beginning) from error

    def _connection_failure(self, error: BaseException, *, timed_out: bool = False) -> Unreachable:
        """The error for a connection that was not made or broke. `timed_out`: the server took too long to answer."""
        import aiohttp

        from clair.inference.http.requests import without_queries

        unconnected = find_cause(error, aiohttp.ConnectionTimeoutError) is not None
        timed_out = timed_out or unconnected
        message = replace_surrogates(self.redacted(one_line(without_queries(str(error)), 200)))
        never_sent = unconnected or find_cause(error, aiohttp.ClientConnectorError) is not None
        return Unreachable("timeout" if timed_out else message, billed=not never_sent, busy=timed_out)

    def _failure(self, status: int, body: Any, headers: Mapping[str, str]) -> Exception:
        """The error that a server's error response means. `body` is its `error` object, or else the whole response."""
        text = replace_surrogates(one_line(self.redacted(_error_text(body, self.redacted)), 300))
        raw = json.dumps(body, ensure_ascii=False)
        message = f"{status}: {text}" if text else str(status)
        if status == 429 and "insufficient_quota" in raw:
            return PaymentRequired(f"{self.role}: {self.url} has no quota left: {text}")
        if status == 429:
            return RateLimited(retry_after(headers), text)
        if status == 401:
            return Refused(
                f"{self.role}: {self.url} refuses the key ({message}); check api_key_env and the variable it names"
            )
        if status == 402:
            return PaymentRequired(f"{self.role}: {self.url} wants to be paid ({message}); every reply so far is kept")
        if status == 404:
            return NotFound(text)
        if status >= 500 or status in (408, 409, 425):
            return Unreachable(message, starting=status in _STARTING_STATUSES)
        is_parameter_error = bool(_PARAMETER_ERROR.search(text))
        filtered = not is_parameter_error and bool(_FILTERED.search(raw))
        if filtered and status in (400, 422, 451):
            return ContentFiltered("content_filter", message)
        moderated = filtered or (not is_parameter_error and bool(_MODERATED.search(raw)))
        return RequestFailed(f"http_{status}", message, moderated=moderated)

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> str:
        from clair.inference.http.requests import without_queries

        # Headers belong to all requests of the endpoint, and are set in the client.
        sent_body = None if body is None else self.body(body)
        sent = asyncio.get_running_loop().time()
        try:
            async with self._queue.time_limit(self.timeout):
                content = None if sent_body is None else _JSON.encode(sent_body).encode()
                response = await self._send(method, path, content)
        except ContentFiltered:
            return completion_json("", "content_filter", self.name, 0, 0)
        except TimeoutError as error:
            raise Unreachable("timeout", billed=True, busy=not isinstance(error, Overtaken)) from error
        except Unreachable as error:
            error.waiting = error.busy and not error.billed and self._queue.last_answer > sent
            raise
        except (Refused, RequestFailed, RateLimited, NotFound):
            raise
        except Exception as error:  # a library may raise anything for an unforeseen answer
            message = replace_surrogates(self.redacted(one_line(without_queries(str(error)), 200)))
            raise Unreachable(f"no HTTP answer: {type(error).__name__}: {message}", billed=True) from error
        try:
            text = response.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raw = self.redacted(response.content.decode("utf-8", "replace"))
            raise RequestFailed("malformed_reply", f"the reply is not UTF-8: {raw[:200]!r}", raw) from error
        if '"error"' in text:
            self._raise_error(text, response.headers)
        return self._redact_non_reply(text)

    def _raise_error(self, raw: str, headers: Mapping[str, str]) -> None:
        """Raise the error in a response of status 200, if the error states its own status."""
        try:
            body = json.loads(raw)
            error = body["error"]
            if body.get("choices"):
                return
            status = _STATUS_OF_CODE.get(error["code"]) or int(error["code"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        failure = self._failure(status, error, headers)
        if isinstance(failure, RateLimited):
            raise RateLimited(failure.retry_after, str(failure).removeprefix("429: "), in_body=True)
        if isinstance(failure, Refused | Unreachable):
            raise failure

    def body(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The body that is sent of a request: without headers, and with `${NAME}` filled in outside a row's text."""
        sent = {name: value for name, value in request.items() if name != "headers"}
        return sent | expand_environment(
            {name: value for name, value in sent.items() if name not in _ROW_KEYS}, "extra"
        )

    def references(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a request that hold secrets, as they may be stored: `${NAME}`, or `[secret]`."""
        options = {name: value for name, value in request.items() if name not in (*_ROW_KEYS, "headers")}
        public = without_secrets(options)
        hidden = (name for name in options if public[name] != options[name] or environment_names(options[name]))
        return {name: public[name] for name in hidden}

    def _redact_non_reply(self, text: str) -> str:
        """Redact our secrets in a response that is no completion; a model's reply stays as it is."""
        if not self._secrets.search(text):
            return text
        try:
            parse_reply(text, tools=True)
        except RequestFailed:
            return self.redacted(text)
        return text

    def redacted(self, text: str) -> str:
        """The text without our secrets, which a server may repeat."""
        return self._secrets.sub(SECRET, text)


def _error_text(body: Any, redacted: Callable[[str], str]) -> str:
    """The message of an error, under whatever key; of a text, without HTML tags."""
    if isinstance(body, Mapping):
        messages = (body.get(name) for name in _MESSAGE_KEYS)
        return _error_text(
            next((value for value in messages if value), None) or (json.dumps(body) if body else ""), redacted
        )
    if isinstance(body, list):  # FastAPI lists the problems, with the whole request in it
        return "; ".join(text for item in body if (text := _error_text(item, redacted)))
    if isinstance(body, str):  # a secret may look like a tag
        return re.sub(r"(?s)<(style|script|head)\b.*?</\1>|</?[a-zA-Z!][^>]*>", " ", redacted(body))
    return "" if body is None else str(body)


class NotFound(Exception):
    """The endpoint answers 404: it has no such model, file or path."""


class ContentFiltered(RequestFailed):
    """A content filter refuses the prompt, and would refuse it again: that is the outcome of its row."""


class CrossServerRedirect(Refused):
    """A redirect to another server."""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from `retry-after-ms` or `Retry-After` (seconds or a date); None if neither can be parsed."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds is not None:
            seconds = float(milliseconds) / 1000
        elif value is None:
            return None
        elif value.strip().replace(".", "", 1).isdigit():
            seconds = float(value)
        else:  # by the server's clock if it states the date: ours may be wrong, or jump
            date = headers.get("date")
            now = email.utils.parsedate_to_datetime(date).timestamp() if date else time.time()
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, seconds), _MAX_WAIT)
