"""Thresholds with a finite-sample guarantee: conformal risk control, and learn-then-test.

Conformal risk control (arXiv 2208.02814; for model properties arXiv 2406.18777): of n exchangeable units with losses
L_i(t) in [0, B] that only fall as t rises,

    t_hat = inf {t : (sum_i L_i(t) + B) / (n + 1) <= alpha}      gives      E[L_{n+1}(t_hat)] <= alpha.

The expectation is over draws of the n units too: a single draw may well lie above alpha. Below n = 1/alpha - 1 no
finite t will do. Everything here is numpy on losses or scores; which model gave them is not its business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[Any]

SMALL = 100
"""Below this many units a band's direction is not chosen from the data: half of them would cost too much width."""


def check_level(name: str, value: float) -> None:
    """Raises UserError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise UserError(f"{name} is {value:g}; it lies between 0 and 1, such as 0.1")


def fewest(alpha: float) -> int:
    """The fewest units with which a finite threshold exists: the smallest n with n >= 1/alpha - 1."""
    check_level("alpha", alpha)
    return math.ceil(1 / Fraction(str(alpha)) - 1)


def crc_threshold(critical: Floats, alpha: float, *, lowest: float = 0.0) -> float:
    """The smallest t >= lowest with at most floor(alpha (n + 1) - 1) losses 1{critical_i > t}; inf if n is too small.

    `critical` [n] is per unit the smallest t at which its 0/1 loss is 0, -inf for a unit that never loses. The loss
    is strict, so ties stay on the safe side only where what is kept or accepted lies strictly above t as well.
    """
    import numpy as np

    values = np.sort(_one_dimensional(critical, "critical values"))[::-1]
    if len(values) < fewest(alpha):
        return math.inf
    # In exact arithmetic: 0.29 * 100 - 1 is 27.999... in floats, and one unit would be lost.
    allowed = math.floor(Fraction(str(alpha)) * (len(values) + 1) - 1)
    return max(lowest, float(values[allowed])) if allowed < len(values) else lowest


def crc_on_grid(losses: Floats, grid: Floats, alpha: float, *, bound: float = 1.0) -> float:
    """The smallest value of `grid` [G], rising, at which the losses [n, G] keep the promise; inf where none does.

    For losses that are more than 0 and 1. Raises UserError for losses that rise along the grid, and for ones outside
    [0, bound]: conformal risk control proves nothing about them.
    """
    import numpy as np

    table, values = np.asarray(losses, float), _one_dimensional(grid, "grid")
    check_level("alpha", alpha)
    if table.ndim != 2 or table.shape[1] != len(values) or not len(table):
        raise UserError(
            f"losses have shape {table.shape}; give one row a unit and one column for each of {len(values)}"
        )
    if not np.isfinite(table).all() or table.min() < 0 or table.max() > bound:
        raise UserError(f"losses lie in [{table.min():g}, {table.max():g}]; they must lie in [0, {bound:g}]")
    if (np.diff(values) <= 0).any():
        raise UserError("the grid does not rise; sort it, each value once")
    rises = np.diff(table, axis=1) > 0
    if rises.any():
        unit, place = np.argwhere(rises)[0]
        raise UserError(
            f"the loss of unit {unit} rises from {table[unit, place]:g} to {table[unit, place + 1]:g} between "
            f"{values[place]:g} and {values[place + 1]:g}; conformal risk control needs losses that never rise"
        )
    kept = (table.sum(0) + bound) / (len(table) + 1) <= alpha
    return float(values[kept.argmax()]) if kept.any() else math.inf


def precision_threshold(gap: Floats, bad: Floats, alpha: float, delta: float, candidates: Floats) -> float:
    """A threshold t such that P(share of bad among gap > t is above alpha) <= delta; inf where none can be shown.

    Learn-then-test (arXiv 2110.01052) with fixed-sequence testing: `candidates`, chosen without the audit, are tried
    from the strictest down, each by the binomial test of "the share is above alpha" on the audited units that it
    keeps; the last one before the first that fails is taken. `gap` and `bad` [n] are the audit's.
    """
    import numpy as np

    check_level("alpha", alpha)
    check_level("delta", delta)
    gaps, wrong = _one_dimensional(gap, "gaps"), np.asarray(bad, bool)
    found = math.inf
    for candidate in sorted({float(c) for c in _one_dimensional(candidates, "candidates")}, reverse=True):
        kept = gaps > candidate
        if binomial_tail(int(wrong[kept].sum()), int(kept.sum()), alpha) > delta:
            break
        found = candidate
    return found


def fewest_kept(alpha: float, delta: float) -> int:
    """How many units must be kept, all of them good, before the binomial test can pass: ln(delta) / ln(1 - alpha)."""
    check_level("alpha", alpha)
    check_level("delta", delta)
    return math.ceil(math.log(delta) / math.log1p(-alpha))


def candidates_of(gap: Floats, units: int, alpha: float, delta: float, most: int = 50) -> Floats:
    """Thresholds to try on an audit of `units`, strict to loose, from scores `gap` [m] that the audit did not choose.

    At most `most` of the distinct scores, evenly over the pairs. The first is expected to keep half as many again as
    the binomial test needs at the least: were it stricter, the sequence would end before it began.
    """
    import numpy as np

    values = _one_dimensional(gap, "gaps")
    distinct = np.unique(values)[::-1]
    share = np.array([(values > value).mean() for value in distinct])
    usable = distinct[share * units >= 1.5 * fewest_kept(alpha, delta)]
    lower = np.append(usable, distinct[-1] - 1) if len(usable) else usable
    return lower[np.unique(np.linspace(0, len(lower) - 1, min(most, len(lower))).round().astype(int))]


def binomial_tail(successes: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= successes), summed from its logarithms; 1 for n = 0."""
    log_odds = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
        for k in range(successes + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, log_odds)))


@dataclass(frozen=True)
class Band:
    """[score - below, score + above]: within it a value may be moved to make the property hold."""

    above: float
    below: float

    @property
    def width(self) -> float:
        """above + below: score differences within it say nothing."""
        return self.above + self.below


def band(up: Floats, down: Floats, alpha: float, *, seed: int = 0) -> Band:
    """The band at which the 0/1 losses 1{up_i > above or down_i > below} are controlled; infinite where n is too small.

    Two parameters, one promise: `above` and `below` keep a fixed ratio and only their scale is calibrated. From
    `SMALL` units on (and twice as many as alpha needs), a random half of them chooses the ratio of least width and the
    other half calibrates; below that the ratio is 1. (The best point of a grid, chosen on the data that calibrate it,
    breaks the promise: measured in docs/neighbours.md.) up and down [n] are 0 or above.
    """
    import numpy as np

    ups, downs = _one_dimensional(up, "up"), _one_dimensional(down, "down")
    if len(ups) != len(downs):
        raise UserError(f"{len(ups)} values up but {len(downs)} down; give both of each unit")
    angle, rest = math.pi / 4, np.arange(len(ups))
    if len(ups) >= max(SMALL, 2 * fewest(alpha)):
        order = np.random.default_rng(seed).permutation(len(ups))
        tune, rest = order[: len(ups) // 2], order[len(ups) // 2 :]
        angles = np.linspace(0.05, math.pi / 2 - 0.05, 32)
        widths = [_scale(ups[tune], downs[tune], a, alpha) * (math.cos(a) + math.sin(a)) for a in angles]
        angle = float(angles[int(np.argmin(widths))])
    scale = _scale(ups[rest], downs[rest], angle, alpha)
    return Band(scale * math.cos(angle), scale * math.sin(angle))


def _scale(up: Floats, down: Floats, angle: float, alpha: float) -> float:
    """The calibrated t of the band t (cos angle, sin angle)."""
    import numpy as np

    return crc_threshold(np.maximum(up / math.cos(angle), down / math.sin(angle)), alpha)


def joint_words(threshold: float, alpha: float, n: int) -> str:
    """The promise of `crc_threshold` on a filter, in words a user can repeat."""
    if threshold == math.inf:
        return f"no finite threshold: {n} audited prompts are too few for alpha {alpha:g}, which needs {fewest(alpha)}"
    return (
        f"keep a pair only if its gap is above {threshold:g}: at most {alpha:.3g} of new pairs are then kept and bad. "
        f"On average over draws of {n} audited prompts like these; a single draw may lie above. This is not the share "
        f"of bad ones among the kept"
    )


def precision_words(threshold: float, alpha: float, delta: float, n: int) -> str:
    """The promise of `precision_threshold`, or that there is none."""
    if threshold == math.inf:
        return (
            f"no threshold could be shown to keep at most {alpha:.3g} bad among the kept with {n} audited prompts (at "
            f"least {fewest_kept(alpha, delta)} must be kept, all good); audit more, or raise alpha"
        )
    return (
        f"keep a pair only if its gap is above {threshold:g}: at most {alpha:.3g} of the kept are then bad, with a "
        f"chance of at least {1 - delta:.3g} over draws of {n} audited prompts like these"
    )


def _one_dimensional(values: Floats, what: str) -> Floats:
    import numpy as np

    array = np.asarray(values, float)
    if array.ndim != 1 or np.isnan(array).any():
        raise UserError(f"{what}: expected a list of numbers, found shape {array.shape} or values that are none")
    return array
