"""Conformal thresholds: by hand, refused where nothing is promised, and the promises over many draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apo.guarantees.conformal import (
    Band,
    band,
    binomial_tail,
    candidate_thresholds,
    crc_threshold,
    joint_promise,
    min_accepted,
    min_units,
    precision_promise,
    precision_threshold,
)
from apo.guarantees.properties import (
    SearchTester,
    adjusted,
    ceiling,
    certify_pairs,
    concave,
    critical_widths,
    floor,
    isotonic,
    monotone,
)
from clair.core.errors import UserError
from recipes.world import toy

# ---- by hand


def longest_monotone(values, width):
    """The largest number of `values`, in order, that a non-decreasing function passes within a band of this width."""
    levels = np.unique(values)
    best = np.full(len(levels) + 1, -1)  # best[k]: the largest number with the highest at levels[k - 1]; best[0]: none
    best[0] = 0
    for value in values:
        level = int(np.searchsorted(levels, value)) + 1
        top = best[: level + 1].max() + 1
        above = slice(level + 1, int(np.searchsorted(levels, value + width, side="right")) + 1)
        best[above] = np.where(best[above] >= 0, best[above] + 1, -1)
        best[level] = top
    return int(best.max())


def test_the_threshold_by_hand():
    # n = 19, alpha = 0.1: floor(0.1 * 20 - 1) = 1 unit may lose, so the second largest value is the threshold.
    values = np.arange(19.0)
    assert crc_threshold(values, 0.1) == 17.0
    assert (values > 17.0).sum() == 1
    assert crc_threshold(values, 0.05) == 18.0


def test_the_threshold_counts_in_exact_arithmetic():
    # 0.29 * 100 - 1 = 28 exactly, 27.999... in floats: 28 units may lose, and the 29th largest is the threshold.
    assert 0.29 * 100 - 1 < 28
    assert crc_threshold(np.arange(99.0), 0.29) == 70.0


@pytest.mark.parametrize(("alpha", "least"), [(0.1, 9), (0.05, 19), (0.01, 99), (0.3, 3)])
def test_too_few_units_give_an_infinite_threshold_and_it_is_reported(alpha, least):
    assert min_units(alpha) == least
    assert crc_threshold(np.zeros(least - 1), alpha) == math.inf
    assert crc_threshold(np.zeros(least), alpha) == 0.0
    assert f"{least - 1} audited prompts are too few for alpha {alpha:g}, which needs {least}" in joint_promise(
        math.inf, alpha, least - 1
    )


def test_with_ties_only_what_lies_strictly_above_is_kept():
    # 30 of 100 units are bad with gap 3: at t = 3 none of them is kept by "above 3", and all of them by "3 or more".
    critical = np.array([3.0] * 30 + [-math.inf] * 70)
    threshold = crc_threshold(critical, 0.1, lowest=-math.inf)
    assert threshold == 3.0
    assert (critical > threshold).mean() == 0
    assert (critical >= threshold).mean() == 0.3


def test_if_hardly_any_pair_is_bad_all_may_be_accepted():
    assert crc_threshold(np.full(50, -math.inf), 0.1, lowest=-math.inf) == -math.inf


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: crc_threshold(np.zeros(10), 1.5), "alpha is 1.5"),
        (lambda: crc_threshold(np.zeros((5, 2)), 0.1), "expected a list of numbers"),
        (lambda: crc_threshold(np.array([0.0, math.nan]), 0.9), "expected a list of numbers"),
        (lambda: band(np.zeros(3), np.zeros(4), 0.1), "3 values up but 4 down"),
        (lambda: precision_threshold(np.zeros(3), np.zeros(3), 0.1, 0.0, np.zeros(1)), "delta is 0"),
    ],
)
def test_impossible_calibrations_are_refused(call, match):
    with pytest.raises(UserError, match=match):
        call()


@pytest.mark.parametrize(("alpha", "delta", "least"), [(0.05, 0.1, 45), (0.1, 0.1, 22)])
def test_the_fewest_kept_pairs_are_the_first_to_pass(alpha, delta, least):
    assert min_accepted(alpha, delta) == least
    assert binomial_tail(0, least, alpha) <= delta < binomial_tail(0, least - 1, alpha)


def test_the_binomial_tail_is_scipys():
    from scipy.stats import binom

    for successes, n, p in ((0, 0, 0.1), (3, 20, 0.1), (40, 300, 0.1), (900, 1000, 0.95)):
        assert binomial_tail(successes, n, p) == pytest.approx(binom.cdf(successes, n, p), rel=1e-9)


def test_precision_stops_at_the_first_threshold_that_fails():
    # Kept above 3: 50 good. Above 2: 50 more, all bad, which fails. Above 1: 900 good would pass, too late.
    gap = np.repeat([4.0, 3.0, 2.0], [50, 50, 900])
    bad = np.repeat([False, True, False], [50, 50, 900])
    assert precision_threshold(gap, bad, 0.1, 0.1, np.array([1.0, 2.0, 3.0])) == 3.0
    assert binomial_tail(50, 1000, 0.1) < 0.1
    assert precision_threshold(gap, bad, 0.1, 0.1, np.array([2.0])) == math.inf
    assert "audit more, or raise alpha" in precision_promise(math.inf, 0.1, 0.1, 1000)


def test_candidates_run_from_strict_to_loose_and_end_with_keeping_all():
    gap = np.repeat([0.0, 1.0, 2.0, 3.0], [100, 100, 100, 10])
    # alpha 0.1, delta 0.1 need 22 kept; with a margin of a half 33 of 100 units. 3 keeps none, 2 keeps 3, 1 keeps 35.
    assert candidate_thresholds(gap, 100, 0.1, 0.1).tolist() == [1.0, 0.0, -1.0]
    assert candidate_thresholds(gap, 10, 0.1, 0.1).tolist() == []


def test_a_small_sample_gets_the_even_direction_and_a_large_one_chooses():
    rng = np.random.default_rng(0)
    up, down = rng.exponential(5.0, 400), rng.exponential(0.5, 400)
    even = band(up[:60], down[:60], 0.1)
    assert even.above == pytest.approx(even.below)
    assert band(up, down, 0.1).above > 2 * band(up, down, 0.1).below
    # 150 units are enough for alpha 0.01, half of them are not: no direction is chosen.
    strict = band(up[:150], down[:150], 0.01)
    assert strict.above == pytest.approx(strict.below)
    assert math.isfinite(strict.width)
    assert math.isinf(band(up[:5], down[:5], 0.1).width)


def test_properties_by_hand():
    units, line = np.array([[0.0], [1.0]]), np.array([0.5])

    def widths(score, direction):
        return critical_widths(score, direction, units).round(6).tolist()

    falling = lambda x: -x[:, 0]  # noqa: E731
    assert widths(falling, monotone(0, line)) == [0.5, 0.5]
    assert widths(falling, monotone(0, line, increasing=False)) == [0.0, 0.0]
    assert widths(falling, floor(-0.25)) == [0.0, 0.75]
    assert widths(falling, ceiling(-0.25)) == [0.25, 0.0]
    assert widths(falling, concave(0, line)) == [0.0, 0.0]
    # x^2 on the way from 0 or 1 to 0.5: above by t (1 - t) / 4 for a share t.
    shares = np.random.default_rng(0)
    shares.choice(line, 2)
    t = shares.random((2, 1))[:, 0]
    squared = critical_widths(lambda x: x[:, 0] ** 2, concave(0, line), units)
    assert squared == pytest.approx(t * (1 - t) / 4)


def test_the_search_walks_from_the_middle_to_the_unit_by_hand():
    # Pivots 1, 2, 3: the unit at 2.5 meets 2, then 3. f(2) = 5 lies 4 above its 1, and it lies 1 above f(3) = 0.
    score = lambda x: np.select([x[:, 0] == 2, x[:, 0] == 3, x[:, 0] == 1], [5.0, 0.0, 9.0], 1.0)  # noqa: E731
    up, down = SearchTester(0, np.array([1.0, 2.0, 3.0])).sides(score, np.array([[2.5]]))
    assert (up.tolist(), down.tolist()) == ([4.0], [1.0])
    # A score that should fall: the mirrored score has the same faults, and they are mended on the other side.
    mirrored = SearchTester(0, np.array([1.0, 2.0, 3.0]), increasing=False).sides(
        lambda x: -score(x), np.array([[2.5]])
    )
    assert [side.tolist() for side in mirrored] == [[1.0], [4.0]]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30))
def test_isotonic_is_scipys(values):
    from scipy.optimize import isotonic_regression

    assert isotonic(np.array(values, float)) == pytest.approx(isotonic_regression(values).x)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(0, 4))
def test_the_longest_monotone_share_is_that_of_all_subsets(values, width):
    best = 0
    for chosen in range(1 << len(values)):
        subset = [v for position, v in enumerate(values) if chosen >> position & 1]
        if all(earlier - later <= width for index, later in enumerate(subset) for earlier in subset[:index]):
            best = max(best, len(subset))
    assert longest_monotone(np.array(values, float), float(width)) == best


def test_an_adjusted_score_stays_in_the_band_and_a_wide_band_makes_it_monotone():
    points = np.linspace(0, 1, 60)[:, None]
    grid = np.linspace(0, 1, 41)
    narrow, wide = (adjusted(toy.dip, 0, grid, Band(w, w))(points) for w in (0.05, 5.0))
    assert abs(narrow - toy.dip(points)).max() == pytest.approx(0.05)
    assert np.diff(toy.dip(points)).min() < -0.05
    assert np.diff(wide).min() > -0.02  # not exactly 0: each point has a line of its own
    falling = adjusted(lambda x: -toy.dip(x), 0, grid, Band(5.0, 5.0), increasing=False)(points)
    assert falling == pytest.approx(-wide)


def test_a_certificate_says_which_promise_it_makes():
    rng = np.random.default_rng(0)
    units = rng.random((200, 1))
    widths = critical_widths(toy.dip, monotone(0, np.linspace(0, 1, 100)), units)
    pairs = certify_pairs(widths, 0.1, "rises")
    domain = SearchTester(0, np.linspace(0, 1, 64)).certify(toy.dip, units, 0.1)
    assert "pair risk" in pairs.summary()
    assert "nothing about a share of the domain" in pairs.summary()
    assert "domain certificate: on at least 0.9 of the domain" in domain.summary()
    assert domain.band.width > pairs.band.width
    assert "no finite band: alpha 0.001 needs 999 units" in certify_pairs(widths, 0.001, "rises").summary()


# ---- the promises, over many draws


def standard_error(values: list[float]) -> float:
    return float(np.std(values) / math.sqrt(len(values)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 200, 500])
@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.01])
def test_d1_mean_risk_over_500_draws_is_alpha(n, alpha):
    rng = np.random.default_rng(0)
    population = critical_widths(toy.dip, monotone(0, np.linspace(0, 1, 100_001)), rng.random((400_000, 1)), 1)
    assert (population > 0).mean() == pytest.approx(0.133, abs=0.003)
    risks, above = [], 0
    for _ in range(500):
        threshold = crc_threshold(rng.choice(population, n), alpha)
        assert (threshold == math.inf) == (n < 1 / alpha - 1)
        risks.append(float((population > threshold).mean()))
        above += risks[-1] > alpha
    print(f"n {n}, alpha {alpha}: {np.mean(risks):.4f} +- {standard_error(risks):.4f}, {above / 500:.0%} above alpha")
    assert np.mean(risks) <= alpha + 3 * standard_error(risks)
    if n >= 1 / alpha - 1:
        assert np.mean(risks) >= alpha - 2 / (n + 1) - 3 * standard_error(risks)
        assert above > 100  # the promise is on average: single draws lie above, and the docs say so


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.01])
def test_d2_a_monotone_function_is_in_the_band_on_what_the_search_accepts(alpha):
    rng = np.random.default_rng(0)
    tester = SearchTester(0, np.linspace(0, 1, 129)[1:-1])
    units = np.sort(rng.random((20_000, 1)), axis=0)
    f, (up, down) = toy.dip(units), tester.sides(toy.dip, units)
    shares = []
    for draw in range(300):
        drawn = rng.integers(len(units), size=500)
        within = band(up[drawn], down[drawn], alpha, seed=draw)
        accepted = (up <= within.above) & (down <= within.below)
        monotone_function = np.maximum.accumulate(f[accepted] - within.below)
        assert (monotone_function <= f[accepted] + within.above + 1e-12).all()
        shares.append(float(accepted.mean()))
    print(f"alpha {alpha}: accepted {np.mean(shares):.4f} +- {standard_error(shares):.4f}")
    assert np.mean(shares) >= 1 - alpha - 3 * standard_error(shares)


def test_pairs_alone_do_not_certify_the_domain():
    rng = np.random.default_rng(0)
    widths = critical_widths(toy.dip, monotone(0, np.linspace(0, 1, 10_001)), rng.random((20_000, 1)))
    width = crc_threshold(widths, 0.05)
    line = toy.dip(np.linspace(0, 1, 1000)[:, None])
    share = longest_monotone(line, width) / 1000
    assert (widths > width).mean() <= 0.05
    assert share < 0.93


@pytest.mark.slow
def test_d3_choosing_a_point_of_the_grid_breaks_the_promise_and_a_direction_keeps_it():
    rng = np.random.default_rng(0)
    up, down = SearchTester(0, np.linspace(0, 1, 129)[1:-1]).sides(toy.dip, rng.random((50_000, 1)))

    def risk(above, below):
        return float(((up > above) | (down > below)).mean())

    def best_on_the_data(u, d, alpha):
        allowed = math.floor(alpha * (len(u) + 1) - 1)
        bounds = {x: float(np.sort(np.where(u > x, math.inf, d))[::-1][allowed]) for x in np.append(u, 0.0)}
        above = min(bounds, key=lambda x: x + bounds[x])
        return above, bounds[above]

    for n in (50, 100, 500):
        naive, ours = [], []
        for draw in range(400):
            drawn = rng.integers(len(up), size=n)
            naive.append(risk(*best_on_the_data(up[drawn], down[drawn], 0.1)))
            within = band(up[drawn], down[drawn], 0.1, seed=draw)
            ours.append(risk(within.above, within.below))
        means = [f"{np.mean(risks):.4f} +- {standard_error(risks):.4f}" for risks in (naive, ours)]
        print(f"n {n}: best point of the data {means[0]}, direction {means[1]}")
        assert np.mean(ours) <= 0.1 + 3 * standard_error(ours)
        if n == 50:
            assert np.mean(naive) > 0.1 + 5 * standard_error(naive)


@pytest.mark.slow
def test_d4_the_filter_keeps_both_promises_with_ties():
    large = toy.audited(200_000, seed=1)
    unlabelled = toy.audited(5000, seed=2).gap
    joint, strict_only, shares, failed = [], [], [], 0
    for draw in range(500):
        audit = toy.audited(1000, seed=100 + draw)
        critical = np.where(audit.bad, audit.gap, -math.inf)
        threshold = crc_threshold(critical, 0.1, lowest=-math.inf)
        joint.append(float(((large.gap > threshold) & large.bad).mean()))
        strict_only.append(float(((large.gap >= threshold) & large.bad).mean()))
        candidates = candidate_thresholds(unlabelled, 1000, 0.1, 0.1)
        precise = precision_threshold(audit.gap, audit.bad, 0.1, 0.1, candidates)
        passing = large.gap > precise
        shares.append(float(large.bad[passing].mean()) if passing.any() else 0.0)
        failed += shares[-1] > 0.1
    print(f"joint {np.mean(joint):.4f}, with >= {np.mean(strict_only):.4f}")
    print(f"share of bad {np.mean(shares):.4f}, above alpha in {failed / 500:.1%} of the draws")
    assert np.mean(joint) <= 0.1 + 3 * standard_error(joint)
    assert np.mean(strict_only) > 0.1 + 3 * standard_error(strict_only)
    assert failed / 500 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 500)
    assert np.mean(shares) > 0


@pytest.mark.slow
def test_the_tabular_example_keeps_its_risks_and_costs_little_error():
    from docs.make_monotone import measure

    for alpha, row in measure(20).items():
        print(alpha, row)
        assert row["risk, constrained"] == 0
        assert row["risk, unconstrained"] > 0.3
        assert row["risk, adjusted"] <= alpha + 0.02  # about three standard errors of the mean of 20 splits
        assert row["MSE, adjusted"] < 1.05 * row["MSE, unconstrained"]
