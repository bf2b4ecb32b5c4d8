"""Means as result files hold them: with standard error and 95 % interval if there are enough clusters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean, variance
from typing import Any

from apo.evaluation.records.benchmark import Scored, ScoreInterval
from clair.core.statistics import Estimate, clustered_score


def mean_with_interval(
    values: Sequence[float], clusters: Sequence[str], estimator: Callable[[Sequence[float], Sequence[str]], Estimate]
) -> dict[str, Any]:
    """The mean of `values` with `se` and `ci95` of a clustered `estimator`, which are None for a single cluster."""
    if len(set(clusters)) < 2:
        return {"mean": math.fsum(values) / len(values), "se": None, "ci95": None}
    estimate = estimator(values, clusters)
    return {"mean": estimate.mean, "se": estimate.se, "ci95": [estimate.lo, estimate.hi]}


def score_headline(name: str, value: float | None, interval: ScoreInterval, unanswered: int) -> str:
    """A score in per cent with its interval, or its bracket if a server refused items."""
    low, high = (f"{100 * end:.1f}" for end in interval.ci95 or interval.bracket)
    if value is None:
        return f"{name} between {low} and {high} %, {unanswered} items were refused"
    return f"{name} {100 * value:.1f} %" + (f", 95 % interval {low} to {high}" if interval.ci95 else "")


def score_interval(scored: Sequence[Scored]) -> ScoreInterval:
    """The uncertainty of a mean of scores. Fields are None if there are too few of them or one is `unanswered`."""
    scores, clusters = [entry.score for entry in scored], [entry.cluster for entry in scored]
    answered = not any(entry.unanswered for entry in scored)
    clustered = clustered_score(scores, clusters) if answered and len(set(clusters)) > 1 else None
    by_question: dict[str, list[float]] = defaultdict(list)
    for entry in scored:
        by_question[entry.question].append(entry.score)
    resolved = [entry.score for entry in scored if entry.resolved]
    right = math.fsum(resolved)
    return ScoreInterval(
        mean=math.fsum(scores) / len(scores) if answered else None,
        n=len(scores),
        questions=len(by_question),
        clusters=len(set(clusters)),
        se_naive=math.sqrt(variance(scores) / len(scores)) if answered and len(scores) > 1 else None,
        se_clustered=clustered.se if clustered else None,
        ci95=(clustered.lo, clustered.hi) if clustered else None,
        unique_mean=fmean(fmean(scores) for scores in by_question.values()) if answered else None,
        bracket=(right / len(scores), (right + len(scores) - len(resolved)) / len(scores)),
    )
