"""Pairs and unpaired rows as token ids: tokenised once, looked at one by one, never cut.

A pair becomes `prompt_ids`, `chosen_ids` and `rejected_ids`, the columns that TRL's collator reads. An unpaired row is
a pair without the other response: `rejected_ids` is empty where it is desirable, `chosen_ids` where not. A response
starts where prompt and prompt-with-answer part, and ends with the end of turn: what a template writes after it
(ChatML's line break) is not said by the model and not trained (rendering.py). Where an answer has turns of users or
tools in it, `chosen_mask` and `rejected_mask` have a 1 for each token that is trained; a mask that is empty, or not
there, means all. A pair whose answers are equal, or a row longer than `max_length` on either side, is dropped and
counted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apo.data.rendering import NOTES, control_tokens, no_end_message, render, writes_time
from clair.core.errors import UserError
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
LOOKED_AT = 64
"""Rows at the beginning of a stream that notes are about; the others are looked at when they come."""


@dataclass(frozen=True)
class Tokenized:
    """Tokenised rows, how many were dropped for which reason, and what the user should know."""

    dataset: Dataset
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def size(self, name: str = "train") -> dict[str, int]:
        """How many `pairs` there are; of unpaired rows how many `rows`, and how many `desirable` among them."""
        unpaired = count_unpaired(self.dataset, name)
        return {"pairs": len(self.dataset)} if unpaired is None else {"rows": sum(unpaired), "desirable": unpaired[0]}


def eos_ids(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None = None) -> frozenset[int]:
    """The token ids that end a turn: the tokenizer's end of sequence and those the model generates up to."""
    ends = getattr(generation, "eos_token_id", None)
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return frozenset(end for end in (tokenizer.eos_token_id, *ends) if end is not None)


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    ends: frozenset[int],
    name: str = "train",
    num_proc: int | None = None,
    objective: Mixture | None = None,
    day: str | None = None,
) -> Tokenized:
    """`dataset` with the three id columns, and the masks if an answer has inner turns. Rows longer than `max_length`
    and pairs with equal answers are left out.

    `day` is the date (YYYY-MM-DD) that a chat template writes as today's; None is the date of the clock.

    Raises UserError, in one line with the first row at fault, for a missing column, a row that cannot be rendered
    (rendering.py), an answer that ends twice, a prompt that begins twice, a label that is not true or false, pairs that
    are all equal, and unpaired rows under an `objective` that needs pairs.
    """
    if set(ID_COLUMNS) <= set(dataset.column_names):
        _refuse_unpaired(objective, name, count_unpaired(dataset, name) is not None)
        return Tokenized(dataset)
    from datasets import Features, List, Value

    check_columns(dataset.column_names, f"{name} dataset")
    _refuse_unpaired(objective, name, needed_columns(dataset) == UNPAIRED_COLUMNS)
    _check_labels(dataset, name)
    read = read_dataset(dataset, f"{name} dataset", keep_text=True, num_proc=num_proc)
    dataset, notes = read.dataset, [f"{name}: {note}" for note in read.notes]
    arguments = {"tokenizer": tokenizer, "ends": sorted(ends), "max_length": max_length}
    arguments["control"] = control_tokens(tokenizer, ends)
    # Part of the key in `datasets`' cache, and so only where the ids depend on it.
    arguments["day"] = day if writes_time(tokenizer) else None
    # Said, not inferred: the other responses of unpaired rows are empty, and an empty list has no type.
    features = Features({
        **dataset.features, **dict.fromkeys(ID_COLUMNS, List(Value("int64"))),
        **dict.fromkeys(MASK_COLUMNS, List(Value("int8"))),
        "_verdict": Value("string"), "_notes": List(Value("string")),
    })  # fmt: skip
    encoded = dataset.map(
        _encode_read, fn_kwargs=arguments, num_proc=num_proc, features=features, desc=f"Tokenizing {name}"
    )
    verdicts, noted = encoded["_verdict"][:], encoded["_notes"][:]
    _refuse_faults(encoded, verdicts, name)
    kept = [row for row, verdict in enumerate(verdicts) if not verdict]
    dropped = {reason: count for reason in DROPPED if (count := verdicts.count(reason))}
    equal = _equal_notes(verdicts, noted, name)
    if not kept and equal:
        why = [[key for key in keys if key != "after_end"] for keys in noted]
        told = "; ".join(notes + _notes(why, name) + equal)
        raise UserError(f"{name} dataset: no pair is left to train on: {told}")
    notes += _notes(noted, name) + equal
    unmasked = () if any(_has_content(encoded, column) for column in MASK_COLUMNS) else MASK_COLUMNS
    encoded = encoded.remove_columns(["_verdict", "_notes", *unmasked])
    encoded = encoded.select(kept) if dropped else encoded
    if objective is not None and name == "train":
        notes += _balance(count_unpaired(encoded, name), objective)
    return Tokenized(encoded, dropped, notes)


def tokenize_stream(
    stream: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    ends: frozenset[int],
    name: str,
    objective: Mixture,
    weights: str | None = None,
) -> tuple[IterableDataset, dict[str, int], list[str]]:
    """A stream of rows with the columns that `tokenize` adds, each tokenised when it comes; how many were left out so
    far, by reason; and notes on its first `LOOKED_AT` rows. A row that comes again, in another epoch, is counted once.

    Raises UserError for the first row at once, and for a later one at fault when it comes: see `tokenize`.
    """
    first = first_row(stream, name)
    dropped: dict[str, int] = {}
    if set(ID_COLUMNS) <= set(first):
        return stream, dropped, []
    unpaired = first.get("chosen") is None and first.get("completion") is not None
    _refuse_unpaired(objective, name, unpaired)
    control, left_out = control_tokens(tokenizer, ends), {reason: set() for reason in DROPPED}

    def read(row: dict[str, Any], place: int) -> dict[str, Any]:
        where = f"{name} dataset, row {place}"
        if (row.get("chosen") is None and row.get("completion") is not None) != unpaired:
            raise UserError(f"{where}: pairs and unpaired rows are in one dataset; give either")
        if unpaired and not isinstance(row.get("label"), bool):
            raise UserError(f"{where}: label is {row.get('label')!r}; true (desirable) or false needed")
        if weights is not None:
            check_weight(row.get(weights), f"{weights!r} of row {place} of the {name} dataset")
        ids = encode(row, tokenizer, sorted(ends), max_length, control)
        verdict, _ = ids.pop("_verdict"), ids.pop("_notes")
        if verdict and verdict not in DROPPED:
            raise UserError(f"{where}: {verdict}")
        if verdict:
            left_out[verdict].add(place)
            dropped[verdict] = len(left_out[verdict])
        return {**ids, **({} if weights is None else {weights: row[weights]}), "_dropped": bool(verdict)}

    read(first, 0)
    noted = [
        encode(row, tokenizer, sorted(ends), max_length, control)["_notes"] for row in first_rows(stream, LOOKED_AT)
    ]
    notes = [f"{note}, of those that come first" for note in _notes(noted, name)]
    tokenised = stream.map(read, with_indices=True, remove_columns=[key for key in first if key != weights])
    return tokenised.filter(lambda row: not row["_dropped"]).remove_columns(["_dropped"]), dropped, notes


def first_rows(dataset: Dataset | IterableDataset, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a dataset or a stream, which starts anew when it is read; all if there are fewer."""
    return list(dataset.take(min(count, len(dataset)) if hasattr(dataset, "__len__") else count))


def first_row(stream: IterableDataset, name: str) -> dict[str, Any]:
    """The first row of a stream. Raises UserError where there is none."""
    rows = first_rows(stream, 1)
    if not rows:
        raise UserError(f"the {name} dataset has no rows")
    return rows[0]


def check_weight(value: Any, where: str) -> None:
    """Raises UserError for a weight that is missing, not a finite number or negative."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value >= 0):
        raise UserError(f"weights: {where} is {value!r}; finite and >= 0 needed")


def needed_columns(dataset: Dataset) -> tuple[str, str, str]:
    """The columns that rows of this dataset need: those of unpaired rows where there is a completion and no chosen."""
    unpaired = "completion" in dataset.column_names and "chosen" not in dataset.column_names
    return UNPAIRED_COLUMNS if unpaired else COLUMNS


def count_unpaired(dataset: Dataset, name: str = "train") -> tuple[int, int] | None:
    """How many desirable and undesirable rows a tokenised dataset holds, or None where its rows are pairs.

    Raises UserError for a row without any response, and for pairs and unpaired rows in one dataset.
    """
    counts: Counter[tuple[bool, bool]] = Counter()
    for batch in dataset.select_columns(list(ID_COLUMNS)).with_format("arrow").iter(batch_size=1000):
        there = (batch[column].combine_chunks().value_lengths().to_pylist() for column in ID_COLUMNS[1:])
        counts.update((bool(chosen), bool(rejected)) for chosen, rejected in zip(*there, strict=True))
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
    if unpaired and objective is not None and (why := objective.paired_only_reason):
        raise UserError(
            f"objective {objective.name}: {why}, and the {name} dataset has unpaired rows "
            f"({', '.join(UNPAIRED_COLUMNS)}); take kto or apo_zero_unpaired, alone or with sft, or give pairs"
        )


def _check_labels(dataset: Dataset, name: str) -> None:
    """Labels are true or false. Not 1 and 0: elsewhere those are scores, or -1 is the other one."""
    if needed_columns(dataset) != UNPAIRED_COLUMNS:
        return
    for row, label in enumerate(dataset["label"][:]):
        if not isinstance(label, bool):
            raise UserError(f"label of row {row} of the {name} dataset is {label!r}; true (desirable) or false needed")


def _balance(counts: tuple[int, int] | None, objective: Mixture) -> list[str]:
    """What to tell about the numbers of desirable and undesirable rows: nothing from 3:4 to 4:3, weighted."""
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


def _has_content(dataset: Dataset, column: str) -> bool:
    """Whether any row has more than an empty list in a column."""
    batches = dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000)
    return any(len(batch[column].combine_chunks().flatten()) for batch in batches)


def _refuse_faults(encoded: Dataset, verdicts: list[str], name: str) -> None:
    """Raise UserError for the first row at fault, with how many there are."""
    at_fault = [row for row, verdict in enumerate(verdicts) if verdict and verdict not in DROPPED]
    if at_fault:
        row = at_fault[0]
        which = f"row {row}" + (f" (id {encoded[row]['id']})" if "id" in encoded.column_names else "")
        count = f"{len(at_fault):,} of {len(verdicts):,} rows; first " if len(at_fault) > 1 else ""
        raise UserError(f"{name} dataset, {count}{which}: {verdicts[row]}")


def _notes(noted: list[list[str]], name: str) -> list[str]:
    """What the rows' notes come to: each with how many rows have it, and the first of them."""
    notes = []
    for key, words in NOTES.items():
        if key == "after_end" and name != "train":
            continue  # said once
        if rows := [row for row, keys in enumerate(noted) if any(one.partition(":")[0] == key for one in keys)]:
            count = f"{len(rows):,} of {len(noted):,} rows (first: row {rows[0]})"
            names = sorted({one.partition(":")[2] for row in rows for one in noted[row] if one.startswith(f"{key}:")})
            notes.append(f"{name}: " + words.format(rows=count, names=", ".join(names)))
    return notes


def _equal_notes(verdicts: list[str], noted: list[list[str]], name: str) -> list[str]:
    rows = [row for row, verdict in enumerate(verdicts) if verdict == "equal"]
    if not rows:
        return []
    lost = sum(bool({"thoughts", "text"} & set(noted[row])) for row in rows)
    why = f", in {lost:,} of them once the chat template has left out text" if lost else ""
    equal = f"chosen is equal to rejected in {len(rows):,} of {len(verdicts):,} pairs (first: row {rows[0]}){why}"
    return [f"{name}: {equal}; nothing is preferred there, so they are left out"]


def encode(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    max_length: int | None,
    control: list[str] | None = None,
    day: str | None = None,
) -> dict[str, Any]:
    """The ids and masks of one row, what is wrong with it (`_verdict`), and what to note (`_notes`, keys of
    rendering.py's). A verdict is one of `DROPPED`, or the words of a refusal, or nothing. `day` is as in `render`.
    """
    control = control_tokens(tokenizer, frozenset(ends)) if control is None else control
    try:
        row, _ = read_row(example, keep_text=True)
    except UserError as fault:
        return _refused(fault)
    return _encode(row, tokenizer, ends, max_length, control, day)


def _encode_read(example: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """`encode` of a row of `read_dataset`."""
    return _encode(restore_row(example), **arguments)


def _refused(fault: UserError) -> dict[str, Any]:
    return {**{key: [] for key in (*ID_COLUMNS, *MASK_COLUMNS, "_notes")}, "_verdict": str(fault)}


def _encode(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    max_length: int | None,
    control: list[str],
    day: str | None,
) -> dict[str, Any]:
    """`encode` of a row that was read."""
    try:
        rendered = render(row, tokenizer, set(ends), control, day)
    except UserError as fault:
        return _refused(fault)
    responses, masks = rendered.answers, rendered.masks or [[] for _ in rendered.answers]
    sides = list(zip(responses, masks, strict=True))
    if len(sides) == 1:
        sides = [*sides, ([], [])] if row["label"] else [([], []), *sides]
    return {
        "prompt_ids": rendered.prompt,
        **{column: ids for column, (ids, _) in zip(ID_COLUMNS[1:], sides, strict=True)},
        **{column: mask for column, (_, mask) in zip(MASK_COLUMNS, sides, strict=True)},
        "_verdict": _verdict(rendered.prompt, responses, set(ends), tokenizer, max_length),
        "_notes": sorted(rendered.notes),
    }


def _verdict(
    prompt: list[int], responses: list[list[int]], ends: set[int], tokenizer: PreTrainedTokenizerBase, most: int | None
) -> str:
    """What is wrong with a tokenised row: one of `DROPPED`, the words of a refusal, or nothing."""
    if len(responses) == 2 and responses[0] == responses[1]:
        return "equal"
    bos = tokenizer.bos_token_id
    if bos is not None and prompt[:2] == [bos, bos]:
        return ("the prompt begins with the beginning-of-sequence token twice; let the chat template or the text write "
                "it, not both")  # fmt: skip
    if any(not ids or ids[-1] not in ends for ids in responses):
        return no_end_message(tokenizer)
    if any(len(ids) > 1 and ids[-2] in ends for ids in responses):
        return "an answer ends with the end of turn twice; take it out of the text"
    if most is not None and len(prompt) + max(map(len, responses)) > most:
        return "too_long"
    return ""
