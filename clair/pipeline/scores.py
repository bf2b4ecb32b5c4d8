"""Scores of answers, and the pair that they choose: best against worst, or a margin with a floor on the winner.

Scores come from a checker, a reward model, pointwise judges, or the prompt's row. Every scorer gives one list of scores
for each judge; the mean over judges counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from statistics import fmean, pstdev
from typing import Any, Protocol

from clair.core.student_t import t_quantile
from clair.data.records import Answer, Dropped, Prompt, message_text
from clair.pipeline.config import ScoresConfig
from clair.pipeline.steps import ScoreJudge, best_and_worst_index, gather_all, score_once


class ScoreSource(Protocol):
    """Gives scores to the answers of a prompt."""

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[list[float]]:
        """The scores of the answers by each judge, [J, N]. Raises Dropped."""
        ...

    async def close(self) -> None:
        """Free what it holds."""
        ...


@dataclass(frozen=True)
class Judges:
    """Models that each give every answer a score by a rubric."""

    judges: Sequence[ScoreJudge]

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[list[float]]:
        """The scores of the answers by each judge, [J, N]. Drops the row if a reply has no readable score."""
        texts = [message_text(answer.message()).strip() for answer in answers]
        scores = await gather_all(*(score_once(prompt, text, judge) for judge in self.judges for text in texts))
        return [scores[start : start + len(texts)] for start in range(0, len(scores), len(texts))]

    async def close(self) -> None:
        """Nothing to free: the run closes its models."""


@dataclass
class Scoring:
    """The scorer of a recipe, None for scores of the rows, its choice of a pair, and counts over all prompts."""

    config: ScoresConfig
    scorer: ScoreSource | None = None
    judges: tuple[str, ...] = ()
    """The names of the judges' models, if there are several."""
    prompts: int = 0
    flat: int = 0
    """Prompts whose scores hardly vary."""
    shares: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """By two judges: the share of pairs of answers of each prompt on whose order they agree."""

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float]:
        """The mean score of each answer over all judges. Raises Dropped."""
        assert self.scorer is not None
        by_judge = await self.scorer.score(prompt, answers)
        for pair in combinations(range(len(by_judge)), 2):
            share = agreement(*(by_judge[judge] for judge in pair))
            if share is not None:
                self.shares.setdefault(pair, []).append(share)
        return [fmean(scores) for scores in zip(*by_judge, strict=True)]

    def choose(self, scores: Sequence[float]) -> tuple[int, int]:
        """The indices of winner and loser. Raises Dropped if the scores make no pair.

        With a margin, the winner has the highest score that leaves a loser within the margin, and the loser is the one
        furthest below it.
        """
        config = self.config
        if not any(map(math.isnan, scores)):
            self.prompts += 1
            if (spread := pstdev(scores)) <= config.flat:
                self.flat += 1
                if config.leave_out_flat:
                    raise Dropped("scores", "flat", f"the scores of {len(scores)} answers vary by {spread:g}")
        best, worst = best_and_worst_index(scores)
        if config.floor is not None and scores[best] < config.floor:
            raise Dropped("scores", "floor", f"the best answer has the score {scores[best]:g}")
        if config.margin is None:
            return best, worst
        floor, margin = -math.inf if config.floor is None else config.floor, config.margin
        fitting = [
            (scores[winner], scores[winner] - scores[loser], -winner, -loser)
            for winner, loser in permutations(range(len(scores)), 2)
            if scores[winner] >= floor and margin.least <= scores[winner] - scores[loser] <= margin.most
        ]
        if not fitting:
            raise Dropped("scores", "margin", f"no two of the scores {', '.join(f'{s:g}' for s in scores)} fit")
        *_, winner, loser = max(fitting)
        return -winner, -loser

    def clear(self) -> None:
        """Forget the counts, before another pass over the prompts."""
        self.prompts = self.flat = 0
        self.shares.clear()

    def summary(self) -> dict[str, Any]:
        """The counts for the manifest."""
        sums = [
            {
                "judges": [self.judges[first], self.judges[second]],
                "prompts": len(shares),
                "sum": round(math.fsum(shares), 9),
                "squares": round(math.fsum(share**2 for share in shares), 9),
            }
            for (first, second), shares in sorted(self.shares.items())
        ]
        return scores_summary([{"prompts": self.prompts, "flat": self.flat, "agreement": sums}])


def agreement(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The share of pairs of answers that two judges order alike, with a tie of one of them as 1/2.

    None if both judges tie on every pair.
    """
    values = []
    for i, j in combinations(range(len(first)), 2):
        order, other_order = (_sign(scores[i] - scores[j]) for scores in (first, second))
        if order or other_order:
            values.append((1 + order * other_order) / 2)
    return fmean(values) if values else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def scores_summary(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of several shards as one, with the mean agreement of each two judges and its 95 % interval."""
    agreements: dict[tuple[str, ...], dict[str, Any]] = {}
    for number, entry in (item for part in parts for item in enumerate(part["agreement"])):
        sums = agreements.setdefault((str(number), *entry["judges"]), {"judges": entry["judges"]})
        for name in ("prompts", "sum", "squares"):
            sums[name] = sums.get(name, 0) + entry[name]
    for sums in agreements.values():
        n, mean = sums["prompts"], sums["sum"] / sums["prompts"]
        variance = max(0.0, sums["squares"] / n - mean**2) * n / (n - 1) if n > 1 else math.nan
        half = t_quantile(0.975, n - 1) * math.sqrt(variance / n) if n > 1 else math.nan
        interval = [max(0.0, mean - half), min(1.0, mean + half)] if n > 1 else None
        sums |= {"share": mean, "ci95": interval}
    totals = {name: sum(part[name] for part in parts) for name in ("prompts", "flat")}
    return {**totals, "agreement": list(agreements.values())}
