"""Confidence intervals and tests for clustered data.

A cluster is a unit that is sampled independently, such as a question that a benchmark has in several rows and an
evaluation answers several times. Values of one cluster may be correlated in any way. docs/intervals.md gives the
measured coverage of these intervals. Only the bootstrap imports numpy, when it runs.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from clair.core.student_t import t_cdf, t_quantile, t_two_sided

if TYPE_CHECKING:
    import numpy as np


class Estimate(NamedTuple):
    """A mean with its standard error and 95 % confidence interval; `df` are the degrees of freedom of its t."""

    mean: float
    se: float
    lo: float
    hi: float
    n: int
    clusters: int
    df: float = math.inf


# ---- one mean


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of `values` with the cluster-robust (CR2) standard error and a t interval.

    se^2 = sum_g (sum_{i in g} (v_i - mean))^2 / (1 - n_g / n) / n^2, which is unbiased for independent values, with
    `satterthwaite` degrees of freedom (Bell & McCaffrey 2002). For clusters of equal size this is CR1 with clusters - 1
    degrees of freedom. `values` may be paired differences. Raises ValueError for unequal lengths, and for fewer than
    two clusters, from which no error can be estimated.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} cluster labels; give one label a value")
    n, sizes = len(values), Counter(clusters)
    if len(sizes) < 2:
        raise ValueError(f"{len(sizes)} cluster(s): an interval needs at least 2")
    mean = math.fsum(values) / n
    sums = _sums_by_cluster((value - mean for value in values), clusters)
    se = math.sqrt(math.fsum(total**2 / (1 - sizes[cluster] / n) for cluster, total in sums.items())) / n
    if se < 1e-12 * max(map(abs, values)):  # a rounding error: no cluster differs from another
        se = 0.0
    df = satterthwaite(sizes.values())
    half = t_quantile(0.975, df) * se
    return Estimate(mean, se, mean - half, mean + half, n, len(sizes), df)


def _sums_by_cluster(values: Iterable[float], clusters: Sequence[Hashable]) -> dict[Hashable, float]:
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value
    return sums


def satterthwaite(sizes: Iterable[int]) -> float:
    """Degrees of freedom of CR2 for a mean of independent values in clusters of `sizes` (Bell & McCaffrey 2002).

    n^2 / (sum_g n_g^2 + sum_{g != h} u_g u_h) with u_g = n_g^2 / (n - n_g); clusters - 1 if all sizes are equal.
    """
    sizes = list(sizes)
    n = sum(sizes)
    u = [size**2 / (n - size) for size in sizes]
    trace = math.fsum(size**2 for size in sizes) + math.fsum(u) ** 2 - math.fsum(u_g**2 for u_g in u)
    return max(1.0, n**2 / trace)


def clustered_score(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of scores in [0, 1] with the standard error of `clustered_mean` and an interval inside [0, 1].

    It is Wilson's interval at the effective sample size mean (1 - mean) / se^2 (Korn & Graubard 1998), with t instead
    of z; if all scores are equal, the effective sample size is the number of clusters. Near 0 and 1 and for few
    clusters its coverage is right while that of the symmetric interval is not. Raises ValueError as `clustered_mean`
    does, and for a value outside [0, 1].
    """
    if values and not (min(values) >= 0 and max(values) <= 1):
        raise ValueError(f"scores from {min(values)} to {max(values)}; a score lies in [0, 1]")
    estimate = clustered_mean(values, clusters)
    variance = estimate.mean * (1 - estimate.mean)
    effective_n = variance / estimate.se**2 if estimate.se > 0 and variance > 0 else float(estimate.clusters)
    lo, hi = _wilson_interval(estimate.mean, effective_n, t_quantile(0.975, estimate.df))
    return estimate._replace(lo=lo, hi=hi)


def wilson(successes: float, n: int, z: float = 1.959964) -> Estimate:
    """A proportion with Wilson's 95 % interval (Wilson 1927), which lies inside [0, 1]; [0, 1] itself if n = 0."""
    if n == 0:
        return Estimate(math.nan, math.nan, 0.0, 1.0, 0, 0)
    p = successes / n
    return Estimate(p, math.sqrt(p * (1 - p) / n), *_wilson_interval(p, n, z), n, n)


def _wilson_interval(p: float, n: float, z: float) -> tuple[float, float]:
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def exact_proportion(successes: int, n: int) -> Estimate:
    """A proportion of independent trials with the exact 95 % interval of Clopper & Pearson (1934).

    Its ends are the proportions whose binomial tail at the observed count is 2.5 %; 0 and 1 if the count is 0 or n.
    """
    p = successes / n

    def end(low: float, high: float, counts: range) -> float:
        """The proportion at which these counts have 2.5 %: their tail is above it at `high`."""
        for _ in range(60):
            middle = (low + high) / 2
            tail = math.fsum(math.comb(n, k) * middle**k * (1 - middle) ** (n - k) for k in counts)
            low, high = (low, middle) if tail > 0.025 else (middle, high)
        return (low + high) / 2

    lo = end(0.0, p, range(successes, n + 1)) if successes else 0.0
    hi = end(1.0, p, range(successes + 1)) if successes < n else 1.0
    return Estimate(p, math.sqrt(p * (1 - p) / n), lo, hi, n, n)


def two_way_mean(values: Sequence[float], first: Sequence[Hashable], second: Sequence[Hashable]) -> Estimate:
    """Mean of values that are clustered in two ways, such as runs by seed and by question.

    se^2 = se_first^2 + se_second^2 - se_both^2, where the last is clustered by the cells of both, so that what both
    share counts once (Cameron, Gelbach & Miller 2011); the larger of the first two if that is smaller. Degrees of
    freedom are Satterthwaite's for the sum of the first two. Raises ValueError as `clustered_mean` does.
    """
    one, two = clustered_mean(values, first), clustered_mean(values, second)
    both = clustered_mean(values, list(zip(first, second, strict=True)))
    a, b = one.se**2, two.se**2
    df = (a + b) ** 2 / (a**2 / one.df + b**2 / two.df) if a + b else min(one.df, two.df)
    se = math.sqrt(max(a + b - both.se**2, a, b))
    half = t_quantile(0.975, df) * se
    return Estimate(one.mean, se, one.mean - half, one.mean + half, one.n, min(one.clusters, two.clusters), df)


# ---- differences of two means, and multiple tests


MIN_DIFFERING = 10
"""The number of differing clusters below which a t-test of a difference needs the sign test beside it."""


class Difference(NamedTuple):
    """The mean of paired differences, its two-sided p-value by a t-test, and the counts of better and worse rows.

    If all clusters differ by the same amount, no error can be estimated: the standard error, the interval and `p` are
    NaN; `p` is 1 if no row differs. `p_sign` is the p-value of the exact sign test over the `differing` clusters.
    """

    estimate: Estimate
    p: float
    better: int
    worse: int
    differing: int
    p_sign: float

    @property
    def cautious_p(self) -> float:
        """The larger p-value if fewer than `MIN_DIFFERING` clusters differ, else `p`; `p_sign` if `p` is NaN."""
        if math.isnan(self.p):
            return self.p_sign
        return max(self.p, self.p_sign) if self.differing < MIN_DIFFERING else self.p

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of a difference of scores in [0, 1].

        None if no error can be estimated, or if the interval excludes 0 although the sign test is not significant.
        """
        if math.isnan(self.estimate.se) or self.p < 0.05 <= self.cautious_p:
            return None
        return max(-1.0, self.estimate.lo), min(1.0, self.estimate.hi)


def paired_difference(base: Sequence[float], tuned: Sequence[float], clusters: Sequence[Hashable]) -> Difference:
    """The mean of tuned minus base over rows. Raises ValueError as `clustered_mean` does, and for unequal lengths."""
    if len(base) != len(tuned):
        raise ValueError(f"{len(base)} rows against {len(tuned)}; a paired difference needs the same rows")
    differences = [t - b for b, t in zip(base, tuned, strict=True)]
    estimate = clustered_mean(differences, clusters)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    sums = _sums_by_cluster(differences, clusters)
    up, down = (sum(sign * total > 1e-12 for total in sums.values()) for sign in (1, -1))
    if estimate.se == 0:
        estimate, p = estimate._replace(se=math.nan, lo=math.nan, hi=math.nan), math.nan
        if better == worse == 0:
            p = 1.0
    else:
        p = t_two_sided(estimate.mean / estimate.se, estimate.df)
    return Difference(estimate, p, better, worse, up + down, sign_test(up, down))


def sign_test(better: int, worse: int) -> float:
    """Two-sided p-value of the exact sign test (McNemar's for scores 0 and 1); 1 if nothing differs."""
    n = better + worse
    coefficient = total = 1  # integers: from n = 1,024 on they are no floats
    for k in range(min(better, worse)):
        coefficient = coefficient * (n - k) // (k + 1)
        total += coefficient
    return min(1.0, 2 * total / 2**n)


def equivalence_p(estimate: Estimate, margin: float) -> float:
    """P-value of two one-sided t-tests that a mean lies within `margin` of 0 (TOST; Schuirmann 1987).

    The larger of both. Below 0.05, the 90 % interval lies within the margin.
    """
    if estimate.se == 0:
        return 0.0 if abs(estimate.mean) < margin else 1.0
    return 1 - t_cdf((margin - abs(estimate.mean)) / estimate.se, estimate.df)


def equivalence_margin(sd: float, n: int) -> float:
    """The margin at which `equivalence_p` of n values with this standard deviation has 80 % power at a true 0."""
    return (t_quantile(0.95, n - 1) + t_quantile(0.90, n - 1)) * sd / math.sqrt(n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests by Holm's step-down method (Holm 1979): the family-wise error rate is held.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_j). A NaN stays NaN and counts among the m,
    because a test without a p-value is a test as well.
    """
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=p_values.__getitem__)
    adjusted, highest = list(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


# ---- the best of several means


class Best(NamedTuple):
    """The best of several candidates: its index, observed mean, selection bias, and bias-corrected mean.

    `lo` and `hi` are the 95 % interval of its true mean, around `corrected`.
    """

    candidate: int
    observed: float
    bias: float
    corrected: float
    lo: float
    hi: float


def best_of(
    candidates: Sequence[Sequence[float]],
    clusters: Sequence[Hashable],
    *,
    draws: int = 400,
    inner: int = 100,
    seed: int = 0,
) -> Best:
    """The candidate with the highest mean, and the selection bias of that mean by a nested cluster bootstrap.

    `candidates` are K lists of values of the same rows. Each bootstrap sample of clusters selects its own best
    candidate; the difference between its mean in the sample and in the data estimates the selection bias. This estimate
    is too small, because the means of the data are themselves spread by chance. A second bootstrap inside each sample
    estimates that error: bias = 2 outer - inner (Hall & Martin 1988). Raises ValueError as `clustered_mean` does.
    """
    import numpy as np

    clustered_mean(candidates[0], clusters)  # raises ValueError if there is no interval
    sums, sizes = _cluster_sums(candidates, clusters)
    means, rng = sums.sum(0) / sizes.sum(), np.random.default_rng(seed)
    best = int(means.argmax())
    outer, nested = [], []
    for weights in _bootstrap_weights(rng, sizes, draws):
        for weight in weights:
            sample = weight @ sums / (weight @ sizes)
            selected = sample.argmax()
            inner_weights = _bootstrap_weights(rng, sizes, inner, weight)
            resampled = np.concatenate([w @ sums / (w @ sizes)[:, None] for w in inner_weights])
            nested.append((resampled.max(1) - sample[resampled.argmax(1)]).mean())
            outer.append(sample[selected] - means[selected])
    bias = max(0.0, 2 * float(np.mean(outer)) - float(np.mean(nested)))
    scale = bias / float(np.mean(outer)) if np.mean(outer) > 0 else 0.0
    # The error of the corrected mean in each sample, which is corrected as the observed mean is.
    low, high = np.quantile(np.array(outer) - scale * np.array(nested), [0.025, 0.975])
    corrected = float(means[best]) - bias
    return Best(best, float(means[best]), bias, corrected, corrected - float(high), corrected - float(low))


def _cluster_sums(columns: Sequence[Sequence[float]], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of each column over each cluster, [G, K], and the sizes of the clusters, [G]."""
    import numpy as np

    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    indices = np.array([numbers[cluster] for cluster in clusters])
    sums = [np.bincount(indices, weights=column, minlength=len(numbers)) for column in columns]
    return np.stack(sums, axis=1), np.bincount(indices).astype(float)


def _bootstrap_weights(
    rng: np.random.Generator, sizes: np.ndarray, draws: int, weights: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """The count of each cluster in each of `draws` bootstrap samples, at most 500 samples at a time, [<= 500, G]."""
    groups = len(sizes)
    shares = [1 / groups] * groups if weights is None else weights / weights.sum()
    for start in range(0, draws, 500):
        yield rng.multinomial(groups, shares, size=min(500, draws - start)).astype(float)


# ---- the design of an evaluation


class VarianceComponents(NamedTuple):
    """The variance of a value between clusters and within a cluster (NaN if each cluster has one value)."""

    between: float
    within: float


def variance_components(values: Sequence[float], clusters: Sequence[Hashable]) -> VarianceComponents:
    """Variance between and within clusters of any size by the method of moments (Searle et al. 1992, 3.6).

    If the rows of a cluster are answers to one question, the variance within is that of sampling and judging an answer.
    """
    n, sizes = len(values), Counter(clusters)
    sums = _sums_by_cluster(values, clusters)
    mean = math.fsum(values) / n
    groups = len(sizes)
    sum_within = math.fsum((v - sums[c] / sizes[c]) ** 2 for v, c in zip(values, clusters, strict=True))
    mean_between = math.fsum(size * (sums[c] / size - mean) ** 2 for c, size in sizes.items()) / (groups - 1)
    within = sum_within / (n - groups) if n > groups else math.nan
    effective_size = (n - sum(size**2 for size in sizes.values()) / n) / (groups - 1)
    between = mean_between if n == groups else max(0.0, (mean_between - within) / effective_size)
    return VarianceComponents(between, within)


def design_se(variances: VarianceComponents, sizes: Iterable[int], samples: int | float = 1) -> float:
    """Standard error of a mean over clusters of `sizes`, if each of their rows is sampled `samples` times.

    sqrt(sum_g (n_g^2 between + n_g within / samples)) / n; samples may be infinite.
    """
    sizes = list(sizes)
    within = 0.0 if math.isnan(variances.within) or samples == math.inf else variances.within / samples
    return math.sqrt(math.fsum(size**2 * variances.between + size * within for size in sizes)) / sum(sizes)
