"""Generate answers of the small models, greedy or sampled, and score them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.world.evaluate import generate_answers, generate_in_memory
from recipes.world.style import STYLES, style_of
from recipes.world.tasks import Task, is_right

MAX_NEW_TOKENS = 96  # the longest padded right sentence of the held-out tasks has fewer than 80


def answers(folder: Path, tasks: Sequence[Task], *, temperature: float = 0.0, seed: int = 0) -> list[str]:
    """Return one answer per task: greedy at temperature 0, otherwise sampled by this seed."""
    return generate_answers(folder, tasks, temperature=temperature, seed=seed, max_new_tokens=MAX_NEW_TOKENS)


def answers_in_memory(model: Any, tokenizer: Any, tasks: Sequence[Task]) -> list[str]:
    """Return one greedy answer per task, of a model in memory."""
    model.eval()
    return generate_in_memory(model, tokenizer, tasks, max_new_tokens=MAX_NEW_TOKENS)


def scored(tasks: Sequence[Task], texts: Sequence[str]) -> dict[str, Any]:
    """Return a digit per question (1 is right), a letter per question (`LETTER`), and the mean length in words."""
    return {
        "right": "".join("01"[is_right(task, text)] for task, text in zip(tasks, texts, strict=True)),
        "wording": "".join(LETTER[style_of(text)] for text in texts),
        "words": round(sum(len(text.split()) for text in texts) / len(texts), 3),
    }


LETTER: dict[str, str] = dict(zip(STYLES, "epd", strict=True))
"""engaging, plain, padded."""
