"""The calls of a Batch API: files and batches, through the openai client, each repeated until it gets through."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import IO, Any, TypeVar

from clair.inference.model import Refused, RequestFailed, TooMany, Unreachable
from clair.inference.openai import NotListed, OpenAIModel

PATH = "/v1/chat/completions"
_LONGEST_BACKOFF = 60.0
T = TypeVar("T")


class Pending(Exception):
    """What is waited for comes with a batch: a later pass of this run, or a later run, finds it in the ledger."""


async def happens(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event comes within so many seconds; returns when it does."""
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

    async def upload(self, name: str, file: IO[bytes]) -> str:
        """The id of the uploaded file. Raises Refused."""

        async def upload() -> str:
            file.seek(0)
            named = (name, file, "application/jsonl")
            made = await self.model.call(lambda client: client.files.create(file=named, purpose="batch"))
            return str(made.id)

        return await self._told(upload, "cannot upload a batch file")

    async def begin(self, file: str) -> str:
        """The id of the batch made of an uploaded file: of one, however often the connection breaks. Raises Refused."""
        sent = False

        async def begin() -> str:
            nonlocal sent
            id = await self.begun(file) if sent else None  # the try before may have begun it
            sent = True
            if id:
                return id
            made = await self.model.call(
                lambda client: client.batches.create(input_file_id=file, endpoint=PATH, completion_window="24h")
            )
            return str(made.id)

        return await self._told(begin, "cannot begin a batch")

    async def begun(self, file: str) -> str | None:
        """The batch that the service made of a file; None where it lists none, or keeps no list."""
        after: dict[str, str] = {}
        try:
            while True:
                page = await self._patiently(
                    lambda after=after: self.model.call(lambda client: client.batches.list(limit=100, **after)),
                    "cannot list batches",
                )
                for batch in page.data:
                    if batch.input_file_id == file:
                        return str(batch.id)
                if not page.data or not page.has_more or after == {"after": page.data[-1].id}:
                    return None
                after = {"after": page.data[-1].id}
        except (NotListed, RequestFailed):
            return None

    async def look(self, id: str) -> Any:
        """The batch as it is. Raises NotListed, and TooMany or Unreachable at once."""
        return await self._shown(lambda client: client.batches.retrieve(id))

    async def download(self, file: str, kept: IO[bytes]) -> None:
        """Write a file's content to `kept`. Raises NotListed, and TooMany or Unreachable at once."""
        import httpx2

        async def fetch(client: Any) -> None:
            async with client.files.with_streaming_response.content(file) as response:
                async for part in response.iter_bytes():
                    kept.write(part)

        try:
            await self._shown(fetch)
        except httpx2.HTTPError as error:  # it broke off
            raise Unreachable(str(error)) from error

    async def _shown(self, ask: Callable[[Any], Awaitable[T]]) -> T:
        try:
            return await self.model.call(ask)
        except RequestFailed as error:
            raise Refused(
                f"{self.role}: {self.url} does not show its batches ({error.detail}); check api_key_env and the "
                f"variable it names"
            ) from error

    async def _told(self, step: Callable[[], Awaitable[T]], what: str) -> T:
        try:
            return await self._patiently(step, what)
        except RequestFailed as error:
            raise Refused(
                f"{self.role}: {what}: {self.url} refuses it ({error.detail}); nothing of it was asked"
            ) from error
        except NotListed as error:
            raise Refused(
                f"{self.role}: {what}: {self.url} has no Batch API (404: {error}); set {self.role}.batch: false "
                f"to ask live"
            ) from error

    async def _patiently(self, step: Callable[[], Awaitable[T]], what: str) -> T:
        """Do a step until it gets through. Raises Refused where the service stays away, Pending when it is stopped."""
        attempt = 0
        while True:
            try:
                return await step()
            except TooMany as error:
                wait = error.retry_after or self._pause
            except Unreachable as error:
                attempt += 1
                if attempt >= self._attempts:
                    raise Refused(f"{self.role}: {what}: no answer from {self.url} ({error})") from error
                wait = random.uniform(0.5, 1.0) * min(_LONGEST_BACKOFF, 2.0**attempt, self._pause)
            if await happens(self.stopped, wait):
                raise Pending
