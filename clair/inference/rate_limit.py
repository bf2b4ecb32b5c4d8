"""Limits on the requests of a role: in flight, per minute, and the time of each request at its server.

The limit in flight learns from refusals (429), which have two causes. If the server has too many requests at once, the
number that it still works on is its capacity, and the limit falls to it. If requests come too often, the server refuses
well below the number that it took before, and sending pauses for as long as it says (Retry-After).

A server may also accept all requests and work on few at a time (llama.cpp, Ollama). Then answers come in the order in
which the requests were sent, at equal intervals: twice the number that it works on keeps it busy.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

PAUSE = 1.0
"""Seconds to pause after a refusal that names no time."""
# A server can refuse at a number in flight that it took before, because some of the requests counted are answered and
# their answers are on the way. Only a refusal well below that number is about the frequency of requests.
_WELL_BELOW = 0.8
# The number of answers examined together, and the largest number of slots that so few answers can show: by chance,
# answers of different lengths come in the order of their requests in at most one of 300,000 windows.
_WINDOW = 16
_MAX_SLOTS = 4
_MIN_WAIT = 2.0
"""Seconds in the server's queue from which it is worth to send fewer requests."""


class Limiter:
    """At most `limit` requests in flight: refusals lower the limit, answers raise it slowly up to `max_in_flight`.

    `await acquire()` before a request, `release()` after it, and `succeeded()` or `refused(retry_after)` in between.
    Waiters are served first in, first out; a retried request goes before those that were never sent.
    """

    def __init__(self, max_in_flight: int, clock: Callable[[], float] = time.monotonic) -> None:
        if max_in_flight < 1:
            raise ValueError(f"concurrency is {max_in_flight}; at least 1 request must be allowed in flight")
        self.max_in_flight = max_in_flight
        self.limit = float(max_in_flight)
        self.in_flight = 0
        self.slots: int | None = None
        """The number of requests that the server works on at once, if it was found to be small."""
        self._proven = 0
        self._lowered_time = -math.inf
        self._shortest = math.inf
        self._answers: list[tuple[float, float]] = []
        self._clock = clock
        self._closed_until = 0.0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def acquire(self, *, retry: bool = False) -> None:
        """Wait for a slot in flight; `retry`: the request was refused or failed before."""
        if self._open() and (retry or not self._waiters):
            self.in_flight += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        (self._waiters.appendleft if retry else self._waiters.append)(waiter)
        self._arm()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release()  # admitted and cancelled at the same moment: give the slot back
            raise

    def release(self) -> None:
        """Give the slot back."""
        self.in_flight -= 1
        self._admit()

    def succeeded(self, sent: float | None = None) -> None:
        """Record an answer to a request sent at `sent`: the server takes as many as are in flight, perhaps one more."""
        self._proven = max(self._proven, self.in_flight)
        self.limit = min(float(self.max_in_flight), self.limit + 1 / self.limit)
        if sent is not None:
            self._answers.append((sent, self._clock()))
            self._shortest = min(self._shortest, self._clock() - sent)
        if len(self._answers) >= _WINDOW:
            self._learn_slots()
            self._answers = []

    def _learn_slots(self) -> None:
        """Little's law: a server works on (answers a second) x (seconds that one takes) requests at once."""
        sent, answered = zip(*self._answers, strict=True)
        slots = max(1, round((len(answered) - 1) * self._shortest / max(answered[-1] - answered[0], 1e-9)))
        in_order = all(earlier < later for earlier, later in zip(sent, sent[slots:], strict=False))
        if slots <= _MAX_SLOTS and in_order and answered[-1] - sent[-1] >= _MIN_WAIT and self.in_flight > 2 * slots:
            self.slots = slots
            self.limit = min(self.limit, 2.0 * slots)

    def timed_out(self, sent: float) -> None:
        """Record a timeout of a request sent at time `sent`, if no later request was answered either."""
        if sent > self._lowered_time:  # one decrease for all requests in flight at that time
            self.limit = max(1.0, min(self.limit, self.in_flight) / 2)
            self._lowered_time = self._clock()

    def refused(self, retry_after: float | None) -> None:
        """Record a refusal; `retry_after`: seconds to wait, if the server stated them."""
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
        """Seconds until the pause ends."""
        return max(0.0, self._closed_until - self._clock())

    def _open(self) -> bool:
        return self.in_flight < int(self.limit) and self._clock() >= self._closed_until

    def _admit(self) -> None:
        while self._waiters and self._open():
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.in_flight += 1
                waiter.set_result(None)
        self._arm()

    def _arm(self) -> None:
        """Wake up when the pause that the server requested is over."""
        wait = self._closed_until - self._clock()
        if self._waiters and wait > 0 and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._admit()


class Rate:
    """A rate limit per minute (of requests, or tokens): evenly spaced, with bursts of one second's worth."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        if per_minute is not None and per_minute <= 0:
            raise ValueError(f"a rate of {per_minute} a minute lets nothing through")
        self._seconds_per_unit = 60.0 / per_minute if per_minute else 0.0
        self._clock = clock
        self._next = 0.0

    async def acquire(self, amount: float = 1.0) -> None:
        """Wait until `amount` more may be sent."""
        if (seconds := self.reserve(amount)) > 0:
            await asyncio.sleep(seconds)

    def reserve(self, amount: float = 1.0) -> float:
        """The seconds after which `amount` more may be sent; it counts as sent."""
        if not self._seconds_per_unit:
            return 0.0
        now = self._clock()
        start = max(self._next, now - 1.0)
        self._next = start + amount * self._seconds_per_unit
        return max(0.0, start - now)

    def refund(self, amount: float) -> None:
        """Return the part of an acquired amount that was not used."""
        self._next -= amount * self._seconds_per_unit


class Overtaken(TimeoutError):
    """A request timed out while the server answered later ones: the server as a whole is not overloaded."""


class ServerQueue:
    """The requests at one server, in the order in which they were sent.

    A server that answers one request at a time lets the others wait, which is no failure. So the time limit of a
    request counts from the last answer to a request that was sent before it.
    """

    def __init__(self) -> None:
        self._sent = 0
        self._waiting: dict[int, None] = {}
        # (number of the request, time of its answer), both rising: an answer to an earlier request counts for all later
        # requests, so that the answers it supersedes are dropped.
        self._answers: list[tuple[int, float]] = []
        self._latest = -1
        self.last_answer = -math.inf
        """The time of the server's last answer, by the loop's clock."""

    @asynccontextmanager
    async def time_limit(self, seconds: float) -> AsyncIterator[None]:
        """Limit the request sent inside the block to `seconds`, which count from its turn. Raises TimeoutError.

        Raises Overtaken if a request that was sent later has been answered.
        """
        loop = asyncio.get_running_loop()
        number, sent = self._sent, loop.time()
        self._sent += 1
        self._waiting[number] = None
        try:
            async with asyncio.timeout(None) as limit:

                def check_deadline() -> None:
                    nonlocal timer
                    deadline = max(sent, self._previous_answer_time(number)) + seconds
                    if deadline <= loop.time():
                        limit.reschedule(deadline)
                    else:
                        timer = loop.call_at(deadline, check_deadline)

                timer = loop.call_later(seconds, check_deadline)
                try:
                    yield
                finally:
                    timer.cancel()
            self._record_answer(number, loop.time())
        except TimeoutError as error:
            if self._latest > number:
                raise Overtaken from error
            raise
        finally:
            del self._waiting[number]

    def _previous_answer_time(self, number: int) -> float:
        """The time of the last answer to a request that was sent before this one; 0 if there is none."""
        index = bisect_left(self._answers, (number,))
        return self._answers[index - 1][1] if index else 0.0

    def _record_answer(self, number: int, answer_time: float) -> None:
        self._latest, self.last_answer = max(self._latest, number), answer_time
        while self._answers and self._answers[-1][0] >= number:
            self._answers.pop()
        self._answers.append((number, answer_time))
        if len(self._answers) > 2 * len(self._waiting) + 16:  # answers before the oldest waiting request are never read
            oldest = bisect_left(self._answers, (min(self._waiting),))
            del self._answers[: max(0, oldest - 1)]


_QUEUES: WeakValueDictionary[str, ServerQueue] = WeakValueDictionary()


def queue_of_server(origin: str) -> ServerQueue:
    """The queue of one server, shared by all models there."""
    return _QUEUES.setdefault(origin, ServerQueue())
