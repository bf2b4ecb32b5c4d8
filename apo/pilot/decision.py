"""The choice among pilots by the user's metric. It is pure: easy to read, test and measure."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from apo.advice.rule import Certainty
from clair.core.statistics import MIN_DIFFERING, Best, Estimate, best_of, clustered_mean, paired_difference
from clair.core.student_t import detectable_difference


@dataclass(frozen=True)
class PilotVerdict:
    """The pilot to train with, or None: do not train, or too few prompts to say (`needed` is the number that would do).

    `gain`, `bias`, `corrected` and `ci95` are of the best pilot: its mean gain over the base, the part of it that
    choosing the best accounts for, and the difference with its 95 % interval.
    """

    choice: str | None
    sure: Certainty
    because: str
    best: str
    gain: float
    bias: float
    corrected: float
    ci95: tuple[float, float]
    needed: int | None = None
    close: list[str] = field(default_factory=list)
    """Pilots that these prompts do not tell apart from the best."""


def decide(
    gains: Mapping[str, Sequence[float]],
    clusters: Sequence[Hashable],
    objectives: Mapping[str, str],
    difference: float,
    unit: str = "",
) -> PilotVerdict:
    """Choose among pilots by their gains over the base on the same rows.

    Train only if the lower end of the best pilot's interval, corrected for its selection, is above 0. The certainty is
    high if the best is also better than every pilot of another objective. `difference` is a gain that matters, and
    `unit` what follows a gain in words.
    """
    names = list(gains)
    values = [list(gains[name]) for name in names]
    best = best_of(values, clusters)
    name = names[best.candidate]
    test = paired_difference([0.0] * len(clusters), gains[name], clusters)
    estimate = test.estimate
    lo, hi = _corrected_interval(best, estimate)
    close = [other for other in names if other != name and not _is_better(gains[name], gains[other], clusters)]
    numbers = {"best": name, "gain": best.observed, "bias": best.bias, "corrected": best.corrected, "close": close}
    significant = not math.isnan(estimate.se) and test.cautious_p < 0.05
    if lo > 0 and significant:
        others = [other for other in close if objectives[other] != objectives[name]]
        because = f"its lower bound, corrected for choosing the best of {len(names)}, is above the base"
        return PilotVerdict(name, "fair" if others else "high", because, ci95=(lo, hi), **numbers)
    if not math.isnan(estimate.se) and estimate.hi <= 0:
        return PilotVerdict(None, "high", "no pilot is as good as the base", ci95=(lo, hi), **numbers)
    # What these prompts exclude is no ground not to train either: a full run gains more than its pilot (docs/log).
    smallest = difference / 5
    target = best.corrected if best.corrected >= smallest else difference if hi >= difference else smallest
    needed = rows_needed(values[best.candidate], clusters, target)
    reason = f"too few prompts to say: {len(set(clusters))}, and {needed} would detect a gain of {target:.2g}{unit}"
    return PilotVerdict(None, "low", reason, ci95=(lo, hi), needed=needed, **numbers)


def _corrected_interval(best: Best, estimate: Estimate) -> tuple[float, float]:
    """The bootstrap's interval, and at least the run's own moved by the bias: the former is too narrow for few rows."""
    if math.isnan(estimate.se):  # no row differs: up to 3.7 / n may, by the exact interval of a share of 0
        half = 3.7 / estimate.clusters
        return best.lo - half, best.hi + half
    return min(best.lo, estimate.lo - best.bias), max(best.hi, estimate.hi - best.bias)


def _is_better(best: Sequence[float], other: Sequence[float], clusters: Sequence[Hashable]) -> bool:
    test = paired_difference(other, best, clusters)
    return test.estimate.mean > 0 and test.cautious_p < 0.05


def rows_needed(gains: Sequence[float], clusters: Sequence[Hashable], target: float) -> int:
    """How many clusters detect a gain of `target` at the 5 % level with 80 % power, if they vary as these do."""
    estimate = clustered_mean(gains, clusters)
    # Gains that do not vary at all say nothing about how others would: as if one in ten differed by one.
    deviation = estimate.se * math.sqrt(estimate.clusters) or math.sqrt(0.1)
    # A t-test needs ten that differ.
    return max(estimate.clusters + 1, 2 * MIN_DIFFERING, math.ceil((detectable_difference(deviation) / target) ** 2))
