"""Score answers by a command that reads and writes JSON lines, in processes with limits on time and memory.

The command gets one line per prompt: `{"id": ..., "prompt": [messages], "answers": [texts], "reference": ...}`. In time
it must write the line `{"id": ..., "scores": [numbers]}`. The id assigns the scores to the prompt.
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
    """A pool of checker processes. A process that hangs or crashes is killed; the next prompt gets a new one."""

    def __init__(self, config: CheckerConfig) -> None:
        self._config = config
        self._slots: asyncio.LifoQueue[_Process | None] = asyncio.LifoQueue()
        for _ in range(config.processes):
            self._slots.put_nowait(None)

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[list[float]]:
        """Return one list with the scores. Drops the row if the checker hangs, crashes or gives no numbers."""
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
        """Kill all idle processes."""
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
        """Send a line and return the reply. Drops the row if none comes in time, or if the process ends."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            async with asyncio.timeout(seconds):
                with suppress(ConnectionError):  # it ended without reading: its stderr is read below
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
        """Kill the process and its children."""
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
    """Return the command with a limit on its address space, which `ulimit` counts in KiB."""
    limit = str(config.megabytes * 1000**2 // 1024)
    return ["/bin/sh", "-c", 'ulimit -v "$0" && exec "$@"', limit, *config.command]


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return f": {one_line(lines[-1])}" if lines else ""


def _read_scores(text: bytes, id: str, count: int) -> list[float]:
    """Parse a checker's line. Drops a line of another form or of another prompt, and a score that is not finite."""
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


def check_checker(config: CheckerConfig, key: str = "scores.checker") -> None:
    """Check that the command starts, and ends when its input ends. Raises UserError, with the `key` of the recipe."""
    program = config.command[0]
    if shutil.which(program) is None:
        raise UserError(f"{key}.command: there is no program {program!r}; give a program on the PATH, or its full path")
    name = f"{key}: `{' '.join(config.command)}`"
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "start_new_session": True}
    try:
        command = _limited(config)
        result = subprocess.run(command, timeout=config.seconds, check=False, **options)  # noqa: S603 (the command of the recipe)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{name} does not end within {config.seconds:g} s when its input ends; read standard input to its end, or "
            f"raise {key}.seconds"
        ) from None
    if result.returncode:
        raise UserError(
            f"{name} ends with code {result.returncode} before it gets a line{_last_line(result.stderr)}; mend it, or "
            f"raise {key}.megabytes (now {config.megabytes})"
        )
