"""The rule that turns evidence about pairs and a model into advice. It is pure: easy to read, test and measure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from apo.analysis.bootstrap import Interval
from clair.core.student_t import detectable_difference

AdvisedObjective = Literal["apo_zero", "apo_down", "dpo", "none"]
Certainty = Literal["low", "fair", "high"]
CERTAINTIES: tuple[Certainty, ...] = ("low", "fair", "high")
FINE, COARSE = 0.10, 0.25
"""Differences from one half. The sample is sized to detect the first; a sample too small for the second is refused."""
MAX_STRANGE = 0.05
"""The largest share of prompts in another model's template with which training is advised."""
BETA, MIN_BETA, MAX_REWARD = 0.1, 0.03, 4.0
"""The paper's beta, the lowest beta that is advised, and the reward at which `apo_zero`'s gradient nearly vanishes."""
RATE, RATE_PARAMETERS = 1e-6, 3e9
"""SmolLM3's published learning rate for full fine-tuning, and its number of parameters."""


@dataclass(frozen=True)
class Evidence:
    """The evidence about pairs and a model. Every interval is a 95 % interval over prompts.

    Shares are in [0, 1], and a tie counts one half. Log-probs are in nats. None means unknown.
    """

    pairs: int
    parameters: int
    win: Interval | None
    """The share of prompts on which a judge prefers the winner to the model's own answer."""
    right: Interval | None
    """The share of prompts on which the judge prefers the winner to the loser."""
    winner_gap: Interval
    """Log-prob per token of the winner minus that of the model's own answer."""
    loser_gap: Interval
    """The same for the loser."""
    winner_total: Interval
    """The same as `winner_gap`, summed over the answer."""
    coherence: Interval
    """Mean product of two pairs' first steps over their mean square. 0: the pairs have no common direction."""
    displacement: Interval
    """The winner's share in the first growth of the margin. 1: all of it, 0: none, below 0: the winner falls."""
    longer: Interval
    """Share of winners that are longer than their losers."""
    winners_own: float | None = None
    """Share of winners that the model itself wrote, according to the dataset."""
    losers_own: float | None = None
    """Share of losers that the model itself wrote."""
    strange: float = 0.0
    """Share of prompts that do not fit the model's template."""


@dataclass(frozen=True)
class Advice:
    """The objective to train with, or "none" (do not train on these pairs), with certainty, reason and warnings."""

    objective: AdvisedObjective
    sure: Certainty
    because: str
    beta: float | None = None
    learning_rate: float | None = None
    beware: list[str] = field(default_factory=list)


def refusal(evidence: Evidence) -> Advice | None:
    """The advice not to train if the pairs cannot be right: another model's template, or exchanged columns."""
    if evidence.strange > MAX_STRANGE:
        reason = f"{evidence.strange:.0%} of the prompts do not fit this model's template; convert them first"
        return Advice("none", "high", reason)
    if evidence.right is not None and evidence.right.hi < 0.5:
        losers = 1 - evidence.right.value
        return Advice("none", "high", f"the judge prefers the losers in {losers:.0%}: are the columns exchanged?")
    return None


def advise(evidence: Evidence) -> Advice:
    """Derive the advice: check that the pairs can be right, then compare winners with the model's own answers.

    Too little evidence lowers the certainty. It is no reason not to train.
    """
    if refused := refusal(evidence):
        return refused
    right = evidence.right
    if right is not None and right.lo <= 0.5 and right.hi <= 0.5 + FINE:
        reason = f"the judge cannot distinguish winners from losers: it prefers {right.value:.0%} of the winners"
        return Advice("none", "fair", reason)
    standing, sure, because = winner_standing(evidence)
    objective: AdvisedObjective = "apo_zero" if standing == "better" else "apo_down" if standing == "worse" else "dpo"
    beware = []
    if right is not None and right.lo <= 0.5:
        sure = "low"
        beware.append(
            f"too few pairs to say if winners are better than losers: the judge prefers {right.value:.0%} of them "
            f"({right.lo:.0%} to {right.hi:.0%}); {sample_size(FINE)} prompts would do"
        )
    if right is None and evidence.coherence.lo <= 0:
        beware.append(
            "the first steps of these pairs have no common direction; only a judge could say if labels are right"
        )
    if both_own(evidence):
        sure = CERTAINTIES[max(0, CERTAINTIES.index(sure) - 1)]
        beware.append(
            "the model wrote both sides: the pairs choose among answers that it already gives, and age as it learns"
            if has_authors(evidence)
            else "both sides are as likely to the model as its own answers: the pairs may choose among answers that it "
            "already gives, and age as it learns"
        )
    if evidence.displacement.hi < 0 and objective != "apo_down":
        beware.append("winners are expected to become less likely: lower the learning rate, or add sft with weight 0.1")
    if not 0.3 <= evidence.longer.value <= 0.7 and not evidence.longer.lo <= 0.5 <= evidence.longer.hi:
        beware.append(f"{evidence.longer.value:.0%} of the winners are longer: the model will learn length as well")
    return Advice(objective, sure, because, suggest_beta(evidence), suggest_learning_rate(evidence.parameters), beware)


def pilot_order(evidence: Evidence) -> tuple[str, ...]:
    """The objectives of pilots, the most promising first."""
    return {
        "better": ("apo_zero", "sft", "dpo", "apo_down"),
        "even": ("dpo", "apo_zero", "sft", "apo_down"),
        "worse": ("apo_down", "dpo", "apo_zero", "sft"),
    }[winner_standing(evidence)[0]]


def winner_standing(evidence: Evidence) -> tuple[Literal["better", "worse", "even"], Certainty, str]:
    """Compare winners with the model's own answers, by the judge, or without one by the authors of both sides."""
    if evidence.win is not None:
        subject = f"winners win {evidence.win.value:.0%} against the model's own answers"
        if evidence.win.lo > 0.5:
            return "better", "high", subject
        return (
            ("worse", "high", subject)
            if evidence.win.hi < 0.5
            else ("even", "fair", f"{subject}: neither is certainly better")
        )
    winners, losers = (
        _like_own_answers(evidence.winners_own, evidence.winner_gap),
        _like_own_answers(evidence.losers_own, evidence.loser_gap),
    )
    subject = "both sides are" if winners else "neither side is"
    if has_authors(evidence):
        reasons = {
            "better": "the losers are the model's own answers, and the winners are preferred to them",
            "worse": "the winners are the model's own answers, and the losers are not",
            "even": f"{subject} the model's own answers, so only a judge could say which is better",
        }
    else:
        reasons = {
            "better": "losers are as likely to the model as its own answers, and winners are not",
            "worse": "winners are as likely to the model as its own answers, and losers are not",
            "even": f"{subject} as likely to the model as its own answers",
        }
        unknown = "their authors are unknown, and only a judge could say which is better"
        reasons = {standing: f"{reason}; {unknown}" for standing, reason in reasons.items()}
    standing = "even" if winners == losers else "worse" if winners else "better"
    # Without authors the likelihoods are only a hint.
    return standing, "fair" if has_authors(evidence) and standing != "even" else "low", reasons[standing]


def has_authors(evidence: Evidence) -> bool:
    """True if the dataset states the authors of both sides."""
    return evidence.winners_own is not None and evidence.losers_own is not None


def both_own(evidence: Evidence) -> bool:
    """True if the model wrote both sides, or if both are as likely to it as its own answers."""
    return _like_own_answers(evidence.winners_own, evidence.winner_gap) and _like_own_answers(
        evidence.losers_own, evidence.loser_gap
    )


def _like_own_answers(share: float | None, gap: Interval) -> bool:
    """True if the model wrote the side, or if the author is unknown and it is as likely as the model's own answers."""
    return gap.hi >= 0 if share is None else share > 0.5


def suggest_beta(evidence: Evidence) -> float:
    """Return 0.1, or less if winners would need a reward above 4 to be as likely as the model's own answers."""
    deficit = max(0.0, -evidence.winner_total.value)
    return BETA if deficit * BETA <= MAX_REWARD else max(MIN_BETA, _rounded(MAX_REWARD / deficit))


def suggest_learning_rate(parameters: int) -> float:
    """Return the rate for full fine-tuning: 1e-6 at 3 billion parameters, falling with their cube root.

    LoRA takes ten times that. This rule of thumb goes through two points that work: SmolLM3's, and the quickstart's
    1.5e-5 at 0.9 million parameters.
    """
    return _rounded(RATE * (RATE_PARAMETERS / parameters) ** (1 / 3))


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")


def sample_size(difference: float) -> int:
    """Return how many verdicts detect this difference from one half at the 5 % level with 80 % power.

    The variance is assumed to be maximal: every verdict is 0 or 1.
    """
    return math.ceil((detectable_difference(0.5) / difference) ** 2)
