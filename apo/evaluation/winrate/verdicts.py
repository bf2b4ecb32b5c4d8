"""Two answers and a judge's two verdicts about them, and what many of those come to: a win rate with intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apo.evaluation.winrate.length_control import length_controlled
from clair.core.statistics import Estimate, clustered_score
from clair.data.records import Prompt, content_id

SIDES = ("base", "tuned")


def key_of(prompt: Prompt) -> str:
    """What tells prompts apart, whatever answers their rows bring: the cluster."""
    return content_id(prompt.messages, None)


@dataclass(frozen=True, slots=True)
class Answer:
    """One side's answer."""

    text: str
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Compared:
    """Two answers to one prompt and the judge's verdicts: who was better with the base shown first, and second.

    A verdict is "base", "tuned", "tie", or None where none could be read; `unresolved` then says why.
    """

    prompt: Prompt
    sample: int
    base: Answer
    tuned: Answer
    verdicts: tuple[str | None, str | None]
    reasoning: tuple[str, str] = ("", "")
    unresolved: str | None = None

    @property
    def value(self) -> float | None:
        """What the tuned model gets: 1 for each order it wins in, one half for a tie, over both; None if unresolved."""
        if self.unresolved:
            return None
        return sum({"tuned": 0.5, "tie": 0.25}.get(verdict or "", 0.0) for verdict in self.verdicts)

    @property
    def unanswered(self) -> bool:
        """A server refused a request of it: who wins is unknown."""
        return self.unresolved is not None and self.unresolved.startswith(("answer_http_", "judge_http_"))

    @property
    def identical(self) -> bool:
        """Both models said the same: a tie for which no judge is asked."""
        return self.base.text == self.tuned.text

    def row(self) -> dict[str, Any]:
        """The line of winrate.jsonl."""
        answers = {side: getattr(self, side).text for side in SIDES}
        cut = {f"{side}_truncated": getattr(self, side).truncated for side in SIDES}
        names = ("base_first", "tuned_first")
        verdicts = dict(zip(names, self.verdicts, strict=True))
        reasoning = {f"{name}_reasoning": said for name, said in zip(names, self.reasoning, strict=True)}
        told = {"id": self.prompt.id, "prompt": [dict(turn) for turn in self.prompt.messages], "sample": self.sample}
        return {**told, **answers, **cut, **verdicts, **reasoning, "value": self.value, "unresolved": self.unresolved}


def summary(compared: Sequence[Compared]) -> dict[str, Any]:
    """The numbers of winrate.json. Unresolved comparisons are left out, counted, and bracketed; so is in the bracket,
    but not in the rate, what was judged of an answer that was cut off.

    `win_rate` is a mean over comparisons, clustered by prompt; lengths are in characters.
    """
    settled = [one for one in compared if one.value is not None]
    if not settled:
        return {"comparisons": len(compared), "resolved": 0, "unresolved": reasons(compared), "win_rate": None}
    prompts, values = [key_of(one.prompt) for one in settled], [one.value or 0.0 for one in settled]
    lengths = [(len(one.base.text), len(one.tuned.text)) for one in settled]
    agree = [float(one.verdicts[0] == one.verdicts[1]) for one in settled if not one.identical]
    asked = [key_of(one.prompt) for one in settled if not one.identical]
    whole = [one.value or 0.0 for one in settled if not (one.base.truncated or one.tuned.truncated)]
    bracket = [(math.fsum(whole) + extra) / len(compared) for extra in (0, len(compared) - len(whole))]
    ratios = [tuned / base for base, tuned in lengths if base]
    consistency = _told(agree, asked, clustered_score) if agree else None
    return {
        "comparisons": len(compared),
        "resolved": len(settled),
        "prompts": len(set(prompts)),
        "unresolved": reasons(compared),
        "unanswered": sum(one.unanswered for one in compared),
        "identical": sum(one.identical for one in settled),
        "won": sum(value > 0.5 for value in values),
        "tied": sum(value == 0.5 for value in values),
        "lost": sum(value < 0.5 for value in values),
        "win_rate": _told(values, prompts, clustered_score),
        "bracket": bracket,
        "length_controlled": _length_controlled(values, lengths, prompts),
        "length": {
            **{side: math.fsum(pair[at] for pair in lengths) / len(lengths) for at, side in enumerate(SIDES)},
            "ratio": math.fsum(ratios) / len(ratios) if ratios else None,
        },
        "consistency": consistency,
        "distrust": distrust(consistency),
        "truncated": {side: sum(getattr(one, side).truncated for one in settled) for side in SIDES},
    }


def distrust(consistency: Mapping[str, Any] | None) -> str | None:
    """Why a judge's verdicts are not worth more than a coin's, or None: they hang on the order of the answers."""
    if consistency is None or consistency["ci95"] is None or consistency["ci95"][0] > 0.5:
        return None
    told = f"the judge agrees with itself in {100 * consistency['mean']:.0f} % of the comparisons shown in both orders"
    if consistency["mean"] <= 0.5:
        return f"{told}, no more than a coin does: it is no judge, and this rate says nothing about the models"
    return f"{told}, which by chance a coin does too: too few to know whether it is a judge"


def reasons(compared: Sequence[Compared]) -> dict[str, int]:
    """Why comparisons are unresolved, and how many for each reason."""
    return dict(sorted(Counter(one.unresolved for one in compared if one.unresolved).items()))


def _told(values: Sequence[float], prompts: Sequence[str], how: Callable[..., Estimate]) -> dict[str, Any]:
    if len(set(prompts)) < 2:
        return {"mean": math.fsum(values) / len(values), "se": None, "ci95": None}
    found = how(values, prompts)
    return {"mean": found.mean, "se": found.se, "ci95": [found.lo, found.hi]}


def _length_controlled(
    values: Sequence[float], lengths: Sequence[tuple[int, int]], prompts: Sequence[str]
) -> dict[str, Any]:
    try:
        found = length_controlled(values, [float(tuned - base) for base, tuned in lengths], prompts)
    except ValueError as error:
        return {"rate": None, "ci95": None, "why": str(error)}
    fit = {"theta": found.theta, "theta_se": found.theta_se, "length": found.length, "length_se": found.length_se}
    return {"rate": found.rate, "ci95": [found.lo, found.hi], **fit}
