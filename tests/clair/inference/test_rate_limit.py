"""Limits by hand, on a virtual clock, and their efficiency on servers that limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

from clair.inference.rate_limit import PAUSE, Limiter, Rate
from clair.pipeline.build import build
from recipes.world.running import running
from recipes.world.server import ServerOptions
from recipes.world.tasks import distinct_tasks, write_prompts
from tests.clair.building import config_for
from tests.clair.virtual_time import now, run


async def entered(limiter: Limiter, count: int) -> None:
    for _ in range(count):
        await limiter.acquire()


async def waits(limiter: Limiter, **options: bool) -> asyncio.Task[None]:
    task = asyncio.ensure_future(limiter.acquire(**options))
    await asyncio.sleep(0)
    assert not task.done()
    return task


# ---- by hand


def test_no_more_than_the_limit_are_let_in():
    async def work():
        limiter = Limiter(2, now)
        await entered(limiter, 2)
        third = await waits(limiter)
        limiter.release()
        await third
        assert limiter.in_flight == 2

    run(work())


def test_requests_go_in_order_of_arrival_and_refused_ones_first():
    async def work():
        limiter = Limiter(1, now)
        await entered(limiter, 1)
        order = []

        async def named(name, retry=False):
            await limiter.acquire(retry=retry)
            order.append(name)
            limiter.release()

        tasks = [asyncio.ensure_future(named(name)) for name in "ab"]
        await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(named("refused", retry=True)))
        await asyncio.sleep(0)
        limiter.release()
        await asyncio.gather(*tasks)
        assert order == ["refused", "a", "b"]
        assert limiter.in_flight == 0

    run(work())


def test_a_newcomer_does_not_jump_the_queue_when_the_limit_rises():
    async def work():
        limiter = Limiter(2, now)
        limiter.limit = 1.0
        await entered(limiter, 1)
        first = await waits(limiter)
        limiter.succeeded()  # now there is one more slot, and `first` has it when `leave` checks
        newcomer = await waits(limiter)
        limiter.release()
        await asyncio.gather(first, newcomer)
        assert limiter.in_flight == 2

    run(work())


@pytest.mark.parametrize("let_in_first", [True, False])
def test_a_cancelled_waiter_returns_its_slot(let_in_first):
    async def work():
        limiter = Limiter(1, now)
        await entered(limiter, 1)
        first, second = await waits(limiter), await waits(limiter)
        if let_in_first:
            limiter.release()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        if not let_in_first:
            limiter.release()
        await second
        assert limiter.in_flight == 1

    run(work())


def test_too_many_at_once_lowers_the_limit_to_what_the_server_still_works_on():
    async def work():
        limiter = Limiter(10, now)
        await entered(limiter, 10)
        for _ in range(7):  # the server takes 3
            limiter.refused(None)
            limiter.release()
        assert (limiter.in_flight, limiter.limit) == (3, 3)
        await waits(limiter)

    run(work())


def test_a_refusal_at_a_number_that_was_taken_before_halves_the_limit_once_and_pauses():
    async def work():
        limiter = Limiter(8, now)
        await entered(limiter, 8)
        for _ in range(4):
            limiter.succeeded()
            limiter.release()
        limiter.refused(3.0)
        limiter.release()
        limiter.refused(5.0)
        limiter.release()
        assert limiter.limit == 4
        waiting = await waits(limiter)
        started = now()
        await waiting
        assert now() - started == pytest.approx(5.0, abs=0.01)

    run(work())


@pytest.mark.parametrize(("seconds", "paused"), [(None, PAUSE), (0.25, 0.25), (120.0, 120.0)])
def test_the_pause_is_as_long_as_the_server_says(seconds, paused):
    async def work():
        limiter = Limiter(1, now)
        await entered(limiter, 1)
        limiter.refused(seconds)
        limiter.release()
        await limiter.acquire(retry=True)
        return now()

    assert run(work())[0] == pytest.approx(paused, abs=0.01)


def test_answers_raise_the_limit_by_one_a_round_and_never_above_the_most():
    async def work():
        limiter = Limiter(4, now)
        await entered(limiter, 4)
        limiter.limit = 2.0
        for _ in range(2):
            limiter.succeeded()
        assert 2.8 < limiter.limit < 3
        for _ in range(100):
            limiter.succeeded()
        assert limiter.limit == 4

    run(work())


def test_the_limit_never_falls_below_one():
    async def work():
        limiter = Limiter(2, now)
        for _ in range(10):
            await limiter.acquire()
            limiter.refused(0.0)
            limiter.release()
        assert limiter.limit == 1

    run(work())


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Limiter(0)


def test_a_timeout_halves_the_limit_once_for_all_that_were_under_way():
    async def work():
        limiter = Limiter(64, now)
        await entered(limiter, 64)
        await asyncio.sleep(10)
        for _ in range(20):
            limiter.timed_out(0.0)
            limiter.release()
        assert limiter.limit == 32
        for _ in range(20):
            limiter.release()
        await asyncio.sleep(10)
        limiter.timed_out(15.0)  # sent since, with 24 in flight
        assert limiter.limit == 12
        for _ in range(23):
            limiter.release()
        await asyncio.sleep(10)
        limiter.timed_out(25.0)
        assert limiter.limit == 1

    run(work())


# ---- rates


def uptime() -> float:
    """The clock of a machine that has been up for a while."""
    return 1000.0 + now()


def test_a_rate_spaces_requests_evenly_after_a_seconds_worth():
    async def work():
        rate = Rate(120, uptime)  # two a second
        times = []
        for _ in range(8):
            await rate.acquire()
            times.append(now())
        return times

    assert run(work())[0] == pytest.approx([0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.5])


def test_a_rate_counts_amounts_and_takes_back_what_was_not_used():
    async def work(unused):
        rate = Rate(6000, uptime)  # 100 tokens a second
        await rate.acquire(1000)
        rate.refund(unused)
        await rate.acquire(100)
        return now()

    assert run(work(0))[0] == pytest.approx(9.0)
    assert run(work(900))[0] == pytest.approx(0.0)


def test_no_rate_lets_everything_through_at_once():
    async def work():
        rate = Rate(None, now)
        for _ in range(1000):
            await rate.acquire(1e9)

    assert run(work())[1] == 0


@pytest.mark.parametrize("rate", [0, -1])
def test_a_rate_that_lets_nothing_through_is_refused(rate):
    with pytest.raises(ValueError, match="lets nothing through"):
        Rate(rate)


# ---- servers that limit


@dataclass
class Server:
    """Takes `cap` at once, or `per_second` of them; answers after `latency()`; the rest is refused after a moment."""

    latency: Callable[[], float]
    cap: int | None = None
    per_second: float | None = None
    retry_after: float | None = None
    in_flight: int = 0
    refusals: int = 0
    _taken: list[float] = field(default_factory=list)

    async def answer(self) -> bool:
        await asyncio.sleep(0.001)
        self._taken = [time for time in self._taken if time > now() - 1]
        full = self.cap is not None and self.in_flight >= self.cap
        if full or (self.per_second is not None and len(self._taken) >= self.per_second):
            self.refusals += 1
            return False
        self._taken.append(now())
        self.in_flight += 1
        await asyncio.sleep(self.latency())
        self.in_flight -= 1
        return True


async def ask_all(server: Server, rows: int, concurrency: int) -> Limiter:
    """Acquire and release a limiter like a client."""
    limiter = Limiter(concurrency, now)

    async def row():
        await limiter.acquire()
        while True:
            if await server.answer():
                limiter.succeeded()
                limiter.release()
                return
            limiter.refused(server.retry_after)
            limiter.release()
            await asyncio.sleep(server.retry_after or 0)
            await limiter.acquire(retry=True)

    await asyncio.gather(*(row() for _ in range(rows)))
    assert limiter.in_flight == server.in_flight == 0
    return limiter


@pytest.mark.parametrize("retry_after", [None, 0.0, 1.0])
def test_a_server_with_30_places_wanted_by_100_is_used_to_four_fifths_with_few_refusals(retry_after):
    server = Server(latency=lambda: 0.5, cap=30, retry_after=retry_after)
    _, seconds = run(ask_all(server, 600, 100))
    print(f"{seconds:.2f} s of {600 * 0.5 / 30:.0f} s, {server.refusals} refusals")
    assert seconds <= 1.25 * 10
    assert server.refusals <= 150


@pytest.mark.parametrize("cap", [1, 2, 10, 64, 99])
def test_any_cap_is_found(cap):
    server = Server(latency=lambda: 0.5, cap=cap)
    rows = 20 * cap
    _, seconds = run(ask_all(server, rows, 100))
    assert seconds <= 1.35 * rows * 0.5 / cap
    assert server.refusals <= 100 + rows / 2


def test_a_cap_is_found_where_answers_take_differing_times():
    random = Random(0)
    server = Server(latency=lambda: random.expovariate(1 / 0.5), cap=30)
    _, seconds = run(ask_all(server, 600, 100))
    print(f"{seconds:.2f} s, {server.refusals} refusals")
    assert seconds <= 1.5 * 600 * 0.5 / 30
    assert server.refusals <= 200


def test_a_server_that_takes_a_number_a_second_is_asked_about_as_often():
    server = Server(latency=lambda: 0.1, per_second=20, retry_after=1.0)
    _, seconds = run(ask_all(server, 400, 100))
    print(f"{seconds:.2f} s of 20 s, {server.refusals} refusals")
    assert seconds <= 2 * 20
    assert server.refusals <= 400


def test_a_server_without_limits_is_never_held_back():
    _, seconds = run(ask_all(Server(latency=lambda: 1.0), 500, 50))
    assert seconds == pytest.approx(10, rel=0.02)


def test_a_server_whose_cap_falls_and_rises_is_followed():
    async def work():
        server = Server(latency=lambda: 0.5, cap=60)
        asking = asyncio.ensure_future(ask_all(server, 3000, 100))
        await asyncio.sleep(5)
        server.cap = 10
        await asyncio.sleep(20)
        server.cap = 60
        limiter = await asking
        return limiter, server

    (limiter, server), seconds = run(work())
    ideal = 25 + (3000 - 5 * 120 - 20 * 20) / 120
    print(f"{seconds:.1f} s of {ideal:.1f} s, {server.refusals} refusals, limit {limiter.limit:.0f}")
    assert seconds <= 1.5 * ideal


# ---- servers that answer few at a time, and refuse none


async def ask_slots(slots: int, latency: Callable[[], float], rows: int, concurrency: int) -> tuple[Limiter, list[int]]:
    """The limiter after that, and how many were in flight at each answer."""
    limiter, free, flying = Limiter(concurrency, now), asyncio.Semaphore(slots), []

    async def row(number: int) -> None:
        await limiter.acquire()
        await asyncio.sleep(1e-6 * number)  # one after the other, as on a real clock
        sent = now()
        async with free:
            await asyncio.sleep(latency())
        limiter.succeeded(sent)
        flying.append(limiter.in_flight)
        limiter.release()

    await asyncio.gather(*(row(number) for number in range(rows)))
    return limiter, flying


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_server_that_answers_few_at_a_time_is_found_by_its_first_answers_and_kept_busy(slots):
    random = Random(slots)
    work = ask_slots(slots, lambda: random.uniform(0.8, 1.2), 200, 64)
    (limiter, flying), seconds = run(work)
    assert max(1, slots - 1) <= limiter.slots <= slots
    assert seconds <= 1.05 * 200 / slots
    assert max(flying[100:-10]) <= 6 * slots
    assert min(flying[100:-10]) >= slots


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["equal", "exponential", "with many lengths"])
def test_a_server_that_answers_all_at_once_is_never_held_back(kind, seed):
    random = Random(seed)
    latency = {
        "equal": lambda: 5.0,
        "exponential": lambda: 2.0 + random.expovariate(0.2),
        "with many lengths": lambda: random.lognormvariate(2.0, 1.5),
    }[kind]
    (limiter, _), _ = run(ask_slots(10_000, latency, 2000, 64))
    assert (limiter.slots, limiter.limit) == (None, 64)


@pytest.mark.slow
@pytest.mark.parametrize("retry_after", [0.1, 1.0])
def test_over_http_a_cap_of_30_wanted_by_100_is_found_with_few_refusals(tmp_path, retry_after):
    write_prompts(tmp_path / "prompts.jsonl", distinct_tasks("train", 600, 0), answers_seed=0)
    with running(ServerOptions(latency=0.5, cap=30, retry_after=retry_after)) as server:
        config = config_for(
            tmp_path, server.url, reviser={"url": server.url, "model": "world-reviser"}, concurrency=100
        )
        built = build(config)
        stats = server.stats()
    assert built.failed == 0
    assert stats["paid_total"] == 600
    assert stats["statuses"]["429"] <= 150
