"""Properties of a score, such as monotonicity: how wide a band around the scores must be for a unit to have them.

A unit has several scores: of the two answers of a prompt, or of more texts in an order (a ladder). Its critical width
is the smallest s = above + below such that some values within the bands [f - below, f + above] have the property.
Conformal risk control of these widths bounds the share of new units that fail (`certify_widths`). For a score that can
be evaluated at any point, `apo.guarantees.shapes` certifies monotonicity and concavity on a share of the domain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from apo.guarantees.conformal import Band, crc_threshold, min_units
from clair.core.statistics import Estimate, wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[Any]

PropertyKind = Literal["rises", "concave", "same", "floor", "ceiling", "lipschitz"]


def critical_widths(kind: PropertyKind, scores: Floats, bound: float = 0.0, distance: Floats | float = 1.0) -> Floats:
    """Return the critical width of each unit, [n], from its `scores` [n, k]; 0 if they have the property as they are.

    rises       no score is below an earlier one: the largest fall
    concave     the scores, at equal steps, lie on a concave line: the largest depth below a chord
    same        all scores are equal: the largest minus the smallest
    floor       every score is at least `bound`
    ceiling     every score is at most `bound`
    lipschitz   the first and the last differ by at most `bound` times their `distance` [n]
    """
    import numpy as np

    if kind == "rises":
        widths = (np.maximum.accumulate(scores, axis=1) - scores).max(axis=1)
    elif kind == "concave":
        depths = [
            ((k - j) * scores[:, i] + (j - i) * scores[:, k]) / (k - i) - scores[:, j]
            for i, j, k in combinations(range(scores.shape[1]), 3)
        ]
        widths = np.max(depths, axis=0)
    elif kind == "same":
        widths = np.ptp(scores, axis=1)
    elif kind == "floor":
        widths = bound - scores.min(axis=1)
    elif kind == "ceiling":
        widths = scores.max(axis=1) - bound
    else:
        widths = abs(scores[:, -1] - scores[:, 0]) - bound * np.asarray(distance)
    return np.maximum(widths, 0.0)


@dataclass(frozen=True)
class Certificate:
    """The certified distance of a score from a property. `promise` says what holds with a risk of at most alpha."""

    description: str
    promise: str
    alpha: float
    n: int
    band: Band
    unadjusted: Estimate
    """The share of units on which the score as it is fails, with Wilson's interval."""

    def summary(self) -> str:
        """State how often the score fails, and the promise."""
        failing = f"{self.description}: as it is, it fails on {self.unadjusted.mean:.3g} of {self.n} units"
        reason = self.refusal()
        return f"{failing}; {reason or self.promise}"

    def refusal(self) -> str:
        """Say why these units cannot certify the property, and what would do; empty if they can."""
        return "" if math.isfinite(self.band.width) else too_few(self.alpha, self.n)


AVERAGE = "on average over draws of the units; a single draw may lie above"


def too_few(alpha: float, n: int) -> str:
    """Say that n units give no finite band at this alpha, and how many units or which alpha would."""
    required, smallest = min_units(alpha), math.ceil(1e4 / (n + 1)) / 1e4
    return (
        f"no finite band: alpha {alpha:g} needs {required:,} units, and there are {n:,}; give {required - n:,} more, "
        f"or an alpha of at least {smallest:g}"
    )


def certify_widths(widths: Floats, alpha: float, description: str) -> Certificate:
    """Return the pair risk for the critical widths [n] of n units.

    Only the total width of the band is calibrated. Its two sides are equal.
    """
    width = crc_threshold(widths, alpha)
    promise = (
        f"pair risk: score differences up to {width:.4g} decide nothing, and then at most {alpha:.3g} of new queries "
        f"fail, {AVERAGE}. This says nothing about a share of the domain"
    )
    failed = wilson(int((widths > 0).sum()), len(widths))
    return Certificate(description, promise, alpha, len(widths), Band(width / 2, width / 2), failed)
