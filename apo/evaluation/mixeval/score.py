"""From items to a score: means as upstream rounds them, intervals that know which items share question or passage."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any

from apo.evaluation.results import SPLITS, Interval, Item, Part, Profile
from clair.core.statistics import clustered_score

_DECIMALS = 3


def aggregate(items: Sequence[Item], profile: Profile) -> dict[str, Any]:
    """The fields of a Score that follow from its items.

    *faithful*: the mean of each split, duplicates included, rounded to 3 decimals, and the mean of both weighted by
    their rows. *strict*: the mean over all items, unrounded. None for a part with an item that is `unanswered`.
    """
    by_split = {split: [item for item in items if item.split == split] for split in SPLITS}
    means = {split: _shown(part, profile) for split, part in by_split.items()}
    overall = _shown(items, "strict")
    if profile == "faithful" and overall is not None:
        overall = sum(len(part) * (means[split] or 0.0) for split, part in by_split.items()) / len(items)
        overall = round(overall, 12)  # what adding floats leaves behind is no part of a score
    return {
        "overall": overall,
        "free_form": means["free-form"],
        "multiple_choice": means["multiple-choice"],
        "by_benchmark": {split: _by_benchmark(part, profile) for split, part in by_split.items()},
        "intervals": {
            "overall": interval(items, profile),
            "free_form": interval(by_split["free-form"], profile),
            "multiple_choice": interval(by_split["multiple-choice"], profile),
        },
        "unresolved": sum(item.unresolved is not None for item in items),
        "unresolved_reasons": dict(sorted(Counter(i.unresolved for i in items if i.unresolved).items())),
        "unanswered": sum(item.unanswered for item in items),
        "fallbacks": sum(item.fallback for item in items),
        "truncated": sum(item.truncated for item in items),
    }


def interval(items: Sequence[Item], profile: Profile = "faithful") -> Interval:
    """How sure the mean of items is. None for what too few of them cannot tell, or one that is `unanswered`.

    The bracket is over what is unresolved; under *strict* over answers that were cut off too.
    """
    scores, clusters = [item.score for item in items], [item.cluster for item in items]
    known = not any(item.unanswered for item in items)
    clustered = clustered_score(scores, clusters) if known and len(set(clusters)) > 1 else None
    by_question: dict[str, list[float]] = defaultdict(list)
    for item in items:
        by_question[item.question].append(item.score)
    settled = [i for i in items if i.unresolved is None and not (i.truncated and profile == "strict")]
    right = math.fsum(item.score for item in settled)
    return Interval(
        mean=_mean(items) if known else None,
        n=len(items),
        questions=len(by_question),
        clusters=len(set(clusters)),
        se_naive=math.sqrt(variance(scores) / len(scores)) if known and len(scores) > 1 else None,
        se_clustered=clustered.se if clustered else None,
        ci95=(clustered.lo, clustered.hi) if clustered else None,
        unique_mean=fmean(fmean(scores) for scores in by_question.values()) if known else None,
        bracket=(right / len(items), (right + len(items) - len(settled)) / len(items)),
    )


def _by_benchmark(items: Sequence[Item], profile: Profile) -> dict[str, Part]:
    parts: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        parts[item.benchmark].append(item)
    return {
        name: Part(
            score=_shown(part, profile),
            n=len(part),
            right=round(math.fsum(item.score for item in part), 12),
            unresolved=sum(item.unresolved is not None for item in part),
        )
        for name, part in sorted(parts.items())
    }


def _mean(items: Sequence[Item]) -> float:
    return math.fsum(item.score for item in items) / len(items)


def _shown(items: Sequence[Item], profile: Profile) -> float | None:
    if any(item.unanswered for item in items):
        return None
    return round(_mean(items), _DECIMALS) if profile == "faithful" else _mean(items)
