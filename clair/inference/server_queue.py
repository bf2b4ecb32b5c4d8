"""Whose turn it is at a server: it may answer fewer requests at once than it is sent, and the others wait there."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Overtaken(TimeoutError):
    """The time of one request is over while the server answers others: it is not the server that is busy."""


class Turns:
    """The requests at one server, in the order in which they were sent.

    A server that answers one at a time keeps the others waiting, which is no failure: the time of a request counts
    from the last answer to one that was sent before it.
    """

    def __init__(self) -> None:
        self._sent = 0
        self._waiting: dict[int, None] = {}
        # (number of the request, when it was answered), both rising: an answer to an earlier request counts for all
        # later ones, so that what it outdates is left out.
        self._answers: list[tuple[int, float]] = []
        self._latest = -1
        self.last_answer = -math.inf
        """When the server answered last, by the loop's clock."""

    @asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """Send one request inside of this. Raises TimeoutError after so many seconds, which begin with its turn.

        Raises Overtaken for one that was not answered though one was that was sent after it.
        """
        loop = asyncio.get_running_loop()
        number, sent = self._sent, loop.time()
        self._sent += 1
        self._waiting[number] = None
        try:
            async with asyncio.timeout(None) as limit:

                def look() -> None:
                    nonlocal timer
                    ends = max(sent, self._passed(number)) + seconds
                    if ends <= loop.time():
                        limit.reschedule(ends)
                    else:
                        timer = loop.call_at(ends, look)

                timer = loop.call_later(seconds, look)
                try:
                    yield
                finally:
                    timer.cancel()
            self._answered(number, loop.time())
        except TimeoutError as error:
            if self._latest > number:
                raise Overtaken from error
            raise
        finally:
            del self._waiting[number]

    def _passed(self, number: int) -> float:
        """When the last request was answered that was sent before this one."""
        index = bisect_left(self._answers, (number,))
        return self._answers[index - 1][1] if index else 0.0

    def _answered(self, number: int, at: float) -> None:
        self._latest, self.last_answer = max(self._latest, number), at
        while self._answers and self._answers[-1][0] >= number:
            self._answers.pop()
        self._answers.append((number, at))
        if len(self._answers) > 2 * len(self._waiting) + 16:  # nobody asks for those before the oldest that waits
            oldest = bisect_left(self._answers, (min(self._waiting),))
            del self._answers[: max(0, oldest - 1)]


_TURNS: WeakValueDictionary[str, Turns] = WeakValueDictionary()


def turns_at(origin: str) -> Turns:
    """The turns at one server, which all models have in common that ask it."""
    return _TURNS.setdefault(origin, Turns())
