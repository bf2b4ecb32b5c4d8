"""Two answers with the judge's two verdicts on them, and the summary of many: a win rate with intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apo.evaluation.intervals import mean_with_interval
from apo.evaluation.winrate.length_control import length_controlled
from clair.core.statistics import clustered_score
from clair.data.records import Prompt, content_id

SIDES = ("base", "tuned")


def prompt_key(prompt: Prompt) -> str:
    """The hash of a prompt without its row's answer: the cluster."""
    return content_id(prompt.messages, None)


@dataclass(frozen=True, slots=True)
class AnswerText:
    """One side's answer."""

    text: str
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt and the judge's verdicts: with the base shown first, and shown second.

    A verdict is "base", "tuned", "tie", or None if it is unreadable; `unresolved` is then the reason.
    """

    prompt: Prompt
    sample: int
    base: AnswerText
    tuned: AnswerText
    verdicts: tuple[str | None, str | None]
    reasoning: tuple[str, str] = ("", "")
    unresolved: str | None = None

    @property
    def value(self) -> float | None:
        """The tuned model's score, the mean over both orders of 1, 1/2 (tie) or 0; None if unresolved."""
        if self.unresolved:
            return None
        return sum({"tuned": 0.5, "tie": 0.25}.get(verdict or "", 0.0) for verdict in self.verdicts)

    @property
    def unanswered(self) -> bool:
        """True if a server refused one of its requests: the winner is unknown."""
        return self.unresolved is not None and self.unresolved.startswith(("answer_http_", "judge_http_"))

    @property
    def identical(self) -> bool:
        """True if both answers are equal: a tie without a request to the judge."""
        return self.base.text == self.tuned.text

    def row(self) -> dict[str, Any]:
        """The line of winrate.jsonl."""
        answers = {side: getattr(self, side).text for side in SIDES}
        cut = {f"{side}_truncated": getattr(self, side).truncated for side in SIDES}
        names = ("base_first", "tuned_first")
        verdicts = dict(zip(names, self.verdicts, strict=True))
        reasoning = {f"{name}_reasoning": reasoning for name, reasoning in zip(names, self.reasoning, strict=True)}
        prompt = {"id": self.prompt.id, "prompt": [dict(turn) for turn in self.prompt.messages], "sample": self.sample}
        return {**prompt, **answers, **cut, **verdicts, **reasoning, "value": self.value, "unresolved": self.unresolved}


def position_counts(compared: Sequence[Comparison]) -> Counter[int]:
    """Count the verdicts for the answer shown first (1), for the second (2), and ties (0), equal requests once."""
    distinct = {(prompt_key(c.prompt), c.base.text, c.tuned.text): c for c in compared if not c.identical}
    orders = (("tie", "base", "tuned"), ("tie", "tuned", "base"))
    return Counter(
        order.index(verdict)
        for comparison in distinct.values()
        for order, verdict in zip(orders, comparison.verdicts, strict=True)
        if verdict is not None
    )


def summary(compared: Sequence[Comparison]) -> dict[str, Any]:
    """The numbers of winrate.json. `win_rate` is a mean over comparisons, clustered by prompt; lengths in characters.

    Unresolved comparisons are left out of the rate and counted. The bracket covers them, and comparisons of an answer
    that was cut off, as all lost and as all won.
    """
    settled = [comparison for comparison in compared if comparison.value is not None]
    if not settled:
        return {
            "comparisons": len(compared),
            "resolved": 0,
            "unresolved": unresolved_counts(compared),
            "win_rate": None,
        }
    prompts, values = (
        [prompt_key(comparison.prompt) for comparison in settled],
        [comparison.value or 0.0 for comparison in settled],
    )
    lengths = [(len(comparison.base.text), len(comparison.tuned.text)) for comparison in settled]
    agree = [
        float(comparison.verdicts[0] == comparison.verdicts[1]) for comparison in settled if not comparison.identical
    ]
    judged_prompts = [prompt_key(comparison.prompt) for comparison in settled if not comparison.identical]
    complete = [
        comparison.value or 0.0
        for comparison in settled
        if not (comparison.base.truncated or comparison.tuned.truncated)
    ]
    bracket = [(math.fsum(complete) + extra) / len(compared) for extra in (0, len(compared) - len(complete))]
    ratios = [tuned / base for base, tuned in lengths if base]
    consistency = mean_with_interval(agree, judged_prompts, clustered_score) if agree else None
    return {
        "comparisons": len(compared),
        "resolved": len(settled),
        "prompts": len(set(prompts)),
        "unresolved": unresolved_counts(compared),
        "unanswered": sum(comparison.unanswered for comparison in compared),
        "identical": sum(comparison.identical for comparison in settled),
        "won": sum(value > 0.5 for value in values),
        "tied": sum(value == 0.5 for value in values),
        "lost": sum(value < 0.5 for value in values),
        "win_rate": mean_with_interval(values, prompts, clustered_score),
        "bracket": bracket,
        "length_controlled": _length_controlled(values, lengths, prompts),
        "length": {
            **{side: math.fsum(pair[index] for pair in lengths) / len(lengths) for index, side in enumerate(SIDES)},
            "ratio": math.fsum(ratios) / len(ratios) if ratios else None,
        },
        "consistency": consistency,
        "distrust": inconsistency_reason(consistency),
        "truncated": {side: sum(getattr(comparison, side).truncated for comparison in settled) for side in SIDES},
    }


def inconsistency_reason(consistency: Mapping[str, Any] | None) -> str | None:
    """The reason to distrust a judge whose verdicts depend on the order of the answers as a coin's would; or None."""
    if consistency is None or consistency["ci95"] is None or consistency["ci95"][0] > 0.5:
        return None
    agreement = (
        f"the judge agrees with itself in {100 * consistency['mean']:.0f} % of the comparisons shown in both orders"
    )
    if consistency["mean"] <= 0.5:
        return f"{agreement}, no more than a coin does: this rate says nothing about the models; use another judge"
    return f"{agreement}, which a coin may do by chance too: there are too few to trust this judge"


def unresolved_counts(compared: Sequence[Comparison]) -> dict[str, int]:
    """The number of unresolved comparisons by reason."""
    return dict(sorted(Counter(comparison.unresolved for comparison in compared if comparison.unresolved).items()))


def _length_controlled(
    values: Sequence[float], lengths: Sequence[tuple[int, int]], prompts: Sequence[str]
) -> dict[str, Any]:
    try:
        controlled = length_controlled(values, [float(tuned - base) for base, tuned in lengths], prompts)
    except ValueError as error:
        return {"rate": None, "ci95": None, "why": str(error)}
    fit = {
        "theta": controlled.theta,
        "theta_se": controlled.theta_se,
        "length": controlled.length,
        "length_se": controlled.length_se,
    }
    return {"rate": controlled.rate, "ci95": [controlled.lo, controlled.hi], **fit}
