"""Intervals against a pencil, scipy, and an independent implementation."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from clair.core.statistics import (
    best_of,
    clustered_mean,
    clustered_score,
    design_se,
    equivalence_margin,
    equivalence_p,
    exact_proportion,
    holm,
    paired_difference,
    sign_test,
    two_way_mean,
    variance_components,
    wilson,
)
from clair.core.student_t import detectable_difference, t_quantile, t_test_power, t_two_sided

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import statsmodels.api as sm
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.proportion import proportion_confint


def test_three_clusters_by_pencil():
    # Values 1, 1 | 0, 1 | 0: mean 3/5. Deviations summed by cluster: 0.8, -0.2, -0.6; squares 0.64, 0.04, 0.36, each
    # over 1 - n_g / 5, that is 3/5, 3/5, 4/5: 1.066667 + 0.066667 + 0.45. se^2 = 1.583333 / 25.
    # u_g = n_g^2 / (5 - n_g) = 4/3, 4/3, 1/4: df = 25 / (9 + (35/12)^2 - (16/9 + 16/9 + 1/16)) = 25 / 13.888889 = 1.8.
    estimate = clustered_mean([1, 1, 0, 1, 0], ["a", "a", "b", "b", "c"])
    assert estimate.mean == pytest.approx(0.6)
    assert estimate.se == pytest.approx(math.sqrt(1.583333333 / 25))
    assert estimate.df == pytest.approx(1.8)
    assert estimate.hi - 0.6 == pytest.approx(0.6 - estimate.lo) == pytest.approx(stats.t.ppf(0.975, 1.8) * estimate.se)
    assert (estimate.n, estimate.clusters) == (5, 3)


def test_a_cluster_of_its_own_for_each_value_is_the_textbook_t_interval():
    values = np.random.default_rng(0).normal(2.0, 3.0, 40)
    estimate = clustered_mean(values.tolist(), range(40))
    interval = stats.t.interval(0.95, 39, loc=values.mean(), scale=stats.sem(values))
    assert estimate.se == pytest.approx(stats.sem(values))
    assert (estimate.lo, estimate.hi) == pytest.approx(interval)


def test_a_cluster_repeated_adds_no_information():
    values, labels = [1.0, 2.0, 4.0, 7.0], [0, 1, 2, 3]
    once, thrice = clustered_mean(values, labels), clustered_mean(values * 3, labels * 3)
    assert thrice.se == pytest.approx(once.se)
    assert thrice.lo == pytest.approx(once.lo)


def cr2(values: list[float], clusters: list[int]) -> tuple[float, float]:
    """CR2 standard error and Bell-McCaffrey degrees of a regression on a constant, by the matrices of their paper."""
    y, g = np.array(values), np.array(clusters)
    n, names = len(y), np.unique(g)
    x = np.ones((n, 1))
    hat = x @ np.linalg.inv(x.T @ x) @ x.T
    rows = []
    for name in names:
        inside = g == name
        eigenvalues, vectors = np.linalg.eigh(np.eye(inside.sum()) - hat[np.ix_(inside, inside)])
        root = vectors @ np.diag(np.where(eigenvalues > 1e-12, eigenvalues, np.inf) ** -0.5) @ vectors.T
        rows.append(np.linalg.inv(x.T @ x) @ x[inside].T @ root @ (np.eye(n) - hat)[inside])
    vectors = np.concatenate(rows)
    inner = vectors @ vectors.T
    return math.sqrt(((vectors @ y) ** 2).sum()), np.trace(inner) ** 2 / (inner**2).sum()


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 5)), min_size=2, max_size=60))
def test_it_agrees_with_the_matrices_of_bell_and_mccaffrey(rows):
    values, clusters = [v for v, _ in rows], [c for _, c in rows]
    if len(set(clusters)) < 2:
        with pytest.raises(ValueError, match="at least 2"):
            clustered_mean(values, clusters)
        return
    estimate = clustered_mean(values, clusters)
    se, df = cr2(values, clusters)
    assert estimate.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert estimate.se == pytest.approx(se, abs=1e-6)
    assert estimate.df == pytest.approx(df)
    assert estimate.hi - estimate.mean == pytest.approx(stats.t.ppf(0.975, estimate.df) * se, rel=1e-6, abs=1e-4)


def test_clusters_of_one_size_give_what_statsmodels_gives():
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(30), 4)
    values = rng.normal(0, 1, 120) + rng.normal(0, 1, 30)[clusters]
    fitted = sm.OLS(values, np.ones(120)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    estimate = clustered_mean(values.tolist(), clusters.tolist())
    assert estimate.se == pytest.approx(fitted.bse[0])
    assert (estimate.lo, estimate.hi) == pytest.approx(tuple(fitted.conf_int()[0]))
    assert estimate.df == pytest.approx(29)


@given(st.floats(0.001, 0.999), st.floats(1, 2000))
def test_the_t_quantile_agrees_with_scipy(p, df):
    assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-9, abs=1e-9)


@given(st.floats(1e-6, 60), st.floats(1, 2000))
def test_the_tails_of_t_agree_with_scipy(t, df):
    assert t_two_sided(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-7)
    assert t_two_sided(-t, math.inf) == pytest.approx(2 * stats.norm.sf(t), rel=1e-9)


def test_a_t_on_one_degree_by_pencil():
    # Cauchy: P(|T| > 1) = 1/2.
    assert t_two_sided(1, 1) == pytest.approx(0.5)
    assert t_quantile(0.75, 1) == pytest.approx(1)
    assert t_quantile(0.5, 7) == 0


@pytest.mark.parametrize(("p", "df"), [(0, 3), (1, 3), (-0.1, 3), (0.5, 0), (0.5, math.nan)])
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


# ---- scores in [0, 1]


def test_a_score_with_a_cluster_for_each_row_is_nearly_wilsons():
    # Effective n = p (1 - p) / se^2 = n - 1, since se^2 = p (1 - p) / (n - 1); t on n - 1 degrees in place of z.
    values = [1.0] * 30 + [0.0] * 70
    estimate = clustered_score(values, range(100))
    expected = wilson(30 / 100 * 99, 99, t_quantile(0.975, 99))
    assert (estimate.lo, estimate.hi) == pytest.approx((expected.lo, expected.hi))
    assert estimate[:2] == clustered_mean(values, range(100))[:2]


@given(st.lists(st.tuples(st.sampled_from([0, 0.1, 0.5, 1]), st.integers(0, 5)), min_size=2, max_size=60))
@example([(0, 1), (0.1, 0), (0.1, 0), (0.1, 2), (0.1, 2), (0.5, 0), (0.5, 1), (0.5, 2)])
def test_a_score_and_its_interval_stay_inside_and_are_never_a_point(rows):
    clusters = [c for _, c in rows]
    if len(set(clusters)) > 1:
        estimate = clustered_score([v for v, _ in rows], clusters)
        assert 0 <= estimate.lo <= estimate.mean + 1e-12
        assert estimate.mean - 1e-12 <= estimate.hi <= 1
        # Clusters whose means nearly agree by chance give a narrow t interval: its 95 % are over all draws, and the
        # example's is 0.041 wide. Only without any variation is there a width to require.
        assert estimate.hi - estimate.lo > (0.05 if estimate.se == 0 else 0)


def test_all_wrong_is_not_certain():
    # Four questions with two answers each, none right: 0 of 4, with t on 3 degrees.
    estimate = clustered_score([0.0] * 8, [0, 0, 1, 1, 2, 2, 3, 3])
    t = stats.t.ppf(0.975, 3)
    assert (estimate.mean, estimate.se, estimate.lo) == (0, 0, 0)
    assert estimate.hi == pytest.approx(t**2 / (4 + t**2))


def test_a_score_outside_of_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"scores from 0 to 1\.5"):
        clustered_score([0, 1.5], [0, 1])


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_agrees_with_statsmodels(successes, n):
    successes = min(successes, n)
    assert wilson(successes, n)[2:4] == pytest.approx(proportion_confint(successes, n, method="wilson"), abs=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 120), st.integers(1, 120))
@example(105, 105)
def test_the_exact_interval_of_a_proportion_agrees_with_scipy(successes, n):
    successes = min(successes, n)
    expected = stats.binomtest(successes, n).proportion_ci(0.95, "exact")
    assert exact_proportion(successes, n)[2:4] == pytest.approx(expected, abs=1e-9)


def test_105_of_105_is_not_certain():
    assert exact_proportion(105, 105)[2:4] == pytest.approx((0.965, 1.0), abs=5e-4)


def test_clusters_in_two_ways_by_matrices():
    rng = np.random.default_rng(1)
    values = 2 * rng.normal(size=(4, 1)) + 2 * rng.normal(size=(1, 6)) + rng.normal(size=(4, 6))
    first, second = np.divmod(np.arange(24), 6)
    residuals = values - values.mean()
    rows, columns = (residuals.sum(axis) ** 2 for axis in (1, 0))
    variance = (rows.sum() * 4 / 3 + columns.sum() * 6 / 5 - (residuals**2).sum() * 24 / 23) / 24**2
    result = two_way_mean(list(values.ravel()), list(first), list(second))
    assert (result.mean, result.se) == pytest.approx((values.mean(), math.sqrt(variance)))
    assert 3 < result.df < 8  # Satterthwaite's, between those of either way and their sum


def test_two_way_intervals_hold_the_truth_where_one_way_intervals_do_not():
    rng, hits = np.random.default_rng(1), Counter()
    first, second = (list(side) for side in np.divmod(np.arange(8 * 20), 20))
    for _ in range(300):
        values = list(rng.normal(size=8)[first] + rng.normal(size=20)[second] + rng.normal(size=160))
        for name, estimate in (("two", two_way_mean(values, first, second)), ("one", clustered_mean(values, second))):
            hits[name] += estimate.lo <= 0 <= estimate.hi
    assert hits["two"] > 0.92 * 300
    assert hits["one"] < 0.85 * 300


# ---- pairs and many


def test_a_paired_difference_by_pencil():
    # Differences 1, 0 | -1, 1 | 1: 2 / 5. Sums of deviations 0.2, -0.8, 0.6 over 1 - n_g / 5.
    difference = paired_difference([0, 1, 1, 0, 0], [1, 1, 0, 1, 1], ["a", "a", "b", "b", "c"])
    se = math.sqrt((0.04 / 0.6 + 0.64 / 0.6 + 0.36 / 0.8) / 25)
    assert difference.estimate.mean == pytest.approx(0.4)
    assert difference.estimate.se == pytest.approx(se)
    assert difference.p == pytest.approx(2 * stats.t.sf(0.4 / se, 1.8))
    assert (difference.better, difference.worse) == (3, 1)


def test_a_difference_without_clusters_is_the_paired_t_test():
    rng = np.random.default_rng(5)
    base, tuned = rng.normal(0, 1, 50), rng.normal(0.3, 1, 50)
    difference = paired_difference(base.tolist(), tuned.tolist(), range(50))
    reference = stats.ttest_rel(tuned, base)
    assert difference.p == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval()
    assert (difference.estimate.lo, difference.estimate.hi) == pytest.approx((interval.low, interval.high))


def test_no_difference_and_one_without_spread():
    assert paired_difference([0, 1, 1], [0, 1, 1], [0, 1, 2]).p == 1
    assert math.isnan(paired_difference([0, 0, 0], [1, 1, 1], [0, 1, 2]).p)
    with pytest.raises(ValueError, match="2 rows against 3"):
        paired_difference([0, 0], [1, 1, 1], [0, 1])


def test_rows_that_all_differ_by_the_same_amount_give_no_interval():
    for tuned in ([0, 1, 1], [1, 2, 2]):
        estimate = paired_difference([0, 1, 1], tuned, [0, 1, 2]).estimate
        assert estimate.mean == tuned[0]
        assert all(map(math.isnan, (estimate.se, estimate.lo, estimate.hi)))


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_agrees_with_scipy(better, worse):
    if better + worse:
        assert sign_test(better, worse) == pytest.approx(stats.binomtest(better, better + worse).pvalue, abs=1e-12)
    else:
        assert sign_test(0, 0) == 1


@pytest.mark.parametrize(("better", "worse"), [(512, 512), (0, 1024), (900, 1100), (9000, 9300)])
def test_the_sign_test_of_thousands_agrees_with_scipy(better, worse):
    assert sign_test(better, worse) == pytest.approx(stats.binomtest(better, better + worse).pvalue, rel=1e-9)


def test_four_better_and_none_worse_is_no_difference_though_t_finds_one():
    tuned = [1.0] * 4 + [0.0] * 96
    difference = paired_difference([0.0] * 100, tuned, range(100))
    assert difference.p == pytest.approx(0.045, abs=1e-3)
    assert (difference.differing, difference.p_sign, difference.cautious_p) == (4, 0.125, 0.125)
    # Rows of one question count once: four of them are two.
    assert paired_difference([0.0] * 100, tuned, [n // 2 for n in range(100)]).p_sign == 0.5
    # If ten differ, t is used.
    many = paired_difference([0.0] * 100, [1.0] * 10 + [0.0] * 90, range(100))
    assert many.cautious_p == many.p


def test_the_cautious_p_is_below_5_percent_in_at_most_5_of_100_cases_without_a_difference():
    """Few of 200 questions differ, as often for the better as for the worse."""
    rng, rejections = np.random.default_rng(3), {"t": 0, "cautious": 0}
    for _ in range(2000):
        differing = rng.integers(4, 10)
        signs = np.concatenate([rng.choice([-1.0, 1.0], differing), np.zeros(200 - differing)])
        difference = paired_difference([0.0] * 200, signs.tolist(), range(200))
        rejections["t"] += difference.p < 0.05
        rejections["cautious"] += difference.cautious_p < 0.05
    assert rejections["cautious"] <= 0.05 * 2000 < rejections["t"]


def test_holm_by_pencil():
    # Of 0.01, 0.04, 0.03: 3 x 0.01, 2 x 0.03, and 0.04, lifted to what came before it.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    corrected = holm([0.02, math.nan, 0.9])
    assert corrected[0] == pytest.approx(0.06)  # a comparison without p-value counts too
    assert math.isnan(corrected[1])
    assert corrected[2] == pytest.approx(1)


@settings(max_examples=15)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_agrees_with_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=12).filter(lambda v: np.std(v) > 1e-3), st.floats(0.05, 1))
def test_equivalence_agrees_with_two_t_tests_of_scipy(values, margin):
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    estimate = clustered_mean(values, range(len(values)))
    assert equivalence_p(estimate, margin) == pytest.approx(max(above, below), abs=1e-9)


def test_equivalence_has_its_level_at_the_margin_and_about_80_percent_power_at_zero():
    rng, n, found = np.random.default_rng(0), 10, Counter()
    margin = equivalence_margin(1.0, n)
    for _ in range(1000):
        for truth in (0.0, margin):
            estimate = clustered_mean(list(rng.normal(truth, 1.0, n)), range(n))
            found[truth] += equivalence_p(estimate, margin) < 0.05
    assert 0.75 * 1000 < found[0.0] < 0.9 * 1000
    assert found[margin] < 0.07 * 1000


def test_equal_values_are_equivalent_if_they_lie_within_the_margin():
    assert equivalence_p(clustered_mean([0.1, 0.1], [0, 1]), 0.2) == 0.0
    assert equivalence_p(clustered_mean([0.3, 0.3], [0, 1]), 0.2) == 1.0


# ---- the best of several means


def test_one_candidate_is_chosen_without_bias():
    values = np.random.default_rng(9).normal(1, 1, 60).tolist()
    best = best_of([values], range(60))
    assert (best.candidate, best.observed) == (0, pytest.approx(np.mean(values)))
    assert best.bias < 0.05 * np.std(values)


def test_a_candidate_that_is_far_ahead_is_chosen_without_bias():
    rng = np.random.default_rng(10)
    ahead, others = rng.normal(2, 1, 100), rng.normal(0, 1, (4, 100))
    best = best_of([*others.tolist()[:2], ahead.tolist(), *others.tolist()[2:]], range(100))
    assert best.candidate == 2
    assert best.bias < 0.02
    assert best.lo < ahead.mean() < best.hi


def test_the_nested_bootstrap_agrees_with_all_samples_of_three_clusters():
    values = np.array([[0.0, 3.0, 1.5], [2.0, 0.5, 1.0]])

    def gains(world: np.ndarray) -> list[float]:
        """The fall of the winner of each of the 27 samples in the world it was drawn from."""
        samples = [world[:, list(drawn)] for drawn in itertools.product(range(3), repeat=3)]
        means = [sample.mean(1) for sample in samples]
        return [m.max() - world[int(m.argmax())].mean() for m in means]

    outer = np.mean(gains(values))
    inner = np.mean([np.mean(gains(values[:, list(drawn)])) for drawn in itertools.product(range(3), repeat=3)])
    best = best_of(values.tolist(), range(3), draws=3000, inner=30)
    assert (best.candidate, best.observed) == (0, pytest.approx(1.5))
    assert best.bias == pytest.approx(2 * outer - inner, abs=0.03)


@pytest.mark.slow
def test_the_bias_of_the_best_of_ten_equal_checkpoints_is_found():
    """True bias: the expected maximum of ten standard normals, 1.539 standard errors. The estimate holds most of it."""
    rng = np.random.default_rng(11)
    clusters, biases, true, held, naive = np.arange(120).tolist(), [], [], 0, 0
    for _ in range(150):
        values = rng.normal(0, math.sqrt(120), (10, 120))
        best = best_of(values.tolist(), clusters, draws=150, inner=50)
        biases.append(best.bias)
        true.append(best.observed)
        held += best.lo <= 0 <= best.hi
        naive += abs(best.observed) <= 1.96
    print(f"true {np.mean(true):.3f}, found {np.mean(biases):.3f}, held {held}, naive {naive} of 150")
    assert np.mean(true) == pytest.approx(1.539, abs=0.15)
    assert 0.75 * 1.539 < np.mean(biases) < 1.539
    assert held >= 0.9 * 150 > naive


# ---- power


def test_components_by_pencil():
    # Clusters (0, 2) and (4, 6): inside 4 squares of 1 over 4 - 2; means 1 and 5 around 3: 2 (4 + 4) / 1 = 16.
    variances = variance_components([0, 2, 4, 6], ["a", "a", "b", "b"])
    assert variances.within == pytest.approx(2)
    assert variances.between == pytest.approx((16 - 2) / 2)
    assert math.isnan(variance_components([0.0, 1.0], [0, 1]).within)


def test_components_of_equal_clusters_are_those_of_a_mixed_model():
    rng = np.random.default_rng(12)
    clusters = np.repeat(np.arange(50), 6)
    values = rng.normal(0, 2, 50)[clusters] + rng.normal(0, 1, 300)
    fitted = sm.MixedLM(values, np.ones(300), groups=clusters).fit(reml=True)
    variances = variance_components(values.tolist(), clusters.tolist())
    assert variances.between == pytest.approx(fitted.cov_re[0, 0], rel=1e-3)
    assert variances.within == pytest.approx(fitted.scale, rel=1e-3)


def test_the_design_foretells_the_error_that_is_found():
    rng = np.random.default_rng(13)
    sizes = rng.integers(1, 6, 400)
    clusters = np.repeat(np.arange(400), sizes)
    values = rng.normal(0, 1, 400)[clusters] + rng.normal(0, 1, len(clusters))
    variances = variance_components(values.tolist(), clusters.tolist())
    predicted = design_se(variances, sizes.tolist())
    assert predicted == pytest.approx(clustered_mean(values.tolist(), clusters.tolist()).se, rel=0.1)
    assert (
        design_se(variances, sizes.tolist(), samples=math.inf)
        < design_se(variances, sizes.tolist(), samples=4)
        < predicted
    )


@pytest.mark.parametrize("df", [1, 1.8, 3, 4, 10, 40, 366, 1e5])
def test_power_agrees_with_the_noncentral_t(df):
    for effect in (0.5, 1.0, 2.0, 2.8, 4.0, 12.0):
        critical = stats.t.ppf(0.975, df)
        exact = stats.nct.sf(critical, df, effect) + np.nan_to_num(stats.nct.cdf(-critical, df, effect))
        assert t_test_power(effect, 1.0, df) == pytest.approx(exact, abs=1e-8)
    assert t_test_power(detectable_difference(1.0, df), 1.0, df) == pytest.approx(0.8, abs=1e-6)
    assert t_test_power(0.0, 1.0, df) == pytest.approx(0.05)
    assert detectable_difference(1.0) == pytest.approx(1.959964 + 0.841621, abs=1e-5)


# ---- coverage: how often an interval that says 95 % holds the truth, over evaluations of MixEval-Hard 2024-06-01

FREE_FORM = {1: 2, 2: 149, 3: 3, 4: 19, 6: 4, 8: 2, 9: 1, 10: 3, 14: 1, 22: 1}
MULTIPLE_CHOICE = {1: 25, 2: 202, 3: 3, 4: 14, 6: 1}
"""Rows about one passage, or one question without any: how many of these clusters there are of each size."""
SIZES = np.array(
    [size for split in (FREE_FORM, MULTIPLE_CHOICE) for size, count in split.items() for _ in range(count)]
)
CLUSTERS = np.repeat(np.arange(len(SIZES)), SIZES).tolist()


def test_these_are_the_sizes_of_mixeval(shared):
    row_count = 0
    for name, sizes in (("free-form", FREE_FORM), ("multiple-choice", MULTIPLE_CHOICE)):
        file = shared / "data" / "mixeval" / "2024-06-01" / "mixeval-hard" / f"{name}.json"
        rows = json.loads(file.read_text("utf-8")).values()
        questions = Counter(
            row["context"] if (row["context"] or "none").strip().lower() not in ("", "none", "null") else row["prompt"]
            for row in rows
        )
        assert Counter(questions.values()) == sizes
        row_count += len(rows)
    assert row_count == len(CLUSTERS) == 1000


def answers(rng: np.random.Generator, accuracy: float) -> np.ndarray:
    """Right or wrong for each row: beta-binomial over questions, correlated 0.5 within one, [1000]."""
    chance = rng.beta(accuracy, 1 - accuracy, len(SIZES))
    return (rng.random(len(CLUSTERS)) < np.repeat(chance, SIZES)).astype(float)


def coverage(accuracy: float, evaluations: int, seed: int = 0) -> tuple[float, float, float]:
    """Shares that hold the truth: the score's interval, the symmetric one, the difference's of two such models."""
    rng, held = np.random.default_rng(seed), np.zeros(3)
    for _ in range(evaluations):
        base, tuned = answers(rng, accuracy).tolist(), answers(rng, accuracy).tolist()
        difference = paired_difference(base, tuned, CLUSTERS).estimate
        estimates = (clustered_score(base, CLUSTERS), clustered_mean(base, CLUSTERS), difference)
        held += [e.lo <= truth <= e.hi for e, truth in zip(estimates, (accuracy, accuracy, 0), strict=True)]
    return tuple(held / evaluations)


def test_about_95_of_100_intervals_hold_the_truth():
    score, _, difference = coverage(0.3, 300)
    assert 0.92 <= score <= 0.98
    assert 0.92 <= difference <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.25, 0.3, 0.4, 0.5])
def test_93_to_97_of_100_intervals_hold_the_truth_over_2000_evaluations(accuracy):
    shares = coverage(accuracy, 2000)
    print(f"accuracy {accuracy}: score {shares[0]:.4f}, symmetric {shares[1]:.4f}, difference {shares[2]:.4f}")
    assert all(0.93 <= share <= 0.97 for share in shares)


@pytest.mark.slow
def test_near_0_the_symmetric_interval_fails_and_the_scores_does_not():
    score, symmetric, _ = coverage(0.02, 2000)
    print(f"accuracy 0.02: score {score:.4f}, symmetric {symmetric:.4f}")
    assert symmetric < 0.93 <= score <= 0.97
