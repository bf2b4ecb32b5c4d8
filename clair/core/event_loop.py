"""Coroutines behind plain functions, which also work where an event loop is running already, as in a notebook."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

Result = TypeVar("Result")
_OBJECTS_PER_COLLECTION = 20_000
"""How many more objects than before let Python search for garbage. Its 700 are those of a few dozen rows in flight: a
build spends an eighth of its time on searches that find nothing."""


def run_async(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end and return its result or raise its error.

    If an event loop is running in this thread, the coroutine runs in the loop of a worker thread and this call waits.
    Ctrl-C (a notebook's interrupt) then calls the handler that the coroutine has registered for SIGINT with
    `loop.add_signal_handler`; without one it ends the coroutine by KeyboardInterrupt.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with _rare_garbage_collection():
            return asyncio.run(coroutine)
    loop, outcome = _WorkerLoop(), Future[Result]()

    def work() -> None:
        try:
            with _rare_garbage_collection(), asyncio.Runner(loop_factory=lambda: loop) as runner:
                result = runner.run(coroutine)
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    context = contextvars.copy_context()
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, lambda *_: loop.interrupt()) if in_main_thread else None
    threading.Thread(target=context.run, args=(work,), name="event loop", daemon=True).start()
    try:
        return outcome.result()
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    threshold = gc.get_threshold()
    gc.set_threshold(max(threshold[0], _OBJECTS_PER_COLLECTION) if threshold[0] else 0, *threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*threshold)


async def await_shielded(future: asyncio.Future[Result]) -> Result:
    """Await a future that goes on if its caller is cancelled.

    Nobody then sees its error, and asyncio would print it as "never retrieved" beside the one line of the run's error.
    """
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(_retrieve_exception)
        raise


def _retrieve_exception(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


class _WorkerLoop(asyncio.SelectorEventLoop):
    """An event loop in a thread that receives no signals: it keeps the handler of SIGINT for `interrupt` to call."""

    def __init__(self) -> None:
        super().__init__()
        self._on_interrupt: tuple[Callable[..., object], tuple[Any, ...]] | None = None

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: Any) -> None:
        """Keep the handler of SIGINT; other signals end the process as usual."""
        if sig == signal.SIGINT:
            self._on_interrupt = callback, args

    def remove_signal_handler(self, sig: int) -> bool:
        """Forget the handler. Returns True if there was one."""
        existed = sig == signal.SIGINT and self._on_interrupt is not None
        if existed:
            self._on_interrupt = None
        return existed

    def interrupt(self) -> None:
        """Call the handler of SIGINT inside the loop; callable from any thread."""
        with suppress(RuntimeError):  # the loop was closed a moment ago: the result is there
            self.call_soon_threadsafe(self._call_handler)

    def _call_handler(self) -> None:
        if self._on_interrupt is None:
            raise KeyboardInterrupt
        callback, arguments = self._on_interrupt
        callback(*arguments)
