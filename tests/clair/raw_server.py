"""Servers in the running event loop that write what bytes they like."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from clair.inference.model import completion_json
from clair.inference.openai import OpenAIModel

GOOD = completion_json("fine", "stop", "m", 1, 1).encode()
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def http(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """A whole HTTP answer; `length` is what it claims."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += ["Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def writes(*chunks: bytes) -> Answer:
    """An answer of these bytes."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.writelines(chunks)
        await writer.drain()

    return answer


@asynccontextmanager
async def serving(
    *answers: Answer,
    path: list[str] | None = None,
    bodies: list[bytes] | None = None,
    heads: list[str] | None = None,
) -> AsyncIterator[str]:
    """The base URL of a server that gives the answers in turn, the last of them for ever, a connection each.

    `path`, `bodies` and `heads`: where the first line, the body and the whole head of each request are put.
    """
    left, running = list(answers), set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.add(asyncio.current_task())
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            if path is not None:
                path.append(head.split("\r\n")[0])
            if heads is not None:
                heads.append(head)
            if bodies is not None:
                bodies.append(body)
            await (left.pop(0) if len(left) > 1 else left[0])(writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@asynccontextmanager
async def model_at(url: str, **options: Any) -> AsyncIterator[OpenAIModel]:
    """A model behind a URL."""
    model = OpenAIModel(url, "m", **options)
    try:
        yield model
    finally:
        await model.close()
