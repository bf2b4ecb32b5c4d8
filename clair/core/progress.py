"""Progress of long work on stderr: a live display in a terminal, otherwise a line from time to time.

The display fits the width of the terminal and is redrawn every second, so that times advance while nothing is reported.
Rates and remaining times are computed from completed items, in whatever order they complete. `printable` makes text of
models and servers safe to print.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

FIRST_LINE_AFTER = 0.7
"""Seconds until the first line without a terminal. Shorter work writes none."""
LINE_INTERVAL = 30.0
"""Seconds between two later lines."""
_MIN_COMPLETIONS = 10
_MIN_SECONDS = 5.0

_REPLACEMENTS = {code: code + 0x2400 for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_REPLACEMENTS |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def printable(text: str) -> str:
    """The text with a visible sign in place of each control character, so that it cannot control a terminal.

    Replaced are all of C0 (which starts escape sequences) except line feed and tab, all of C1, and marks that change
    the direction of writing.
    """
    return text.translate(_REPLACEMENTS)


def print_line(message: str) -> None:
    """Print one line to stderr."""
    print(printable(message), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as text: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_rate(rate: float | None) -> str:
    """A rate per second as text: `3.2/s` or `14 s each`; empty if it is unknown."""
    if not rate:
        return ""
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.2g} s each" if rate > 0.1 else f"{1 / rate:.0f} s each"


class CompletionRate:
    """The rate of completions per second, over at least the last 10 completions and 5 seconds, or since the start.

    It is measured from a completion to now, so that time without completions lowers it. A batch that completes at once
    counts from the end of the batch before.
    """

    def __init__(self, now: float, initial: int = 0) -> None:
        self._history: deque[tuple[float, int]] = deque([(now, initial)])
        self.completed = initial

    def add(self, now: float, completed: int) -> None:
        """Record the total number of completions at time `now`."""
        if completed <= self.completed:
            return
        self.completed = completed
        if len(self._history) > 1 and now - self._history[-2][0] < 1:
            self._history[-1] = now, completed  # one entry a second is enough
        else:
            self._history.append((now, completed))
        while (
            len(self._history) > 2
            and now - self._history[1][0] >= _MIN_SECONDS
            and completed - self._history[1][1] >= _MIN_COMPLETIONS
        ):
            self._history.popleft()

    def per_second(self, now: float) -> float | None:
        """The rate, or None before the first completion."""
        start, completed = self._history[0]
        return (self.completed - completed) / (now - start) if self.completed > completed and now > start else None

    def seconds_left(self, now: float, remaining: int) -> float | None:
        """Seconds until `remaining` more are completed, or None if the rate is unknown."""
        rate = self.per_second(now)
        return 0.0 if remaining <= 0 else remaining / rate if rate else None


class Progress:
    """The progress of one piece of work: its title, the completed items of `total` (None: unknown), and details.

    `initial` items were completed before. `details` returns further lines, such as the requests in flight.
    `seconds_left` returns the remaining seconds; without it they follow from the rate. The display calls both from
    another thread than the work.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        details: Callable[[], Sequence[str]] = tuple,
        seconds_left: Callable[[], float | None] | None = None,
        initial: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.details = title, total, details
        self._seconds_left, self._clock, self._started = seconds_left, clock, clock()
        self._rate = CompletionRate(self._started, initial)
        self.completed = initial
        self.in_terminal = False
        """True if it is drawn in a terminal and not written as lines."""

    def update(self, completed: int) -> None:
        """Set the number of completed items. It may fall: a build may pass over its rows more than once."""
        self.completed = completed
        self._rate.add(self._clock(), completed)

    def advance(self, count: int = 1) -> None:
        """Add completed items."""
        self.update(self.completed + count)

    def status(self) -> list[str]:
        """The count, the rate and the remaining time as texts, as far as they are known."""
        now = self._clock()
        elapsed = f"{duration(now - self._started)} so far"
        if self.total is None:
            return [elapsed]
        remaining = max(0, self.total - self.completed)
        left = self._seconds_left() if self._seconds_left and remaining else self._rate.seconds_left(now, remaining)
        time_text = elapsed if left is None or not remaining else f"about {duration(left)} left"
        rate = format_rate(self._rate.per_second(now))
        return [text for text in (f"{self.completed:,}/{self.total:,}", rate, time_text) if text]

    def line(self) -> str:
        """Title, status and details in one line."""
        return f"{self.title}: {'; '.join([', '.join(self.status()), *self.details()])}"

    def write_lines(self, first: float, wait: Callable[[float], bool]) -> None:
        """Write a line after `first` seconds and then every `LINE_INTERVAL`, until `wait(seconds)` returns True."""
        seconds = first
        while not wait(seconds):
            print_line(self.line())
            seconds = LINE_INTERVAL

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        status = self.status()
        text, room = "  ".join([self.title, *status]), options.max_width - 3
        if self.total and (width := min(40, room - len(text))) >= 5:
            header = Table.grid(padding=(0, 2, 0, 0))
            bar = ProgressBar(total=self.total, completed=min(self.completed, self.total), width=width)
            header.add_row(Text(self.title), bar, Text("  ".join(status)))
            yield header
        else:
            yield Text(text, no_wrap=True, overflow="ellipsis")
        for line in self.details():
            yield Text(printable(line), style="dim", no_wrap=True, overflow="ellipsis")


@contextmanager
def progress(
    title: str,
    total: int | None = None,
    *,
    details: Callable[[], Sequence[str]] = tuple,
    seconds_left: Callable[[], float | None] | None = None,
    initial: int = 0,
    first: float | None = None,
    shown: bool = True,
    closing: bool = False,
) -> Iterator[Progress]:
    """Show the progress of work while the block runs: a temporary display in a terminal, otherwise lines.

    The first line comes after `first` seconds (default: `FIRST_LINE_AFTER`). `closing` writes a line at the end
    of any work. Nothing is shown if `total` is 0 or if not `shown`, as for all processes but the first. Other output to
    stderr appears above the display. The other arguments are those of `Progress`.
    """
    from rich.console import Console
    from rich.live import Live

    work, console = Progress(title, total, details, seconds_left, initial), Console(stderr=True)
    if shown and total != 0 and console.is_terminal:
        work.in_terminal = True
        with Live(work, console=console, refresh_per_second=1, transient=True, redirect_stdout=False):
            yield work
    elif shown and total != 0:
        finished = threading.Event()
        first = FIRST_LINE_AFTER if first is None else first
        thread = threading.Thread(target=work.write_lines, args=(first, finished.wait), name="progress", daemon=True)
        thread.start()
        try:
            yield work
        finally:
            finished.set()
            thread.join()
            if closing:
                print_line(f"{title}: {', '.join(work.status())}")
    else:
        yield work
