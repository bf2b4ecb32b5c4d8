"""How often the intervals of clair/core/statistics.py hold the truth, over simulated evaluations.

    python tests/benchmarks/run.py intervals

An evaluation asks about passages (or questions without any: the clusters) in as many rows each as MixEval-Hard
2024-06-01 does, or, for smaller parts, twice each. Whether a row is answered right is beta-binomial, correlated 0.5
within a cluster. The tuned model answers half of
the questions with a chance of its own and the others as the base does; its own chance is as the base's on average
(`difference`), or a fifth of the way from there to 1 (`gain`). `EVALUATIONS` (5000) sets how many.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ACCURACIES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.4, 0.5, 0.75, 0.9, 0.98)
FREE_FORM = {1: 2, 2: 149, 3: 3, 4: 19, 6: 4, 8: 2, 9: 1, 10: 3, 14: 1, 22: 1}
MULTIPLE_CHOICE = {1: 25, 2: 202, 3: 3, 4: 14, 6: 1}
"""Rows about one passage, or one question without any: how many of these clusters there are of each size."""


def measure() -> dict[str, Any]:
    """By design and accuracy: which shares of the intervals of scores, symmetric ones, and differences hold."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    evaluations = int(os.environ.get("EVALUATIONS", "5000"))
    designs = {
        "hard": [*_sizes(FREE_FORM), *_sizes(MULTIPLE_CHOICE)],
        "free-form": _sizes(FREE_FORM),
        **{f"{questions} questions, twice each": [2] * questions for questions in (60, 19, 8, 4)},
    }
    measured: dict[str, Any] = {"evaluations": evaluations}
    for name, sizes in designs.items():
        measured[name] = {str(p): _coverage(p, np.array(sizes), evaluations) for p in ACCURACIES}
    return measured | {"best_of": _best(evaluations // 25)}


def _sizes(counts: dict[int, int]) -> list[int]:
    return [size for size, count in counts.items() for _ in range(count)]


def _coverage(accuracy: float, sizes: Any, evaluations: int) -> dict[str, float | None]:
    import numpy as np

    from clair.core.statistics import clustered_mean, clustered_score, paired_difference

    rng, clusters = np.random.default_rng(0), np.repeat(np.arange(len(sizes)), sizes).tolist()
    held, counted = np.zeros(4), np.zeros(4)
    better = accuracy + (1 - accuracy) / 5

    def drawn(chance: Any) -> list[float]:
        return (rng.random(len(clusters)) < np.repeat(chance, sizes)).astype(float).tolist()

    def draw_other(accuracy: float) -> list[float]:
        drawn_shares = rng.beta(accuracy, 1 - accuracy, len(sizes))
        return drawn(np.where(rng.random(len(sizes)) < 0.5, drawn_shares, chance))

    for _ in range(evaluations):
        chance = rng.beta(accuracy, 1 - accuracy, len(sizes))
        base = drawn(chance)
        same, gain = (paired_difference(base, draw_other(p), clusters).estimate for p in (accuracy, better))
        score, symmetric = clustered_score(base, clusters), clustered_mean(base, clusters)
        counted += [1, 1, same.se > 0, gain.se > 0]  # without spread, a difference has no interval
        held += [
            score.lo <= accuracy <= score.hi,
            symmetric.lo <= accuracy <= symmetric.hi,
            same.se > 0 and same.lo <= 0 <= same.hi,
            gain.se > 0 and gain.lo <= (better - accuracy) / 2 <= gain.hi,
        ]
    shares = [round(float(h / t), 4) if t else None for h, t in zip(held, counted, strict=True)]
    return dict(zip(("score", "symmetric", "difference", "gain"), shares, strict=True))


def _best(evaluations: int) -> dict[str, Any]:
    """The best of several checkpoints: the bias of choosing, its estimate, and the coverage of the intervals.

    Checkpoints are equally good, or the best one is 3 standard errors ahead of the worst. In standard errors.
    """
    import numpy as np

    from clair.core.statistics import best_of

    measured = {}
    for count in (2, 5, 10):
        for spread in (0.0, 3.0):
            rng, truth = np.random.default_rng(0), np.linspace(0, spread, count)[:, None]
            rows = []
            for _ in range(evaluations):
                values = truth + rng.normal(0, np.sqrt(200), (count, 200))
                best = best_of(values.tolist(), range(200), draws=200, inner=50)
                true = float(truth[best.candidate, 0])
                naive = values[best.candidate].std(ddof=1) / np.sqrt(200)
                holds = best.lo <= true <= best.hi, abs(best.observed - true) <= 1.97 * naive
                rows.append([best.observed - true, best.bias, *holds])
            bias, estimate, held, uncorrected = (round(float(mean), 3) for mean in np.mean(rows, axis=0))
            measured[f"{count} checkpoints, {spread:g} apart"] = {
                "true_bias": bias, "estimated_bias": estimate, "holds": held, "uncorrected_holds": uncorrected
            }  # fmt: skip
    return measured
