"""Aggregate items to a score: means rounded as upstream does, and intervals clustered by question or passage."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from apo.evaluation.intervals import score_interval
from apo.evaluation.records.benchmark import ScoreInterval
from apo.evaluation.records.mixeval import SPLITS, MixEvalItem, Profile, SubsetScore

_DECIMALS = 3


def aggregate(items: Sequence[MixEvalItem], profile: Profile) -> dict[str, Any]:
    """The fields of a `Score` that are computed from its items.

    *faithful*: the mean of each split, duplicates included, rounded to 3 decimals; overall is their mean weighted by
    rows. *strict*: the unrounded mean over all items. None if one of the items is `unanswered`.
    """
    by_split = {split: [item for item in items if item.split == split] for split in SPLITS}
    means = {split: _reported_mean(split_items, profile) for split, split_items in by_split.items()}
    overall = _reported_mean(items, "strict")
    if profile == "faithful" and overall is not None:
        overall = sum(len(split_items) * (means[split] or 0.0) for split, split_items in by_split.items()) / len(items)
        overall = round(overall, 12)  # removes the rounding error of the sum
    return {
        "overall": overall,
        "free_form": means["free-form"],
        "multiple_choice": means["multiple-choice"],
        "by_benchmark": {split: _by_benchmark(split_items, profile) for split, split_items in by_split.items()},
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


def interval(items: Sequence[MixEvalItem], profile: Profile = "faithful") -> ScoreInterval:
    """The uncertainty of the mean of items. Fields are None if there are too few items or one is `unanswered`.

    The bracket covers unresolved items, under *strict* also answers that were cut off.
    """
    return score_interval([item.scored(profile) for item in items])


def _by_benchmark(items: Sequence[MixEvalItem], profile: Profile) -> dict[str, SubsetScore]:
    by_benchmark: dict[str, list[MixEvalItem]] = defaultdict(list)
    for item in items:
        by_benchmark[item.benchmark].append(item)
    return {
        name: SubsetScore(
            score=_reported_mean(items_, profile),
            n=len(items_),
            right=round(math.fsum(item.score for item in items_), 12),
            unresolved=sum(item.unresolved is not None for item in items_),
        )
        for name, items_ in sorted(by_benchmark.items())
    }


def _reported_mean(items: Sequence[MixEvalItem], profile: Profile) -> float | None:
    if any(item.unanswered for item in items):
        return None
    mean = math.fsum(item.score for item in items) / len(items)
    return round(mean, _DECIMALS) if profile == "faithful" else mean
