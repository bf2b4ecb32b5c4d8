"""Thresholds with a finite-sample guarantee: conformal risk control, and learn-then-test.

Conformal risk control (arXiv 2208.02814; for model properties arXiv 2406.18777): for n exchangeable units with losses
L_i(t) in [0, B] that do not increase with t,

    t_hat = inf {t : (sum_i L_i(t) + B) / (n + 1) <= alpha}      gives      E[L_{n+1}(t_hat)] <= alpha.

The expectation includes the draw of the n units, so a single draw may lie above alpha. If n < 1/alpha - 1, no finite t
exists. All functions take numpy arrays of losses or scores, and do not depend on the model.
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


def check_level(name: str, value: float) -> None:
    """Raise UserError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise UserError(f"{name} is {value:g}; give a number between 0 and 1, such as 0.1")


def min_units(alpha: float) -> int:
    """Return the minimal number of units for a finite threshold: the smallest n with n >= 1/alpha - 1."""
    check_level("alpha", alpha)
    return math.ceil(1 / Fraction(str(alpha)) - 1)


def crc_threshold(critical: Floats, alpha: float, *, lowest: float = 0.0) -> float:
    """Return the smallest t >= lowest with at most floor(alpha (n + 1) - 1) losses 1{critical_i > t}.

    The result is inf if n is too small. `critical` [n] has, for each unit, the smallest t at which its 0/1 loss is 0;
    -inf if its loss is always 0. The loss is a strict inequality. So with ties, the promise holds only if a filter also
    keeps what lies strictly above t.
    """
    import numpy as np

    values = np.sort(_one_dimensional(critical, "critical values"))[::-1]
    if len(values) < min_units(alpha):
        return math.inf
    # Exact arithmetic, because 0.29 * 100 - 1 is 27.999... in floats, which would lose one unit.
    allowed = math.floor(Fraction(str(alpha)) * (len(values) + 1) - 1)
    return max(lowest, float(values[allowed])) if allowed < len(values) else lowest


def precision_threshold(gap: Floats, bad: Floats, alpha: float, delta: float, candidates: Floats) -> float:
    """Return a threshold t such that P(share of bad among gap > t is above alpha) <= delta; inf if there is none.

    Learn-then-test (arXiv 2110.01052) with fixed-sequence testing. The `candidates`, chosen without the audit, are
    tested from the strictest to the loosest, each by a binomial test of "the share is above alpha" on the audited units
    that it keeps. The result is the last candidate before the first failure. `gap` and `bad` [n] are the audit's.
    """
    import numpy as np

    check_level("alpha", alpha)
    check_level("delta", delta)
    gaps, wrong = _one_dimensional(gap, "gaps"), np.asarray(bad, bool)
    threshold = math.inf
    for candidate in sorted({float(c) for c in _one_dimensional(candidates, "candidates")}, reverse=True):
        accepted = gaps > candidate
        if binomial_tail(int(wrong[accepted].sum()), int(accepted.sum()), alpha) > delta:
            break
        threshold = candidate
    return threshold


def min_accepted(alpha: float, delta: float) -> int:
    """Return how many units must be kept, all good, for the binomial test to pass: ln(delta) / ln(1 - alpha)."""
    check_level("alpha", alpha)
    check_level("delta", delta)
    return math.ceil(math.log(delta) / math.log1p(-alpha))


def candidate_thresholds(gap: Floats, units: int, alpha: float, delta: float, limit: int = 50) -> Floats:
    """Return thresholds to test on an audit of `units`, strict to loose, from the score gaps [m] of other pairs.

    They are at most `limit` of the distinct gaps, spread evenly; the last one keeps all pairs. The first of several is
    expected to keep 1.5 times the units that the binomial test needs. A stricter one would fail, and end the sequence
    at once. No label is read, so the order of the tests is fixed before the audit. If the audit has fewer units than
    the test needs, there are no thresholds.
    """
    import numpy as np

    values = _one_dimensional(gap, "gaps")
    distinct = np.unique(values)[::-1]
    share = np.array([(values > value).mean() for value in distinct])
    usable = distinct[share * units >= 1.5 * min_accepted(alpha, delta)]
    lower = np.append(usable, distinct[-1] - 1) if units >= min_accepted(alpha, delta) else usable
    return lower[np.unique(np.linspace(0, len(lower) - 1, min(limit, len(lower))).round().astype(int))]


def binomial_tail(successes: int, n: int, p: float) -> float:
    """Return P(Binomial(n, p) <= successes), summed from logarithms; 1 for n = 0."""
    log_odds = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
        for k in range(successes + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, log_odds)))


@dataclass(frozen=True)
class Band:
    """The interval [score - below, score + above], within which a score may be moved to satisfy the property."""

    above: float
    below: float

    @property
    def width(self) -> float:
        """above + below: score differences up to this width are undecided."""
        return self.above + self.below


def band(up: Floats, down: Floats, alpha: float) -> Band:
    """Return the band, as a vector of two, that controls the losses 1{up_i > above or down_i > below}.

    E[loss of a new unit] <= floor(alpha (n + 1)) / (n + 1), and all n units calibrate both sides. `up` and `down` [n]
    are >= 0. Starting without bounds, floor(alpha (n + 1)) cuts remove one unit each: the first cut lowers both sides
    to the largest value of either, and each later one lowers the larger side to the largest value that remains on it.
    The result is infinite if there is no cut.

    Why it holds: cut n + 1 units instead, the new one included. As long as the new one remains, both runs remove the
    same units, because a cut depends only on units removed before. So if the n units' bounds reject the new one, the
    n + 1 units' cuts remove it, and by symmetry that has a probability of floor(alpha (n + 1)) / (n + 1). These are
    Tukey's statistically equivalent blocks (1947). The best point of a grid on the calibration data has no such bound
    (measured in docs/properties.md).
    """
    import numpy as np

    ups, downs = _one_dimensional(up, "up"), _one_dimensional(down, "down")
    if len(ups) != len(downs):
        raise UserError(f"{len(ups)} values up but {len(downs)} down; give both for each unit")
    sides = np.stack([ups, downs])
    remaining, bounds = np.ones(sides.shape[1], bool), np.full(2, math.inf)
    # Equal values are cut in an order that depends on values alone, so that the order of the units does not matter.
    orders = [np.lexsort((sides[0], sides.sum(0), values))[::-1] for values in (*sides, sides.max(0))]
    for cut in range(math.floor(Fraction(str(alpha)) * (sides.shape[1] + 1))):
        side = 2 if cut == 0 else int(bounds.argmax())
        unit = orders[side][remaining[orders[side]].argmax()]
        remaining[unit] = False
        if side == 2:
            bounds[:] = sides[:, unit].max()
        else:
            bounds[side] = sides[side, unit]
    return Band(float(bounds[0]), float(bounds[1]))


def joint_promise(threshold: float, alpha: float, n: int) -> str:
    """State the promise of `crc_threshold` for a filter, or that there is no threshold."""
    if threshold == math.inf:
        required = min_units(alpha)
        return f"no finite threshold: {n} audited prompts are too few for alpha {alpha:g}, which needs {required}"
    return (
        f"keep a pair only if its gap is above {threshold:g}: at most {alpha:.3g} of new pairs are then kept and bad, "
        f"on average over draws of {n} audited prompts like these; a single draw may lie above. This is not the share "
        f"of bad pairs among the kept"
    )


def precision_promise(threshold: float, alpha: float, delta: float, n: int) -> str:
    """State the promise of `precision_threshold`, or that there is no threshold."""
    if threshold == math.inf:
        return (
            f"no threshold could be shown, with {n} audited prompts, to keep at most {alpha:.3g} bad pairs among the "
            f"kept (at least {min_accepted(alpha, delta)} must be kept, all good); audit more, or raise alpha"
        )
    return (
        f"keep a pair only if its gap is above {threshold:g}: at most {alpha:.3g} of the kept are then bad, with a "
        f"probability of at least {1 - delta:.3g} over draws of {n} audited prompts like these"
    )


def _one_dimensional(values: Floats, name: str) -> Floats:
    import numpy as np

    array = np.asarray(values, float)
    if array.ndim != 1 or np.isnan(array).any():
        raise UserError(f"{name}: expected a list of numbers, found shape {array.shape} or NaN")
    return array
