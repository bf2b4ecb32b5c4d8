"""Limits and money that several shards share: never passed, all of them used, and nothing lost with a shard."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from clair.cluster.leased_limits import LeasedResources
from clair.cluster.merge import merge
from clair.cluster.shared_limits import REPLACED, RoleLimits, RoleReport, ShardReport, SharedLimits
from clair.inference.budget import Budget, BudgetConfig
from clair.ledger.ledger import Ledger
from clair.pipeline.build import build
from clair.pipeline.shards import Shard, shard_config
from tests.clair.building import final_bytes, manifest
from tests.clair.scripted import Scripted, endpoint, install, recipe, revision

PRICE = {"input": "1", "output": "1000"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def quotas(concurrency=10, *, tokens=None, clock=None, shards="ab", **rates):
    budget = Budget(BudgetConfig(tokens=tokens), {}, {}) if tokens else None
    shared = SharedLimits({"role": RoleLimits(concurrency, **rates)}, budget, clock or Clock())
    for name in shards:
        shared.begin(name, "1", Decimal(0))
    return shared


def ask(keeper, shard, *, attempt="1", spent=0, leased=0, needs=0, last=False, **role):
    money = {"spent": Decimal(spent), "leased": Decimal(leased), "needs": Decimal(needs)}
    return keeper.report(ShardReport(shard, attempt, {"role": RoleReport(**role)}, last=last, **money))


def slots(keeper, shard, **role):
    return ask(keeper, shard, **role).roles["role"].slots


def test_a_lone_shard_has_all_slots_and_gives_half_of_them_to_a_second_one_as_they_become_free():
    keeper = quotas(10)
    assert slots(keeper, "a", waiting=50) == 10
    assert slots(keeper, "b", waiting=50) == 0
    assert slots(keeper, "a", in_flight=10, waiting=40) == 5
    assert slots(keeper, "b", waiting=50) == 0, "ten are in flight still"
    assert slots(keeper, "a", in_flight=7, waiting=40) == 5
    assert slots(keeper, "b", waiting=50) == 3
    assert slots(keeper, "a", in_flight=5, waiting=40) == 5
    assert slots(keeper, "b", in_flight=3, waiting=50) == 5
    assert slots(keeper, "b", in_flight=1) == 1
    assert slots(keeper, "a", in_flight=5, waiting=40) == 9


def test_a_single_slot_goes_to_the_shard_with_the_fewest_answers():
    keeper = quotas(1)
    assert slots(keeper, "a", waiting=5) == 1
    assert slots(keeper, "a", in_flight=0, waiting=5, answered=1) == 1, "b has asked for nothing yet"
    assert slots(keeper, "b", waiting=5) == 0
    assert slots(keeper, "a", waiting=5, answered=1) == 0
    assert slots(keeper, "b", waiting=5) == 1


@given_settings(max_examples=40)
@given(st.data())
def test_places_in_flight_never_pass_the_limit_and_none_stays_unused(data):
    keeper = quotas(limit := data.draw(st.integers(1, 12)), shards="abcd")
    leased, flying = dict.fromkeys("abcd", 0), dict.fromkeys("abcd", 0)
    wants = {name: data.draw(st.integers(0, 9)) for name in "abcd"}
    for name in data.draw(st.lists(st.sampled_from("abcd"), max_size=30)):
        flying[name] = data.draw(st.integers(0, min(leased[name], wants[name])))
        leased[name] = slots(keeper, name, in_flight=flying[name], waiting=wants[name] - flying[name])
        assert sum(max(leased[n], flying[n]) for n in leased) <= limit
    for _ in range(6):
        for name in "abcd":
            flying[name] = min(flying[name], leased[name])
            leased[name] = slots(keeper, name, in_flight=flying[name], waiting=wants[name] - flying[name])
    assert sum(leased.values()) == min(limit, sum(wants.values()))


def test_the_places_of_a_shard_that_is_gone_or_silent_go_to_the_others():
    clock = Clock()
    keeper = quotas(10, clock=clock)
    assert slots(keeper, "a", waiting=50) == 10
    keeper.begin("a", None, Decimal(0))
    assert slots(keeper, "b", waiting=50) == 10
    keeper.begin("a", "2", Decimal(0))
    assert ask(keeper, "a", waiting=1).stop == REPLACED, "the first attempt lives, and must not go on"
    assert slots(keeper, "a", attempt="2", waiting=50) == 0
    clock.now += 31
    assert slots(keeper, "a", attempt="2", waiting=50) == 10


def test_a_refusal_of_one_shard_lowers_the_limit_of_all_and_answers_raise_it():
    clock = Clock()
    keeper = quotas(40, clock=clock)
    for name in "bab":
        slots(keeper, name, waiting=50)
    assert slots(keeper, "a", waiting=50) == 20
    slots(keeper, "a", in_flight=20, waiting=50)
    lease = ask(keeper, "b", in_flight=10, waiting=50, refused=((10, 7.0),))
    assert (lease.roles["role"].slots, lease.roles["role"].pause) == (9, 0.0), "30 in flight were too many: 29 are left"
    slots(keeper, "a", in_flight=15, waiting=50, answered=30)
    lease = ask(keeper, "b", in_flight=2, waiting=50, refused=((2, 7.0),))
    assert lease.roles["role"].pause == 7.0, "17 were fine before: we ask too often"
    clock.now += 7
    limit = slots(keeper, "a", in_flight=0, waiting=90)
    assert slots(keeper, "a", in_flight=0, waiting=90, answered=400) > limit


def test_shards_share_one_rate_in_the_order_in_which_they_ask():
    clock = Clock()
    clock.now = 100.0
    keeper = quotas(100, clock=clock, requests_per_minute=60, tokens_per_minute=600)
    assert ask(keeper, "a", requests=3).roles["role"].requests == (0.0, 0.0, 1.0)
    assert ask(keeper, "b", requests=2).roles["role"].requests == (2.0, 3.0)
    assert ask(keeper, "a", tokens=(30.0,)).roles["role"].tokens == (0.0,)
    assert ask(keeper, "b", tokens=(10.0, 10.0)).roles["role"].tokens == (2.0, 3.0)
    assert ask(keeper, "b", tokens=(10.0,), tokens_refunded=20.0).roles["role"].tokens == (2.0,)


def test_money_is_leased_up_to_the_budget_and_what_is_not_needed_comes_back():
    keeper = quotas(tokens=100)
    lease = ask(keeper, "a", needs=10)
    assert 10 <= lease.more <= 30
    first = lease.more
    lease = ask(keeper, "b", needs=95)
    assert (lease.more, lease.refused, lease.scarce) == (0, None, True), "what a keeps may not be spent"
    assert ask(keeper, "a", spent=2, leased=2).scarce
    assert 95 <= ask(keeper, "b", needs=95).more <= 98
    assert first > 2
    lease = ask(keeper, "a", spent=2, leased=2, needs=99)
    assert "budget reached: 2 tokens of 100 spent, and the next call may cost 99" in lease.refused


def test_a_dead_shards_cost_is_read_from_its_ledger():
    keeper = quotas(tokens=100)
    assert ask(keeper, "a", needs=60).more >= 60
    assert ask(keeper, "b", needs=60).refused is None
    keeper.begin("a", None, Decimal(30))
    assert ask(keeper, "b", needs=70).more == 70
    keeper.begin("a", "2", Decimal(30))
    lease = ask(keeper, "a", attempt="2", spent=30, leased=30, needs=1)
    assert (lease.more, lease.refused) == (0, None)
    ask(keeper, "b", spent=65, leased=70, last=True)
    assert ask(keeper, "a", attempt="2", spent=30, leased=30, needs=5).more == 5


# ---- builds, each shard in a thread of its own, as processes on a cluster are


class Counted(Scripted):
    """Knows how many requests were in flight at most, over all shards."""

    lock = threading.Lock()
    flying = max_flying = 0

    async def complete(self, request, sample=0):
        with self.lock:
            self.flying += 1
            self.max_flying = max(self.max_flying, self.flying)
        try:
            return await super().complete(request, sample)
        finally:
            with self.lock:
                self.flying -= 1


class Shared:
    """Quotas that threads may report to, as an actor takes one report after the other."""

    def __init__(self, *limits):
        self.quotas, self.lock = SharedLimits(*limits), threading.Lock()

    async def report(self, report):
        with self.lock:
            return self.quotas.report(report)


def in_shards(config, of, keeper):
    """All shards at once; how each was built."""

    def build_shard(index):
        shard = Shard(index, of)
        keeper.quotas.begin(shard.name, "1", Decimal(0))
        return build(config, shard=shard, resources=LeasedResources(shard.name, "1", keeper.report))

    with ThreadPoolExecutor(of) as threads:
        return list(threads.map(build_shard, range(1, of + 1)))


def rows(count):
    return [{"prompt": f"question {n}", "answer": f"bad answer {n}"} for n in range(count)]


@pytest.mark.slow
def test_shards_on_leases_build_the_bytes_of_one_run_within_one_limit(tmp_path, monkeypatch):
    model = Counted("reviser", revision, latency=0.005, trouble=0.02)
    install(monkeypatch, reviser=model)
    keys = {"pipeline": "revised", "reviser": endpoint(price=PRICE, max_tokens=100), "concurrency": 6}
    build(recipe(tmp_path / "one", rows(60), **keys))
    model.max_flying = 0
    config = recipe(tmp_path / "all", rows(60), **keys)
    built = in_shards(config, 3, Shared({"reviser": RoleLimits(6)}))
    assert [result.stopped for result in built] == [None] * 3
    assert 4 <= model.max_flying <= 6
    merge(tmp_path / "all-shards")
    assert final_bytes(tmp_path / "all") == final_bytes(tmp_path / "one")


@pytest.mark.slow
def test_shards_on_one_budget_stop_before_it_is_passed_and_use_nearly_all_of_it(tmp_path, monkeypatch):
    model = Counted("reviser", revision, latency=0.002)
    install(monkeypatch, reviser=model)
    money = {"budget": {"tokens": 6_000}, "reviser": endpoint(max_tokens=100)}
    config = recipe(tmp_path / "all", rows(60), pipeline="revised", **money)
    keeper = Shared({"reviser": RoleLimits(64)}, Budget(config.budget, {}, {}))
    built = in_shards(config, 3, keeper)
    assert any("budget reached" in (result.stopped or "") for result in built)
    assert 3_000 <= model.billed <= 6_000
    spent = []
    for index in (1, 2, 3):
        shard = shard_config(config, Shard(index, 3), shared=True)
        with Ledger(shard.ledger_path) as ledger:
            spent.append(sum(ledger.spent(shard.out)["reviser"]))
    assert sum(spent) == model.billed


def test_a_shard_whose_keeper_is_gone_stops_and_keeps_what_it_has(tmp_path, monkeypatch):
    model = Scripted("reviser", revision, latency=0.01)
    install(monkeypatch, reviser=model)
    config = recipe(tmp_path / "all", rows(80), pipeline="revised", reviser=endpoint(), concurrency=4)
    keeper, reports = Shared({"reviser": RoleLimits(4)}), []
    keeper.quotas.begin("1-of-1", "1", Decimal(0))

    async def report(message):
        reports.append(message)
        if len(reports) > 2:
            raise ConnectionError("gone")
        return await keeper.report(message)

    built = build(config, shard=Shard(1, 1), resources=LeasedResources("1-of-1", "1", report))
    assert built.stopped == "the actor with this job's limits is gone"
    request_count = len(model.requests)
    assert 0 < request_count < 80
    (result,) = in_shards(config, 1, Shared({"reviser": RoleLimits(4)}))
    assert result.stopped is None
    assert len(model.requests) == 80, "what was answered before is not asked again"


def test_a_shard_has_a_part_of_the_budget_only_where_batches_keep_it_from_being_shared(tmp_path):
    budget = {"budget": {"tokens": 900}, "pipeline": "revised"}
    live = recipe(tmp_path / "live", rows(1), reviser=endpoint(), **budget)
    batch = recipe(tmp_path / "batch", rows(1), reviser=endpoint(batch=True), **budget)
    budgets = [shard_config(config, Shard(1, 3), shared=True).budget.tokens for config in (live, batch)]
    assert budgets == [900, 300]


@pytest.mark.parametrize("rates", [{"requests_per_minute": 3000}, {"tokens_per_minute": 600_000}])
def test_shards_on_one_rate_build_all_rows(tmp_path, monkeypatch, rates):
    install(monkeypatch, reviser=Scripted("reviser", revision))
    config = recipe(tmp_path / "all", rows(12), pipeline="revised", reviser=endpoint(max_tokens=100, **rates))
    built = in_shards(config, 2, Shared({"reviser": RoleLimits(8, **rates)}))
    assert sum(manifest(result.out)["counts"]["pairs"] for result in built) == 12
