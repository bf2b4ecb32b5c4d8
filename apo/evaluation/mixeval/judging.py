"""What the judge is asked, and what its replies say: a verdict, or by name why there is none.

Two profiles, which are never mixed. *faithful* is upstream: no temperature and no seed, a reply that cannot be read is
asked for again up to ten rounds, then a random score stands in (seeded here, counted and marked); a letter past the
options is wrong. *strict* is temperature 0 with a seed, asked once; a verdict is the only one in double brackets of a
reply that ended by itself. What cannot be read is unresolved and counts as wrong, a letter past the options too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from apo.evaluation.config import is_passing
from apo.evaluation.mixeval.answers import Answer
from apo.evaluation.mixeval.benchmark import JudgeWords, Row
from apo.evaluation.mixeval.rules import chosen_letter, is_right
from apo.evaluation.results import Item, Profile
from clair.core.files import content_hash
from clair.data.records import Dropped, Reply
from clair.inference.client import ModelClient

MAX_TOKENS = 999
ROUNDS: Mapping[Profile, int] = {"faithful": 10, "strict": 1}
_NUMBERS = (re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]"), re.compile(r"\[(\d+(?:\.\d*)?)\]"))
_LETTERS = (re.compile(r"\[\[([A-Z])\]\]"), re.compile(r"\[([A-Z])\]"))
_LOWER_CASE = re.compile(r"\[[a-z]\]")
_OCTAL = re.compile(r"0+[1-9]\d*")  # no number in Python, so that upstream's parser ends at it


REASONS = {
    "empty": "the judge's reply is empty",
    "cut_off": "its reply ended at the token limit, before a verdict (strict: at all)",
    "not_ended": "its reply did not end normally: a refusal, or an unknown finish reason (strict only)",
    "no_brackets": "nothing in brackets (strict: double ones) can be a verdict: a refusal, HTML, another format",
    "two_verdicts": "two different verdicts in double brackets (strict only; faithful takes the first)",
    "lower_case": "a lower-case letter in brackets",
    "malformed_number": "digits in brackets that are no number, such as [[05]]",
    "out_of_range": "a number that is not between 0 and 1",
    "past_options": "a letter that no option has (strict only; faithful counts it as wrong)",
    "no_option": "the rule parser found no option in the response",
    "judge_http_*": "the judge's server refused this request, such as judge_http_400: no score, only a bracket",
    "judge_content_filter": "a filter before the judge replaced its reply: no score, only a bracket",
    "answer_http_*": "the model's server refused this question, such as answer_http_400: no score, only a bracket",
    "answer_*": "the model gave no answer, such as answer_prompt_too_long or answer_content_filter: counts as wrong",
}
"""Why an item is unresolved, by name."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A score and the text it was read from, or the name of what is wrong."""

    value: str | None
    score: float = 0.0
    unresolved: str | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """The last verdict on an answer, the reply it is from, and what all rounds took."""

    verdict: Verdict
    text: str = ""
    rounds: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def request_options(profile: Profile, seed: int) -> dict[str, Any]:
    """The judge's request beside model and messages."""
    strict = {"temperature": 0.0, "seed": seed} if profile == "strict" else {}
    return {"max_tokens": MAX_TOKENS, "response_format": {"type": "text"}, **strict}


def read_verdict(reply: Reply, row: Row, profile: Profile) -> Verdict:
    """What a judge's reply says about a row's answer.

    faithful: the first thing in double brackets, else in single ones. strict: the only one in double brackets of a
    reply with a good ending; two that say the same are one.
    """
    double, single = _LETTERS if row.options else _NUMBERS
    if profile == "faithful":
        match = double.search(reply.text) or single.search(reply.text)
        return _verdict(match[1], row) if match else Verdict(None, unresolved=_nothing_read(reply, row))
    if incomplete := reply.incomplete():
        return Verdict(None, unresolved="cut_off" if incomplete == "truncated" else "not_ended")
    verdicts = {(found.score, found.unresolved, found.value if row.options else None): found
                for found in (_verdict(text, row) for text in double.findall(reply.text))}  # fmt: skip
    if len(verdicts) != 1:
        return Verdict(None, unresolved="two_verdicts" if verdicts else _nothing_read(reply, row))
    (verdict,) = verdicts.values()
    past = row.options and verdict.value not in row.letters
    return replace(verdict, unresolved="past_options") if past else verdict


def _verdict(text: str, row: Row) -> Verdict:
    """What stands in brackets, as a verdict."""
    if row.options:
        return Verdict(text, float(text in row.right))
    if not text.isascii() or _OCTAL.fullmatch(text):
        return Verdict(None, unresolved="malformed_number")
    score = float(text)
    return Verdict(text, score) if score <= 1 else Verdict(text, unresolved="out_of_range")


def _nothing_read(reply: Reply, row: Row) -> str:
    if reply.incomplete() == "truncated":
        return "cut_off"
    if not reply.text.strip():
        return "empty"
    return "lower_case" if row.options and _LOWER_CASE.search(reply.text) else "no_brackets"


def by_rule(answer: Answer, profile: Profile) -> Judged:
    """The verdict of the benchmark's rule parser; `strict` finds numbers where the benchmark finds none."""
    row = answer.row
    if not row.options:
        return Judged(Verdict(None, float(is_right(answer.text, row.right, faithful=profile == "faithful"))))
    letter = chosen_letter(answer.text, row.options)
    if letter is None:
        return Judged(Verdict(None, unresolved="no_option"))
    return Judged(Verdict(letter, float(letter in row.right)))


@dataclass
class Judge:
    """A model that judges. `independent` names the run whose requests share no reply; None shares all equal ones."""

    client: ModelClient
    words: JudgeWords
    profile: Profile
    independent: str | None = None
    answered_by: set[str] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)
    """What the server said to requests that it refused for good."""
    distinct: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tokens of each different request that was answered."""

    async def judge(self, answer: Answer) -> Judged:
        """Ask until there is a verdict, or the profile's rounds are over. Raises Dropped where nobody answers."""
        messages = self.words.messages(answer.row, answer.text)
        judged = Judged(Verdict(None))
        for round_ in range(ROUNDS[self.profile]):
            sample = self._first_sample(answer) + round_
            try:
                reply = await self.client.ask(messages, row=answer.name, sample=sample)
            except Dropped as dropped:
                if is_passing(dropped):
                    raise
                self.refusals.append(f"judge: {dropped.detail}")
                return replace(judged, verdict=Verdict(None, unresolved=f"judge_{dropped.reason}"), rounds=round_ + 1)
            tokens = (reply.usage.get("prompt_tokens", 0), reply.usage.get("completion_tokens", 0))
            self.distinct[content_hash([messages, sample])] = tokens
            self.answered_by |= {reply.model} - {""}
            judged = Judged(
                read_verdict(reply, answer.row, self.profile),
                reply.text,
                round_ + 1,
                judged.prompt_tokens + tokens[0],
                judged.completion_tokens + tokens[1],
            )
            if reply.incomplete() == "content_filter":  # so would the next round be, and no verdict is the judge's
                self.refusals.append("judge: content_filter")
                return replace(judged, verdict=Verdict(None, unresolved="judge_content_filter"))
            if judged.verdict.unresolved is None:
                break
        return judged

    def _first_sample(self, answer: Answer) -> int:
        """Which of several equal requests the first round is, for the ledger: its place, or one of its own."""
        if self.independent is None:
            return 0
        return ROUNDS["faithful"] * (1 + int(content_hash([self.independent, answer.name, answer.sample])[:12], 16))


def item_of(answer: Answer, judged: Judged) -> Item:
    """The line of items.jsonl. What has no verdict scores 0 here."""
    row, verdict = answer.row, judged.verdict
    return Item(
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


def with_fallbacks(items: Iterable[Item], rows: Mapping[tuple[str, int], Row], seed: int) -> list[Item]:
    """Upstream's random scores for what has no verdict, marked as such; draws go through `items` in their order.

    One decimal for a free-form answer, any of its letters for a multiple-choice one. An item without an answer stays
    wrong: there was nothing to judge. What a server refused (`Item.unanswered`) is nobody's verdict.
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
