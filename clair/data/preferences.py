"""Read a whole `datasets.Dataset` of preference rows of any supported format into one, and count the repairs.

Each row is read by itself (preference_rows.py). It is first encoded as JSON text beside its traits (its form, its
repairs, the keys and types of its messages). The traits of all rows then determine the columns that it is decoded to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError
from clair.core.files import content_hash, file_sha256
from clair.data.message_reader import require_utf8
from clair.data.normalised_rows import arrow_batches, is_normalised
from clair.data.preference_rows import read_row
from clair.data.row_formats import ALIASES, COLUMNS, CONSUMED_COLUMNS, UNPAIRED_COLUMNS, repair_note

if TYPE_CHECKING:
    from datasets import Dataset

ROW, TRAITS = "_row", "_traits"
"""The columns of encoded rows: the row as JSON text, and its traits, such as `kind:text` and `repair:roles`."""
_MODULES = (
    "preferences",
    "preference_rows",
    "comparison_rows",
    "normalised_rows",
    "message_reader",
    "row_formats",
    "row_files",
)
CODE = content_hash([file_sha256(Path(__file__).with_name(f"{module}.py")) for module in _MODULES])
"""The hash of the code that reads rows. It is part of every key of `datasets`' cache, so that rows that another version
read are read again."""
_OBJECTS = ("tools", "chat_template_kwargs")
_SIDES = ("prompt", "chosen", "rejected", "completion")
_ARROW_TYPES = {bool: "bool", int: "int64", float: "float64", str: "string"}


@dataclass(frozen=True)
class Preferences:
    """A dataset that was read, and notes on it: the number of rows with each repair."""

    dataset: Dataset
    notes: list[str] = field(default_factory=list)


def read_dataset(
    dataset: Dataset, location: str, *, keep_text: bool = False, num_proc: int | None = None
) -> Preferences:
    """Read each row as `read_row` does. The result has `prompt`, `chosen` and `rejected`, or completion and label.

    Messages are structs of role and content. Other keys of messages are text columns of the struct, with objects such
    as `tool_calls` as JSON text, so that Arrow adds nothing to them. `tools` and `chat_template_kwargs` are JSON text,
    as TRL takes them. `restore_row` turns a row of the result into what `read_row` returned. Other columns are copied.

    `location` names the dataset in errors. With `keep_text`, a dataset of plain text stays text. Raises UserError with
    the number of the first row that cannot be read.
    """
    if is_normalised(dataset):
        return Preferences(dataset)
    copied = {column: dataset.features[column] for column in dataset.column_names if column not in CONSUMED_COLUMNS}
    encoded = dataset.map(
        _encode_rows,
        batched=True,
        with_indices=True,
        num_proc=num_proc,
        desc="Reading rows",
        remove_columns=[column for column in dataset.column_names if column not in copied],
        fn_kwargs={"location": location, "keep_text": keep_text, "features": dataset.features, "code": CODE},
        features=encoded_features(copied),
    )
    if keep_text and _is_mixed(_count_traits(encoded)):
        return read_dataset(dataset, location, num_proc=num_proc)
    return decode(encoded, location, num_proc=num_proc)


def check_columns(columns: Sequence[str], location: str, *, pairs: bool = False, change: str = "rename yours") -> None:
    """Raise UserError unless the columns of a dataset are those of pairs or those of unpaired rows.

    `pairs` allows only pairs. `change` ends the message with what the user can do.
    """
    unpaired = not pairs and "completion" in columns and "chosen" not in columns
    needed = UNPAIRED_COLUMNS if unpaired else COLUMNS
    if missing := [name for name in needed[1:] if not {name, *ALIASES.get(name, ())} & set(columns)]:
        raise UserError(
            f"{location} has no column {missing[0]!r}; found: {', '.join(columns) or 'none'}; needed: "
            f"{', '.join(needed)}; {change}"
        )


# ---- encoding


def encoded_features(copied: Mapping[str, Any]) -> Any:
    """The features of encoded rows, with those of the columns that are copied."""
    from datasets import Features, List, Value

    return Features({**copied, ROW: Value("string"), TRAITS: List(Value("string"))})


def _encode_rows(
    batch: Mapping[str, list[Any]],
    indices: Sequence[int],
    location: str,
    keep_text: bool,
    features: Mapping[str, Any],
    code: str,
) -> dict[str, list[Any]]:
    consumed = [name for name in batch if name in CONSUMED_COLUMNS]
    encoded = []
    for number, index in enumerate(indices):
        row = {name: values[number] for name, values in batch.items()}
        row |= {name: _drop_struct_nulls(row[name], features[name]) for name in consumed}
        encoded.append(encode_row(row, f"{location}, row {index}", keep_text=keep_text))
    return {ROW: [row for row, _ in encoded], TRAITS: [traits for _, traits in encoded]}


def encode_row(row: Mapping[str, Any], location: str, *, keep_text: bool = False) -> tuple[str, list[str]]:
    """The result of `read_row` as JSON text, and its traits. Raises UserError that names the `location` of the row."""
    try:
        result, repairs = read_row(row, keep_text=keep_text, keep_nulls=True)
    except UserError as error:
        id = "" if row.get("id") is None else f" (id {row['id']})"
        raise UserError(f"{location}{id}: {error}") from error
    sides = {name: result[name] for name in _SIDES if name in result}
    traits = {f"repair:{repair}": None for repair in repairs}
    for name, value in sides.items():
        traits[f"column:{name}"] = None
        traits[f"kind:{'text' if isinstance(value, str) else 'messages'}"] = None
        for turn in value if isinstance(value, list) else ():
            traits |= {
                f"key:{key}:{_ARROW_TYPES.get(type(turn[key]), 'json')}": None
                for key in turn
                if key not in ("role", "content")
            }
    objects = {name: result[name] for name in _OBJECTS if name in result}
    traits |= {f"column:{name}": None for name in objects}
    text = json.dumps({**sides, **objects}, ensure_ascii=False)
    return require_utf8(text, f"{location}: a tool or a key of a message"), list(traits)


def _drop_struct_nulls(value: Any, feature: Any) -> Any:
    """A value of an Arrow column without the keys that Arrow added as nulls. JSON values keep the nulls of the row."""
    if isinstance(value, list):
        inner = getattr(feature, "feature", None)
        return value if inner is None else [_drop_struct_nulls(item, inner) for item in value]
    if isinstance(value, Mapping) and isinstance(feature, Mapping):
        return {key: _drop_struct_nulls(item, feature.get(key)) for key, item in value.items() if item is not None}
    return value


# ---- decoding


def decode(encoded: Dataset, location: str, *, num_proc: int | None = None) -> Preferences:
    """Turn encoded rows into columns, with notes on the repairs. Raises UserError if text and messages are mixed."""
    from datasets import Features, List, Value

    counts = _count_traits(encoded)
    if _is_mixed(counts):
        is_text = ["kind:text" in traits for traits in encoded[TRAITS][:]]
        text, messages = is_text.index(True), is_text.index(False)
        raise UserError(
            f"{location}: row {text} is plain text and row {messages} messages; give all rows one of the two forms"
        )
    keys: dict[str, set[str]] = {}
    for trait in counts:
        if trait.startswith("key:"):
            key, type_name = trait.removeprefix("key:").rsplit(":", 1)
            keys.setdefault(key, set()).add(type_name)
    # Values of one type keep it. All others become JSON text, to which Arrow can add nothing.
    types = {key: types.pop() if len(types) == 1 else "json" for key, types in keys.items()}
    message = {key: Value("string" if kind == "json" else kind) for key, kind in sorted(types.items())}
    message = {"role": Value("string"), "content": Value("string"), **message}
    column = Value("string") if counts["kind:text"] else List(message)
    names = [name for name in (*_SIDES, *_OBJECTS) if counts[f"column:{name}"]]
    features = {name: Value("string") if name in _OBJECTS else column for name in names}
    copied = {name: feature for name, feature in encoded.features.items() if name not in (ROW, TRAITS)}
    decoded = encoded.map(
        _decode_rows,
        batched=True,
        input_columns=[ROW],
        remove_columns=[ROW, TRAITS],
        num_proc=num_proc,
        desc="Reading rows",
        features=Features({**copied, **features}),
        fn_kwargs={
            "names": names,
            "json_keys": sorted(key for key, kind in types.items() if kind == "json"),
            "code": CODE,
        },
    )
    return Preferences(decoded, _notes(counts, len(encoded)))


def _count_traits(encoded: Dataset) -> Counter[str]:
    """The number of encoded rows with each trait."""
    counts: Counter[str] = Counter()
    for batch in arrow_batches(encoded, [TRAITS]):
        for count in batch[TRAITS].combine_chunks().flatten().value_counts().to_pylist():
            counts[count["values"]] += count["counts"]
    return counts


def _is_mixed(counts: Mapping[str, int]) -> bool:
    """True if some rows are text and others messages."""
    return bool(counts["kind:text"] and counts["kind:messages"])


def _decode_rows(rows: list[str], names: Sequence[str], json_keys: Sequence[str], code: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for row in map(json.loads, rows):
        for name in names:
            value = row.get(name)
            if isinstance(value, list) and name in _SIDES:
                for turn in value:
                    turn |= {key: json.dumps(turn[key], ensure_ascii=False) for key in json_keys if key in turn}
            elif value is not None and name in _OBJECTS:
                value = json.dumps(value, ensure_ascii=False)
            columns[name].append(value)
    return columns


def restore_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `read_row` for a row of `read_dataset`: without Arrow's nulls, JSON text parsed. Checks nothing."""
    restored = {name: value for name, value in row.items() if value is not None or name not in CONSUMED_COLUMNS}
    for name, value in restored.items():
        if name in _SIDES and isinstance(value, list):
            restored[name] = [
                {k: json.loads(v) if k == "tool_calls" else v for k, v in turn.items() if v is not None}
                for turn in value
            ]
        elif name in _OBJECTS and value is not None:
            restored[name] = json.loads(value)
    return restored


def _notes(counts: Mapping[str, int], rows: int) -> list[str]:
    repairs = sorted((key.removeprefix("repair:"), count) for key, count in counts.items() if key.startswith("repair:"))
    return [f"{count:,} of {rows:,} rows {repair_note(repair)}" for repair, count in repairs]
