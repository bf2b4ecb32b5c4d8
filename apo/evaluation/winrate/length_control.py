"""A win rate freed from length: judges prefer longer answers, and training on preferences makes answers longer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from clair.core.student_t import t_quantile

_FEWEST = 4
_FAR = 30.0
"""A coefficient from here on is infinity: the outcomes are separated, and no finite one fits best."""


class LengthControlled(NamedTuple):
    """The win rate at equal lengths with its 95 % interval, and the fit it is read off."""

    rate: float
    lo: float
    hi: float
    theta: float
    theta_se: float
    length: float
    """How much a length difference of many standard deviations adds to the log-odds."""
    length_se: float


def length_controlled(
    values: Sequence[float], differences: Sequence[float], clusters: Sequence[Hashable]
) -> LengthControlled:
    """The win rate that `values` in [0, 1] would have if both answers were always equally long.

    A logistic regression (outcomes may be fractions: quasi-likelihood) of value on
        logit P = theta + length * tanh(d / sd),    rate = sigmoid(theta),
    with d the length differences, tuned minus base, and sd their standard deviation: AlpacaEval's correction (arXiv
    2404.04475) without its per-prompt terms, which need many models. Fitted by Newton's method; errors are robust and
    clustered (CR1), the interval is a t interval of theta on clusters - 2 degrees, carried through the sigmoid.
    Raises ValueError where theta cannot be told from such data: fewer than 4 clusters (of 3, the interval holds in 87
    of 100 cases), lengths that never differ, or outcomes that lengths (or nothing at all) separate wholly.
    """
    groups, n = len(set(clusters)), len(values)
    if groups < _FEWEST:
        raise ValueError(f"{groups} prompt(s) are too few to tell length from quality")
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / n)
    if spread == 0:
        raise ValueError("all answers differ by the same length, so its effect cannot be told")
    x = [math.tanh(d / spread) for d in differences]
    theta, length = _fit(values, x)
    scores: dict[Hashable, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for value, feature, cluster in zip(values, x, clusters, strict=True):
        residual = value - _sigmoid(theta + length * feature)
        scores[cluster] = (scores[cluster][0] + residual, scores[cluster][1] + residual * feature)
    bread = _inverse(*_curvature(theta, length, x))
    scale = groups / (groups - 1)
    projected = [(bread[0] * u + bread[1] * v, bread[1] * u + bread[2] * v) for u, v in scores.values()]
    errors = [math.sqrt(scale * math.fsum(part[i] ** 2 for part in projected)) for i in (0, 1)]
    half = t_quantile(0.975, groups - 2) * errors[0]
    rate, lo, hi = (_sigmoid(value) for value in (theta, theta - half, theta + half))
    return LengthControlled(rate, lo, hi, theta, errors[0], length, errors[1])


def _fit(values: Sequence[float], x: Sequence[float]) -> tuple[float, float]:
    """(theta, length) of highest likelihood. The likelihood is concave: a step that does not raise it is halved."""
    theta = length = 0.0
    likelihood = _likelihood(theta, length, values, x)
    for _ in range(100):
        gradient = [math.fsum(parts) for parts in zip(*_gradients(theta, length, values, x), strict=True)]
        inverse = _inverse(*_curvature(theta, length, x))
        step = (
            inverse[0] * gradient[0] + inverse[1] * gradient[1],
            inverse[1] * gradient[0] + inverse[2] * gradient[1],
        )
        if max(map(abs, step)) < 1e-10:
            return theta, length
        scale = 1.0
        while (found := _likelihood(theta + scale * step[0], length + scale * step[1], values, x)) < likelihood:
            scale /= 2
            if scale < 1e-9:  # rounding: there is nothing left to climb
                return theta, length
        theta, length, likelihood = theta + scale * step[0], length + scale * step[1], found
        if max(abs(theta), abs(length)) > _FAR:
            break
    raise ValueError("one side wins wherever the lengths say so, or everywhere, so that no finite rate fits")


def _gradients(theta: float, length: float, values: Sequence[float], x: Sequence[float]) -> list[tuple[float, float]]:
    residuals = [value - _sigmoid(theta + length * feature) for value, feature in zip(values, x, strict=True)]
    return [(residual, residual * feature) for residual, feature in zip(residuals, x, strict=True)]


def _likelihood(theta: float, length: float, values: Sequence[float], x: Sequence[float]) -> float:
    """sum of y log p + (1 - y) log(1 - p), by log(1 + exp(z)) so that nothing overflows."""
    logits = [theta + length * feature for feature in x]
    return math.fsum(y * z - max(z, 0.0) - math.log1p(math.exp(-abs(z))) for y, z in zip(values, logits, strict=True))


def _curvature(theta: float, length: float, x: Sequence[float]) -> tuple[float, float, float]:
    """The entries (theta theta, theta length, length length) of minus the Hessian."""
    weights = [_sigmoid(z) * _sigmoid(-z) for z in (theta + length * feature for feature in x)]
    return (
        math.fsum(weights),
        math.fsum(w * feature for w, feature in zip(weights, x, strict=True)),
        math.fsum(w * feature**2 for w, feature in zip(weights, x, strict=True)),
    )


def _inverse(a: float, b: float, c: float) -> tuple[float, float, float]:
    determinant = a * c - b * b
    if determinant <= 1e-12 * a * c or a * c == 0:
        raise ValueError("one side wins wherever the lengths say so, or everywhere, so that no finite rate fits")
    return c / determinant, -b / determinant, a / determinant


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0
