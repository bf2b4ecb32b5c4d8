"""An event loop whose clock jumps to the next timer instead of waiting: hours of limiting in milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _NoWaiting(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("every task waits for something that will never happen")
        self.waited += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """`loop.time()` is the time waited, in seconds."""

    def __init__(self) -> None:
        self._waiting = _NoWaiting()
        super().__init__(self._waiting)

    def time(self) -> float:
        return self._waiting.waited


def run(work: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """The result of `work`, and the virtual seconds that it took."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work), runner.get_loop().time()


def now() -> float:
    """The running loop's clock, for code that takes one."""
    return asyncio.get_running_loop().time()
