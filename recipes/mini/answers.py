"""Answers of one of the mini world's models, greedy or sampled, with room for padding; and what can be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes.world.evaluate import load
from recipes.world.style import STYLES, style_of
from recipes.world.tasks import Task, is_right

MAX_NEW_TOKENS = 96  # the longest padded right sentence of the held-out tasks has fewer than 80


@torch.no_grad()
def answers(
    folder: Path, tasks: Sequence[Task], *, temperature: float = 0.0, seed: int = 0, batch_size: int = 128
) -> list[str]:
    """One answer per task, in the order given: greedy at temperature 0, else sampled by this seed."""
    model, tokenizer = load(folder)
    turns = [[{"role": "user", "content": task.prompt}] for task in tasks]
    texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    order = sorted(range(len(tasks)), key=lambda at: len(texts[at]))
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    said = [""] * len(tasks)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer([texts[at] for at in rows], return_tensors="pt", padding=True, add_special_tokens=False)
            out = model.generate(**batch, **how, max_new_tokens=MAX_NEW_TOKENS)
            new = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for at, text in zip(rows, new, strict=True):
                said[at] = text
    return said


def scored(tasks: Sequence[Task], said: Sequence[str]) -> dict[str, Any]:
    """A digit a question (1 is right), a letter a question for the wording (`LETTER`), and the mean length in words."""
    return {
        "right": "".join("01"[is_right(task, text)] for task, text in zip(tasks, said, strict=True)),
        "wording": "".join(LETTER[style_of(text)] for text in said),
        "words": round(sum(len(text.split()) for text in said) / len(said), 3),
    }


LETTER = dict(zip(STYLES, "epd", strict=True))
"""engaging, plain, padded."""
