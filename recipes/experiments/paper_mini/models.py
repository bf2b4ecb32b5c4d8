"""Fine-tune the quickstart's model to answer differently.

The quickstart's model gives the right answer half of the time, and otherwise the answer by a wrong rule. A short
fine-tuning on a mix of answers sets how often it is right in each skill, and in which style it answers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch

from clair.core.files import write_json
from recipes.world.evaluate import load
from recipes.world.make_model import PAD, answer_loss, encode, save, token_id
from recipes.world.style import STYLES, add_style
from recipes.world.tasks import Task, draw_tasks

BASE = Path("recipes/world/model")
RECORD = "made.json"
SPREAD = {"sums": 0.10, "order": 0.15, "convert": 0.0, "lookup": -0.10, "edit": -0.15}
"""Added to the share of right answers in each skill; scaled down if that share is near 0 or 1."""


@dataclass(frozen=True)
class Habits:
    """The answers that a model is trained on: the share of right ones, and of each style (in the order of `STYLES`)."""

    right: float
    wording: tuple[float, float, float]
    steps: int
    seed: int

    def right_in(self, skill: str) -> float:
        """Return the share of right answers in one skill."""
        room = min(self.right, 1 - self.right) / 0.5
        return self.right + SPREAD[skill] * room


PEAK, BATCH = 5e-4, 64


def answered(habits: Habits) -> Iterator[tuple[Task, str]]:
    """Yield tasks of the pretraining split with answers by these habits, without end."""
    coin = Random(f"habits-{habits.seed}")
    for task in draw_tasks("pretrain", 1000 + habits.seed):
        sentence = task.right if coin.random() < habits.right_in(task.skill) else task.wrong
        yield task, add_style(sentence, coin.choices(STYLES, habits.wording)[0], coin)


def trained(habits: Habits, threads: int, *, name: str = "", peak: float = PEAK, batch: int = BATCH) -> tuple[Any, Any]:
    """Return the quickstart's model, fine-tuned to these habits, and its tokenizer."""
    torch.set_num_threads(threads)
    torch.manual_seed(habits.seed)
    model, tokenizer = load(BASE)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    source = answered(habits)
    for step in range(habits.steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 20) * (1 - step / habits.steps)
        loss = answer_loss(model, encode(tokenizer, list(islice(source, batch))), token_id(tokenizer, PAD))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 40 == 0:
            print(f"{name}: step {step + 1}/{habits.steps}  loss {loss.item():.4f}", flush=True)
    return model, tokenizer


def save_atomically(model: Any, tokenizer: Any, folder: Path, record: Mapping[str, Any]) -> None:
    """Write a model and its settings, atomically."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    save(model, tokenizer, unfinished)
    write_json(unfinished / RECORD, record)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
