"""Certified properties of a score, such as monotonicity: how far a score violates them, tested by random queries.

A property consists of a sampler of queries and the critical width of a query: the smallest s = above + below such that
some values within the bands [f - below, f + above] at the queried points satisfy the property. Conformal risk control
of these widths gives a `pair risk`. For monotonicity, the binary-search tester also gives a `domain certificate`: a
monotone function exists within the band on the accepted part of the domain. Queries of pairs cannot show that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apo.guarantees.conformal import Band, band, crc_threshold, min_units
from clair.core.statistics import Estimate, wilson

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    Floats = NDArray[Any]

Score = Callable[["Floats"], "Floats"]
"""A function from points [n, D] to their scores [n]."""


@dataclass(frozen=True)
class Property:
    """A property: a description, a sampler of queries, and their critical widths.

    `sample` draws one query per unit, from the units [n, D], and returns its points, each [n, D]. `critical` returns
    the critical widths [n] from the points and their scores.
    """

    description: str
    sample: Callable[[Floats, Generator], tuple[Floats, ...]]
    critical: Callable[[tuple[Floats, ...], tuple[Floats, ...]], Floats]


def critical_widths(score: Score, prop: Property, units: Floats, seed: int = 0) -> Floats:
    """Return the critical width of one random query per unit, [n]; 0 if the score as it is satisfies the query."""
    import numpy as np

    points = prop.sample(units, np.random.default_rng(seed))
    return np.maximum(prop.critical(points, tuple(score(p) for p in points)), 0.0)


def monotone(coordinate: int, values: Floats, *, increasing: bool = True) -> Property:
    """Monotonicity in one coordinate: a query compares a unit with a copy whose coordinate is drawn from `values`.

    `values` must not come from the units themselves, or the queries would not be independent.
    """
    import numpy as np

    def sample(units: Floats, rng: Generator) -> tuple[Floats, ...]:
        copies = _with_coordinate(units, coordinate, rng.choice(values, len(units)))
        swap = (copies[:, coordinate] < units[:, coordinate])[:, None]
        return np.where(swap, copies, units), np.where(swap, units, copies)

    sign = 1.0 if increasing else -1.0
    return Property(
        f"the score never {'falls' if increasing else 'rises'} with coordinate {coordinate}",
        sample,
        lambda _, f: sign * (f[0] - f[1]),
    )


def concave(coordinate: int, values: Floats) -> Property:
    """Concavity along one coordinate: t f(a) + (1 - t) f(b) <= f(m) with m = t a + (1 - t) b.

    a is the unit, b is drawn from `values`, and t is uniform.
    """

    def sample(units: Floats, rng: Generator) -> tuple[Floats, ...]:
        copies = _with_coordinate(units, coordinate, rng.choice(values, len(units)))
        share = rng.random((len(units), 1))
        return units, copies, share * units + (1 - share) * copies

    def critical(points: tuple[Floats, ...], f: tuple[Floats, ...]) -> Floats:
        import numpy as np

        a, b, m = (p[:, coordinate] for p in points)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(a == b, 1.0, (m - b) / (a - b))
        return share * f[0] + (1 - share) * f[1] - f[2]

    return Property(f"the score is concave along coordinate {coordinate}", sample, critical)


def floor(bound: float) -> Property:
    """A lower bound of the score. Only the upper side of the band matters."""
    return Property(f"the score is at least {bound:g}", lambda units, _: (units,), lambda _, f: bound - f[0])


def ceiling(bound: float) -> Property:
    """An upper bound of the score. Only the lower side of the band matters."""
    return Property(f"the score is at most {bound:g}", lambda units, _: (units,), lambda _, f: f[0] - bound)


def _with_coordinate(units: Floats, coordinate: int, values: Floats) -> Floats:
    changed = units.copy()
    changed[:, coordinate] = values
    return changed


@dataclass(frozen=True)
class Certificate:
    """The certified distance of a score from a property. `kind` is `pair risk` or `domain certificate`."""

    description: str
    kind: str
    alpha: float
    n: int
    band: Band
    unadjusted: Estimate
    """The share of units on which the score as it is fails, with Wilson's interval."""

    def summary(self) -> str:
        """State the promise."""
        failing = f"{self.description}: as it is, it fails on {self.unadjusted.mean:.3g} of {self.n} units"
        if math.isinf(self.band.width):
            return f"{failing}; no finite band: alpha {self.alpha:g} needs {min_units(self.alpha)} units"
        average = "on average over draws of the units; a single draw may lie above"
        if self.kind == "pair risk":
            return (
                f"{failing}; pair risk: score differences up to {self.band.width:.4g} decide nothing, and then at most "
                f"{self.alpha:.3g} of new queries fail, {average}. This says nothing about a share of the domain"
            )
        return (
            f"{failing}; domain certificate: on at least {1 - self.alpha:.3g} of the domain, {average}, a monotone "
            f"function lies within -{self.band.below:.4g} and +{self.band.above:.4g} of the score"
        )


def certify_pairs(widths: Floats, alpha: float, description: str) -> Certificate:
    """Return the pair risk for critical widths [n] of one query per unit.

    Only the total width of the band is calibrated. Its two sides are equal.
    """
    width = crc_threshold(widths, alpha)
    failed = wilson(int((widths > 0).sum()), len(widths))
    return Certificate(description, "pair risk", alpha, len(widths), Band(width / 2, width / 2), failed)


@dataclass(frozen=True)
class SearchTester:
    """The binary-search tester of monotonicity in one coordinate.

    A query is a binary search for the unit's coordinate among `pivots`. It compares the unit's score with the score at
    each visited pivot, which takes log2(pivots) scores per unit. `pivots` must be chosen without the units.
    """

    coordinate: int
    pivots: Floats
    increasing: bool = True

    def sides(self, score: Score, units: Floats) -> tuple[Floats, Floats]:
        """Return by how much each unit's score is too low (up) and too high (down), [n] each.

        up = max over visited pivots p < x of f(p) - f(x), down = max over visited p > x of f(x) - f(p), at least 0.
        On the units with up <= above and down <= below, a monotone function lies within the band: the running maximum
        of f - below. The reason: any two such units i < j share a visited pivot m between them, and
        f(i) - below <= f(m) <= f(j) + above.
        """
        import numpy as np

        pivots, sign = np.sort(np.asarray(self.pivots, float)), 1.0 if self.increasing else -1.0
        x, unit_scores = units[:, self.coordinate], sign * score(units)
        low, high = np.zeros(len(units), int), np.full(len(units), len(pivots))
        up, down = np.zeros(len(units)), np.zeros(len(units))
        while (active := low < high).any():
            middle = (low + high) // 2
            pivot = pivots[np.minimum(middle, len(pivots) - 1)]
            value = sign * score(_with_coordinate(units, self.coordinate, pivot))
            up = np.where(active & (pivot < x), np.maximum(up, value - unit_scores), up)
            down = np.where(active & (pivot > x), np.maximum(down, unit_scores - value), down)
            right = pivot < x
            low, high = np.where(active & right, middle + 1, low), np.where(active & ~right, middle, high)
        return (up, down) if self.increasing else (down, up)

    def certify(self, score: Score, units: Floats, alpha: float, *, seed: int = 0) -> Certificate:
        """Return the certificate that the band holds a monotone g on at least 1 - alpha of the domain, on average."""
        up, down = self.sides(score, units)
        failed = wilson(int(((up > 0) | (down > 0)).sum()), len(units))
        direction = "rises" if self.increasing else "falls"
        description = f"the score {direction} with coordinate {self.coordinate}"
        return Certificate(
            description, "domain certificate", alpha, len(units), band(up, down, alpha, seed=seed), failed
        )


def adjusted(score: Score, coordinate: int, grid: Floats, within: Band, *, increasing: bool = True) -> Score:
    """Return the score moved towards the nearest monotone function, within the band.

    For each point, the scores along `coordinate` at the values of `grid` and of the point itself are replaced by their
    isotonic regression (pool adjacent violators), clipped to [score - below, score + above].
    """
    import numpy as np

    values = np.unique(grid)
    sign = 1.0 if increasing else -1.0

    def moved(points: Floats) -> Floats:
        scores = score(points)
        lines = [sign * score(_with_coordinate(points, coordinate, np.full(len(points), v))) for v in values]
        line = np.stack(lines, axis=1)
        result = np.empty(len(points))
        for row, index in enumerate(np.searchsorted(values, points[:, coordinate])):
            result[row] = sign * isotonic(np.insert(line[row], index, sign * scores[row]))[index]
        return np.clip(result, scores - within.below, scores + within.above)

    return moved


def isotonic(values: Floats) -> Floats:
    """Return the non-decreasing sequence nearest to `values` [n] in least squares, by pooling adjacent violators."""
    import numpy as np

    blocks: list[tuple[float, int]] = []
    for value in values:
        total, count = float(value), 1
        while blocks and blocks[-1][0] * count >= total * blocks[-1][1]:
            pooled_total, pooled_count = blocks.pop()
            total, count = total + pooled_total, count + pooled_count
        blocks.append((total, count))
    return np.repeat([total / count for total, count in blocks], [count for _, count in blocks])
