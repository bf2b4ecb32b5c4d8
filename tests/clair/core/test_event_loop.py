"""`run_async` runs a coroutine with and without a running event loop, and an interrupt reaches it in both cases."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import signal
import threading

import pytest

from clair.core.event_loop import run_async

VARIABLE = contextvars.ContextVar("variable", default="outside")


async def thread_and_variable() -> tuple[str, str]:
    await asyncio.sleep(0)
    return threading.current_thread().name, VARIABLE.get()


async def fail() -> None:
    raise ValueError("three of four")


async def inside_a_loop(coroutine):
    """The result of `run_async` inside a running loop, as in a notebook's cell."""
    return run_async(coroutine)


def test_without_a_loop_a_coroutine_runs_in_this_thread():
    assert run_async(thread_and_variable()) == (threading.current_thread().name, "outside")


def test_inside_a_loop_a_coroutine_runs_in_a_thread_with_the_context_of_the_caller():
    async def call():
        VARIABLE.set("inside")
        return run_async(thread_and_variable())

    assert asyncio.run(call()) == ("event loop", "inside")


def test_an_error_is_raised_to_the_caller_with_its_class_and_message():
    with pytest.raises(ValueError, match=r"^three of four$"):
        asyncio.run(inside_a_loop(fail()))


def test_a_loop_inside_a_loop_inside_a_loop_works():
    async def outer():
        return run_async(thread_and_variable())

    assert asyncio.run(inside_a_loop(outer())) == ("event loop", "outside")


def test_an_interrupt_calls_the_handler_that_the_coroutine_registered():
    async def stops() -> str:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, stop.set)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(stop.wait(), 10)
        assert loop.remove_signal_handler(signal.SIGINT)
        assert not loop.remove_signal_handler(signal.SIGINT)
        return "stopped in order"

    original = signal.getsignal(signal.SIGINT)
    assert asyncio.run(inside_a_loop(stops())) == "stopped in order"
    assert signal.getsignal(signal.SIGINT) is original


def test_an_interrupt_without_a_handler_ends_the_coroutine():
    closed = []

    async def waits() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(10)
        finally:
            closed.append("closed")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(inside_a_loop(waits()))
    assert closed == ["closed"]


@pytest.mark.parametrize("inside", [False, True], ids=["without a loop", "inside a loop"])
@pytest.mark.parametrize(("setting", "expected"), [(700, 20_000), (10**6, 10**6), (0, 0)])
def test_garbage_is_searched_for_rarely_while_a_coroutine_runs_and_as_before_after_it(inside, setting, expected):
    async def threshold() -> int:
        return gc.get_threshold()[0]

    before = gc.get_threshold()
    try:
        gc.set_threshold(setting, 9, 8)
        assert (asyncio.run(inside_a_loop(threshold())) if inside else run_async(threshold())) == expected
        with pytest.raises(ValueError, match="three of four"):
            run_async(fail())
        assert gc.get_threshold() == (setting, 9, 8)
    finally:
        gc.set_threshold(*before)
