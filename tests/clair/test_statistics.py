"""Intervals against a pencil, scipy, and an independent implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from clair.statistics import clustered_mean, t_quantile


def test_three_clusters_by_pencil():
    # Values 1, 1 | 0, 1 | 0: mean 3/5. Deviations summed by cluster: 0.8, -0.2, -0.6; squares 0.64, 0.04, 0.36: 1.04.
    # se^2 = 3/2 * 1.04 / 25 = 0.0624; t(0.975, 2) = 4.302653.
    found = clustered_mean([1, 1, 0, 1, 0], ["a", "a", "b", "b", "c"])
    assert found.mean == pytest.approx(0.6)
    assert found.se == pytest.approx(math.sqrt(0.0624))
    assert found.lo == pytest.approx(0.6 - 4.302653 * math.sqrt(0.0624), abs=1e-6)
    assert found.hi == pytest.approx(0.6 + 4.302653 * math.sqrt(0.0624), abs=1e-6)
    assert (found.n, found.clusters) == (5, 3)


def test_a_cluster_of_its_own_for_each_value_is_the_textbook_t_interval():
    values = np.random.default_rng(0).normal(2.0, 3.0, 40)
    found = clustered_mean(values.tolist(), range(40))
    interval = stats.t.interval(0.95, 39, loc=values.mean(), scale=stats.sem(values))
    assert found.se == pytest.approx(stats.sem(values))
    assert (found.lo, found.hi) == pytest.approx(interval)


def test_a_cluster_repeated_adds_no_information():
    values, labels = [1.0, 2.0, 4.0, 7.0], [0, 1, 2, 3]
    once, thrice = clustered_mean(values, labels), clustered_mean(values * 3, labels * 3)
    assert thrice.se == pytest.approx(once.se)
    assert thrice.lo == pytest.approx(once.lo)


def sandwich_se(values: list[float], clusters: list[int]) -> float:
    """CR1 by the matrix formula of a regression on a constant (Cameron & Miller 2015, equation 11)."""
    y, g = np.array(values), np.array(clusters)
    x = np.ones((len(y), 1))
    bread = np.linalg.inv(x.T @ x)
    residual = y - x @ (bread @ x.T @ y)
    meat = sum(
        x[g == name].T @ np.outer(residual[g == name], residual[g == name]) @ x[g == name] for name in np.unique(g)
    )
    groups, n, k = len(np.unique(g)), len(y), 1
    return math.sqrt((groups / (groups - 1) * (n - 1) / (n - k) * bread @ meat @ bread).item())


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 5)), min_size=2, max_size=60))
def test_it_agrees_with_the_sandwich_of_a_regression_on_a_constant(rows):
    values, clusters = [v for v, _ in rows], [c for _, c in rows]
    if len(set(clusters)) < 2:
        with pytest.raises(ValueError, match="at least 2"):
            clustered_mean(values, clusters)
        return
    found = clustered_mean(values, clusters)
    se = sandwich_se(values, clusters)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.se == pytest.approx(se, abs=1e-6)
    half = stats.t.ppf(0.975, len(set(clusters)) - 1) * se
    assert found.hi - found.mean == pytest.approx(half, rel=1e-6, abs=1e-4)


@given(st.floats(0.001, 0.999), st.integers(1, 2000))
def test_the_t_quantile_agrees_with_scipy(p, df):
    assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("p", "df"), [(0, 3), (1, 3), (-0.1, 3), (0.5, 0)])
def test_the_t_quantile_refuses_what_has_none(p, df):
    with pytest.raises(ValueError, match="0 < p < 1"):
        t_quantile(p, df)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="3 values but 2 cluster labels"):
        clustered_mean([1, 2, 3], [0, 1])


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0]])
def test_fewer_than_two_clusters_give_no_interval(values):
    with pytest.raises(ValueError, match="at least 2"):
        clustered_mean(values, [0] * len(values))


def test_95_of_100_intervals_hold_the_truth_where_clusters_are_correlated():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        shared = np.repeat(rng.normal(0, 1, 25), 8)
        found = clustered_mean((shared + rng.normal(0, 1, 200)).tolist(), np.repeat(np.arange(25), 8).tolist())
        held += found.lo <= 0 <= found.hi
    assert 0.92 <= held / 400 <= 0.98
