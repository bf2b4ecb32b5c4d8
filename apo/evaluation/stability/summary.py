"""Summarize repeated judgements: how often verdicts flip, and how much that widens the interval of a difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from statistics import fmean, variance
from typing import Any

from apo.evaluation.intervals import mean_with_interval
from apo.evaluation.pairs import mean_difference
from clair.core.statistics import clustered_mean, clustered_score

RIGHT = 0.5
"""The lowest score that counts as right."""
Scores = Sequence[Sequence[float]]
"""Scores of N answers, K judgements each: [N, K]."""


def flip_rate(scores: Scores, clusters: Sequence[str]) -> dict[str, Any]:
    """Return how probably two judgements of an answer by one judge differ: in right or wrong, and in the score.

    `unanimous` is the share of answers whose K judgements all agree. Intervals are clustered.
    """
    pairs = [list(combinations(row, 2)) for row in scores]
    flips = [fmean(_flips(a, b) for a, b in row) for row in pairs]
    changes = [fmean(float(a != b) for a, b in row) for row in pairs]
    unanimous = [float(flip == 0) for flip in flips]
    named = {"flips": flips, "changes": changes, "unanimous": unanimous}
    return {name: mean_with_interval(values, clusters, clustered_score) for name, values in named.items()}


def disagreement(first: Scores, second: Scores, clusters: Sequence[str]) -> dict[str, Any]:
    """Return the probability that two judges differ in whether an answer is right, and the difference of their scores.

    The difference is the second judge's mean score minus the first's.
    """
    flips = [fmean(_flips(a, b) for a, b in product(*row)) for row in zip(first, second, strict=True)]
    return {
        "flips": mean_with_interval(flips, clusters, clustered_score),
        "score_difference": mean_difference(_means(first), _means(second), clusters),
    }


def _means(scores: Scores) -> list[float]:
    return [fmean(row) for row in scores]


def _flips(first: float, second: float) -> float:
    return float((first >= RIGHT) != (second >= RIGHT))


def difference(base: Scores, tuned: Scores, clusters: Sequence[str]) -> dict[str, Any]:
    """Return tuned minus base, and the half width of its interval by one judgement, by K, and by a judge without noise.

    The standard error of the mean over K judgements contains the judge's variance divided by K. That of one judgement
    is estimated within clusters: sum_g var_k(D_gk) / n^2, where D_gk is the sum of the differences of cluster g in
    judgement k. `widening` is the relative increase of the interval by the noise of one judgement.
    """
    repeats = len(base[0])
    differences = [[t - b for b, t in zip(*row, strict=True)] for row in zip(base, tuned, strict=True)]
    by_repeat = [fmean(column) for column in zip(*differences, strict=True)]
    sums: dict[str, list[float]] = {}
    for cluster, row in zip(clusters, differences, strict=True):
        sums[cluster] = [a + b for a, b in zip(sums.get(cluster, [0.0] * repeats), row, strict=True)]
    noise = math.fsum(variance(column) for column in sums.values()) / len(differences) ** 2
    result: dict[str, Any] = {"mean": fmean(by_repeat), "by_repeat": by_repeat, "judge_se": math.sqrt(noise)}
    if len(sums) < 2:
        return {**result, "half_width": None, "widening": None}
    estimate = clustered_mean(_means(differences), clusters)
    quantile = (estimate.hi - estimate.mean) / estimate.se if estimate.se else 0.0
    steady = max(0.0, estimate.se**2 - noise / repeats)
    variances = {"one": steady + noise, "all": estimate.se**2, "steady": steady}
    widths = {name: quantile * math.sqrt(value) for name, value in variances.items()}
    widening = math.sqrt(variances["one"] / steady) - 1 if steady else None
    return {**result, "ci95": [estimate.lo, estimate.hi], "half_width": widths, "widening": widening}


def summarize(
    scores: Mapping[str, Mapping[str, Scores]], splits: Sequence[str], clusters: Sequence[str]
) -> dict[str, Any]:
    """Return the numbers of stability.json.

    `scores` are the K scores of each answer by judge and model; `splits` and `clusters` belong to the rows.
    """
    sections = {"overall": range(len(splits))}
    sections |= {split: [n for n, name in enumerate(splits) if name == split] for split in dict.fromkeys(splits)}

    def both(judge: str, rows: Sequence[int]) -> Scores:
        return [side[row] for side in scores[judge].values() for row in rows]

    def clusters_of(rows: Sequence[int]) -> list[str]:
        return [clusters[row] for row in rows] * 2

    result: dict[str, Any] = {"judges": {}, "between": None}
    for judge, sides in scores.items():
        flips = {name: flip_rate(both(judge, rows), clusters_of(rows)) for name, rows in sections.items()}
        base, tuned = sides.values()
        result["judges"][judge] = {"flips": flips, "difference": difference(base, tuned, clusters)}
    if len(scores) > 1:
        first, second = scores
        between = {
            name: disagreement(both(first, rows), both(second, rows), clusters_of(rows))
            for name, rows in sections.items()
        }
        first_change, second_change = (
            [fmean(t) - fmean(b) for b, t in zip(*sides.values(), strict=True)] for sides in scores.values()
        )
        result["between"] = {**between, "difference_change": mean_difference(first_change, second_change, clusters)}
    return result
