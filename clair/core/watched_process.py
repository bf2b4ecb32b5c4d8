"""A command whose processes end with this one, however it ends.

The command runs below a watchdog, a small process that waits for the end of its standard input. It comes when this
process closes its side, and the system closes it if this process is killed. The watchdog then ends the command's whole
process group: SIGTERM, and SIGKILL after `GRACE_SECONDS`. Neither gets the terminal's Ctrl-C; `send_signal` passes a
signal on.

This file is also the watchdog's program, and imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

GRACE_SECONDS = 10.0
"""Seconds between SIGTERM and SIGKILL."""


class WatchedProcess:
    """A running command, as arguments: no shell reads it. `output` receives its stdout and stderr; None: ours do."""

    def __init__(self, command: Sequence[str], output: IO[bytes] | None = None) -> None:
        self._watchdog = subprocess.Popen(  # noqa: S603 (the command of the recipe)
            [sys.executable, "-I", "-S", __file__, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def poll(self) -> int | None:
        """The exit code of the command, 128 + number if a signal ended it; None while it runs."""
        return self._watchdog.poll()

    def wait(self) -> int:
        """Wait for the end of the command and return its exit code."""
        return self._watchdog.wait()

    def send_signal(self, number: int) -> None:
        """Send a signal to the command's process group: SIGINT or SIGTERM."""
        self._watchdog.send_signal(number)

    def stop(self) -> int:
        """End the command and all processes of its group, and wait for their end."""
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        return self._watchdog.wait()


def _watch(command: Sequence[str]) -> int:
    """Run the command until it ends or standard input does, and return its exit code."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        return 127

    def signal_group(number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def end_with_input() -> None:
        os.read(0, 1)  # nothing is ever written: this returns at the end of the input
        signal_group(signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        signal_group(signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: signal_group(received))
    threading.Thread(target=end_with_input, daemon=True).start()
    code = process.wait()
    signal_group(signal.SIGKILL)  # processes that the command has left behind
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_watch(sys.argv[1:]))
