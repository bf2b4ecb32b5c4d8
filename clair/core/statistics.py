"""Intervals: small, pure, documented functions without torch. The pipeline, the evaluation and the world use them.

A cluster is what is drawn independently: a question, which a benchmark may ask in several rows and an evaluation
several times. Values of one cluster may be correlated in any way. docs/evaluation.md says how often these intervals
hold the truth, measured. numpy is imported by the two bootstraps only, when they run.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Estimate(NamedTuple):
    """A mean with its standard error and 95 % interval; `df` are the degrees of freedom of its t."""

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

    se^2 = sum_g (sum_{i in g} (v_i - mean))^2 / (1 - n_g / n) / n^2, which is unbiased where values are independent,
    on `satterthwaite` degrees (Bell & McCaffrey 2002). With clusters of equal size this is CR1 on clusters - 1 degrees.
    Paired differences are values like any others. Raises ValueError for unequal lengths or fewer than two clusters,
    where no error can be estimated.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} cluster labels; give one label a value")
    n, sizes = len(values), Counter(clusters)
    if len(sizes) < 2:
        raise ValueError(f"{len(sizes)} cluster(s): an interval needs at least 2")
    mean = math.fsum(values) / n
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    se = math.sqrt(math.fsum(total**2 / (1 - sizes[cluster] / n) for cluster, total in sums.items())) / n
    if se < 1e-12 * max(map(abs, values)):  # what rounding leaves where no cluster differs from another
        se = 0.0
    df = satterthwaite(sizes.values())
    half = t_quantile(0.975, df) * se
    return Estimate(mean, se, mean - half, mean + half, n, len(sizes), df)


def satterthwaite(sizes: Iterable[int]) -> float:
    """Degrees of freedom of CR2 for a mean over clusters of these sizes, values independent (Bell & McCaffrey 2002).

    n^2 / (sum_g n_g^2 + sum_{g != h} u_g u_h) with u_g = n_g^2 / (n - n_g); clusters - 1 where all are of one size.
    """
    sizes = list(sizes)
    n = sum(sizes)
    u = [size**2 / (n - size) for size in sizes]
    trace = math.fsum(size**2 for size in sizes) + math.fsum(u) ** 2 - math.fsum(part**2 for part in u)
    return max(1.0, n**2 / trace)


def clustered_score(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of scores in [0, 1] with the standard error of `clustered_mean`, and an interval that stays inside [0, 1].

    The interval is Wilson's at the effective sample size mean (1 - mean) / se^2 (Korn & Graubard 1998) with t in place
    of z; where the scores do not vary at all, at the number of clusters. Near 0 and 1 and with few clusters it holds
    where the symmetric one does not. Raises ValueError as `clustered_mean` does, and for a value outside [0, 1].
    """
    if values and not (min(values) >= 0 and max(values) <= 1):
        raise ValueError(f"scores from {min(values)} to {max(values)}; a score lies in [0, 1]")
    found = clustered_mean(values, clusters)
    spread = found.mean * (1 - found.mean)
    effective = spread / found.se**2 if found.se > 0 and spread > 0 else float(found.clusters)
    lo, hi = _wilson(found.mean, effective, t_quantile(0.975, found.df))
    return found._replace(lo=lo, hi=hi)


def wilson(successes: float, n: int, z: float = 1.959964) -> Estimate:
    """A proportion with Wilson's 95 % interval (Wilson 1927), which stays inside [0, 1]; [0, 1] itself for n = 0."""
    if n == 0:
        return Estimate(math.nan, math.nan, 0.0, 1.0, 0, 0)
    p = successes / n
    return Estimate(p, math.sqrt(p * (1 - p) / n), *_wilson(p, n, z), n, n)


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


# ---- two means, and many


FEW = 10
"""Clusters that differ, from which on a t-test of a difference is believed by itself."""


class Difference(NamedTuple):
    """The mean of paired differences, its two-sided p-value by t, and how many rows came out better and worse.

    Where all clusters differ by the same amount no error can be estimated: its error and interval are NaN, and so is
    `p`, or 1 where no row differs. `p_sign` is the exact sign test's: of `differing` clusters, how many for the better.
    """

    estimate: Estimate
    p: float
    better: int
    worse: int
    differing: int
    p_sign: float

    @property
    def cautious_p(self) -> float:
        """The p-value to go by: with fewer than `FEW` differing clusters none that only t finds, nor without a t."""
        if math.isnan(self.p):
            return self.p_sign
        return max(self.p, self.p_sign) if self.differing < FEW else self.p

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of a difference of scores in [0, 1].

        None where no error can be estimated, or where it would call a difference what the sign test does not.
        """
        if math.isnan(self.estimate.se) or self.p < 0.05 <= self.cautious_p:
            return None
        return max(-1.0, self.estimate.lo), min(1.0, self.estimate.hi)


def paired_difference(base: Sequence[float], tuned: Sequence[float], clusters: Sequence[Hashable]) -> Difference:
    """tuned minus base, row by row, by `clustered_mean`. Raises ValueError as that does, and for unequal lengths."""
    if len(base) != len(tuned):
        raise ValueError(f"{len(base)} rows against {len(tuned)}; a paired difference needs the same rows")
    differences = [after - before for before, after in zip(base, tuned, strict=True)]
    found = clustered_mean(differences, clusters)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    sums: dict[Hashable, float] = defaultdict(float)
    for difference, cluster in zip(differences, clusters, strict=True):
        sums[cluster] += difference
    up, down = (sum(sign * total > 1e-12 for total in sums.values()) for sign in (1, -1))
    counts = (better, worse, up + down, sign_test(up, down))
    if found.se == 0:
        unknown = found._replace(se=math.nan, lo=math.nan, hi=math.nan)
        return Difference(unknown, 1.0 if better == worse == 0 else math.nan, *counts)
    return Difference(found, t_two_sided(found.mean / found.se, found.df), *counts)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p-value of the exact sign test (McNemar's, where scores are 0 and 1): 1 where nothing differs."""
    n = better + worse
    return min(1.0, 2 * math.fsum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, step down (Holm 1979): all those under 0.05 hold together at 5 %.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_j). A NaN stays one, and counts among the m:
    what was looked at and has no p-value was looked at all the same.
    """
    order = sorted((place for place, p in enumerate(p_values) if not math.isnan(p)), key=lambda place: p_values[place])
    adjusted, highest = list(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


# ---- bootstraps


def cluster_bootstrap(
    values: Sequence[float], clusters: Sequence[Hashable], *, draws: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean of `values` with the standard deviation and the 2.5 and 97.5 % quantiles of its mean over `draws` samples
    of whole clusters with replacement (Davison & Hinkley 1997, 2.4). Raises ValueError as `clustered_mean` does.
    """
    import numpy as np

    plain = clustered_mean(values, clusters)
    sums, sizes = _by_cluster([values], clusters)
    means = np.concatenate([w @ sums[:, 0] / (w @ sizes) for w in _drawn(np.random.default_rng(seed), sizes, draws)])
    lo, hi = np.quantile(means, [0.025, 0.975])
    return Estimate(plain.mean, float(means.std(ddof=1)), float(lo), float(hi), plain.n, plain.clusters)


class Best(NamedTuple):
    """The best of several candidates: which, its mean as seen, what of that the choosing made, and what is left.

    `lo` and `hi` are the 95 % interval of the chosen one's true mean, around `corrected`.
    """

    place: int
    seen: float
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

    `candidates` are K lists of values of the same rows. A sample of clusters chooses its own best; how much that one's
    mean falls when it is looked up outside the sample is the bias of choosing. Measured so, it comes out too small,
    because the means we sample from are already spread by chance; a second bootstrap inside each sample tells by how
    much, and bias = 2 outer - inner (Hall & Martin 1988). Raises ValueError as `clustered_mean` does.
    """
    import numpy as np

    clustered_mean(candidates[0], clusters)  # refuses what has no interval
    sums, sizes = _by_cluster(candidates, clusters)
    means, rng = sums.sum(0) / sizes.sum(), np.random.default_rng(seed)
    best = int(means.argmax())
    errors, outer, nested = [], [], []
    for weights in _drawn(rng, sizes, draws):
        for weight in weights:
            sample = weight @ sums / (weight @ sizes)
            chosen = sample.argmax()
            resampled = np.concatenate([w @ sums / (w @ sizes)[:, None] for w in _drawn(rng, sizes, inner, weight)])
            again = resampled.argmax(1)
            nested.append((resampled.max(1) - sample[again]).mean())
            outer.append(sample[chosen] - means[chosen])
            errors.append(outer[-1])
    bias = max(0.0, 2 * float(np.mean(outer)) - float(np.mean(nested)))
    scale = bias / float(np.mean(outer)) if np.mean(outer) > 0 else 0.0
    # What the corrected mean errs by, sample by sample: each corrected as the real one is.
    low, high = np.quantile(np.array(errors) - scale * np.array(nested), [0.025, 0.975])
    corrected = float(means[best]) - bias
    return Best(best, float(means[best]), bias, corrected, corrected - float(high), corrected - float(low))


def _by_cluster(columns: Sequence[Sequence[float]], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of each column over each cluster, [G, K], and the sizes of the clusters, [G]."""
    import numpy as np

    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    places = np.array([numbers[cluster] for cluster in clusters])
    sums = [np.bincount(places, weights=column, minlength=len(numbers)) for column in columns]
    return np.stack(sums, axis=1), np.bincount(places).astype(float)


def _drawn(
    rng: np.random.Generator, sizes: np.ndarray, draws: int, weights: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """How often each cluster is in each of `draws` samples, some hundred samples at a time, [<= 500, G]."""
    groups = len(sizes)
    shares = [1 / groups] * groups if weights is None else weights / weights.sum()
    for start in range(0, draws, 500):
        yield rng.multinomial(groups, shares, size=min(500, draws - start)).astype(float)


# ---- what a design can see


class Components(NamedTuple):
    """Variances of one value: between clusters, and within a cluster (NaN where each cluster has one value only)."""

    between: float
    within: float


def components(values: Sequence[float], clusters: Sequence[Hashable]) -> Components:
    """Variance between and within clusters by the method of moments for clusters of any size (Searle et al. 1992, 3.6).

    Where several rows ask the same question, the variance within is what sampling an answer and judging it adds.
    """
    n, sizes = len(values), Counter(clusters)
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value
    mean = math.fsum(values) / n
    groups = len(sizes)
    inside = math.fsum((v - sums[c] / sizes[c]) ** 2 for v, c in zip(values, clusters, strict=True))
    outside = math.fsum(size * (sums[c] / size - mean) ** 2 for c, size in sizes.items()) / (groups - 1)
    within = inside / (n - groups) if n > groups else math.nan
    usual = (n - sum(size**2 for size in sizes.values()) / n) / (groups - 1)
    return Components(outside if n == groups else max(0.0, (outside - within) / usual), within)


def design_se(parts: Components, sizes: Iterable[int], samples: int | float = 1) -> float:
    """Standard error of a mean over clusters of these sizes, each of its rows sampled `samples` times.

    sqrt(sum_g (n_g^2 between + n_g within / samples)) / n; samples may be infinite.
    """
    sizes = list(sizes)
    within = 0.0 if math.isnan(parts.within) or samples == math.inf else parts.within / samples
    return math.sqrt(math.fsum(size**2 * parts.between + size * within for size in sizes)) / sum(sizes)


def detectable(se: float, df: float = math.inf, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference that a two-sided test at `alpha` finds with this power. Inverse of `power_of`."""
    return _noncentrality(df, power, alpha) * se


@lru_cache(maxsize=256)
def _noncentrality(df: float, power: float, alpha: float) -> float:
    lo, hi = 0.0, 1.0
    while power_of(hi, 1.0, df, alpha) < power:
        lo, hi = hi, 2 * hi
    while hi - lo > 1e-9 * hi:
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if power_of(middle, 1.0, df, alpha) < power else (lo, middle)
    return (lo + hi) / 2


def power_of(difference: float, se: float, df: float = math.inf, alpha: float = 0.05) -> float:
    """With which probability a two-sided t-test at `alpha` finds a true difference: P(|T| > t) of the noncentral t.

    The mean of Phi(d - t s) + Phi(-d - t s) over s = sqrt(chi2 / df), d the difference in standard errors, by Simpson's
    rule over log s.
    """
    critical, effect = t_quantile(1 - alpha / 2, df), abs(difference) / se
    if df > 1e6:
        return _normal_cdf(effect - critical) + _normal_cdf(-effect - critical)
    # Density of u = log s: 2 (df/2)^(df/2) / Gamma(df/2) exp(df u - df exp(2 u) / 2), with its peak at 0.
    scale = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    lowest, highest = -21 / df - 6 / math.sqrt(df), 0.5 * math.log1p(80 / df + 18 / math.sqrt(df))
    steps = 2000
    width, parts = (highest - lowest) / steps, []
    for step in range(steps + 1):
        u = lowest + step * width
        s = math.exp(u)
        found = _normal_cdf(effect - critical * s) + _normal_cdf(-effect - critical * s)
        weight = 1 if step in (0, steps) else 4 if step % 2 else 2
        parts.append(weight * found * math.exp(scale + df * u - df * s * s / 2))
    return min(1.0, math.fsum(parts) * width / 3)


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


# ---- Student's t


@lru_cache(maxsize=1024)
def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t (the normal's at infinite df) by bisection on its distribution function."""
    if not 0 < p < 1 or not df >= 1:
        raise ValueError(f"t_quantile needs 0 < p < 1 and df >= 1, got p={p}, df={df}")
    if p <= 0.5:
        return -t_quantile(1 - p, df) if p < 0.5 else 0.0
    lo, hi = 0.0, 1.0
    while t_cdf(hi, df) < p:
        lo, hi = hi, 2 * hi
    while hi - lo > 1e-12 * hi:
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if t_cdf(middle, df) < p else (lo, middle)
    return (lo + hi) / 2


def t_cdf(t: float, df: float) -> float:
    """Distribution function of Student's t."""
    return t_two_sided(t, df) / 2 if t < 0 else 1 - t_two_sided(t, df) / 2


def t_two_sided(t: float, df: float) -> float:
    """P(|T| > |t|): I_x(df / 2, 1 / 2) at x = df / (df + t^2) (DLMF 8.17), erfc(|t| / sqrt 2) at infinite df."""
    if df > 1e6:
        return math.erfc(abs(t) / math.sqrt(2))
    if t == 0:
        return 1.0
    a, b, x = df / 2, 0.5, df / (df + t * t)
    beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    log_front = a * math.log(x) + math.log(abs(t)) - math.log(df + t * t) / 2 - beta
    # The fraction converges fast below the mean of the beta distribution, and its mirror image above.
    if x < (a + 1) / (a + b + 2):
        return math.exp(log_front) * _beta_fraction(a, b, x) / a
    return 1 - math.exp(log_front) * _beta_fraction(b, a, 1 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (DLMF 8.17.22), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 500):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / (1.0 + step * d or tiny)
            c = 1.0 + step / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
