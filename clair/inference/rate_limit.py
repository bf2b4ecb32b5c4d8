"""How fast we may ask: a limit on requests in flight that learns from refusals.

Two things make a server refuse (429). It has too many of our requests at once: then the number it is still working
on is what it takes, and the limit falls to that. Or we ask too often: then it refuses well below what it took
before, and asking pauses for as long as it says (Retry-After).

A server may also take all of them and answer few at a time (llama.cpp, Ollama). Then answers come in the order in which
the requests were sent, one every so many seconds: twice what it works on are enough to keep it busy.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

PAUSE = 1.0
"""Seconds to pause after a refusal that names no time."""
# A server can refuse at a number in flight that it took before, since some that we count are answered already and the
# answer is under way: only well below what it took is a refusal about how often we ask.
_WELL_BELOW = 0.8
# Answers that are looked at together, and the most that a server works on at once for it to show in so few: by chance,
# answers of different lengths come in the order of their requests in one of 300,000 windows at the most.
_WINDOW = 16
_FEW_SLOTS = 4
_LONG = 2.0
"""Seconds that a request waits at the least where it is worth to ask less."""


class Limiter:
    """At most `limit` requests in flight, at most `most`; refusals lower the limit, answers raise it slowly.

    `await enter()` before a request, `leave()` after it, and `succeeded()` or `refused(retry_after)` in between.
    Waiters go first in, first out; a request that was refused goes before those that never were asked.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        if most < 1:
            raise ValueError(f"concurrency is {most}; at least 1 request must be allowed in flight")
        self.most = most
        self.limit = float(most)
        self.in_flight = 0
        self.refusals = 0
        self.slots: int | None = None
        """How many the server works on at once, where it turned out to be few."""
        self._proven = 0
        self._lowered_at = -math.inf
        self._shortest = math.inf
        self._answers: list[tuple[float, float]] = []
        self._clock = clock
        self._closed_until = 0.0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self, *, again: bool = False) -> None:
        """Wait for a place in flight; `again` for a request that was refused or failed before."""
        if self._open() and (again or not self._waiters):
            self.in_flight += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        (self._waiters.appendleft if again else self._waiters.append)(waiter)
        self._arm()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.leave()  # let in and cancelled at the same moment: give the place back
            raise

    def leave(self) -> None:
        """Give the place back."""
        self.in_flight -= 1
        self._let_in()

    def succeeded(self, sent: float | None = None) -> None:
        """A request was answered: the server takes as many as are in flight, and perhaps one more. `sent`: when."""
        self._proven = max(self._proven, self.in_flight)
        self.limit = min(float(self.most), self.limit + 1 / self.limit)
        if sent is not None:
            self._answers.append((sent, self._clock()))
            self._shortest = min(self._shortest, self._clock() - sent)
        if len(self._answers) >= _WINDOW:
            self._learn_slots()
            self._answers = []

    def _learn_slots(self) -> None:
        """Little's law: a server works on (answers a second) x (seconds that one takes) requests at once."""
        sent, ended = zip(*self._answers, strict=True)
        slots = max(1, round((len(ended) - 1) * self._shortest / max(ended[-1] - ended[0], 1e-9)))
        in_turn = all(earlier < later for earlier, later in zip(sent, sent[slots:], strict=False))
        if slots <= _FEW_SLOTS and in_turn and ended[-1] - sent[-1] >= _LONG and self.in_flight > 2 * slots:
            self.slots = slots
            self.limit = min(self.limit, 2.0 * slots)

    def timed_out(self, sent: float) -> None:
        """The server answered neither a request in its time nor any that came after it; `sent`: when."""
        if sent > self._lowered_at:  # one decrease for all that were under way
            self.limit = max(1.0, min(self.limit, self.in_flight) / 2)
            self._lowered_at = self._clock()

    def refused(self, retry_after: float | None) -> None:
        """A request was refused, with the seconds to wait where the server told."""
        self.refusals += 1
        paused = self._clock() < self._closed_until
        if self.in_flight > max(1, _WELL_BELOW * self._proven) and not paused:
            self.limit = max(1.0, min(self.limit, self.in_flight - 1.0))
            return
        if not paused:  # one decrease for a whole burst of refusals
            self.limit = max(1.0, self.limit / 2)
            self._proven = int(self.limit)
        self._closed_until = max(self._closed_until, self._clock() + (PAUSE if retry_after is None else retry_after))

    @property
    def pause(self) -> float:
        """Seconds until asking goes on."""
        return max(0.0, self._closed_until - self._clock())

    def _open(self) -> bool:
        return self.in_flight < int(self.limit) and self._clock() >= self._closed_until

    def _let_in(self) -> None:
        while self._waiters and self._open():
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.in_flight += 1
                waiter.set_result(None)
        self._arm()

    def _arm(self) -> None:
        """Wake up when the pause that a server asked for is over."""
        wait = self._closed_until - self._clock()
        if self._waiters and wait > 0 and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._let_in()


class Rate:
    """At most so many a minute (requests, or tokens), evenly spaced, a second's worth at once."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        if per_minute is not None and per_minute <= 0:
            raise ValueError(f"a rate of {per_minute} a minute lets nothing through")
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._clock = clock
        self._next = 0.0

    async def take(self, amount: float = 1.0) -> None:
        """Wait until `amount` more may go."""
        if (seconds := self.reserve(amount)) > 0:
            await asyncio.sleep(seconds)

    def reserve(self, amount: float = 1.0) -> float:
        """The seconds after which `amount` more may go; it counts as gone."""
        if not self._seconds_each:
            return 0.0
        now = self._clock()
        at = max(self._next, now - 1.0)
        self._next = at + amount * self._seconds_each
        return max(0.0, at - now)

    def give_back(self, amount: float) -> None:
        """Less was used than was taken."""
        self._next -= amount * self._seconds_each
