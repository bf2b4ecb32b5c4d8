"""The ways to make a pair, each a few lines that compose steps."""

from __future__ import annotations

from collections.abc import Sequence

from clair.models.asking import Asker
from clair.records import Pair, Prompt
from clair.steps import Reviser, generate, keep, revise


async def revised(prompt: Prompt, *, target: Asker | None, reviser: Reviser, filters: Sequence[str]) -> Pair:
    """CLAIR (arXiv 2408.06266): rejected is the target's own answer, chosen is its minimal revision."""
    answer = await generate(prompt, target)
    revision = await revise(prompt, answer, reviser)
    author = target.model.name if target and prompt.answer is None else "prompt file"
    models = {"rejected": author, "chosen": reviser.asker.model.name}
    pair = Pair(prompt.id, prompt.messages, revision.answer, answer, revision.reasoning, models)
    return keep(pair, filters)
