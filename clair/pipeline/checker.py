"""Score answers by a command of the user's: JSON lines in a process of its own, with limits on time and memory.

A line goes in for each prompt: `{"id": ..., "prompt": [messages], "answers": [texts], "reference": ...}`. The line
`{"id": ..., "scores": [numbers]}` must come out in time. The id says that the reply belongs to the prompt.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from clair.core.errors import UserError, one_line
from clair.data.records import Answer, Dropped, Prompt
from clair.pipeline.config import CheckerConfig

_MAX_LINE = 2**24
_STDERR_BYTES = 4000


class Checker:
    """A pool of checker processes. One that hangs or crashes is killed, and the next prompt gets a new one."""

    def __init__(self, config: CheckerConfig) -> None:
        self._config = config
        self._slots: asyncio.LifoQueue[_Process | None] = asyncio.LifoQueue()
        for _ in range(config.processes):
            self._slots.put_nowait(None)

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[list[float]]:
        """One list with the scores of the answers. Drops the row if the checker hangs, crashes, or gives no numbers."""
        line = {"id": prompt.id, "prompt": prompt.messages, "answers": [answer.text for answer in answers]}
        if any(answer.tool_calls for answer in answers):
            line |= {"tool_calls": [answer.tool_calls for answer in answers], "tools": prompt.tools}
        if prompt.reference is not None:
            line["reference"] = prompt.reference
        process = await self._slots.get()
        try:
            process = process or await _Process.start(self._config)
            text = await process.ask(json.dumps(line).encode() + b"\n", self._config.seconds)
            return [_read_scores(text, prompt.id, len(answers))]
        except BaseException:
            if process:
                await process.kill()
                process = None
            raise
        finally:
            self._slots.put_nowait(process)

    async def close(self) -> None:
        """Kill all processes that wait for a line."""
        while not self._slots.empty():
            if process := self._slots.get_nowait():
                await process.kill()


class _Process:
    """A running checker."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._stderr = b""
        self._drain = asyncio.create_task(self._read_stderr())

    @classmethod
    async def start(cls, config: CheckerConfig) -> _Process:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = _limited(config)
        return cls(await asyncio.create_subprocess_exec(*command, **pipes, limit=_MAX_LINE, start_new_session=True))

    async def ask(self, line: bytes, seconds: float) -> bytes:
        """The line that answers `line`. Drops the row if none comes in time, or the process ends."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            async with asyncio.timeout(seconds):
                with suppress(ConnectionError):  # it ended without reading: its last words are read below
                    stdin.write(line)
                    await stdin.drain()
                reply = await stdout.readline()
                if reply.endswith(b"\n"):
                    return reply
                code = await self._process.wait()
                await self._drain
        except TimeoutError:
            raise Dropped("checker", "timeout", f"no line came within {seconds:g} s") from None
        except ValueError:
            raise Dropped("checker", "unreadable", f"the line is longer than {_MAX_LINE:,} bytes") from None
        raise Dropped("checker", "crashed", f"it ended with code {code}{_last_line(self._stderr)}")

    async def kill(self) -> None:
        """End the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        await asyncio.wait({self._drain}, timeout=1)  # a process that left the group may hold the pipe
        self._drain.cancel()

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        while block := await self._process.stderr.read(_STDERR_BYTES):
            self._stderr = (self._stderr + block)[-_STDERR_BYTES:]


def _limited(config: CheckerConfig) -> list[str]:
    """The command behind a limit on its address space, which `ulimit` counts in KiB."""
    limit = str(config.megabytes * 1000**2 // 1024)
    return ["/bin/sh", "-c", 'ulimit -v "$0" && exec "$@"', limit, *config.command]


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return f": {one_line(lines[-1])}" if lines else ""


def _read_scores(text: bytes, id: str, count: int) -> list[float]:
    """The scores in a checker's line. Drops a line of another form, of another prompt, or with a score that is none."""
    try:
        reply: Any = json.loads(text)
        scores = reply["scores"] if reply["id"] == id else None
        numbers = [math.nan if score is None else float(score) for score in scores or ()]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        numbers = []
    if len(numbers) != count:
        expected = f'{{"id": {json.dumps(id)}, "scores": [{count} numbers]}}'
        raise Dropped(
            "checker", "unreadable", f"expected {expected}, found {one_line(text.decode('utf-8', 'replace'))}"
        )
    if not all(map(math.isfinite, numbers)):
        raise Dropped("checker", "nan", f"a score is no finite number: {numbers}")
    return numbers


def check_checker(config: CheckerConfig) -> None:
    """Check that the command starts and ends when its input ends. Raises UserError."""
    program = config.command[0]
    if shutil.which(program) is None:
        raise UserError(
            f"scores.checker.command: there is no program {program!r}; give a command that this shell finds"
        )
    name = f"scores.checker: `{' '.join(config.command)}`"
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "start_new_session": True}
    try:
        command = _limited(config)
        result = subprocess.run(command, timeout=config.seconds, check=False, **options)  # noqa: S603 (the user's own)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{name} does not end within {config.seconds:g} s when its input ends; read standard input to its end, or "
            f"raise scores.checker.seconds"
        ) from None
    if result.returncode:
        raise UserError(
            f"{name} ends with code {result.returncode} before it gets a line{_last_line(result.stderr)}; mend it, or "
            f"raise scores.checker.megabytes (now {config.megabytes})"
        )
