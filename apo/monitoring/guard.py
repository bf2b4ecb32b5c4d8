"""Guard: measures abilities that training should not harm, and stops the run when one is lost.

There are four measures. `text`: the language-modelling loss on a text, in nats per token. `tasks`: the share of
multiple-choice tasks whose right option is the likeliest answer. `answers`: how much less likely the model's own
answers have become, in nats per token, which estimates KL(reference || policy). These are compared, text by text, task
by task and answer by answer, with the model before the first step; a limit is violated if the whole 95 % interval of
the loss of ability lies beyond it. `winners`: the log-prob of held-out chosen answers, compared pair by pair with its
highest mean in the run; it is violated by a fall of more than twice its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from clair.core.errors import UserError, near_miss
from clair.core.recipe import Recipe
from clair.core.statistics import Estimate, clustered_mean
from clair.data.row_files import read_jsonl

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

MAX_WINNERS = 256
"""Held-out chosen answers that `winners` measures, spread over all of them."""
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
    winners: bool = False
    """Stop if held-out chosen answers fall from their highest mean log-prob by more than twice the standard error."""
    answers: str | None = None
    """Answers of the untrained model: .jsonl with `prompt` (text or messages) and `answer`."""
    max_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.3
    """The fall of the log-prob of `answers` that is allowed, in nats per token."""
    every: Annotated[int, Field(gt=0)] | None = None
    """Steps between two measurements. Absent: a tenth of the run."""

    @model_validator(mode="after")
    def _check_files(self) -> Guard:
        if self.text is None and self.tasks is None and self.answers is None and not self.winners:
            raise ValueError("a guard without text and tasks, answers and winners measures nothing; give one of them")
        for limit, file in (("most_loss_rise", "text"), ("most_accuracy_drop", "tasks"), ("max_kl", "answers")):
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
    answers: Examples = field(default_factory=list)
    winners: Examples = field(default_factory=list)

    @property
    def examples(self) -> Examples:
        """All examples of a measurement, in the order in which `measure_guard` reads their log-probs."""
        return [*self.pieces, *self.options, *self.answers, *self.winners]

    def interval(self, steps: int) -> int:
        """Return the steps between two measurements in a run of `steps`."""
        return self.guard.every or default_interval(steps)

    def summary(self, steps: int) -> str:
        """Describe in one line what a run of `steps` measures."""
        tokens = sum(len(e["prompt_ids"]) + len(e["chosen_ids"]) for e in self.examples)
        files = f"{len(set(self.texts)):,} texts, {len(self.tasks):,} tasks"
        for name, examples in (("own answers", self.answers), ("winners", self.winners)):
            files += f", {len(examples):,} {name}" if examples else ""
        return f"{files}, {tokens:,} tokens a measurement, every {self.interval(steps):,} steps"


@dataclass(frozen=True)
class GuardMeasurement:
    """A model's loss on every text in nats, the texts' lengths in tokens, and 1.0 for each task answered right.

    `answers` are the losses on own answers in nats, `answer_tokens` their lengths; `winners` are log-probs per token.
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    right: tuple[float, ...]
    answers: tuple[float, ...] = ()
    answer_tokens: tuple[int, ...] = ()
    winners: tuple[float, ...] = ()


def load_guard(
    guard: Guard,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    max_tokens: int | None,
    day: str | None = None,
    held_out: Sequence[Mapping[str, Any]] | None = None,
) -> GuardSet:
    """Read and tokenise a guard's files. `max_tokens` is the model's context, or None.

    `day` is the date (YYYY-MM-DD) that a chat template writes as today's; None: the clock's date. `held_out` are the
    held-out pairs as token ids. Raises UserError with file and line for a row that is not valid.
    """
    piece = min(PIECE, max_tokens or PIECE)
    encode = partial(_encode, tokenizer=tokenizer, generation=generation, max_tokens=max_tokens, day=day)
    pieces, texts = _read_text(Path(guard.text), tokenizer, piece) if guard.text else ([], [])
    options, tasks = _read_tasks(Path(guard.tasks), encode) if guard.tasks else ([], [])
    answers = _read_answers(Path(guard.answers), encode) if guard.answers else []
    winners = _held_out_winners(held_out or ()) if guard.winners else []
    return GuardSet(guard, pieces, texts, options, tasks, answers, winners)


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


def _read_tasks(path: Path, encode: Callable[..., Examples]) -> tuple[Examples, list[tuple[int, int, int]]]:
    if not path.is_file():
        raise UserError(f"guard.tasks: {path} does not exist; give a .jsonl file")
    rows: list[tuple[Any, str]] = []
    tasks: list[tuple[int, int, int]] = []
    for location, row in read_jsonl(path):
        prompt, options, right = _check_task(row, location)
        tasks.append((len(rows), len(rows) + len(options), len(rows) + right))
        rows += [(prompt, option) for option in options]
    if len(tasks) < 2:
        raise UserError(f"guard.tasks: {path} holds {len(tasks)} task(s); give at least 2")
    return encode(rows, "tasks"), tasks


def _read_answers(path: Path, encode: Callable[..., Examples]) -> Examples:
    if not path.is_file():
        raise UserError(f"guard.answers: {path} does not exist; give a .jsonl file")
    rows: list[tuple[Any, str]] = []
    for location, row in read_jsonl(path):
        if not isinstance(row, dict) or "prompt" not in row or not isinstance(row.get("answer"), str):
            raise UserError(f"guard.answers: {location}: a row needs prompt and answer, a text")
        rows.append((_as_messages(row["prompt"]), row["answer"]))
    if len(rows) < 2:
        raise UserError(f"guard.answers: {path} holds {len(rows)} answer(s); give at least 2")
    return encode(rows, "answers")


def _held_out_winners(pairs: Sequence[Mapping[str, Any]]) -> Examples:
    """The chosen answers of up to `MAX_WINNERS` held-out pairs."""
    if len(pairs) < 2 or not any(pairs[0]["rejected_ids"]):
        raise UserError("guard.winners: at least 2 held-out pairs are needed; set `eval`, or leave it out")
    spread = range(0, len(pairs), -(-len(pairs) // MAX_WINNERS))
    columns = ("prompt_ids", "chosen_ids", "chosen_mask")
    return [{**{c: pairs[i][c] for c in columns if c in pairs[i]}, "rejected_ids": []} for i in spread]


def _encode(
    rows: Sequence[tuple[Any, str]],
    key: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    max_tokens: int | None,
    day: str | None,
) -> Examples:
    """Prompts (messages) with an answer each as token ids. `key` of the guard names them in an error."""
    from datasets import Dataset

    from apo.data.tokenize import ID_COLUMNS, eos_ids, tokenize

    dataset = Dataset.from_list([
        {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}], "label": True}
        for prompt, answer in rows
    ])  # fmt: skip
    eos = eos_ids(tokenizer, generation)
    tokenized = tokenize(dataset, tokenizer, max_tokens, eos, f"guard.{key}", day=day)
    if tokenized.dropped:
        raise UserError(
            f"guard.{key}: {tokenized.dropped['too_long']:,} answers are longer than the {max_tokens:,} tokens that "
            f"the model takes; take their {key} out"
        )
    columns = {name: tokenized.dataset[name] for name in ID_COLUMNS}
    return [dict(zip(columns, ids, strict=True)) for ids in zip(*columns.values(), strict=True)]


def _as_messages(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _check_task(row: Any, location: str) -> tuple[list[dict[str, str]], list[str], int]:
    """Return a task's prompt as messages, its options, and the index of the right one. Raises UserError."""
    keys = ["prompt", "options", "answer"]
    if not isinstance(row, dict) or not set(keys) <= set(row):
        near = near_miss(next(iter(set(row) - set(keys)), ""), keys) if isinstance(row, dict) else ""
        raise UserError(f"guard.tasks: {location}: a row needs prompt, options and answer{near}")
    prompt, options, answer = _as_messages(row["prompt"]), row["options"], row["answer"]
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
    logps = iter(response_logps(guard_set.examples))
    losses = [0.0] * (max(guard_set.texts, default=-1) + 1)
    tokens = [0] * len(losses)
    for text, piece in zip(guard_set.texts, guard_set.pieces, strict=True):
        losses[text] -= next(logps)
        tokens[text] += len(piece["chosen_ids"])
    options = [next(logps) for _ in guard_set.options]
    right = [float(max(range(start, end), key=options.__getitem__) == best) for start, end, best in guard_set.tasks]
    texts = [text for text, count in enumerate(tokens) if count]
    return GuardMeasurement(
        tuple(losses[t] for t in texts),
        tuple(tokens[t] for t in texts),
        tuple(right),
        answers=tuple(-next(logps) for _ in guard_set.answers),
        answer_tokens=tuple(len(example["chosen_ids"]) for example in guard_set.answers),
        winners=tuple(next(logps) / len(example["chosen_ids"]) for example in guard_set.winners),
    )


def higher(first: GuardMeasurement, second: GuardMeasurement) -> GuardMeasurement:
    """The measurement whose winners have the higher mean log-prob; the first if they are equal."""
    return second if sum(second.winners) > sum(first.winners) else first


def guard_metrics(
    baseline: GuardMeasurement, current: GuardMeasurement, highest: GuardMeasurement | None = None
) -> dict[str, float]:
    """Return the metrics to log: loss in nats per token, accuracy, the change of each for the worse, and its noise.

    The noise is half of the 95 % interval of the paired difference, over tasks, and over texts weighted by tokens; for
    winners, twice the standard error. `highest` is the measurement whose winners were likeliest (absent: `baseline`).
    """
    metrics: dict[str, float] = {}
    if current.losses:
        loss = sum(current.losses) / sum(current.tokens)
        rise = _mean_rise(baseline.losses, current.losses, current.tokens)
        metrics |= {"guard/text_loss": loss, **_difference("text_loss_rise", rise)}
    if current.right:
        lost = [start - now for start, now in zip(baseline.right, current.right, strict=True)]
        drop = clustered_mean(lost, range(len(lost)))
        accuracy = sum(current.right) / len(current.right)
        metrics |= {"guard/accuracy": accuracy, **_difference("accuracy_drop", drop)}
    if current.answers:
        metrics |= _difference("kl", _mean_rise(baseline.answers, current.answers, current.answer_tokens))
    if current.winners:
        falls = [best - now for best, now in zip((highest or baseline).winners, current.winners, strict=True)]
        fall = clustered_mean(falls, range(len(falls)))
        logp = sum(current.winners) / len(current.winners)
        metrics |= {"guard/winners": logp, "guard/winners_fall": fall.mean, "guard/winners_fall_noise": 2 * fall.se}
    return metrics


def _mean_rise(baseline: Sequence[float], losses: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """The mean rise of losses in nats per token, clustered by text."""
    rises = [((now - start) / n, n) for start, now, n in zip(baseline, losses, tokens, strict=True)]
    return clustered_mean(
        [value for value, n in rises for _ in range(n)], [text for text, (_, n) in enumerate(rises) for _ in range(n)]
    )


def _difference(name: str, estimate: Estimate) -> dict[str, float]:
    return {f"guard/{name}": estimate.mean, f"guard/{name}_noise": estimate.mean - estimate.lo}


def violation(guard: Guard, metrics: dict[str, float]) -> str | None:
    """Describe the limits that the metrics exceed by more than their noise; None if there is none."""
    limits = (
        ("text_loss_rise", "most_loss_rise", "the loss on the guard's text rose by {:.3g} nats per token"),
        ("accuracy_drop", "most_accuracy_drop", "the accuracy on the guard's tasks fell by {:.3g}"),
        ("kl", "max_kl", "the model's own answers fell by {:.3g} nats per token"),
        ("winners_fall", "winners", "held-out chosen answers fell by {:.3g} nats per token from their highest"),
    )
    exceeded = []
    for name, key, message in limits:
        limit = 0.0 if key == "winners" else getattr(guard, key)
        value, noise = (metrics.get(f"guard/{name}{suffix}", 0.0) for suffix in ("", "_noise"))
        if value - noise > limit or not math.isfinite(value):
            exceeded.append(f"{message.format(value)} (+- {noise:.2g}; guard.{key} allows {limit:g})")
    return " and ".join(exceeded) or None
