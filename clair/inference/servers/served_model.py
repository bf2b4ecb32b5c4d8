"""A model behind a server of the run's own: started by the recipe's command, waited for, used, and ended."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from clair.core.errors import one_line
from clair.core.progress import duration, print_line
from clair.core.urls import without_secrets
from clair.core.watched_process import WatchedProcess
from clair.inference.config import ModelConfig
from clair.inference.model import Refused, Unreachable
from clair.inference.openai import OpenAIModel
from clair.inference.servers.command import served_identity, server_command

_POLL_SECONDS = 0.25
_LAST_LINES = 5
_MAX_LINES_LENGTH = 600


class ServedModel:
    """A model that a command serves on a free port of 127.0.0.1.

    The server starts with the first request that the ledger cannot answer, so that a run without one starts none. It
    ends with `close`, and with this process if that is killed. Its output goes to a file without a name, whose last
    lines stand in errors. Construct it inside the event loop that uses it; `options` are those of `OpenAIModel`.
    """

    def __init__(self, role: str, config: ModelConfig, options: Mapping[str, Any]) -> None:
        # The port stays bound until the server starts, so that nothing else gets it.
        self._reserved_port = socket.create_server(("127.0.0.1", 0))
        self._command = server_command(config, self._reserved_port.getsockname()[1])
        url = f"http://127.0.0.1:{self._reserved_port.getsockname()[1]}/v1"
        name = config.model or str(config.path)
        self._endpoint = OpenAIModel(url, name, **{**options, "id": served_identity(config)})
        self.name, self.identity, self.url = name, self._endpoint.identity, url
        self.timeout, self.patience, self.role = config.timeout, config.patience, role
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._process: WatchedProcess | None = None
        self._waiting_since: float | None = None
        self._closed = False

    @property
    def activity(self) -> str:
        """What the run waits for while the server starts; else empty."""
        if self._waiting_since is None:
            return ""
        seconds = duration(time.monotonic() - self._waiting_since)
        last = one_line("".join(self._last_lines(1)), 120)
        return f"{self._waiting_text()}, {seconds} so far" + (f"; it says: {last}" if last else "")

    async def check(self) -> None:
        """Start the server and wait until it answers, at most `patience` seconds. Raises Refused."""
        if self._process is None:
            self._reserved_port.close()
            self._process = WatchedProcess(self._command, self._output)
            self._waiting_since = time.monotonic()
            print_line(f"{self.role}: started `{self._shown_command()}`; {self._waiting_text()}")
        try:
            async with asyncio.timeout(self.patience):
                while not self._closed and not await self._answers():  # noqa: ASYNC110 (a server tells no event)
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError as error:
            raise Refused(
                f"{self.role}: the server has not answered at {self.url} within {duration(self.patience)}"
                f"{self._output_text()}; set {self.role}.patience to more seconds, or correct {self.role}.serve"
            ) from error
        if self._waiting_since is not None and not self._closed:
            print_line(f"{self.role}: the server answers after {duration(time.monotonic() - self._waiting_since)}")
        self._waiting_since = None

    async def _answers(self) -> bool:
        try:
            await self._endpoint.probe()
        except Unreachable:
            self._check_running()
            return False
        self._check_running()  # else something else answers at this port
        return True

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """Return the raw JSON text of one chat completion. Raises Refused if the server has ended."""
        try:
            return await self._endpoint.complete(request, sample)
        except Unreachable:
            self._check_running()
            raise

    async def close(self) -> None:
        """End the server and all processes that it has started."""
        self._closed = True
        await self._endpoint.close()
        self._reserved_port.close()
        if self._process:
            await asyncio.to_thread(self._process.stop)
        self._output.close()

    def _check_running(self) -> None:
        assert self._process is not None
        if not self._closed and (code := self._process.poll()) is not None:
            raise Refused(
                f"{self.role}: the server `{self._shown_command()}` ended with exit code {code}{self._output_text()}; "
                f"correct {self.role}.serve, or run the command by hand"
            )

    def _waiting_text(self) -> str:
        return f"waiting for an answer at {self.url}, at most {duration(self.patience)}"

    def _shown_command(self) -> str:
        return one_line(without_secrets(shlex.join(self._command)))

    def _output_text(self) -> str:
        lines = " | ".join(" ".join(line.split()) for line in self._last_lines(_LAST_LINES))
        return f"; its last lines: {without_secrets(lines[-_MAX_LINES_LENGTH:])}" if lines else ", without a word"

    def _last_lines(self, count: int) -> Sequence[str]:
        """The last lines with text that the server has written."""
        file = self._output.fileno()
        # Not by seeking: the server writes at the same position of the same open file.
        tail = os.pread(file, 8192, max(0, os.fstat(file).st_size - 8192)).decode("utf-8", "replace")
        return [line for line in tail.splitlines() if line.strip()][-count:]
