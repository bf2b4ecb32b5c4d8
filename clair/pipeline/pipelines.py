"""The pipelines `revised`, `stronger`, `delta` and `judged`, each composed of steps.

They make the four data sets of arXiv 2408.06266, and the pairs of delta learning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

from clair.data.records import Answer, Dropped, Judgement, Pair, Prompt, message_text, trimmed
from clair.inference.client import ModelClient
from clair.inference.model import visible_answer
from clair.pipeline.filters import Filters
from clair.pipeline.steps import (
    Judge,
    Reviser,
    answer_of,
    apply_filters,
    best_and_worst_index,
    gather_all,
    generate,
    judge_pair,
    revise,
)


async def revised(prompt: Prompt, *, target: ModelClient | None, reviser: Reviser, filters: Filters) -> Pair:
    """Make a CLAIR pair: the target's own answer is rejected, its minimal revision by the reviser is chosen."""
    answer = await generate(prompt, target)
    if not answer.text.strip():
        raise Dropped("target", "tool_call", "the answer only calls a tool: there is no text to revise")
    revision = await revise(prompt, answer.text, reviser)
    models = {"rejected": _author(prompt, target), "chosen": reviser.client.model.name}
    labels = {"source": "revised", **prompt.labels}
    revised = Answer(revision.answer, answer.tool_calls, answer.thinking)
    return apply_filters(_pair(prompt, revised, answer, models, labels, revision.reasoning), filters)


async def stronger(
    prompt: Prompt,
    *,
    answerer: ModelClient | None,
    role: str,
    stronger: ModelClient | None,
    source: str,
    filters: Filters,
) -> Pair:
    """Prefer a stronger model's answer to that of the model in `role`, without a judge.

    That model is the target (stronger-preferred pairs) or the weaker of two others (delta learning). An answer that the
    row already has is used in place of the model's. `source` is the name of the pipeline.
    """
    answer, better = await gather_all(generate(prompt, answerer, role=role), _better(prompt, stronger))
    by = stronger.model.name if stronger and prompt.stronger is None else "prompt file"
    models = {"rejected": _author(prompt, answerer), "chosen": by}
    labels = {"source": source, **prompt.labels}
    return apply_filters(_pair(prompt, better, answer, models, labels), filters)


async def _better(prompt: Prompt, stronger: ModelClient | None) -> Answer:
    if prompt.stronger is not None:
        return Answer(visible_answer(prompt.stronger))
    if stronger is None:
        raise Dropped("stronger", "no_answer", "the row has no stronger answer and the recipe has no stronger model")
    return await answer_of(prompt, stronger)


async def judged(
    prompt: Prompt, *, target: ModelClient | None, judge: Judge | None, samples: int, filters: Filters
) -> Pair:
    """Make a judged pair: the best against the worst of the target's samples (on-policy) or the row's (off-policy).

    If the row has scores, they decide. If a score is missing, the judge decides, or the row is dropped without one.
    Two answers are compared once. Of more answers all pairs are compared, and the numbers of wins decide.
    """
    author = "prompt file" if prompt.answers else _author(prompt, target)
    answers = [Answer(visible_answer(text)) for text in prompt.answers] or await gather_all(
        *(generate(prompt, target, sample) for sample in range(samples))
    )
    models, labels = {"rejected": author, "chosen": author}, {"source": "judged", **prompt.labels}
    if prompt.scores and (judge is None or not any(map(math.isnan, prompt.scores))):
        best, worst = best_and_worst_index(prompt.scores)
        scores = (prompt.scores[best], prompt.scores[worst])
        return apply_filters(_pair(prompt, answers[best], answers[worst], models, labels, scores=scores), filters)
    first: dict[str, Answer] = {}
    for answer in answers:
        first.setdefault(_shown(answer), answer)
    shown, distinct = list(first), list(first.values())
    if len(distinct) < 2:
        raise Dropped("target", "identical_samples", f"all {len(answers)} answers are the same")
    if judge is None:
        raise Dropped("judge", "no_judge", "the row has no scores and the recipe has no judge")
    wins = [0.0] * len(distinct)
    reasoning = ""
    matches = list(combinations(range(len(distinct)), 2))
    judgements = await gather_all(
        *(_match(prompt, shown[i], shown[j], judge, draw=len(distinct) > 2) for i, j in matches)
    )
    for match, judgement in zip(matches, judgements, strict=True):
        if judgement is None:
            for index in match:
                wins[index] += 0.5
        else:
            wins[match[judgement.better - 1]] += 1
            reasoning = judgement.reasoning
    best, worst = best_and_worst_index(wins)
    return apply_filters(_pair(prompt, distinct[best], distinct[worst], models, labels, reasoning), filters)


def _shown(answer: Answer) -> str:
    """The text of an answer that a judge reads."""
    return message_text(answer.message()).strip()


def _pair(
    prompt: Prompt,
    chosen: Answer,
    rejected: Answer,
    models: Mapping[str, str],
    labels: Mapping[str, str],
    reasoning: str = "",
    scores: tuple[float, float] | None = None,
) -> Pair:
    more = {"tools": prompt.tools, "tool_calls": (chosen.tool_calls, rejected.tool_calls)}
    more |= {"thinking": (chosen.thinking, rejected.thinking)}
    texts = (trimmed(chosen.text), trimmed(rejected.text))
    return Pair(prompt.id, prompt.messages, *texts, reasoning, models, labels=labels, scores=scores, **more)


async def _match(prompt: Prompt, first: str, second: str, judge: Judge, *, draw: bool) -> Judgement | None:
    """The judgement of two answers. With `draw`, a tie or a contradiction is None instead of a drop."""
    try:
        return await judge_pair(prompt, first, second, judge)
    except Dropped as drawn:
        if draw and drawn.reason in ("tie", "contradiction"):
            return None
        raise


def _author(prompt: Prompt, target: ModelClient | None) -> str:
    return target.model.name if target and prompt.answer is None else "prompt file"
