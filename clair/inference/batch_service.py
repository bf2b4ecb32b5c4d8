"""The calls of a Batch API through the openai client, repeated until they succeed, and the lines of its files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import IO, Any, TypeVar

from clair.core.backoff import backoff
from clair.core.errors import one_line
from clair.data.records import replace_surrogates
from clair.inference.batch_queue import RequestOutcome
from clair.inference.budget import NOTHING
from clair.inference.model import (
    RateLimited,
    Refused,
    RequestFailed,
    Unreachable,
    parse_reply,
)
from clair.inference.openai import NotFound, OpenAIModel
from clair.ledger.ledger import Tokens

_PATH = "/v1/chat/completions"
_FIRST_BACKOFF = 2.0
_NOT_RUN = ("batch_expired", "batch_cancelled")
_RETRY_STATUSES = (408, 409, 425, 429)
T = TypeVar("T")


class Pending(Exception):
    """The reply comes with a batch: a later pass of this run, or a later run, finds it in the ledger."""


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Wait up to `seconds` for the event; True if it was set."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True


class BatchService:
    """The Batch API of one model's endpoint. `pause` is in seconds; `stopped` ends all waiting with Pending."""

    def __init__(self, model: OpenAIModel, role: str, *, attempts: int, pause: float, stopped: asyncio.Event) -> None:
        self.model = model
        self.url = model.url
        self.role = role
        self.stopped = stopped
        self._attempts = attempts
        self._pause = pause
        self._secrets: dict[str, Any] = {}
        """Request options that hold secrets, as they are sent: the queue on disk has references instead."""

    # ---- lines of request files

    def line(self, key: str, request: Mapping[str, Any]) -> tuple[bytes, int]:
        """The line of a request for the queue, without secrets, and the size in bytes of the line that is sent.

        The queued line is at least as long as the one that is sent, so that the sizes of files are right.
        """
        body = {"model": self.model.name, **self.model.body(request)}
        references = self.model.references(request)
        self._secrets |= {name: body[name] for name in references}
        line = {"custom_id": key, "method": "POST", "url": _PATH, "body": body}
        sent = _encode(line)
        if not references:
            return sent, len(sent)
        return _encode(line | {"body": body | references}).rstrip().ljust(len(sent) - 1) + b"\n", len(sent)

    def fill_secrets(self, line: bytes) -> bytes:
        """The line that is sent for a line of the queue."""
        if not self._secrets:
            return line
        request = json.loads(line)
        request["body"] |= {name: value for name, value in self._secrets.items() if name in request["body"]}
        return _encode(request)

    # ---- calls

    async def upload(self, name: str, file: IO[bytes]) -> str:
        """Upload a file; return its id. Raises Refused."""

        async def upload() -> str:
            file.seek(0)
            upload_file = (name, file, "application/jsonl")
            uploaded = await self.model.call(lambda client: client.files.create(file=upload_file, purpose="batch"))
            return str(uploaded.id)

        return await self._run_step(upload, "cannot upload a batch file")

    async def create_batch(self, file_id: str) -> str:
        """Create one batch of an uploaded file, however often the connection breaks; return its id. Raises Refused."""
        sent = False

        async def create() -> str:
            nonlocal sent
            id = await self.find_batch(file_id) if sent else None  # the try before may have created it
            sent = True
            if id:
                return id
            batch = await self.model.call(
                lambda client: client.batches.create(input_file_id=file_id, endpoint=_PATH, completion_window="24h")
            )
            return str(batch.id)

        return await self._run_step(create, "cannot begin a batch")

    async def find_batch(self, file_id: str) -> str | None:
        """The id of the batch that the service made of a file; None if it lists none, or has no list."""
        cursor: dict[str, str] = {}
        try:
            while True:
                page = await self._retry(
                    lambda cursor=cursor: self.model.call(lambda client: client.batches.list(limit=100, **cursor)),
                    "cannot list batches",
                )
                for batch in page.data:
                    if batch.input_file_id == file_id:
                        return str(batch.id)
                if not page.data or not page.has_more or cursor == {"after": page.data[-1].id}:
                    return None
                cursor = {"after": page.data[-1].id}
        except (NotFound, RequestFailed):
            return None

    async def retrieve(self, id: str) -> Any:
        """The state of a batch. Raises NotFound, and RateLimited or Unreachable without a retry."""
        return await self._read(lambda client: client.batches.retrieve(id))

    async def download(self, file_id: str, target: IO[bytes]) -> None:
        """Write a file's content to `target`. Raises NotFound, and RateLimited or Unreachable without a retry."""
        import httpx2

        async def fetch(client: Any) -> None:
            async with client.files.with_streaming_response.content(file_id) as response:
                async for chunk in response.iter_bytes():
                    target.write(chunk)

        try:
            await self._read(fetch)
        except httpx2.HTTPError as error:  # the connection broke
            raise Unreachable(str(error)) from error

    async def _read(self, call: Callable[[Any], Awaitable[T]]) -> T:
        try:
            return await self.model.call(call)
        except RequestFailed as error:
            raise Refused(
                f"{self.role}: {self.url} does not show its batches ({error.detail}); check api_key_env and the "
                f"variable it names"
            ) from error

    async def _run_step(self, step: Callable[[], Awaitable[T]], problem: str) -> T:
        try:
            return await self._retry(step, problem)
        except RequestFailed as error:
            raise Refused(
                f"{self.role}: {problem}: {self.url} refuses it ({error.detail}); no request was run"
            ) from error
        except NotFound as error:
            raise Refused(
                f"{self.role}: {problem}: {self.url} has no Batch API (404: {error}); set {self.role}.batch: false "
                f"to ask live"
            ) from error

    async def _retry(self, step: Callable[[], Awaitable[T]], problem: str) -> T:
        """Repeat a step until it succeeds. Raises Refused if the service stays away, Pending if the run is stopped."""
        attempt = 0
        while True:
            try:
                return await step()
            except RateLimited as error:
                seconds = error.retry_after or self._pause
            except Unreachable as error:
                attempt += 1
                if attempt >= self._attempts:
                    raise Refused(f"{self.role}: {problem}: no answer from {self.url} ({error})") from error
                seconds = backoff(attempt, _FIRST_BACKOFF, self._pause)
            if await wait_for_event(self.stopped, seconds):
                raise Pending


# ---- lines of files


def _encode(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"  # ASCII: some servers take U+2028 for the end of a line


def parse_outcome(line: str, redacted: Callable[[str], str]) -> RequestOutcome | None:
    """The outcome in a line of the output or the error file; None if the line cannot be parsed.

    Error messages are `redacted`; a model's reply stays as it is.
    """
    try:
        result = json.loads(line)
        key, response, error = result["custom_id"], result.get("response") or {}, result.get("error")
        status, body = response.get("status_code"), response.get("body")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(key, str):
        return None
    if not error and isinstance(status, int) and 200 <= status < 300:
        raw = json.dumps(body, ensure_ascii=False)
        return _reply_outcome(key, raw if raw == replace_surrogates(raw) else json.dumps(body), redacted)
    code, message = _error_message(error or (body.get("error") if isinstance(body, Mapping) else None))
    message = redacted(message)
    if code in _NOT_RUN or not isinstance(status, int) or status >= 500 or status in _RETRY_STATUSES:
        return retry_outcome(key, message, NOTHING, listed=code in _NOT_RUN)
    return RequestOutcome(key, None, NOTHING, f"http_{status}: {status}: {message}")


def retry_outcome(key: str, reason: str, billed: Tokens | None, *, listed: bool = False) -> RequestOutcome:
    """The outcome of a request that is to be sent again."""
    return RequestOutcome(key, None, billed, f"again: {reason}", listed)


def _reply_outcome(key: str, raw: str, redacted: Callable[[str], str]) -> RequestOutcome:
    try:
        usage = parse_reply(raw, tools=True).usage  # whether the request has tools is checked when the reply is used
    except RequestFailed as error:
        return RequestOutcome(key, redacted(raw), None, redacted(f"{error.reason}: {error.detail}"))
    is_known = "prompt_tokens" in usage and "completion_tokens" in usage
    return RequestOutcome(key, raw, Tokens(usage["prompt_tokens"], usage["completion_tokens"]) if is_known else None)


def _error_message(error: Any) -> tuple[str | None, str]:
    """(code, message) of an error object, or of whatever a server sent in its place."""
    if not isinstance(error, Mapping):
        return None, replace_surrogates(one_line(error or "no reply", 300))
    code = error.get("code")
    message = one_line(error.get("message") or code or "no reply", 300)
    return code if isinstance(code, str) else None, replace_surrogates(message)
