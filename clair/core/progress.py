"""How far a long piece of work is, on stderr: a display in a terminal, elsewhere a line now and then.

Whatever is printed of what models and servers say goes through `printable`.

The display stays within the terminal's width and is drawn anew every second from what is true then, so that it goes
on while nothing is reported. Rates and times come from what is done, in whatever order it is done.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

FIRST = 0.7
"""Seconds until the first line where there is no terminal: work that ends before needs none."""
EVERY = 30.0
"""Seconds between two lines after that."""
_FEWEST = 10
_SHORTEST = 5.0


_SIGNS = {code: code + 0x2400 for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_SIGNS |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def printable(text: str) -> str:
    """The text with a sign in the place of each control character: a model or a server must not steer a terminal.

    All of C0 but line feed and tab (an escape sequence begins with one), all of C1, and marks that turn the direction
    of writing.
    """
    return text.translate(_SIGNS)


def tell(message: str) -> None:
    """One line to a person, on stderr."""
    print(printable(message), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds in words: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def pace_of(rate: float | None) -> str:
    """A rate in words, `3.2/s` or `14 s each`; nothing where it is not known."""
    if not rate:
        return ""
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.2g} s each" if rate > 0.1 else f"{1 / rate:.0f} s each"


class Rate:
    """How many a second are being done: of the last 10 and more, over 5 seconds and more, else since the start.

    It is measured from one completion to now. A batch that is done all at once counts from the end of the one before,
    and time in which nothing is done lowers the rate.
    """

    def __init__(self, now: float, begun: int = 0) -> None:
        self._ends: deque[tuple[float, int]] = deque([(now, begun)])
        self.done = begun

    def add(self, now: float, done: int) -> None:
        """So many are done by now, all told."""
        if done <= self.done:
            return
        self.done = done
        if len(self._ends) > 1 and now - self._ends[-2][0] < 1:
            self._ends[-1] = now, done  # one entry a second is enough
        else:
            self._ends.append((now, done))
        while len(self._ends) > 2 and self._suffices(self._ends[1], now):
            self._ends.popleft()

    def _suffices(self, end: tuple[float, int], now: float) -> bool:
        return self.done - end[1] >= _FEWEST and now - end[0] >= _SHORTEST

    def a_second(self, now: float) -> float | None:
        """The rate; None before anything is done."""
        at, done = self._ends[0]
        return (self.done - done) / (now - at) if self.done > done and now > at else None

    def left(self, now: float, remaining: int) -> float | None:
        """Seconds until the remaining ones are done; None where nobody knows."""
        rate = self.a_second(now)
        return 0.0 if remaining <= 0 else remaining / rate if rate else None


class Progress:
    """One piece of work: what it is, how many of how many are done (`total` None: nobody can count), and details.

    `begun` were done before. `details` gives further lines, such as what is in flight. `left` gives the seconds left;
    absent, they follow from the rate. Both are called for each look, in another thread than the work.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        details: Callable[[], Sequence[str]] = tuple,
        left: Callable[[], float | None] | None = None,
        begun: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.details = what, total, details
        self._left, self._clock, self._started = left, clock, clock()
        self._rate = Rate(self._started, begun)
        self.done = begun
        self.in_terminal = False
        """Whether it is drawn in a terminal, and not written as lines."""

    def update(self, done: int) -> None:
        """So many are done, all told. It can be fewer than before: a build may go through its rows once more."""
        self.done = done
        self._rate.add(self._clock(), done)

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.update(self.done + count)

    def parts(self) -> list[str]:
        """How far, how fast and how long to go, each in words; those that are known."""
        now = self._clock()
        since = f"{duration(now - self._started)} so far"
        if self.total is None:
            return [since]
        remaining = max(0, self.total - self.done)
        left = self._left() if self._left and remaining else self._rate.left(now, remaining)
        ends = "" if left is None else f"about {duration(left)} left" if remaining else since
        found = (f"{self.done:,}/{self.total:,}", pace_of(self._rate.a_second(now)), ends or since)
        return [part for part in found if part]

    def line(self) -> str:
        """All of it in one line, for a file."""
        return f"{self.what}: {'; '.join([', '.join(self.parts()), *self.details()])}"

    def lines(self, first: float, wait: Callable[[float], bool]) -> None:
        """Write a line after `first` seconds and then every `EVERY`, until `wait(seconds)` says that the work ended."""
        seconds = first
        while not wait(seconds):
            tell(self.line())
            seconds = EVERY

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        parts = self.parts()
        words, room = "  ".join([self.what, *parts]), options.max_width - 3
        if self.total and (width := min(40, room - len(words))) >= 5:
            head = Table.grid(padding=(0, 2, 0, 0))
            bar = ProgressBar(total=self.total, completed=min(self.done, self.total), width=width)
            head.add_row(Text(self.what), bar, Text("  ".join(parts)))
            yield head
        else:
            yield Text(words, no_wrap=True, overflow="ellipsis")
        for line in self.details():
            yield Text(printable(line), style="dim", no_wrap=True, overflow="ellipsis")


@contextmanager
def progress(
    what: str,
    total: int | None = None,
    *,
    details: Callable[[], Sequence[str]] = tuple,
    left: Callable[[], float | None] | None = None,
    begun: int = 0,
    first: float | None = None,
    shown: bool = True,
    closing: bool = False,
) -> Iterator[Progress]:
    """Show how far a piece of work is while it lasts: in a terminal a display that goes at the end, elsewhere lines.

    The first line comes after `first` seconds (absent: `FIRST`); `closing` writes one at the end, however short it was.
    Nothing is shown where there is nothing to do, and unless `shown`, as of all processes but the first. What else is
    written to stderr stands above the display. The rest as `Progress` has it.
    """
    from rich.console import Console
    from rich.live import Live

    work, console = Progress(what, total, details, left, begun), Console(stderr=True)
    if shown and total != 0 and console.is_terminal:
        work.in_terminal = True
        with Live(work, console=console, refresh_per_second=1, transient=True, redirect_stdout=False):
            yield work
    elif shown and total != 0:
        ended = threading.Event()
        thread = threading.Thread(
            target=work.lines, args=(FIRST if first is None else first, ended.wait), name="progress", daemon=True
        )
        thread.start()
        try:
            yield work
        finally:
            ended.set()
            thread.join()
            if closing:
                tell(f"{what}: {', '.join(work.parts())}")
    else:
        yield work
