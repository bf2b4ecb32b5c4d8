"""Student's t distribution: quantiles, p-values, and the power of a t-test. Pure Python, without scipy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache


@lru_cache(maxsize=1024)
def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t (the normal's at infinite df), by bisection of its distribution function."""
    if not 0 < p < 1 or not df >= 1:
        raise ValueError(f"t_quantile needs 0 < p < 1 and df >= 1, got p={p}, df={df}")
    if p <= 0.5:
        return -t_quantile(1 - p, df) if p < 0.5 else 0.0
    return _bisect(lambda t: t_cdf(t, df), p, 1e-12)


def _bisect(function: Callable[[float], float], value: float, tolerance: float) -> float:
    """The positive x at which an increasing function takes a value, up to a relative error of `tolerance`."""
    lo, hi = 0.0, 1.0
    while function(hi) < value:
        lo, hi = hi, 2 * hi
    while hi - lo > tolerance * hi:
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if function(middle) < value else (lo, middle)
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
    # The continued fraction converges fast below the mean of the beta distribution; above it, its mirror image does.
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


def detectable_difference(se: float, df: float = math.inf, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference that a two-sided t-test detects with `power`. Inverse of `t_test_power`."""
    return _noncentrality(df, power, alpha) * se


@lru_cache(maxsize=256)
def _noncentrality(df: float, power: float, alpha: float) -> float:
    return _bisect(lambda difference: t_test_power(difference, 1.0, df, alpha), power, 1e-9)


def t_test_power(difference: float, se: float, df: float = math.inf, alpha: float = 0.05) -> float:
    """The probability that a two-sided t-test at `alpha` detects a true difference: P(|T| > t) of the noncentral t.

    It is the mean of Phi(d - t s) + Phi(-d - t s) over s = sqrt(chi2 / df), with d the difference in standard errors,
    computed by Simpson's rule over log s.
    """
    critical, effect = t_quantile(1 - alpha / 2, df), abs(difference) / se
    if df > 1e6:
        return _normal_cdf(effect - critical) + _normal_cdf(-effect - critical)
    # Density of u = log s: 2 (df/2)^(df/2) / Gamma(df/2) exp(df u - df exp(2 u) / 2), with its peak at 0.
    scale = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
    lowest, highest = -21 / df - 6 / math.sqrt(df), 0.5 * math.log1p(80 / df + 18 / math.sqrt(df))
    steps = 2000
    width, terms = (highest - lowest) / steps, []
    for step in range(steps + 1):
        u = lowest + step * width
        s = math.exp(u)
        rejection = _normal_cdf(effect - critical * s) + _normal_cdf(-effect - critical * s)
        weight = 1 if step in (0, steps) else 4 if step % 2 else 2
        terms.append(weight * rejection * math.exp(scale + df * u - df * s * s / 2))
    return min(1.0, math.fsum(terms) * width / 3)


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2
