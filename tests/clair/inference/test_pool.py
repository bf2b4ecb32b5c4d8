"""Several endpoints as one: the least loaded first, a dead one set aside and tried again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from clair.core.errors import UserError
from clair.inference.model import Refused, Unreachable
from clair.inference.pool import EndpointPool
from clair.pipeline.build import build
from tests.clair.building import config_for, outcomes, scripted, scripted_rows, write_prompts


class FakeEndpoint:
    """An endpoint that answers with its name when it is let, or is dead, or refuses every request."""

    def __init__(self, name: str) -> None:
        self.name = self.identity = name
        self.dead = self.refuses = False
        self.request_count = 0
        self.let = asyncio.Event()
        self.let.set()

    async def check(self) -> None:
        if self.dead or self.refuses:
            raise Refused(f"cannot reach {self.name}")

    async def complete(self, request: object, sample: int = 0) -> str:
        self.request_count += 1
        if self.dead:
            raise Unreachable("gone")
        if self.refuses:
            raise Refused(f"{self.name} has no model")
        await self.let.wait()
        return self.name

    async def close(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr("clair.inference.pool.time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


async def ask(pool: EndpointPool) -> str:
    try:
        return await pool.complete({})
    except Unreachable:
        return "gone"


def test_the_least_loaded_endpoint_gets_the_request():
    async def run() -> None:
        slow, quick = FakeEndpoint("slow"), FakeEndpoint("quick")
        pool = EndpointPool([slow, quick])
        slow.let.clear()
        waiting = [asyncio.ensure_future(ask(pool))]
        await asyncio.sleep(0)
        assert [await ask(pool) for _ in range(5)] == ["quick"] * 5
        quick.let.clear()
        waiting += [asyncio.ensure_future(ask(pool)) for _ in range(3)]
        await asyncio.sleep(0)
        assert (slow.request_count, quick.request_count) == (2, 7)  # two in flight at each
        slow.let.set()
        quick.let.set()
        assert sorted(await asyncio.gather(*waiting)) == ["quick", "quick", "slow", "slow"]

    asyncio.run(run())


def test_a_dead_one_is_set_aside_longer_each_time_and_is_back_when_it_answers(clock):
    async def run() -> None:
        first, second = FakeEndpoint("first"), FakeEndpoint("second")
        pool = EndpointPool([first, second])
        first.dead = True
        assert await ask(pool) == "gone"
        for aside in (2.0, 4.0, 8.0):
            assert [await ask(pool) for _ in range(3)] == ["second"] * 3
            clock.seconds += aside - 0.01
            assert await ask(pool) == "second"
            clock.seconds += 0.02
            assert await ask(pool) == "gone"
        first.dead = False
        clock.seconds += 60.0
        assert await ask(pool) == "first"
        first.dead = True
        assert await ask(pool) == "gone"
        clock.seconds += 2.01  # an answer makes good for all that was before
        first.dead = False
        assert await ask(pool) == "first"

    asyncio.run(run())


def test_if_all_endpoints_are_set_aside_the_one_due_first_is_used(clock):
    async def run() -> None:
        endpoints = [FakeEndpoint("first"), FakeEndpoint("second")]
        pool = EndpointPool(endpoints)
        for endpoint in endpoints:
            endpoint.dead = True
        assert await ask(pool) == "gone"
        clock.seconds += 1.0
        assert await ask(pool) == "gone"
        assert [endpoint.request_count for endpoint in endpoints] == [1, 1]
        endpoints[0].dead = False
        assert await ask(pool) == "first"

    asyncio.run(run())


def test_one_living_endpoint_is_enough_to_begin_with():
    async def run() -> None:
        first, second = FakeEndpoint("first"), FakeEndpoint("second")
        first.dead = True
        pool = EndpointPool([first, second])
        await pool.check()
        assert [await ask(pool) for _ in range(3)] == ["second"] * 3
        second.dead = True
        with pytest.raises(Refused, match="cannot reach second"):
            await pool.check()

    asyncio.run(run())


def test_one_that_refuses_is_set_aside_with_a_line_and_the_run_ends_only_if_all_refuse(clock, capsys):
    async def run() -> None:
        first, second = FakeEndpoint("first"), FakeEndpoint("second")
        first.refuses = True
        pool = EndpointPool([first, second])
        await pool.check()
        assert [await ask(pool) for _ in range(3)] == ["second"] * 3
        for aside in (4.0, 8.0):
            clock.seconds += aside + 0.01
            assert await ask(pool) == "gone"  # the client tries again
            assert [await ask(pool) for _ in range(3)] == ["second"] * 3
        assert capsys.readouterr().err == "first has no model; its requests go to the other servers\n"
        second.dead = True
        assert await ask(pool) == "gone"  # no refusal of both: the second may be back
        clock.seconds += 60.0
        assert await ask(pool) == "gone"
        second.dead, second.refuses = False, True
        with pytest.raises(Refused, match="second has no model"):
            await ask(pool)
        clock.seconds += 120.0
        first.refuses = False
        assert await ask(pool) == "first"

    asyncio.run(run())


def test_a_build_goes_on_without_a_server_that_has_no_such_model(tmp_path, server, monkeypatch):
    """It passes the check, as one that may come later, and is sent a request when its pause is over."""
    monkeypatch.setattr("clair.inference.pool._FIRST_PAUSE", 0.05)
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["wait:0.1"] * 20))
    wrong = server.url.removesuffix("/v1") + "/no-such-path"
    reviser = {"url": [server.url, wrong], "model": "m"}
    build(config_for(tmp_path, server.url, reviser=reviser, concurrency=2))
    assert outcomes(tmp_path / "out") == {f"row-{n}": f"good answer {n}" for n in range(20)}


def test_a_build_shares_its_requests_out_and_survives_the_death_of_an_endpoint(tmp_path, server):
    """The first URL names the model, so that the second run finds its replies though an endpoint is gone."""
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["wait:0.1"] * 40))
    expected = {f"row-{n}": f"good answer {n}" for n in range(40)}
    with scripted() as second:
        reviser = {"url": [server.url, second.url], "model": "m"}
        build(config_for(tmp_path, server.url, reviser=reviser, concurrency=8))
        assert outcomes(tmp_path / "out") == expected
        assert len(server.requests()) + len(second.requests()) == 40
        assert min(len(server.requests()), len(second.requests())) >= 10
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["wait:0.1"] * 80))
    request_count = len(server.requests())
    build(config_for(tmp_path, server.url, reviser=reviser, concurrency=8))
    assert outcomes(tmp_path / "out") == {f"row-{n}": f"good answer {n}" for n in range(80)}
    assert len(server.requests()) == request_count + 40


def test_endpoints_that_are_all_dead_are_one_line(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    dead = ["http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"]
    with pytest.raises(UserError, match=r"cannot reach http://no-such-host\.invalid/v1"):
        build(config_for(tmp_path, server.url, reviser={"url": dead, "model": "m"}))
