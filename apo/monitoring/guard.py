"""Guard: measures abilities that training should not harm, and stops the run when one is lost.

There are two measures, each on a file of the user's. `text`: the language-modelling loss, in nats per token. `tasks`:
the share of multiple-choice tasks whose right option is the likeliest answer. Both are compared, text by text and task
by task, with the model before the first step. A limit is violated if the whole 95 % interval of the loss of ability
lies beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from clair.core.errors import UserError, near_miss
from clair.core.recipe import Recipe
from clair.core.statistics import Estimate, clustered_mean
from clair.data.row_files import read_jsonl

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

PIECE = 1024
"""Maximal number of tokens of a text in one piece. The first token of a piece is not predicted."""
MEASUREMENTS = 10
"""Measurements in a run if `every` is not set."""

Examples = list[dict[str, list[int]]]


class Guard(Recipe):
    """The `guard` of a training recipe."""

    text: str | None = None
    """Held-out text: .txt with a blank line between texts, or .jsonl with a `text` in each row."""
    tasks: str | None = None
    """Tasks: .jsonl with `prompt` (text or messages), `options` and `answer` (the right option or its index from 0)."""
    most_loss_rise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    """The rise of the loss on `text` that is allowed, in nats per token."""
    most_accuracy_drop: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The drop of the accuracy on `tasks` that is allowed, as a share of all tasks."""
    every: Annotated[int, Field(gt=0)] | None = None
    """Steps between two measurements. Absent: a tenth of the run."""

    @model_validator(mode="after")
    def _check_files(self) -> Guard:
        if self.text is None and self.tasks is None:
            raise ValueError("a guard without text and tasks measures nothing; give one of them")
        for limit, file in (("most_loss_rise", "text"), ("most_accuracy_drop", "tasks")):
            if limit in self.model_fields_set and getattr(self, file) is None:
                raise ValueError(f"{limit} would be ignored without {file}; leave it out")
        return self


def default_interval(steps: int) -> int:
    """Return the steps between two of the `MEASUREMENTS` of a run of `steps`."""
    return max(1, math.ceil(steps / MEASUREMENTS))


@dataclass(frozen=True)
class GuardSet:
    """A guard's files, checked and tokenised.

    Each piece of text is an example whose prompt is its first token; `texts` has the index of its text. Each option of
    a task is an example; `tasks` has, for each task, its indices in `options`: the first, one past the last, the right.
    """

    guard: Guard
    pieces: Examples
    texts: list[int]
    options: Examples
    tasks: list[tuple[int, int, int]]

    def interval(self, steps: int) -> int:
        """Return the steps between two measurements in a run of `steps`."""
        return self.guard.every or default_interval(steps)

    def summary(self, steps: int) -> str:
        """Describe in one line what a run of `steps` measures."""
        tokens = sum(len(e["prompt_ids"]) + len(e["chosen_ids"]) for e in [*self.pieces, *self.options])
        files = f"{len(set(self.texts)):,} texts, {len(self.tasks):,} tasks"
        return f"{files}, {tokens:,} tokens a measurement, every {self.interval(steps):,} steps"


@dataclass(frozen=True)
class GuardMeasurement:
    """A model's loss on every text in nats, the texts' lengths in tokens, and 1.0 for each task answered right."""

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    right: tuple[float, ...]


def load_guard(
    guard: Guard,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    max_tokens: int | None,
    day: str | None = None,
) -> GuardSet:
    """Read and tokenise a guard's files. `max_tokens` is the model's context, or None.

    `day` is the date (YYYY-MM-DD) that a chat template writes as today's; None: the clock's date. Raises UserError with
    file and line for a row that is not valid.
    """
    piece = min(PIECE, max_tokens or PIECE)
    pieces, texts = _read_text(Path(guard.text), tokenizer, piece) if guard.text else ([], [])
    options, tasks = _read_tasks(Path(guard.tasks), tokenizer, generation, max_tokens, day) if guard.tasks else ([], [])
    return GuardSet(guard, pieces, texts, options, tasks)


def _read_text(path: Path, tokenizer: PreTrainedTokenizerBase, piece_tokens: int) -> tuple[Examples, list[int]]:
    if not path.is_file():
        raise UserError(f"guard.text: {path} does not exist; give a .txt or .jsonl file")
    if path.suffix == ".txt":
        contents = [block.strip() for block in path.read_text("utf-8-sig", "replace").split("\n\n")]
    elif path.suffix == ".jsonl":
        contents = []
        for location, row in read_jsonl(path):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise UserError(f"guard.text: {location}: a row has to be an object with a text in `text`")
            contents.append(row["text"])
    else:
        raise UserError(f"guard.text: {path} is neither .txt nor .jsonl")
    pieces: Examples = []
    texts: list[int] = []
    for number, text in enumerate(text for text in contents if text):
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), piece_tokens):
            piece = ids[start : start + piece_tokens]
            if len(piece) > 1:
                pieces.append({"prompt_ids": piece[:1], "chosen_ids": piece[1:], "rejected_ids": []})
                texts.append(number)
    if len(set(texts)) < 2:
        raise UserError(f"guard.text: {path} holds {len(set(texts))} text(s) of two tokens or more; give at least 2")
    return pieces, texts


def _read_tasks(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    max_tokens: int | None,
    day: str | None,
) -> tuple[Examples, list[tuple[int, int, int]]]:
    from datasets import Dataset

    from apo.data.tokenize import ID_COLUMNS, eos_ids, tokenize

    if not path.is_file():
        raise UserError(f"guard.tasks: {path} does not exist; give a .jsonl file")
    rows: list[dict[str, Any]] = []
    tasks: list[tuple[int, int, int]] = []
    for location, row in read_jsonl(path):
        prompt, options, right = _check_task(row, location)
        tasks.append((len(rows), len(rows) + len(options), len(rows) + right))
        rows += [
            {"prompt": prompt, "completion": [{"role": "assistant", "content": option}], "label": True}
            for option in options
        ]
    if len(tasks) < 2:
        raise UserError(f"guard.tasks: {path} holds {len(tasks)} task(s); give at least 2")
    eos = eos_ids(tokenizer, generation)
    tokenized = tokenize(Dataset.from_list(rows), tokenizer, max_tokens, eos, "guard.tasks", day=day)
    if tokenized.dropped:
        raise UserError(
            f"guard.tasks: {tokenized.dropped['too_long']:,} answers are longer than the {max_tokens:,} tokens that "
            f"the model takes; take their tasks out"
        )
    columns = {name: tokenized.dataset[name] for name in ID_COLUMNS}
    return [dict(zip(columns, ids, strict=True)) for ids in zip(*columns.values(), strict=True)], tasks


def _check_task(row: Any, location: str) -> tuple[list[dict[str, str]], list[str], int]:
    """Return a task's prompt as messages, its options, and the index of the right one. Raises UserError."""
    keys = ["prompt", "options", "answer"]
    if not isinstance(row, dict) or not set(keys) <= set(row):
        near = near_miss(next(iter(set(row) - set(keys)), ""), keys) if isinstance(row, dict) else ""
        raise UserError(f"guard.tasks: {location}: a row needs prompt, options and answer{near}")
    prompt, options, answer = row["prompt"], row["options"], row["answer"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not (isinstance(options, list) and len(options) > 1 and all(isinstance(o, str) and o for o in options)):
        raise UserError(f"guard.tasks: {location}: options have to be at least two texts, none of them empty")
    if len(set(options)) < len(options):
        raise UserError(f"guard.tasks: {location}: an option occurs twice")
    if isinstance(answer, str) and answer in options:
        return prompt, options, options.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return prompt, options, answer
    raise UserError(f"guard.tasks: {location}: answer {answer!r} is neither an option nor its index from 0")


# ---- measurement


def measure_guard(response_logps: Callable[[Examples], list[float]], guard_set: GuardSet) -> GuardMeasurement:
    """Measure the model of the trainer whose `response_logps` this is. Every process must call it."""
    logps = response_logps([*guard_set.pieces, *guard_set.options])
    losses = [0.0] * (max(guard_set.texts, default=-1) + 1)
    tokens = [0] * len(losses)
    for text, piece, logp in zip(guard_set.texts, guard_set.pieces, logps, strict=False):
        losses[text] -= logp
        tokens[text] += len(piece["chosen_ids"])
    answers = logps[len(guard_set.pieces) :]
    right = [float(max(range(start, end), key=answers.__getitem__) == best) for start, end, best in guard_set.tasks]
    texts = [text for text, count in enumerate(tokens) if count]
    return GuardMeasurement(tuple(losses[t] for t in texts), tuple(tokens[t] for t in texts), tuple(right))


def guard_metrics(baseline: GuardMeasurement, current: GuardMeasurement) -> dict[str, float]:
    """Return the metrics to log: loss in nats per token, accuracy, the change of each for the worse, and its noise.

    The noise is half of the 95 % interval of the paired difference, over tasks, and over texts weighted by tokens.
    """
    metrics: dict[str, float] = {}
    if current.losses:
        pairs = zip(baseline.losses, current.losses, current.tokens, strict=True)
        rises = [((now - start) / count, count) for start, now, count in pairs]
        rise = clustered_mean(
            [value for value, count in rises for _ in range(count)],
            [text for text, (_, count) in enumerate(rises) for _ in range(count)],
        )
        loss = sum(current.losses) / sum(current.tokens)
        metrics |= {"guard/text_loss": loss, **_difference("text_loss_rise", rise)}
    if current.right:
        lost = [start - now for start, now in zip(baseline.right, current.right, strict=True)]
        drop = clustered_mean(lost, range(len(lost)))
        accuracy = sum(current.right) / len(current.right)
        metrics |= {"guard/accuracy": accuracy, **_difference("accuracy_drop", drop)}
    return metrics


def _difference(name: str, estimate: Estimate) -> dict[str, float]:
    return {f"guard/{name}": estimate.mean, f"guard/{name}_noise": estimate.mean - estimate.lo}


def violation(guard: Guard, metrics: dict[str, float]) -> str | None:
    """Describe the limits that the metrics exceed by more than their noise; None if there is none."""
    limits = (
        ("text_loss_rise", "most_loss_rise", "the loss on the guard's text rose by {:.3g} nats per token"),
        ("accuracy_drop", "most_accuracy_drop", "the accuracy on the guard's tasks fell by {:.3g}"),
    )
    exceeded = []
    for name, key, message in limits:
        limit = getattr(guard, key)
        value, noise = (metrics.get(f"guard/{name}{suffix}", 0.0) for suffix in ("", "_noise"))
        if value - noise > limit or not math.isfinite(value):
            exceeded.append(f"{message.format(value)} (+- {noise:.2g}; guard.{key} allows {limit:g})")
    return " and ".join(exceeded) or None
