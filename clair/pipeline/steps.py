"""The steps of a pipeline, one coroutine each: generate an answer, revise it, judge two answers, filter the pair.

Each row runs through its steps independently, so that a slow row delays no other; the limiter of each role sets the
number of requests in flight. A step returns its result or raises Dropped with the reason.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

from clair.core.files import content_hash
from clair.core.statistics import wilson
from clair.data.contrast import contrast_of
from clair.data.records import Answer, Dropped, Judgement, Message, Pair, Prompt, Revision, trimmed
from clair.inference.client import ModelClient
from clair.inference.model import visible_answer
from clair.pipeline.filters import Filters, first_drop_reason
from clair.prompting.calls import read_calls, with_calls
from clair.prompting.edits import parse_edits
from clair.prompting.parse import FAILURES, ParseFailure, parse_judgement, parse_revision, parse_score
from clair.prompting.templates import ask_again, request

Read = TypeVar("Read")
Step = TypeVar("Step")
_WARMER = 0.5
"""Added to the temperature of the second request: at the same temperature small models repeat their reply verbatim."""
_POINTLESS_AGAIN = ("truncated", "refusal", "content_filter", "tool_call", "incomplete")


@dataclass(frozen=True, slots=True)
class PromptedModel:
    """A model whose requests are made from a template.

    `ask_again`: if a reply cannot be parsed, the request is sent once more, with the problem.
    """

    client: ModelClient
    template: str
    system: str | None = None
    ask_again: bool = True


@dataclass(frozen=True, slots=True)
class Reviser(PromptedModel):
    """The stronger model. `edits` is the template of the edit mode, None without it.

    `first_replies` counts the first replies by outcome: `read`, or the name of the parse failure.
    """

    edits: str | None = None
    revises_calls: bool = False
    first_replies: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Judge(PromptedModel):
    """The model that compares two answers. `verdicts` counts them by position: 0 is a tie, 1 and 2 an answer."""

    order: Literal["both", "random"] = "both"
    verdicts: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJudge(PromptedModel):
    """A model that gives one answer a score from `scale[0]` to `scale[1]` by a rubric."""

    rubric: str
    scale: tuple[int, int]


async def generate(prompt: Prompt, model: ModelClient | None, sample: int = 0, role: str = "target") -> Answer:
    """The row's own answer without hidden reasoning, or else the model's. Drops an incomplete or empty answer.

    The chosen answer would merely complete an incomplete one. `role` is that of the model.
    """
    if prompt.answer is not None:
        text = visible_answer(prompt.answer)
        if not text.strip():
            raise Dropped(role, "empty_reply", "the row's answer is blank, or only hidden reasoning")
        return Answer(text)
    if model is None:
        raise Dropped(role, "no_answer", f"the row has no answer and the recipe has no {role}")
    return await answer_of(prompt, model, sample)


async def answer_of(prompt: Prompt, model: ModelClient, sample: int = 0) -> Answer:
    """The model's `sample`-th answer to the prompt. Drops an incomplete or empty answer."""
    reply = await model.complete(list(prompt.messages), row=prompt.id, sample=sample, tools=prompt.tools)
    if reason := reply.incomplete(tools=bool(prompt.tools)):
        detail = reply.refusal or f"{FAILURES[reason]} (finish_reason {reply.finish_reason!r})"
        too_long = f"the answer ran into max_tokens; raise {model.role}.max_tokens"
        raise Dropped(model.role, reason, too_long if reason == "truncated" else detail)
    calls = reply.tool_calls if prompt.tools else ()
    if not (reply.text.strip() or calls):
        raise Dropped(model.role, "empty_reply", f"the {model.role} said nothing")
    # Thoughts belong to a pair only if the recipe names the mode in which the model is trained.
    return Answer(trimmed(reply.text), calls, reply.thinking if "chat_template_kwargs" in model.options else "")


async def revise(prompt: Prompt, original: Answer, reviser: Reviser) -> Revision:
    """The reviser's minimal improvement of an answer: as edits if the recipe has the edit mode, else as a whole text.

    If the reviser revises calls, they are lines of the text. If edits cannot be parsed, the whole text is requested.
    Drops the row if that cannot be parsed either.
    """
    calls = original.tool_calls if reviser.revises_calls else ()
    answer = with_calls(original.text, calls)

    def split_calls(parse: Callable[[str, str | None], Revision]) -> Callable[[str, str | None], Revision]:
        return (lambda text, finish: read_calls(parse(text, finish), calls, prompt.tools)) if calls else parse

    template_values = {"system": reviser.system, "tools": prompt.tools, "answer": answer}
    ask = partial(
        _ask_and_read, reviser.client, again=reviser.ask_again, row=prompt.id, first_replies=reviser.first_replies
    )
    if reviser.edits is not None:
        messages = request(reviser.edits, prompt.messages, **template_values)
        try:
            read = partial(parse_edits, answer=answer, template=reviser.edits)
            return await ask(messages, read=split_calls(read))
        except ParseFailure as failure:
            if failure.name in _POINTLESS_AGAIN:
                raise Dropped("reviser", failure.name, failure.explanation) from failure
    try:
        read = partial(parse_revision, answer=answer, template=reviser.template)
        messages = request(reviser.template, prompt.messages, **template_values)
        return await ask(messages, read=split_calls(read))
    except ParseFailure as failure:
        raise Dropped("reviser", failure.name, failure.explanation) from failure


async def gather_all(*steps: Coroutine[Any, Any, Step]) -> list[Step]:
    """Run steps concurrently and return their results. If some raise, raise the first error in order after all ended.

    So no step of a dropped row goes on in the background, and the reported drop does not depend on timing. Any other
    error takes precedence over Dropped, such as Pending: the reply that comes with the batch may be an earlier drop.
    """
    results = await asyncio.gather(*steps, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, Dropped)):
        raise error
    return [result for result in results if not isinstance(result, BaseException)]


async def judge_pair(prompt: Prompt, first: str, second: str, judge: Judge) -> Judgement:
    """The better of two answers, judged in both orders or in one chosen by hash. Drops ties and contradictions."""
    if judge.order == "random":
        swapped = int(content_hash([prompt.id, first, second])[0], 16) % 2 == 1
        judgement = await judge_once(prompt, first, second, judge, swapped)
    else:
        judgements = (judge_once(prompt, first, second, judge, swapped) for swapped in (False, True))
        judgement, reverse = await gather_all(*judgements)
        if {judgement.better, reverse.better} == {1, 2}:
            raise Dropped("judge", "contradiction", "the verdict changes with the order of the answers")
        if judgement.better != reverse.better:
            raise Dropped("judge", "tie", "a tie in one of the two orders")
    if judgement.better == 0:
        raise Dropped("judge", "tie", "the judge finds neither better")
    return judgement


async def judge_once(prompt: Prompt, first: str, second: str, judge: Judge, swapped: bool) -> Judgement:
    """One verdict; if `swapped`, `second` is shown before `first`. Drops a reply without a readable verdict."""
    shown = (second, first) if swapped else (first, second)
    messages = request(judge.template, prompt.messages, judge.system, prompt.tools, first=shown[0], second=shown[1])
    try:
        judgement = await _ask_and_read(
            judge.client,
            messages,
            again=judge.ask_again,
            row=prompt.id,
            read=parse_judgement,
        )
    except ParseFailure as failure:
        raise Dropped("judge", failure.name, failure.explanation) from failure
    judge.verdicts[judgement.better] += 1
    return Judgement(judgement.reasoning, 3 - judgement.better if swapped and judgement.better else judgement.better)


async def score_once(prompt: Prompt, answer: str, judge: ScoreJudge) -> float:
    """A judge's score of one answer. Drops a reply without a readable score."""
    lowest, highest = judge.scale
    texts = {"rubric": judge.rubric, "lowest": str(lowest), "highest": str(highest)}
    messages = request(judge.template, prompt.messages, judge.system, prompt.tools, answer=answer, **texts)
    read = partial(parse_score, lowest=lowest, highest=highest)
    try:
        return await _ask_and_read(judge.client, messages, again=judge.ask_again, row=prompt.id, read=read)
    except ParseFailure as failure:
        raise Dropped(judge.client.role, failure.name, failure.explanation) from failure


async def _ask_and_read(
    client: ModelClient,
    messages: list[Message],
    *,
    again: bool,
    row: str,
    read: Callable[[str, str | None], Read],
    first_replies: Counter[str] | None = None,
) -> Read:
    """Send a request and parse its reply. If that fails and `again`, send it once more with the parse failure.

    `first_replies` counts the outcome of the first reply. Raises ParseFailure.
    """
    first_replies = Counter() if first_replies is None else first_replies
    reply = await client.complete(messages, row=row)
    try:
        if reply.refusal:
            raise ParseFailure("refusal", detail=reply.refusal)
        result = read(reply.text, reply.finish_reason)
        first_replies["read"] += 1
        return result
    except ParseFailure as failure:
        first_replies[failure.name] += 1
        if not again or failure.name in _POINTLESS_AGAIN or not reply.text.strip():
            raise
        problem = failure.explanation
    reply = await client.complete(ask_again(messages, reply.text, problem), row=row, added_temperature=_WARMER)
    return read(reply.text, reply.finish_reason)


def apply_filters(pair: Pair, filters: Filters) -> Pair:
    """The pair with its contrast measured. Raises Dropped with the name of the first filter that rejects it."""
    measured = replace(pair, contrast=contrast_of(*pair.compared)._asdict())
    if reason := first_drop_reason(measured, filters):
        raise Dropped("filter", *reason)
    return measured


def best_and_worst_index(scores: Sequence[float]) -> tuple[int, int]:
    """The indices of the highest and the lowest score. Drops a tie, where one answer would be chosen and rejected.

    Drops also if a score is missing (NaN): that answer may be the best or the worst.
    """
    if missing := sum(map(math.isnan, scores)):
        raise Dropped("scores", "missing", f"{missing} of {len(scores)} answers have no score")
    best, worst = max(scores), min(scores)
    if best == worst:
        raise Dropped("scores", "tie", f"all {len(scores)} answers have the score {best}")
    return list(scores).index(best), list(scores).index(worst)


def position_bias(verdicts: Mapping[int, int]) -> dict[str, Any]:
    """The share of verdicts for the answer shown first, with a 95 % interval; biased if the interval excludes 1/2.

    Each pair is shown in both orders or in an order drawn by hash, so the share of an unbiased judge is 1/2.
    """
    first, second = verdicts.get(1, 0), verdicts.get(2, 0)
    interval = wilson(first, first + second)
    return {
        "first": first,
        "second": second,
        "ties": verdicts.get(0, 0),
        "share_first": interval.mean,
        "ci95": [interval.lo, interval.hi],
        "biased": not interval.lo <= 0.5 <= interval.hi,
    }
