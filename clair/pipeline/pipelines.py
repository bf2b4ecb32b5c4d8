"""The pipelines `revised`, `stronger`, `delta` and `judged`, each composed of steps.

They make the four data sets of arXiv 2408.06266, and the pairs of delta learning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from clair.data.records import Answer, Dropped, Judgement, Pair, Prompt, message_text, trimmed
from clair.inference.client import ModelClient
from clair.inference.model import visible_answer
from clair.pipeline.filters import Filters
from clair.pipeline.scores import Scoring
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
    if not (answer.text.strip() or reviser.revises_calls):
        raise Dropped("target", "tool_call", "the answer only calls a tool: there is no text to revise")
    revision = await revise(prompt, answer, reviser)
    models = {"rejected": _author(prompt, target), "chosen": reviser.client.model.name}
    labels = {"source": "revised", **prompt.labels}
    calls = answer.tool_calls if revision.tool_calls is None else revision.tool_calls
    revised = Answer(revision.answer, calls, answer.thinking)
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
    prompt: Prompt,
    *,
    answerers: Sequence[ModelClient | None],
    judge: Judge | None,
    scoring: Scoring | None,
    samples: int,
    filters: Filters,
) -> Pair:
    """Make a judged pair: of `samples` answers of each model (on-policy), or of the row's answers (off-policy).

    If `scoring` has a scorer, its scores decide, else the row's if it has any: best against worst, or as `scoring`
    chooses. If a score of the row is missing, the judge decides, or the row is dropped without one. A judge compares
    two answers once. Of more answers all pairs are compared, and the numbers of wins decide. The reasoning is that of
    the comparison of winner and loser, and empty if the judge did not prefer the winner in it.
    """
    ready = [(Answer(visible_answer(text)), "prompt file") for text in prompt.answers]
    answers = ready or await _draw_answers(prompt, answerers, samples)
    choose = scoring.choose if scoring else best_and_worst_index

    def pair(winner: tuple[Answer, str], loser: tuple[Answer, str], reasoning: str = "", scores: Any = None) -> Pair:
        models, labels = {"rejected": loser[1], "chosen": winner[1]}, {"source": "judged", **prompt.labels}
        return apply_filters(_pair(prompt, winner[0], loser[0], models, labels, reasoning, scores), filters)

    scores = list(prompt.scores)
    if not (scoring and scoring.scorer) and scores and (judge is None or not any(map(math.isnan, scores))):
        best, worst = choose(scores)
        return pair(answers[best], answers[worst], scores=(scores[best], scores[worst]))
    first: dict[str, tuple[Answer, str]] = {}
    for answer in answers:
        first.setdefault(_shown(answer[0]), answer)
    shown, distinct = list(first), list(first.values())
    if len(distinct) < 2:
        raise Dropped("target", "identical_samples", f"all {len(answers)} answers are the same")
    if scoring and scoring.scorer:
        scores = await scoring.score(prompt, [answer for answer, _ in distinct])
        best, worst = choose(scores)
        return pair(distinct[best], distinct[worst], scores=(scores[best], scores[worst]))
    if judge is None:
        raise Dropped("judge", "no_judge", "the row has no scores and the recipe has no judge")
    wins = [0.0] * len(distinct)
    reasonings: dict[tuple[int, int], str] = {}  # by the indices of the better and the worse answer
    matches = list(combinations(range(len(distinct)), 2))
    judgements = await gather_all(
        *(_match(prompt, shown[i], shown[j], judge, draw=len(distinct) > 2) for i, j in matches)
    )
    for match, judgement in zip(matches, judgements, strict=True):
        if judgement is None:
            for index in match:
                wins[index] += 0.5
        else:
            better, worse = match if judgement.better == 1 else match[::-1]
            wins[better] += 1
            reasonings[better, worse] = judgement.reasoning
    best, worst = best_and_worst_index(wins)
    return pair(distinct[best], distinct[worst], reasonings.get((best, worst), ""))


async def _draw_answers(
    prompt: Prompt, answerers: Sequence[ModelClient | None], samples: int
) -> list[tuple[Answer, str]]:
    """`samples` answers of each model, with its name. The first model is the target."""
    target, *candidates = answerers
    drawn = [(client, sample) for client in candidates if client for sample in range(samples)]
    answers = await gather_all(
        *(generate(prompt, target, sample) for sample in range(samples)),
        *(answer_of(prompt, client, sample) for client, sample in drawn),
    )
    names = [_author(prompt, target)] * samples + [client.model.name for client, _ in drawn]
    return list(zip(answers, names, strict=True))


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
