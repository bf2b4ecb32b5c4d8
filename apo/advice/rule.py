"""The rule: what the evidence about pairs and a model comes to. Pure, so that it can be read, tested and measured."""

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
"""Differences from one half: the sample is sized to see the first; too few to see the second are refused."""
STRANGE = 0.05
"""Share of prompts in another model's template from which on pairs are not to be trained on."""
BETA, LEAST_BETA, LET_GO = 0.1, 0.03, 4.0
"""The paper's beta, the lowest that is advised, and the reward at which `apo_zero` has nearly let go of an answer."""
RATE, RATE_AT = 1e-6, 3e9
"""SmolLM3's published learning rate for full fine-tuning, and its number of parameters."""


@dataclass(frozen=True)
class Evidence:
    """What is known of some pairs and a model; every interval is a 95 % one over prompts.

    Shares are in [0, 1] with a tie counting one half, log-probs in nats. None: nobody can tell.
    """

    pairs: int
    parameters: int
    win: Interval | None
    """How often a judge prefers the winner to the model's own answer."""
    right: Interval | None
    """How often it prefers the winner to the loser."""
    winner_gap: Interval
    """Log-prob per token: the winner's minus that of the model's own answer."""
    loser_gap: Interval
    winner_total: Interval
    """The same as `winner_gap`, summed over the answer."""
    coherence: Interval
    """Of the pairs' first steps: mean product of two pairs' over the mean square; 0: no common direction."""
    displacement: Interval
    """What part of the margin's first growth is the winner's rise: 1 all of it, 0 none, below 0 the winner falls."""
    longer: Interval
    """Share of winners that are longer than their losers."""
    winners_own: float | None = None
    """Share of winners that the dataset says the model itself made."""
    losers_own: float | None = None
    strange: float = 0.0
    """Share of prompts that are not in the model's own template."""


@dataclass(frozen=True)
class Advice:
    """What to train with, or "none": do not train on this; how sure that is, why, and what to watch."""

    objective: Objective
    sure: Sure
    because: str
    beta: float | None = None
    learning_rate: float | None = None
    beware: list[str] = field(default_factory=list)


def advise(e: Evidence) -> Advice:
    """The advice: whether the pairs say anything, then where their winners stand against the model's own answers."""
    if e.strange > STRANGE:
        return _none("high", f"{e.strange:.0%} of the prompts are not in this model's template; convert them first")
    if e.right is not None and e.right.hi < 0.5:
        return _none("high", f"the judge prefers the losers in {1 - e.right.value:.0%}: are the columns exchanged?")
    if e.right is not None and e.right.lo <= 0.5:
        return _none("fair", f"the judge cannot tell winners from losers: it prefers {e.right.value:.0%} of them")
    if e.right is None and e.coherence.lo <= 0:
        return _none("low", "the pairs pull in no common direction, as if their labels were drawn by lot")
    standing, sure, because = standing_of(e)
    objective: Objective = {"better": "apo_zero", "worse": "apo_down"}.get(standing, "dpo")  # type: ignore[assignment]
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
    return Advice(objective, sure, because, beta_of(e), learning_rate_of(e), beware)


def standing_of(e: Evidence) -> tuple[Literal["better", "worse", "even"], Sure, str]:
    """Where winners stand against the model's own answers: by the judge, else by who made which side."""
    if e.win is not None:
        told = f"winners win {e.win.value:.0%} against the model's own answers"
        if e.win.lo > 0.5:
            return "better", "high", told
        return ("worse", "high", told) if e.win.hi < 0.5 else ("even", "fair", f"{told}: neither is better for certain")
    winners, losers = _own(e.winners_own, e.winner_gap), _own(e.losers_own, e.loser_gap)
    if not authors_known(e):
        return _by_likelihood(winners, losers)
    if losers and not winners:
        return "better", "fair", "the losers are the model's own answers, and the winners are preferred to them"
    if winners and not losers:
        return "worse", "fair", "the winners are such as the model says itself, and the losers are not"
    told = "both sides are" if winners else "neither side is"
    return "even", "low", f"{told} such as the model says itself, so without a judge nobody knows which is better"


def _by_likelihood(winners: bool, losers: bool) -> tuple[Literal["better", "worse", "even"], Sure, str]:
    """The standing where the dataset does not say who made both sides: how likely they are is a hint, and no more."""
    unknown = "who wrote them is not known, and which is better cannot be told without a judge"
    if losers and not winners:
        return "better", "low", f"losers are as likely to the model as its own answers and winners are not; {unknown}"
    if winners and not losers:
        return "worse", "low", f"winners are as likely to the model as its own answers and losers are not; {unknown}"
    told = "both sides are as" if winners else "neither side is as"
    return "even", "low", f"{told} likely to the model as its own answers; {unknown}"


def authors_known(e: Evidence) -> bool:
    """Whether the dataset says who made both sides."""
    return e.winners_own is not None and e.losers_own is not None


def both_own(e: Evidence) -> bool:
    """Whether the model itself made both sides, or may have: both are as likely to it as its own answers."""
    return _own(e.winners_own, e.winner_gap) and _own(e.losers_own, e.loser_gap)


def _own(share: float | None, gap: Interval) -> bool:
    """As the dataset says; else whether it is no less likely than the model's own answers."""
    return gap.hi >= 0 if share is None else share > 0.5


def _none(sure: Sure, because: str) -> Advice:
    return Advice("none", sure, because)


def beta_of(e: Evidence) -> float:
    """0.1, or lower, so that a winner lifted to the level of the model's own answers is at reward 4 and no further."""
    below = max(0.0, -e.winner_total.value)
    return BETA if below * BETA <= LET_GO else max(LEAST_BETA, _rounded(LET_GO / below))


def learning_rate_of(e: Evidence) -> float:
    """Of full fine-tuning: 1e-6 at 3 billion parameters, falling with their cube root. LoRA takes ten times that.

    A rule of thumb through two points that are known to work: SmolLM3's, and the quickstart's 1.5e-5 at 0.9 million.
    """
    return _rounded(RATE * (RATE_AT / e.parameters) ** (1 / 3))


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")


def sample_size(difference: float) -> int:
    """Judged answers by which this difference from one half is seen at 5 % with 80 % power, each 0 or 1 at worst."""
    return math.ceil((detectable_difference(0.5) / difference) ** 2)
