"""Requests to the judge, and the verdicts in its replies, or the reason why there is none.

There are two profiles, which are never mixed. *faithful* follows upstream: no temperature and no seed; an unreadable
reply is requested again for up to ten rounds, then a random score replaces it (seeded here, counted and marked); a
letter beyond the options is wrong. *strict* sends one request at temperature 0 with a seed; the verdict must be the
only one in double brackets of a reply that ended normally. Unreadable replies, and letters beyond the options, are
unresolved and count as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from apo.evaluation.answers import RowAnswer
from apo.evaluation.config import is_transient
from apo.evaluation.mixeval.benchmark import BenchmarkRow, JudgePrompts
from apo.evaluation.mixeval.rules import chosen_letter, is_right
from apo.evaluation.records.mixeval import MixEvalItem, Profile
from clair.core.files import content_hash
from clair.data.records import Dropped, Reply
from clair.inference.client import ModelClient
from clair.inference.config import ModelConfig

MAX_TOKENS = 999
ROUNDS: Mapping[Profile, int] = {"faithful": 10, "strict": 1}
_NUMBERS = (re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]"), re.compile(r"\[(\d+(?:\.\d*)?)\]"))
_LETTERS = (re.compile(r"\[\[([A-Z])\]\]"), re.compile(r"\[([A-Z])\]"))
_LOWER_CASE = re.compile(r"\[[a-z]\]")
_OCTAL = re.compile(r"0+[1-9]\d*")  # no number in Python: upstream's parser fails at it


@dataclass(frozen=True, slots=True)
class Verdict:
    """A score and the text it was read from, or the reason why there is none."""

    value: str | None
    score: float = 0.0
    unresolved: str | None = None


@dataclass(frozen=True, slots=True)
class JudgeResult:
    """The last verdict on an answer, the judge's reply, and rounds and tokens in total."""

    verdict: Verdict
    text: str = ""
    rounds: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def request_options(profile: Profile, seed: int) -> dict[str, Any]:
    """The options of the judge's request besides model and messages."""
    strict = {"temperature": 0.0, "seed": seed} if profile == "strict" else {}
    return {"max_tokens": MAX_TOKENS, "response_format": {"type": "text"}, **strict}


def with_profile(judge: ModelConfig, profile: Profile, seed: int) -> ModelConfig:
    """The judge with the profile's request options; a temperature and max_tokens that the recipe sets take precedence.

    A thinking judge needs more tokens than upstream's 999, or another name for them (max_tokens null, and `extra`).
    """
    options = request_options(profile, seed)
    limits = {"temperature": options.pop("temperature", None), "max_tokens": options.pop("max_tokens")}
    unset = {
        name: value for name, value in limits.items() if getattr(judge, name) == ModelConfig.model_fields[name].default
    }
    return judge.model_copy(update={**unset, "extra": {**judge.extra, **options}})


def read_verdict(reply: Reply, row: BenchmarkRow, profile: Profile) -> Verdict:
    """Read the verdict in a judge's reply.

    faithful: the first match in double brackets, else in single ones. strict: the only one in double brackets of a
    reply that ended normally; equal verdicts count as one.
    """
    double, single = _LETTERS if row.options else _NUMBERS
    if profile == "faithful":
        match = double.search(reply.text) or single.search(reply.text)
        return _verdict(match[1], row) if match else Verdict(None, unresolved=_unreadable_reason(reply, row))
    if incomplete := reply.incomplete():
        return Verdict(None, unresolved="cut_off" if incomplete == "truncated" else "not_ended")
    parsed = [_verdict(text, row) for text in double.findall(reply.text)]
    verdicts = {
        (verdict.score, verdict.unresolved, verdict.value if row.options else None): verdict for verdict in parsed
    }
    if len(verdicts) != 1:
        return Verdict(None, unresolved="two_verdicts" if verdicts else _unreadable_reason(reply, row))
    (verdict,) = verdicts.values()
    past = row.options and verdict.value not in row.letters
    return replace(verdict, unresolved="past_options") if past else verdict


def _verdict(text: str, row: BenchmarkRow) -> Verdict:
    """The verdict of a text in brackets."""
    if row.options:
        return Verdict(text, float(text in row.right))
    if not text.isascii() or _OCTAL.fullmatch(text):
        return Verdict(None, unresolved="malformed_number")
    score = float(text)
    return Verdict(text, score) if score <= 1 else Verdict(text, unresolved="out_of_range")


def _unreadable_reason(reply: Reply, row: BenchmarkRow) -> str:
    if reply.incomplete() == "truncated":
        return "cut_off"
    if not reply.text.strip():
        return "empty"
    return "lower_case" if row.options and _LOWER_CASE.search(reply.text) else "no_brackets"


def judge_by_rule(answer: RowAnswer, profile: Profile) -> JudgeResult:
    """The verdict of the benchmark's rule parser. *strict* also reads numbers that the benchmark's parser misses."""
    row = answer.row
    if not row.options:
        return JudgeResult(Verdict(None, float(is_right(answer.text, row.right, faithful=profile == "faithful"))))
    letter = chosen_letter(answer.text, row.options)
    if letter is None:
        return JudgeResult(Verdict(None, unresolved="no_option"))
    return JudgeResult(Verdict(letter, float(letter in row.right)))


@dataclass
class MixEvalJudge:
    """A model that judges. `independent` names a run that shares no replies; None: equal requests share one."""

    client: ModelClient
    judge_prompts: JudgePrompts
    profile: Profile
    independent: str | None = None
    answered_by: set[str] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)
    """The server's messages about requests that it refused for good."""
    distinct: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(prompt, completion) tokens of each distinct request that was answered, by hash."""

    async def judge(self, answer: RowAnswer, repeat: int = 0) -> JudgeResult:
        """Send requests until there is a verdict, in at most the profile's rounds. Raises Dropped without a reply.

        Each `repeat` has requests of its own; the first shares those of an evaluation.
        """
        messages = self.judge_prompts.messages(answer.row, answer.text)
        judged = JudgeResult(Verdict(None))
        for round_ in range(ROUNDS[self.profile]):
            sample = self._first_sample(answer) + ROUNDS["faithful"] * repeat + round_
            try:
                reply = await self.client.complete(messages, row=answer.name, sample=sample)
            except Dropped as dropped:
                if is_transient(dropped):
                    raise
                self.refusals.append(f"judge: {dropped.detail}")
                return replace(judged, verdict=Verdict(None, unresolved=f"judge_{dropped.reason}"), rounds=round_ + 1)
            tokens = (reply.usage.get("prompt_tokens", 0), reply.usage.get("completion_tokens", 0))
            self.distinct[content_hash([messages, sample])] = tokens
            self.answered_by |= {reply.model} - {""}
            judged = JudgeResult(
                read_verdict(reply, answer.row, self.profile),
                reply.text,
                round_ + 1,
                judged.prompt_tokens + tokens[0],
                judged.completion_tokens + tokens[1],
            )
            if (
                reply.incomplete() == "content_filter"
            ):  # the next round would be filtered too, and the judge gave no verdict
                self.refusals.append("judge: content_filter")
                return replace(judged, verdict=Verdict(None, unresolved="judge_content_filter"))
            if judged.verdict.unresolved is None:
                break
        return judged

    def _first_sample(self, answer: RowAnswer) -> int:
        """The ledger's sample number of the first round: 0, or one of this run and answer if `independent`."""
        if self.independent is None:
            return 0
        return ROUNDS["faithful"] * (1 + int(content_hash([self.independent, answer.name, answer.sample])[:12], 16))


def make_item(answer: RowAnswer, judged: JudgeResult) -> MixEvalItem:
    """The line of items.jsonl. Without a verdict the score is 0."""
    row, verdict = answer.row, judged.verdict
    return MixEvalItem(
        split=row.split,
        row=row.row,
        sample=answer.sample,
        question=row.question,
        passage=row.passage,
        benchmark=row.benchmark,
        prompt=row.text,
        target=row.right,
        response=answer.text,
        truncated=answer.truncated,
        judgement=judged.text,
        verdict=verdict.value,
        score=verdict.score,
        unresolved=verdict.unresolved,
        rounds=judged.rounds,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        judge_prompt_tokens=judged.prompt_tokens,
        judge_completion_tokens=judged.completion_tokens,
    )


def with_fallbacks(
    items: Iterable[MixEvalItem], rows: Mapping[tuple[str, int], BenchmarkRow], seed: int
) -> list[MixEvalItem]:
    """Give items without a verdict upstream's random scores and mark them; drawn in the order of `items`.

    A free-form answer gets a random decimal, a multiple-choice one the score of a random letter. Items without an
    answer stay wrong, since there was nothing to judge, and items that a server refused stay unanswered.
    """
    random = Random(seed)
    drawn = []
    for item in items:
        row = rows[item.split, item.row]
        if item.unresolved is None or item.unresolved.startswith("answer_") or item.unanswered:
            drawn.append(item)
            continue
        value = random.choice(row.letters) if row.options else round(random.random(), 1)
        score = float(value in row.right) if isinstance(value, str) else value
        drawn.append(item.model_copy(update={"score": score, "verdict": str(value), "fallback": True}))
    return drawn
