"""Intervals: small, pure, documented functions without torch. The pipeline, the evaluation and the world use them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean with its standard error and 95 % interval."""

    mean: float
    se: float
    lo: float
    hi: float
    n: int
    clusters: int


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of `values` with the cluster-robust (CR1) standard error and a t interval on clusters - 1 degrees.

    se^2 = G / (G - 1) * sum_g (sum_{i in g} (v_i - mean))^2 / n^2 with G clusters: values of one cluster may be
    correlated in any way. Paired differences are values like any others. Raises ValueError for unequal lengths or
    fewer than two clusters, where no error can be estimated.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} cluster labels; give one label a value")
    n = len(values)
    sums: dict[Hashable, float] = defaultdict(float)
    mean = math.fsum(values) / n if n else math.nan
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    groups = len(sums)
    if groups < 2:
        raise ValueError(f"{groups} cluster(s): an interval needs at least 2")
    se = math.sqrt(groups / (groups - 1) * math.fsum(s * s for s in sums.values())) / n
    half = t_quantile(0.975, groups - 1) * se
    return Estimate(mean, se, mean - half, mean + half, n, groups)


def wilson(successes: int, n: int, z: float = 1.959964) -> Estimate:
    """A proportion with Wilson's 95 % interval (Wilson 1927), which stays inside [0, 1]; [0, 1] itself for n = 0."""
    if n == 0:
        return Estimate(math.nan, math.nan, 0.0, 1.0, 0, 0)
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, math.sqrt(p * (1 - p) / n), max(0.0, middle - half), min(1.0, middle + half), n, n)


def t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t by bisection on its distribution function (Abramowitz & Stegun 26.7.3-4)."""
    if not 0 < p < 1 or df < 1:
        raise ValueError(f"t_quantile needs 0 < p < 1 and df >= 1, got p={p}, df={df}")
    lo, hi = -1e6, 1e6
    for _ in range(200):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if _t_cdf(middle, df) < p else (lo, middle)
    return (lo + hi) / 2


def _t_cdf(t: float, df: int) -> float:
    theta = math.atan(t / math.sqrt(df))
    cos2 = math.cos(theta) ** 2
    term = total = math.cos(theta) if df % 2 else 1.0
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= cos2 * (k - 1) / k
        total += term
    if df == 1:
        area = 2 * theta / math.pi
    elif df % 2:
        area = 2 / math.pi * (theta + math.sin(theta) * total)
    else:
        area = math.sin(theta) * total
    return (1 + area) / 2
