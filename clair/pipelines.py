"""The ways to make a pair, each a few lines that compose steps: the four data sets of arXiv 2408.06266."""

from __future__ import annotations

import math
from itertools import combinations

from clair.filters import Filters
from clair.models.asking import Asker
from clair.records import Dropped, Judgement, Pair, Prompt
from clair.steps import Judge, Reviser, answer_of, best_and_worst, generate, judge_pair, keep, revise, together


async def revised(prompt: Prompt, *, target: Asker | None, reviser: Reviser, filters: Filters) -> Pair:
    """CLAIR: rejected is the target's own answer, chosen is its minimal revision."""
    answer = await generate(prompt, target)
    revision = await revise(prompt, answer, reviser)
    models = {"rejected": _author(prompt, target), "chosen": reviser.asker.model.name}
    labels = {"source": "revised", **prompt.labels}
    pair = Pair(prompt.id, prompt.messages, revision.answer, answer, revision.reasoning, models, labels=labels)
    return keep(pair, filters)


async def stronger(prompt: Prompt, *, target: Asker | None, stronger: Asker, filters: Filters) -> Pair:
    """Stronger preferred: rejected is the target's own answer, chosen is a stronger model's, unseen by any judge."""
    answer, better = await together(generate(prompt, target), answer_of(prompt, stronger))
    models = {"rejected": _author(prompt, target), "chosen": stronger.model.name}
    labels = {"source": "stronger", **prompt.labels}
    return keep(Pair(prompt.id, prompt.messages, better, answer, "", models, labels=labels), filters)


async def judged(prompt: Prompt, *, target: Asker | None, judge: Judge | None, samples: int, filters: Filters) -> Pair:
    """Judge: of several answers, the target's own samples (on-policy) or given ones (off-policy), best against worst.

    Given scores decide where there are any; where one is missing, the judge does, or the row is dropped. Two answers
    are compared once; of more, each with each, and the most and the fewest wins decide.
    """
    author = "prompt file" if prompt.answers else _author(prompt, target)
    answers = prompt.answers or tuple(await together(*(generate(prompt, target, sample) for sample in range(samples))))
    models, labels = {"rejected": author, "chosen": author}, {"source": "judged", **prompt.labels}
    if prompt.scores and (judge is None or not any(map(math.isnan, prompt.scores))):
        best, worst = best_and_worst(prompt.scores)
        scores = (prompt.scores[best], prompt.scores[worst])
        chosen, rejected = answers[best], answers[worst]
        pair = Pair(prompt.id, prompt.messages, chosen, rejected, "", models, labels=labels, scores=scores)
        return keep(pair, filters)
    distinct = list(dict.fromkeys(answer.strip() for answer in answers))
    if len(distinct) < 2:
        raise Dropped("target", "identical_samples", f"all {len(answers)} answers are the same")
    if judge is None:
        raise Dropped("judge", "no_judge", "the row has no scores and the recipe has no judge")
    wins = [0.0] * len(distinct)
    reasoning = ""
    matches = list(combinations(range(len(distinct)), 2))
    judgements = await together(
        *(_match(prompt, distinct[i], distinct[j], judge, draw=len(distinct) > 2) for i, j in matches)
    )
    for match, judgement in zip(matches, judgements, strict=True):
        if judgement is None:
            for place in match:
                wins[place] += 0.5
        else:
            wins[match[judgement.better - 1]] += 1
            reasoning = judgement.reasoning
    best, worst = best_and_worst(wins)
    pair = Pair(prompt.id, prompt.messages, distinct[best], distinct[worst], reasoning, models, labels=labels)
    return keep(pair, filters)


async def _match(prompt: Prompt, first: str, second: str, judge: Judge, *, draw: bool) -> Judgement | None:
    """One comparison; None for a draw where draws are allowed."""
    try:
        return await judge_pair(prompt, first, second, judge)
    except Dropped as drawn:
        if draw and drawn.reason in ("tie", "contradiction"):
            return None
        raise


def _author(prompt: Prompt, target: Asker | None) -> str:
    return target.model.name if target and prompt.answer is None else "prompt file"
