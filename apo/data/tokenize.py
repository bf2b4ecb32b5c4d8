"""Tokenize pairs and unpaired rows: once, with each row checked, and never truncated.

A pair becomes `prompt_ids`, `chosen_ids` and `rejected_ids`, the columns that TRL's collator reads. An unpaired row is
a pair with one empty response: `rejected_ids` if it is desirable, `chosen_ids` if not. A response starts where the
prompt and the prompt with its answer diverge, and ends with the end of turn: the model does not write what a template
adds after it (ChatML's line break), and it is not trained (rendering.py). If an answer contains turns of users or
tools, `chosen_mask` and `rejected_mask` have a 1 for each trained token; an empty or missing mask means all. A pair
with equal answers, or a row longer than `max_length` on either side, is dropped and counted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apo.data.encoding import control_tokens, no_end_message
from apo.data.rendering import NOTES, render
from apo.data.template_time import writes_time
from clair.core.errors import UserError, check_name
from clair.data.preference_rows import read_row
from clair.data.preferences import check_columns, read_dataset, restore_row
from clair.data.row_formats import COLUMNS, UNPAIRED_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from apo.losses.mixture import Mixture

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
MASK_COLUMNS = ("chosen_mask", "rejected_mask")
DROPPED = ("too_long", "equal")
PREVIEW_ROWS = 64
"""Rows at the start of a stream that its notes describe; the others are checked when they come."""


@dataclass(frozen=True)
class Tokenized:
    """Tokenized rows, the number of dropped rows by reason, and notes for the user."""

    dataset: Any  # a Dataset, or an IterableDataset of a stream
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def size(self, name: str = "train") -> dict[str, int]:
        """The number of `pairs`, or of unpaired `rows` and the `desirable` among them."""
        unpaired = count_unpaired(self.dataset, name)
        return {"pairs": len(self.dataset)} if unpaired is None else {"rows": sum(unpaired), "desirable": unpaired[0]}


def eos_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None = None) -> frozenset[int]:
    """The token ids that end a turn: the tokenizer's end of sequence and those of the generation config."""
    ids = getattr(generation, "eos_token_id", None)
    ids = ids if isinstance(ids, list | tuple) else [ids]
    end_of_sequence: Any = tokenizer.eos_token_id  # an int or None; transformers annotates more
    return frozenset(token for token in (end_of_sequence, *ids) if token is not None)


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    eos: frozenset[int],
    name: str = "train",
    num_proc: int | None = None,
    objective: Mixture | None = None,
    day: str | None = None,
    weights: str | None = None,
) -> Tokenized:
    """`dataset` with the three id columns, and the masks if an answer contains other turns. Rows longer than
    `max_length` and pairs with equal answers are left out.

    `day` is the date (YYYY-MM-DD) that a chat template writes as today's; None is the date of the clock. `weights` is a
    column of weights, which is checked.

    Raises UserError, in one line with the first row at fault, for a missing column, a row that cannot be rendered
    (rendering.py), an answer that ends twice, a prompt that begins twice, a label that is not true or false, pairs that
    are all equal, and unpaired rows under an `objective` that needs pairs.
    """
    if weights is not None:
        check_weights(dataset, weights, name)
    if set(ID_COLUMNS) <= set(dataset.column_names):
        _refuse_unpaired(objective, name, count_unpaired(dataset, name) is not None)
        return Tokenized(dataset)
    from datasets import Features, List, Value

    check_columns(dataset.column_names, f"{name} dataset")
    _refuse_unpaired(objective, name, needed_columns(dataset) == UNPAIRED_COLUMNS)
    _check_labels(dataset, name)
    read = read_dataset(dataset, f"{name} dataset", keep_text=True, num_proc=num_proc)
    dataset, notes = read.dataset, [f"{name}: {note}" for note in read.notes]
    arguments = {
        "tokenizer": tokenizer,
        "eos": sorted(eos),
        "max_length": max_length,
        "control": control_tokens(tokenizer, eos),
        # Part of the key in `datasets`' cache, and so only set if the ids depend on it.
        "day": day if writes_time(tokenizer) else None,
        "is_read": True,
    }
    # Explicit, because the other responses of unpaired rows are empty, and an empty list has no type.
    features = Features(
        {
            **dataset.features,
            **dict.fromkeys(ID_COLUMNS, List(Value("int64"))),
            **dict.fromkeys(MASK_COLUMNS, List(Value("int8"))),
            "_verdict": Value("string"),
            "_notes": List(Value("string")),
        }
    )
    encoded = dataset.map(encode, fn_kwargs=arguments, num_proc=num_proc, features=features, desc=f"Tokenizing {name}")
    verdicts, noted = encoded["_verdict"][:], encoded["_notes"][:]
    _check_verdicts(encoded, verdicts, name)
    indices = [index for index, verdict in enumerate(verdicts) if not verdict]
    dropped = {reason: count for reason in DROPPED if (count := verdicts.count(reason))}
    equal = _equal_notes(verdicts, noted, name)
    if not indices and equal:
        reasons = [[key for key in keys if key != "after_end"] for keys in noted]
        message = "; ".join(notes + _notes(reasons, name) + equal)
        raise UserError(f"{name} dataset: no pair is left to train on: {message}")
    notes += _notes(noted, name) + equal
    unmasked = () if any(any(column_lengths(encoded, column)) for column in MASK_COLUMNS) else MASK_COLUMNS
    encoded = encoded.remove_columns(["_verdict", "_notes", *unmasked])
    encoded = encoded.select(indices) if dropped else encoded
    if objective is not None and name == "train":
        notes += _balance(count_unpaired(encoded, name), objective)
    return Tokenized(encoded, dropped, notes)


def tokenize_stream(
    stream: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    eos: frozenset[int],
    name: str,
    objective: Mixture,
    weights: str | None = None,
) -> Tokenized:
    """A stream with the columns that `tokenize` adds, tokenized row by row; its notes describe `PREVIEW_ROWS` rows.

    `dropped` counts the rows left out until now; a row that comes again in another epoch counts once.

    Raises UserError as `tokenize` does: at once for the first row, and for a later one when it comes.
    """
    first = first_row(stream, name)
    dropped: dict[str, int] = {}
    if set(ID_COLUMNS) <= set(first):
        return Tokenized(stream)
    unpaired = first.get("chosen") is None and first.get("completion") is not None
    _refuse_unpaired(objective, name, unpaired)
    control, left_out = control_tokens(tokenizer, eos), {reason: set() for reason in DROPPED}

    def read(row: dict[str, Any], index: int) -> dict[str, Any]:
        location = f"{name} dataset, row {index}"
        if (row.get("chosen") is None and row.get("completion") is not None) != unpaired:
            raise UserError(f"{location}: pairs and unpaired rows are in one dataset; give either")
        if unpaired and not isinstance(row.get("label"), bool):
            raise UserError(f"{location}: label is {row.get('label')!r}; true (desirable) or false needed")
        if weights is not None:
            check_weight(row.get(weights), f"{weights!r} of row {index} of the {name} dataset")
        ids = encode(row, tokenizer, sorted(eos), max_length, control)
        verdict, _ = ids.pop("_verdict"), ids.pop("_notes")
        if verdict and verdict not in DROPPED:
            raise UserError(f"{location}: {verdict}")
        if verdict:
            left_out[verdict].add(index)
            dropped[verdict] = len(left_out[verdict])
        return {**ids, **({} if weights is None else {weights: row[weights]}), "_dropped": bool(verdict)}

    read(first, 0)
    noted = [
        encode(row, tokenizer, sorted(eos), max_length, control)["_notes"] for row in first_rows(stream, PREVIEW_ROWS)
    ]
    notes = [f"{note}, of the first rows" for note in _notes(noted, name)]
    tokenised = stream.map(read, with_indices=True, remove_columns=[key for key in first if key != weights])
    return Tokenized(tokenised.filter(lambda row: not row["_dropped"]).remove_columns(["_dropped"]), dropped, notes)


def first_rows(dataset: Dataset | IterableDataset, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a dataset or a stream, or all; a stream starts again when it is read again."""
    rows: Any = dataset
    return list(rows.take(min(count, len(rows)) if hasattr(dataset, "__len__") else count))


def first_row(stream: Dataset | IterableDataset, name: str) -> dict[str, Any]:
    """The first row of a stream. Raises UserError if there is none."""
    rows = first_rows(stream, 1)
    if not rows:
        raise UserError(f"the {name} dataset has no rows")
    return rows[0]


def check_weight(value: Any, location: str) -> None:
    """Raises UserError for a weight that is missing, not a finite number or negative."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value >= 0):
        raise UserError(f"weights: {location} is {value!r}; finite and >= 0 needed")


def check_weights(dataset: Dataset, column: str, name: str) -> None:
    """Raises UserError if a weight is missing, not a finite number or negative, or if all are 0."""
    check_name(f"weights: the {name} dataset has no column", column, dataset.column_names, "found")
    values = dataset[column][:]
    for row, value in enumerate(values):
        check_weight(value, f"{column!r} of row {row} of the {name} dataset")
    if values and not any(values):
        raise UserError(f"weights: every {column!r} of the {name} dataset is 0, so nothing would be learned")


def needed_columns(dataset: Dataset) -> tuple[str, str, str]:
    """The required columns: those of unpaired rows if there is a completion and no chosen, else those of pairs."""
    unpaired = "completion" in dataset.column_names and "chosen" not in dataset.column_names
    return UNPAIRED_COLUMNS if unpaired else COLUMNS


def count_unpaired(dataset: Dataset, name: str = "train") -> tuple[int, int] | None:
    """The numbers of desirable and undesirable rows of a tokenized dataset, or None if its rows are pairs.

    Raises UserError for a row without any response, and for pairs and unpaired rows in one dataset.
    """
    counts: Counter[tuple[bool, bool]] = Counter()
    counts.update((bool(chosen), bool(rejected)) for chosen, rejected in answer_lengths(dataset))
    pairs, desirable, undesirable = (counts[key] for key in ((True, True), (True, False), (False, True)))
    if counts[False, False] or (pairs and desirable + undesirable):
        raise UserError(
            f"{name} dataset holds {pairs:,} pairs, {desirable + undesirable:,} rows with one response and "
            f"{counts[False, False]:,} with none; give pairs, or rows with one response each"
        )
    return (desirable, undesirable) if desirable + undesirable else None


def answer_lengths(dataset: Dataset) -> list[tuple[int, int]]:
    """The tokens of the chosen and of the rejected answer of each row."""
    chosen, rejected = (column_lengths(dataset, name) for name in ID_COLUMNS[1:])
    return list(zip(chosen, rejected, strict=True))


def column_lengths(dataset: Dataset, column: str) -> list[int]:
    """The length of each row's list in a column."""
    lists: Any = dataset.with_format("arrow")[column][:]  # a pyarrow.ChunkedArray
    return lists.combine_chunks().value_lengths().to_pylist()


def _refuse_unpaired(objective: Mixture | None, name: str, unpaired: bool) -> None:
    if unpaired and objective is not None and (reason := objective.paired_only_reason):
        raise UserError(
            f"objective {objective.name}: {reason}, and the {name} dataset has unpaired rows "
            f"({', '.join(UNPAIRED_COLUMNS)}); take kto or apo_zero_unpaired, alone or with sft, or give pairs"
        )


def _check_labels(dataset: Dataset, name: str) -> None:
    """Raises UserError for labels other than true and false: 1 and 0 may be scores, or 1 and -1 elsewhere."""
    if needed_columns(dataset) != UNPAIRED_COLUMNS:
        return
    for row, label in enumerate(dataset["label"][:]):
        if not isinstance(label, bool):
            raise UserError(f"label of row {row} of the {name} dataset is {label!r}; true (desirable) or false needed")


def _balance(counts: tuple[int, int] | None, objective: Mixture) -> list[str]:
    """A note on unequal numbers of desirable and undesirable rows, weighted; none from 3:4 to 4:3."""
    if counts is None:
        return []
    desirable, undesirable = counts
    if not undesirable:
        return ["train: every row is desirable; they all go up, and nothing says what to avoid"]
    if not desirable:
        return ["train: every row is undesirable; the model learns what not to say, and not what to say instead"]
    up, down = objective.class_weights
    ratio = up * desirable / (down * undesirable)
    if 3 / 4 <= ratio <= 4 / 3:
        return []
    return [
        f"train: {desirable:,} desirable and {undesirable:,} undesirable rows pull {ratio:.2g} to 1; desirable_weight "
        f"{up / ratio:.2g} or undesirable_weight {down * ratio:.2g} of the objective would even that out"
    ]


def _check_verdicts(encoded: Dataset, verdicts: list[str], name: str) -> None:
    """Raises UserError for the first invalid row, with the number of all."""
    invalid = [row for row, verdict in enumerate(verdicts) if verdict and verdict not in DROPPED]
    if invalid:
        row = invalid[0]
        location = f"row {row}" + (f" (id {encoded[row]['id']})" if "id" in encoded.column_names else "")
        count = f"{len(invalid):,} of {len(verdicts):,} rows; first " if len(invalid) > 1 else ""
        raise UserError(f"{name} dataset, {count}{location}: {verdicts[row]}")


def _notes(noted: list[list[str]], name: str) -> list[str]:
    """One note per kind, with the number of rows that have it and the first of them."""
    notes = []
    for key, template in NOTES.items():
        if key == "after_end" and name != "train":
            continue  # noted once
        if rows := [row for row, keys in enumerate(noted) if any(note.partition(":")[0] == key for note in keys)]:
            count = f"{len(rows):,} of {len(noted):,} rows (first: row {rows[0]})"
            names = sorted(
                {note.partition(":")[2] for row in rows for note in noted[row] if note.startswith(f"{key}:")}
            )
            notes.append(f"{name}: " + template.format(rows=count, names=", ".join(names)))
    return notes


def _equal_notes(verdicts: list[str], noted: list[list[str]], name: str) -> list[str]:
    rows = [row for row, verdict in enumerate(verdicts) if verdict == "equal"]
    if not rows:
        return []
    lost = sum(bool({"thoughts", "text"} & set(noted[row])) for row in rows)
    reason = f", in {lost:,} of them once the chat template has left out text" if lost else ""
    equal = f"chosen is equal to rejected in {len(rows):,} of {len(verdicts):,} pairs (first: row {rows[0]}){reason}"
    return [f"{name}: {equal}; nothing is preferred there, so they are left out"]


def encode(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    eos: list[int],
    max_length: int | None,
    control: list[str] | None = None,
    day: str | None = None,
    *,
    is_read: bool = False,
) -> dict[str, Any]:
    """The ids and masks of one row, its `_verdict` and its `_notes` (keys of rendering.NOTES).

    A verdict is one of `DROPPED`, an error message, or empty. `day` is as in `render`. `is_read` is true for a row of
    `read_dataset`.
    """
    control = control_tokens(tokenizer, frozenset(eos)) if control is None else control
    try:
        row = restore_row(example) if is_read else read_row(example, keep_text=True)[0]
        rendered = render(row, tokenizer, set(eos), control, day)
    except UserError as fault:
        return {**{key: [] for key in (*ID_COLUMNS, *MASK_COLUMNS, "_notes")}, "_verdict": str(fault)}
    responses, masks = rendered.answers, rendered.masks or [[] for _ in rendered.answers]
    sides = list(zip(responses, masks, strict=True))
    if len(sides) == 1:
        sides = [*sides, ([], [])] if row["label"] else [([], []), *sides]
    return {
        "prompt_ids": rendered.prompt,
        **{column: ids for column, (ids, _) in zip(ID_COLUMNS[1:], sides, strict=True)},
        **{column: mask for column, (_, mask) in zip(MASK_COLUMNS, sides, strict=True)},
        "_verdict": _verdict(rendered.prompt, responses, set(eos), tokenizer, max_length),
        "_notes": sorted(rendered.notes),
    }


def _verdict(
    prompt: list[int],
    responses: list[list[int]],
    eos: set[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
) -> str:
    """One of `DROPPED` or an error message for a tokenized row, or empty if it is valid."""
    if len(responses) == 2 and responses[0] == responses[1]:
        return "equal"
    bos = tokenizer.bos_token_id
    if bos is not None and prompt[:2] == [bos, bos]:
        return (
            "the prompt begins with the beginning-of-sequence token twice; let the chat template or the text write "
            "it, not both"
        )
    if any(not ids or ids[-1] not in eos for ids in responses):
        return no_end_message(tokenizer)
    if any(len(ids) > 1 and ids[-2] in eos for ids in responses):
        return "an answer ends with the end of turn twice; take it out of the text"
    if max_length is not None and len(prompt) + max(map(len, responses)) > max_length:
        return "too_long"
    return ""
