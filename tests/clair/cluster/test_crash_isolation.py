"""Which row a shard dies of, by hand."""

from __future__ import annotations

from clair.cluster.crash_isolation import MAX_CRASHES, CrashHistory
from clair.pipeline.shards import CrashPolicy


def test_a_row_that_a_shard_dies_of_twice_is_left_out_and_the_next_one_is_found_too():
    deaths = CrashHistory()
    policies = []
    for row in (None, None, "a", "a", "b", "b", "b"):
        assert deaths.add_crash(30, row)
        policies.append((sorted(deaths.policy.poison_rows), deaths.policy.log_rows))
    careless, careful, without_a = ([], False), ([], True), (["a"], False)
    assert policies[:4] == [careless, careful, careful, without_a]
    # one by one again only after two more deaths: earlier notes are ignored
    assert policies[4:] == [without_a, (["a"], True), (["a"], True)]
    assert deaths.add_crash(30, "b")
    assert deaths.policy == CrashPolicy(frozenset({"a", "b"}))


def test_a_shard_that_comes_further_between_its_deaths_is_built_on_as_it_is():
    deaths = CrashHistory()
    assert all(deaths.add_crash(answered, None) for answered in range(20))
    assert deaths.policy == CrashPolicy()


def test_a_shard_that_dies_before_any_row_is_hopeless_and_one_that_cannot_be_looked_at_is_not_counted():
    deaths = CrashHistory()
    assert all(deaths.add_crash(0, None) for _ in range(MAX_CRASHES - 1))
    assert all(deaths.add_crash(None, None) for _ in range(20))
    assert not deaths.add_crash(0, None)
