"""Domain certificates: a score of points that rises, or is concave, along one coordinate on most of the domain.

A query evaluates the score at fixed pivots along the unit's own line, and takes the nearest values with the shape. They
leave an interval at the unit's own point: a score with the shape lies inside, any other is moved to the interval's
nearer end. Conformal risk control of these two distances, up and down, gives a band. Within it, the moved score has the
shape on at least 1 - alpha of the domain, and it is the `adjusted` score. In the terms of arXiv 2406.18777, this is a
tester with one-sided error; the projection is ours, because the paper's testers were not available.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from apo.guarantees.conformal import Band, band
from apo.guarantees.properties import AVERAGE, Certificate
from clair.core.errors import UserError
from clair.core.statistics import wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[Any]

Score = Callable[["Floats"], "Floats"]
"""A function from points [n, D] to their scores [n]."""
Shape = Literal["rises", "is concave", "rises and is concave"]
_TOLERANCE = 1e-9
"""Relative to the largest score of a line: smaller distances from the shape are rounding errors."""


def constraints(pivots: Floats, shape: Shape) -> Floats:
    """Return the rows a, [c, m], such that values h at the m pivots have the shape if and only if a h >= 0."""
    import numpy as np

    slopes = np.diff(np.eye(len(pivots)), axis=0) / np.diff(pivots)[:, None]
    rows = {"rises": [slopes], "is concave": [-np.diff(slopes, axis=0)], "rises and is concave": None}[shape]
    # A concave line rises everywhere if it rises at its end.
    rows = [slopes[-1:], -np.diff(slopes, axis=0)] if rows is None else rows
    matrix = np.concatenate(rows)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def nearest(values: Floats, matrix: Floats) -> Floats:
    """Return the h with `matrix` h >= 0 that is nearest to `values` [m] in least squares.

    The dual problem, min |values + matrix' u| over u >= 0, is solved by the active-set method of Lawson and Hanson.
    """
    import numpy as np

    gram, slack = matrix @ matrix.T, matrix @ values
    scale = _TOLERANCE * (abs(values).max() or 1.0)
    dual, active = np.zeros(len(matrix)), np.zeros(len(matrix), bool)
    for _ in range(10 * len(matrix)):
        gradient = np.where(active, np.inf, slack + gram @ dual)
        if not len(gradient) or gradient.min() >= -scale:
            break
        active[gradient.argmin()] = True
        while True:
            solution = np.zeros(len(matrix))
            solution[active] = np.linalg.solve(gram[np.ix_(active, active)], -slack[active])
            negative = active & (solution <= 0)
            if not negative.any():
                break
            step = (dual[negative] / (dual[negative] - solution[negative])).min()
            dual = dual + step * (solution - dual)
            active &= dual > _TOLERANCE * dual.max()
            dual = np.where(active, dual, 0.0)
        dual = solution
    return values + matrix.T @ dual


@dataclass(frozen=True)
class ShapeTester:
    """The tester of a shape along one coordinate, which compares a unit with `pivots` on its line.

    `pivots` must be chosen without the units. A score that falls, or is convex, is tested by its negative.
    """

    coordinate: int
    pivots: Floats
    shape: Shape = "rises"

    def limits(self, score: Score, units: Floats) -> tuple[Floats, Floats]:
        """Return the interval of each unit [n, D], low and high [n] each, from the scores at the pivots.

        With h the nearest values with the shape, at a point between the pivots p and q:

            rises        h(p) <= g(x) <= h(q)
            is concave   chord from p to q <= g(x) <= the chords before p and after q, extended to x

        At a pivot both limits are h. Any g within the limits has the shape from interval to interval. It rises for two
        points with a pivot between them. It is concave for three points if the middle one shares its interval with
        neither of the others: both others lie below the extended chord of the middle one's interval.
        """
        import numpy as np

        pivots, count = np.unique(np.asarray(self.pivots, float)), len(units)
        if len(pivots) < 3:
            raise UserError(f"{len(pivots)} different pivots; give at least 3, such as quantiles of the training rows")
        lines = [score(_with_coordinate(units, self.coordinate, pivot)) for pivot in pivots]
        matrix = constraints(pivots, self.shape)
        h = np.stack([nearest(line, matrix) for line in np.stack(lines, axis=1)])
        x, row = units[:, self.coordinate], np.arange(count)
        left, right = np.searchsorted(pivots, x, "right") - 1, np.searchsorted(pivots, x, "left")
        inside = (left >= 0) & (right < len(pivots))

        def chord(first: Floats) -> Floats:
            """The line through the pivots `first` and `first` + 1 at x; nan if there is no such pair."""
            i = np.clip(first, 0, len(pivots) - 2)
            slope = (h[row, i + 1] - h[row, i]) / (pivots[i + 1] - pivots[i])
            return np.where((first >= 0) & (first <= len(pivots) - 2), h[row, i] + slope * (x - pivots[i]), np.nan)

        low, high = np.full(count, -np.inf), np.full(count, np.inf)
        if "concave" in self.shape:
            low = np.where(inside, chord(left), low)
            high = np.fmin(high, np.fmin(chord(left - 1), chord(right)))
        if "rises" in self.shape:
            low = np.fmax(low, np.where(left >= 0, h[row, np.maximum(left, 0)], -np.inf))
            high = np.fmin(high, np.where(right < len(pivots), h[row, np.minimum(right, len(pivots) - 1)], np.inf))
        at_pivot = left == right
        value = h[row, np.clip(left, 0, len(pivots) - 1)]
        return np.where(at_pivot, value, low), np.where(at_pivot, value, np.maximum(low, high))

    def sides(self, score: Score, units: Floats) -> tuple[Floats, Floats]:
        """Return by how much each unit's score lies below its interval (up) and above it (down), [n] each."""
        import numpy as np

        low, high = self.limits(score, units)
        scores = score(units)
        smallest = _TOLERANCE * abs(scores).max(initial=0.0)
        below, above = low - scores, scores - high
        return np.where(below > smallest, below, 0.0), np.where(above > smallest, above, 0.0)

    def certify(self, score: Score, units: Floats, alpha: float) -> Certificate:
        """Return the certificate that a g of this shape lies within the band on 1 - alpha of the domain, on average."""
        up, down = self.sides(score, units)
        within = band(up, down, alpha)
        promise = (
            f"domain certificate: on at least {1 - alpha:.3g} of the domain, {AVERAGE}, a function that {self.shape} "
            f"from pivot to pivot lies within -{within.below:.4g} and +{within.above:.4g} of the score"
        )
        failed = wilson(int(((up > 0) | (down > 0)).sum()), len(units))
        description = f"the score {self.shape} along coordinate {self.coordinate}"
        return Certificate(description, promise, alpha, len(units), within, failed)

    def adjusted(self, score: Score, within: Band) -> Score:
        """Return the score moved into its interval, but not out of the band: the certified g on what is accepted."""

        def moved(points: Floats) -> Floats:
            up, down = self.sides(score, points)
            return move(score(points), up, down, within)

        return moved


def move(scores: Floats, up: Floats, down: Floats, within: Band) -> Floats:
    """Return the scores [n] moved by the sides of a `ShapeTester`, as far as the band allows."""
    import numpy as np

    return scores + np.minimum(up, within.above) - np.minimum(down, within.below)


def _with_coordinate(units: Floats, coordinate: int, value: float) -> Floats:
    changed = units.copy()
    changed[:, coordinate] = value
    return changed
