"""Properties that a score should have, as random queries; how far a score is from one; and a certificate of it.

A property is a sampler of queries and the critical width of each: the smallest s = above + below such that values
inside the bands [f - below, f + above] at the queried points satisfy it. Conformal risk control of "the query is not
satisfied" gives `pair risk`. For monotonicity there is more: the binary-search tester's `domain certificate`, under
which a monotone function exists inside the band on the accepted part of the domain. Pairs do not give that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apo.guarantees.conformal import Band, band, crc_threshold, fewest
from clair.core.errors import UserError
from clair.core.statistics import Estimate, wilson

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    Floats = NDArray[Any]

Score = Callable[["Floats"], "Floats"]
"""A score of points [n, D], [n]."""


@dataclass(frozen=True)
class Property:
    """What should hold, in words; `sample` gives the points of one query a unit, each [n, D], from the units [n, D];
    `critical` their critical widths [n] from the points and their scores.
    """

    words: str
    sample: Callable[[Floats, Generator], tuple[Floats, ...]]
    critical: Callable[[tuple[Floats, ...], tuple[Floats, ...]], Floats]


def critical_widths(score: Score, wanted: Property, units: Floats, seed: int = 0) -> Floats:
    """The critical width of one random query a unit, [n], 0 where the score satisfies it as it is."""
    import numpy as np

    points = wanted.sample(units, np.random.default_rng(seed))
    return np.maximum(wanted.critical(points, tuple(score(p) for p in points)), 0.0)


def monotone(coordinate: int, values: Floats, *, increasing: bool = True) -> Property:
    """Never falls (or rises) in one coordinate: the unit against itself with that coordinate drawn from `values`.

    `values` must not come from the units themselves, which would then not be independent.
    """
    import numpy as np

    def sample(units: Floats, rng: Generator) -> tuple[Floats, ...]:
        other = _with(units, coordinate, rng.choice(values, len(units)))
        swap = (other[:, coordinate] < units[:, coordinate])[:, None]
        return np.where(swap, other, units), np.where(swap, units, other)

    sign = 1.0 if increasing else -1.0
    return Property(
        f"the score never {'falls' if increasing else 'rises'} with coordinate {coordinate}",
        sample,
        lambda _, f: sign * (f[0] - f[1]),
    )


def concave(coordinate: int, values: Floats) -> Property:
    """Concave along one coordinate: t f(a) + (1 - t) f(b) <= f(m), m = t a + (1 - t) b, for the unit a, b drawn from
    `values` and t uniform.
    """

    def sample(units: Floats, rng: Generator) -> tuple[Floats, ...]:
        other = _with(units, coordinate, rng.choice(values, len(units)))
        share = rng.random((len(units), 1))
        return units, other, share * units + (1 - share) * other

    def critical(points: tuple[Floats, ...], f: tuple[Floats, ...]) -> Floats:
        import numpy as np

        a, b, m = (p[:, coordinate] for p in points)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(a == b, 1.0, (m - b) / (a - b))
        return share * f[0] + (1 - share) * f[1] - f[2]

    return Property(f"the score is concave along coordinate {coordinate}", sample, critical)


def invariant(change: Callable[[Floats, Generator], Floats], words: str) -> Property:
    """Unmoved by `change` (of units [n, D]), such as another value of an irrelevant attribute: |f(x) - f(change x)|."""
    return Property(words, lambda units, rng: (units, change(units, rng)), lambda _, f: abs(f[0] - f[1]))


def lipschitz(constant: float, others: Floats) -> Property:
    """|f(x) - f(x')| <= constant |x - x'| (Euclidean), x' drawn from the rows of `others` [m, D]."""
    import numpy as np

    def critical(points: tuple[Floats, ...], f: tuple[Floats, ...]) -> Floats:
        return abs(f[0] - f[1]) - constant * np.linalg.norm(points[0] - points[1], axis=1)

    return Property(
        f"the score moves at most {constant:g} per unit of distance",
        lambda units, rng: (units, others[rng.integers(len(others), size=len(units))]),
        critical,
    )


def floor(least: float) -> Property:
    """Never below `least`; only the upper side of the band counts."""
    return Property(f"the score is at least {least:g}", lambda units, _: (units,), lambda _, f: least - f[0])


def ceiling(most: float) -> Property:
    """Never above `most`; only the lower side of the band counts."""
    return Property(f"the score is at most {most:g}", lambda units, _: (units,), lambda _, f: f[0] - most)


def _with(units: Floats, coordinate: int, values: Floats) -> Floats:
    changed = units.copy()
    changed[:, coordinate] = values
    return changed


@dataclass(frozen=True)
class Certificate:
    """How far a score is from a property: `kind` is `pair risk` or `domain certificate`."""

    words: str
    kind: str
    alpha: float
    n: int
    band: Band
    unadjusted: Estimate
    """The share of units that the score as it is fails, with Wilson's interval."""

    def told(self) -> str:
        """The promise in words."""
        before = f"{self.words}: fails {self.unadjusted.mean:.3g} of {self.n} units as it is"
        if math.isinf(self.band.width):
            return f"{before}; no finite band: alpha {self.alpha:g} needs {fewest(self.alpha)} units"
        average = "on average over draws of the units, of which one may lie above"
        if self.kind == "pair risk":
            return (
                f"{before}; pair risk: score differences up to {self.band.width:.4g} decide nothing, and then at most "
                f"{self.alpha:.3g} of new queries fail, {average}. This says nothing about a share of the domain"
            )
        return (
            f"{before}; domain certificate: on at least {1 - self.alpha:.3g} of the domain, {average}, a monotone "
            f"function lies within -{self.band.below:.4g} and +{self.band.above:.4g} of the score"
        )


def certify_pairs(widths: Floats, alpha: float, words: str) -> Certificate:
    """Pair risk from critical widths [n], one query a unit. Only the sum of the band's sides is calibrated, and it is
    split evenly.
    """
    width = crc_threshold(widths, alpha)
    failed = wilson(int((widths > 0).sum()), len(widths))
    return Certificate(words, "pair risk", alpha, len(widths), Band(width / 2, width / 2), failed)


@dataclass(frozen=True)
class SearchTester:
    """The binary-search tester of one coordinate: a query walks from the middle of `pivots` to its own place, and is
    compared with the score at each pivot on the way. `pivots` are chosen without the units. log2(pivots) scores a unit.
    """

    coordinate: int
    pivots: Floats
    increasing: bool = True

    def sides(self, score: Score, units: Floats) -> tuple[Floats, Floats]:
        """How far each unit lies below a pivot that it should not be below (up), and above one (down), [n] each.

        up = max over visited pivots p < x of f(p) - f(x), down = max over visited p > x of f(x) - f(p), at least 0.
        Units accepted at up <= above and down <= below carry a monotone function inside the band: the running maximum
        of f - below. For two of them meet at a common pivot m with f(i) - below <= f(m) <= f(j) + above.
        """
        import numpy as np

        pivots, sign = np.sort(np.asarray(self.pivots, float)), 1.0 if self.increasing else -1.0
        x, own = units[:, self.coordinate], sign * score(units)
        low, high = np.zeros(len(units), int), np.full(len(units), len(pivots))
        up, down = np.zeros(len(units)), np.zeros(len(units))
        while (active := low < high).any():
            middle = (low + high) // 2
            at = pivots[np.minimum(middle, len(pivots) - 1)]
            value = sign * score(_with(units, self.coordinate, at))
            up = np.where(active & (at < x), np.maximum(up, value - own), up)
            down = np.where(active & (at > x), np.maximum(down, own - value), down)
            right = at < x
            low, high = np.where(active & right, middle + 1, low), np.where(active & ~right, middle, high)
        return (up, down) if self.increasing else (down, up)

    def certify(self, score: Score, units: Floats, alpha: float, *, seed: int = 0) -> Certificate:
        """The domain certificate: on the accepted share, at least 1 - alpha on average, a monotone g is in the band."""
        up, down = self.sides(score, units)
        failed = wilson(int(((up > 0) | (down > 0)).sum()), len(units))
        way = "rises" if self.increasing else "falls"
        words = f"the score {way} with coordinate {self.coordinate}"
        return Certificate(words, "domain certificate", alpha, len(units), band(up, down, alpha, seed=seed), failed)

    def accepts(self, score: Score, units: Floats, within: Band) -> NDArray[Any]:
        """Which units the tester accepts at this band, [n]."""
        up, down = self.sides(score, units)
        accepted: NDArray[Any] = (up <= within.above) & (down <= within.below)
        return accepted


def adjusted(score: Score, coordinate: int, grid: Floats, within: Band, *, increasing: bool = True) -> Score:
    """The score moved to the nearest monotone function as far as the band lets it.

    On the line through each point along `coordinate`, over the values `grid` and the point's own: the isotonic
    regression (pool adjacent violators), cut off at score - below and score + above.
    """
    import numpy as np

    values = np.unique(grid)
    sign = 1.0 if increasing else -1.0

    def moved(points: Floats) -> Floats:
        own = score(points)
        line = np.stack([sign * score(_with(points, coordinate, np.full(len(points), v))) for v in values], axis=1)
        place = np.searchsorted(values, points[:, coordinate])
        result = np.empty(len(points))
        for row, at in enumerate(place):
            result[row] = sign * isotonic(np.insert(line[row], at, sign * own[row]))[at]
        return np.clip(result, own - within.below, own + within.above)

    return moved


def isotonic(values: Floats) -> Floats:
    """The non-decreasing sequence nearest to `values` [n] in squares, by pooling adjacent violators."""
    import numpy as np

    blocks: list[tuple[float, int]] = []
    for value in values:
        total, count = float(value), 1
        while blocks and blocks[-1][0] * count >= total * blocks[-1][1]:
            before, more = blocks.pop()
            total, count = total + before, count + more
        blocks.append((total, count))
    return np.repeat([total / count for total, count in blocks], [count for _, count in blocks])


def longest_monotone(values: Floats, width: float) -> int:
    """The most of `values` [n], in the order of the coordinate, through which one non-decreasing function can pass
    within a band of this width: no kept value lies more than `width` below an earlier kept one. O(n^2).
    """
    import numpy as np

    if width < 0:
        raise UserError(f"a band's width is {width:g}; it cannot be negative")
    levels = np.unique(values)
    best = np.full(len(levels) + 1, -1)  # best[k]: the most kept with the highest at levels[k - 1]; best[0]: none
    best[0] = 0
    for value in values:
        own = int(np.searchsorted(levels, value)) + 1
        top = best[: own + 1].max() + 1
        above = slice(own + 1, int(np.searchsorted(levels, value + width, side="right")) + 1)
        best[above] = np.where(best[above] >= 0, best[above] + 1, -1)
        best[own] = top
    return int(best.max())
