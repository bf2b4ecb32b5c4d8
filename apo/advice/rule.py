"""The rule from evidence about pairs and a model to advice. It is pure, so that it can be read, tested and measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from apo.analysis.distinguishability import Interval
from clair.core.student_t import detectable_difference

Objective = Literal["apo_zero", "apo_down", "dpo", "none"]
Sure = Literal["low", "fair", "high"]
SURE: tuple[Sure, ...] = ("low", "fair", "high")
FINE, COARSE = 0.10, 0.25
"""Differences from one half: the sample is sized to detect the first; samples too small for the second are refused."""
MAX_STRANGE = 0.05
"""The largest share of prompts in another model's template that is trained on."""
BETA, MIN_BETA, MAX_REWARD = 0.1, 0.03, 4.0
"""The paper's beta, the lowest that is advised, and the reward at which the gradient of `apo_zero` nearly vanishes."""
RATE, RATE_PARAMETERS = 1e-6, 3e9
"""SmolLM3's published learning rate for full fine-tuning, and its number of parameters."""


@dataclass(frozen=True)
class Evidence:
    """The evidence about pairs and a model; every interval is a 95 % interval over prompts.

    Shares are in [0, 1] with a tie counting one half, log-probs in nats. None means unknown.
    """

    pairs: int
    parameters: int
    win: Interval | None
    """The share of prompts on which a judge prefers the winner to the model's own answer."""
    right: Interval | None
    """The share of prompts on which it prefers the winner to the loser."""
    winner_gap: Interval
    """Log-prob per token: the winner's minus that of the model's own answer."""
    loser_gap: Interval
    winner_total: Interval
    """The same as `winner_gap`, summed over the answer."""
    coherence: Interval
    """Mean product of two pairs' first steps over their mean square; 0: no common direction."""
    displacement: Interval
    """The winner's share in the first growth of the margin: 1 all of it, 0 none, below 0 the winner falls."""
    longer: Interval
    """Share of winners that are longer than their losers."""
    winners_own: float | None = None
    """Share of winners that the model itself made, according to the dataset."""
    losers_own: float | None = None
    strange: float = 0.0
    """Share of prompts that are not in the model's own template."""


@dataclass(frozen=True)
class Advice:
    """The objective to train with, or "none": do not train on these pairs; with certainty, reason and warnings."""

    objective: Objective
    sure: Sure
    because: str
    beta: float | None = None
    learning_rate: float | None = None
    beware: list[str] = field(default_factory=list)


def advise(e: Evidence) -> Advice:
    """Derive the advice: first if the pairs carry a signal, then how winners compare with the model's own answers."""
    if e.strange > MAX_STRANGE:
        return _do_not_train(
            "high", f"{e.strange:.0%} of the prompts are not in this model's template; convert them first"
        )
    if e.right is not None and e.right.hi < 0.5:
        return _do_not_train(
            "high", f"the judge prefers the losers in {1 - e.right.value:.0%}: are the columns exchanged?"
        )
    if e.right is not None and e.right.lo <= 0.5:
        return _do_not_train(
            "fair", f"the judge cannot tell winners from losers: it prefers {e.right.value:.0%} of them"
        )
    if e.right is None and e.coherence.lo <= 0:
        return _do_not_train("low", "the pairs pull in no common direction, as if their labels were drawn by lot")
    standing, sure, because = winner_standing(e)
    objective: Objective = "apo_zero" if standing == "better" else "apo_down" if standing == "worse" else "dpo"
    beware = []
    if both_own(e):
        sure = SURE[max(0, SURE.index(sure) - 1)]
        beware.append(
            "both sides are such as the model says itself: pairs choose among what it knows, and age"
            if authors_known(e)
            else "both sides are as likely to the model as its own answers: pairs may choose what it knows, and age"
        )
    if e.displacement.hi < 0 and objective != "apo_down":
        beware.append("winners are expected to become less likely: lower the learning rate, or add sft with weight 0.1")
    if not 0.3 <= e.longer.value <= 0.7 and not e.longer.lo <= 0.5 <= e.longer.hi:
        beware.append(f"{e.longer.value:.0%} of the winners are longer: the model will learn length as well")
    return Advice(objective, sure, because, suggest_beta(e), suggest_learning_rate(e), beware)


def winner_standing(e: Evidence) -> tuple[Literal["better", "worse", "even"], Sure, str]:
    """Compare winners with the model's own answers: by the judge, or else by the authors of both sides."""
    if e.win is not None:
        subject = f"winners win {e.win.value:.0%} against the model's own answers"
        if e.win.lo > 0.5:
            return "better", "high", subject
        return (
            ("worse", "high", subject)
            if e.win.hi < 0.5
            else ("even", "fair", f"{subject}: neither is better for certain")
        )
    winners, losers = _like_own_answers(e.winners_own, e.winner_gap), _like_own_answers(e.losers_own, e.loser_gap)
    if not authors_known(e):
        return _standing_by_likelihood(winners, losers)
    if losers and not winners:
        return "better", "fair", "the losers are the model's own answers, and the winners are preferred to them"
    if winners and not losers:
        return "worse", "fair", "the winners are such as the model says itself, and the losers are not"
    subject = "both sides are" if winners else "neither side is"
    return "even", "low", f"{subject} such as the model says itself, so without a judge nobody knows which is better"


def _standing_by_likelihood(winners: bool, losers: bool) -> tuple[Literal["better", "worse", "even"], Sure, str]:
    """The standing if the authors are unknown, from likelihoods, which are only a hint."""
    unknown = "who wrote them is not known, and which is better cannot be told without a judge"
    if losers and not winners:
        return "better", "low", f"losers are as likely to the model as its own answers and winners are not; {unknown}"
    if winners and not losers:
        return "worse", "low", f"winners are as likely to the model as its own answers and losers are not; {unknown}"
    subject = "both sides are as" if winners else "neither side is as"
    return "even", "low", f"{subject} likely to the model as its own answers; {unknown}"


def authors_known(e: Evidence) -> bool:
    """True if the dataset states the authors of both sides."""
    return e.winners_own is not None and e.losers_own is not None


def both_own(e: Evidence) -> bool:
    """True if the model made both sides, or finds both as likely as its own answers."""
    return _like_own_answers(e.winners_own, e.winner_gap) and _like_own_answers(e.losers_own, e.loser_gap)


def _like_own_answers(share: float | None, gap: Interval) -> bool:
    """True if the model made the side, or, if the author is unknown, finds it as likely as its own answers."""
    return gap.hi >= 0 if share is None else share > 0.5


def _do_not_train(sure: Sure, because: str) -> Advice:
    return Advice("none", sure, because)


def suggest_beta(e: Evidence) -> float:
    """0.1, or lower so that a winner that becomes as likely as the model's own answers has at most reward 4."""
    below = max(0.0, -e.winner_total.value)
    return BETA if below * BETA <= MAX_REWARD else max(MIN_BETA, _rounded(MAX_REWARD / below))


def suggest_learning_rate(e: Evidence) -> float:
    """The rate of full fine-tuning: 1e-6 at 3 billion parameters, falling with their cube root; LoRA: ten times that.

    A rule of thumb through two points that work: SmolLM3's, and the quickstart's 1.5e-5 at 0.9 million parameters.
    """
    return _rounded(RATE * (RATE_PARAMETERS / e.parameters) ** (1 / 3))


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")


def sample_size(difference: float) -> int:
    """The number of verdicts that detects this difference from one half at the 5 % level with 80 % power.

    It assumes the largest variance: every verdict is 0 or 1.
    """
    return math.ceil((detectable_difference(0.5) / difference) ** 2)
