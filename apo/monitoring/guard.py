"""Guard rails: what else the model can do, followed through training, and when to stop because it is being lost.

Two measures, each of a file of the user's. `text`: the loss of a language model, in nats per token. `tasks`: the share
of tasks with options at which the right option is the likeliest answer. Both are compared, text by text and task by
task, with the model before the first step. A rail is crossed where the whole 95 % interval of the loss is beyond it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from clair.core.errors import UserError, near_miss
from clair.core.recipe import Recipe
from clair.core.statistics import clustered_mean
from clair.data.row_files import read_jsonl

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from apo.training.trainer import APOTrainer

PIECE = 1024
"""Tokens of a text that are read in one piece; a longer text is cut, and the first token of a piece not predicted."""
LOOKS = 10
"""In a run, unless `every` says otherwise."""

Examples = list[dict[str, list[int]]]


class Guard(Recipe):
    """`guard:` of a training recipe."""

    text: str | None = None
    """Held-out text: .txt, texts apart by a blank line, or .jsonl with a `text` a row."""
    tasks: str | None = None
    """Tasks: .jsonl with `prompt` (text or messages), `options` and `answer`, the right option or its place from 0."""
    most_loss_rise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    """Nats per token that the loss on `text` may rise by."""
    most_accuracy_drop: Annotated[float, Field(ge=0, le=1)] = 0.05
    """How much of the accuracy on `tasks` may be lost, as a share of all tasks."""
    every: Annotated[int, Field(gt=0)] | None = None
    """Steps between two looks. Absent: a tenth of the run."""

    @model_validator(mode="after")
    def _says_something(self) -> Guard:
        if self.text is None and self.tasks is None:
            raise ValueError("give text or tasks; neither is a guard of nothing")
        for limit, file in (("most_loss_rise", "text"), ("most_accuracy_drop", "tasks")):
            if limit in self.model_fields_set and getattr(self, file) is None:
                raise ValueError(f"{limit} would be ignored without {file}; leave it out")
        return self


@dataclass(frozen=True)
class GuardSet:
    """A guard's files as token ids, read and checked.

    A piece of text is an example whose prompt is its first token; `texts` says which text each is of. A task is as
    many examples as it has options: `tasks` are (first, one past the last, the right one).
    """

    guard: Guard
    pieces: Examples
    texts: list[int]
    options: Examples
    tasks: list[tuple[int, int, int]]

    def every(self, steps: int) -> int:
        """Steps between two looks in a run of so many."""
        return self.guard.every or max(1, math.ceil(steps / LOOKS))

    def told(self, steps: int) -> str:
        """What a run of so many steps looks at, in one line."""
        tokens = sum(len(e["prompt_ids"]) + len(e["chosen_ids"]) for e in [*self.pieces, *self.options])
        what = f"{len(set(self.texts)):,} texts, {len(self.tasks):,} tasks"
        return f"{what}, {tokens:,} tokens a look, every {self.every(steps):,} steps"


@dataclass(frozen=True)
class Look:
    """What a model makes of the rails: the loss of every text in nats with its tokens, and which tasks are right."""

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    right: tuple[float, ...]


def load_rails(
    guard: Guard,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    longest: int | None,
    day: str | None = None,
) -> GuardSet:
    """Read and tokenise a guard's files; `longest` is how many tokens the model takes, or None.

    `day` is the date (YYYY-MM-DD) that a chat template writes as today's; None is the date of the clock.

    Raises UserError, with file and line, for what cannot be meant.
    """
    pieces, texts = _read_text(Path(guard.text), tokenizer, min(PIECE, longest or PIECE)) if guard.text else ([], [])
    options, tasks = _read_tasks(Path(guard.tasks), tokenizer, generation, longest, day) if guard.tasks else ([], [])
    return GuardSet(guard, pieces, texts, options, tasks)


def _read_text(path: Path, tokenizer: PreTrainedTokenizerBase, most: int) -> tuple[Examples, list[int]]:
    if not path.is_file():
        raise UserError(f"guard.text: {path} does not exist; give a .txt or .jsonl file")
    if path.suffix == ".txt":
        found = [part.strip() for part in path.read_text("utf-8-sig", "replace").split("\n\n")]
    elif path.suffix == ".jsonl":
        found = []
        for where, row in read_jsonl(path):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise UserError(f"guard.text: {where}: a row is an object with a text in `text`")
            found.append(row["text"])
    else:
        raise UserError(f"guard.text: {path} is neither .txt nor .jsonl")
    pieces: Examples = []
    texts: list[int] = []
    for number, text in enumerate(text for text in found if text):
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), most):
            piece = ids[start : start + most]
            if len(piece) > 1:
                pieces.append({"prompt_ids": piece[:1], "chosen_ids": piece[1:], "rejected_ids": []})
                texts.append(number)
    if len(set(texts)) < 2:
        raise UserError(f"guard.text: {path} holds {len(set(texts))} text(s) of two tokens or more; give at least 2")
    return pieces, texts


def _read_tasks(
    path: Path, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, longest: int | None,
    day: str | None,
) -> tuple[Examples, list[tuple[int, int, int]]]:  # fmt: skip
    from datasets import Dataset

    from apo.data.tokenize import eos_ids, tokenize

    if not path.is_file():
        raise UserError(f"guard.tasks: {path} does not exist; give a .jsonl file")
    rows: list[dict[str, Any]] = []
    tasks: list[tuple[int, int, int]] = []
    for where, row in read_jsonl(path):
        prompt, options, right = _task(row, where)
        tasks.append((len(rows), len(rows) + len(options), len(rows) + right))
        rows += [
            {"prompt": prompt, "completion": [{"role": "assistant", "content": option}], "label": True}
            for option in options
        ]
    if len(tasks) < 2:
        raise UserError(f"guard.tasks: {path} holds {len(tasks)} task(s); give at least 2")
    ends = eos_ids(tokenizer, generation)
    done = tokenize(Dataset.from_list(rows), tokenizer, longest, ends, "guard.tasks", day=day)
    if done.dropped:
        raise UserError(f"guard.tasks: {done.dropped['too_long']:,} answers are longer than the {longest:,} tokens "
                        "that the model takes; take their tasks out")  # fmt: skip
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: row[name] for name in ids} for row in done.dataset], tasks


def _task(row: Any, where: str) -> tuple[list[dict[str, str]], list[str], int]:
    """Prompt as messages, options, and the place of the right one."""
    if not isinstance(row, dict) or not {"prompt", "options", "answer"} <= set(row):
        near = near_miss(next(iter(set(row) - {"prompt", "options", "answer"}), ""), ["prompt", "options", "answer"]) \
            if isinstance(row, dict) else ""  # fmt: skip
        raise UserError(f"guard.tasks: {where}: a row has prompt, options and answer{near}")
    prompt, options, answer = row["prompt"], row["options"], row["answer"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not (isinstance(options, list) and len(options) > 1 and all(isinstance(o, str) and o for o in options)):
        raise UserError(f"guard.tasks: {where}: options are at least two texts, none empty")
    if len(set(options)) < len(options):
        raise UserError(f"guard.tasks: {where}: an option stands there twice")
    if isinstance(answer, str) and answer in options:
        return prompt, options, options.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return prompt, options, answer
    raise UserError(f"guard.tasks: {where}: answer {answer!r} is neither an option nor its place from 0")


# ---- looking


def look(trainer: APOTrainer, rails: GuardSet) -> Look:
    """Measure the model as it is; every process has to ask."""
    logps = trainer.response_logps([*rails.pieces, *rails.options])
    losses = [0.0] * (max(rails.texts, default=-1) + 1)
    tokens = [0] * len(losses)
    for text, piece, logp in zip(rails.texts, rails.pieces, logps, strict=False):
        losses[text] -= logp
        tokens[text] += len(piece["chosen_ids"])
    answers = logps[len(rails.pieces) :]
    right = [float(max(range(start, end), key=answers.__getitem__) == best) for start, end, best in rails.tasks]
    kept = [text for text, count in enumerate(tokens) if count]
    return Look(tuple(losses[t] for t in kept), tuple(tokens[t] for t in kept), tuple(right))


def compare(base: Look, now: Look) -> dict[str, float]:
    """The metrics of a look: loss in nats per token and accuracy, what was lost of each, and its noise.

    The noise is half of the 95 % interval of the paired difference: over texts, each with all its tokens, and tasks.
    """
    found: dict[str, float] = {}
    if now.losses:
        pairs = zip(base.losses, now.losses, now.tokens, strict=True)
        rises = [((after - before) / count, count) for before, after, count in pairs]
        rise = clustered_mean(
            [value for value, count in rises for _ in range(count)],
            [text for text, (_, count) in enumerate(rises) for _ in range(count)],
        )
        found |= {"guard/text_loss": sum(now.losses) / sum(now.tokens), **_difference("text_loss_rise", rise)}
    if now.right:
        lost = [before - after for before, after in zip(base.right, now.right, strict=True)]
        drop = clustered_mean(lost, range(len(lost)))
        found |= {"guard/accuracy": sum(now.right) / len(now.right), **_difference("accuracy_drop", drop)}
    return found


def _difference(name: str, estimate: Any) -> dict[str, float]:
    return {f"guard/{name}": estimate.mean, f"guard/{name}_noise": estimate.mean - estimate.lo}


def crossed(guard: Guard, found: dict[str, float]) -> str | None:
    """Which rail the metrics of a look are beyond, by more than their noise, in words; None where none is."""
    rails = (
        ("text_loss_rise", "most_loss_rise", "the loss on the guard's text rose by {:.3g} nats per token"),
        ("accuracy_drop", "most_accuracy_drop", "the accuracy on the guard's tasks fell by {:.3g}"),
    )
    told = []
    for name, limit, words in rails:
        most = getattr(guard, limit)
        value, noise = (found.get(f"guard/{name}{end}", 0.0) for end in ("", "_noise"))
        if value - noise > most or not math.isfinite(value):
            told.append(f"{words.format(value)} (+- {noise:.2g}; guard.{limit} allows {most:g})")
    return " and ".join(told) or None
