"""Score the answers to a prompt, and choose a pair by the scores: best against worst, or by a margin and a floor.

Scores come from a checker, a reward model, judges with a rubric, or the prompt's row. Each source returns one list of
scores per judge; the score of an answer is the mean over judges.
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
    """A checker, a reward model, or judges."""

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[list[float]]:
        """Return the scores of the answers by each judge, [J, N]. Raises Dropped."""
        ...

    async def close(self) -> None:
        """Free processes or weights."""
        ...


@dataclass(frozen=True)
class Judges:
    """Models that give each answer a score by a rubric, one answer per request."""

    judges: Sequence[ScoreJudge]

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[list[float]]:
        """Return the scores of the answers by each judge, [J, N]. Drops the row if a reply has no readable score."""
        texts = [message_text(answer.message()).strip() for answer in answers]
        scores = await gather_all(*(score_once(prompt, text, judge) for judge in self.judges for text in texts))
        return [scores[start : start + len(texts)] for start in range(0, len(scores), len(texts))]

    async def close(self) -> None:
        """Do nothing: the run closes its models."""


@dataclass
class Scoring:
    """The choice of pairs by scores, with counts over all prompts. `scorer` is None if the rows have the scores."""

    config: ScoresConfig
    scorer: ScoreSource | None = None
    judges: tuple[str, ...] = ()
    """The names of the judges' models, if there are several."""
    prompts: int = 0
    """Prompts whose answers all have scores."""
    flat: int = 0
    shares: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """The agreement of two judges, by their indices: one number per prompt."""

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float]:
        """Return the score of each answer, its mean over all judges. Raises Dropped."""
        assert self.scorer is not None
        by_judge = await self.scorer.score(prompt, answers)
        for pair in combinations(range(len(by_judge)), 2):
            share = agreement(*(by_judge[judge] for judge in pair))
            if share is not None:
                self.shares.setdefault(pair, []).append(share)
        return [fmean(scores) for scores in zip(*by_judge, strict=True)]

    def choose(self, scores: Sequence[float]) -> tuple[int, int]:
        """Return the indices of winner and loser. Raises Dropped if the scores allow no pair.

        With a margin, the winner is the best answer that has a loser within the margin, and the loser is the worst
        answer within it. Its score is lower than the winner's, whatever the margin.
        """
        config, margin = self.config, self.config.margin
        if not any(map(math.isnan, scores)):
            self.prompts += 1
            if (spread := pstdev(scores)) <= config.flat:
                self.flat += 1
                if config.leave_out_flat:
                    raise Dropped("scores", "flat", f"the scores of {len(scores)} answers vary by {spread:g}")
        best, worst = best_and_worst_index(scores)
        floor = -math.inf if config.floor is None else config.floor
        if scores[best] < floor:
            raise Dropped("scores", "floor", f"the best answer has the score {scores[best]:g}")
        if margin is None:
            return best, worst
        most = math.inf if margin.most is None else margin.most
        fitting = [
            (scores[winner], scores[winner] - scores[loser], -winner, -loser)
            for winner, loser in permutations(range(len(scores)), 2)
            if scores[winner] >= floor and scores[winner] > scores[loser]
            if margin.least <= scores[winner] - scores[loser] <= most
        ]
        if not fitting:
            raise Dropped("scores", "margin", f"no two of the scores {', '.join(f'{s:g}' for s in scores)} fit")
        *_, winner, loser = max(fitting)
        return -winner, -loser

    def clear(self) -> None:
        """Reset the counts before another pass over the prompts."""
        self.prompts = self.flat = 0
        self.shares.clear()

    def summary(self) -> dict[str, Any]:
        """Return the counts for the manifest."""
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
    """Return the share of pairs of answers that two judges put in the same order. A tie of one judge counts 1/2.

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


def scores_summary(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the counts of shards. Each two judges get their mean agreement over prompts and its 95 % interval."""
    agreements: dict[tuple[str, ...], dict[str, Any]] = {}
    for number, entry in (item for summary in summaries for item in enumerate(summary["agreement"])):
        sums = agreements.setdefault((str(number), *entry["judges"]), {"judges": entry["judges"]})
        for name in ("prompts", "sum", "squares"):
            sums[name] = sums.get(name, 0) + entry[name]
    for sums in agreements.values():
        n, mean, interval = sums["prompts"], sums["sum"] / sums["prompts"], None
        if n > 1:
            variance = max(0.0, sums["squares"] / n - mean**2) * n / (n - 1)
            half = t_quantile(0.975, n - 1) * math.sqrt(variance / n)
            interval = [max(0.0, mean - half), min(1.0, mean + half)]
        sums |= {"share": mean, "ci95": interval}
    totals = {name: sum(summary[name] for summary in summaries) for name in ("prompts", "flat")}
    return {**totals, "agreement": list(agreements.values())}
