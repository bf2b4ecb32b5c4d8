"""Which pairs or unpaired rows are trained on and which are held out: one source or several, weighted, by one seed.

A source can be limited to the rows that have a given value in a column (`where`); `column_values` lists those values.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from apo.data.tokenize import COLUMNS, ID_COLUMNS, MASK_COLUMNS, UNPAIRED_COLUMNS, check_weight, needed_columns
from clair.core.errors import UserError, near_miss, one_line
from clair.core.recipe import Recipe
from clair.data.preference_sources import load_preferences, split_names
from clair.data.row_files import kind_of
from clair.storage.object_store import is_url, public_path

if TYPE_CHECKING:
    from datasets import Dataset

    from clair.data.preferences import Preferences

_NAMED = 5
_KEPT = (*dict.fromkeys([*COLUMNS, *UNPAIRED_COLUMNS]), "id", "tools", "chat_template_kwargs")


class Source(Recipe):
    """One dataset of a training recipe."""

    path: str
    """A folder made by `clair build` or a .jsonl, .ndjson, .json, .csv, .tsv (these also as .gz) or .parquet file, here
    or at a URL (s3://...), a `datasets` folder, one of `save_to_disk`, or a name on the hub."""
    name: str | None = None
    """The configuration of a data set that has several."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is seen in an epoch: 2 is twice, 0.5 is a random half, the same in every epoch."""
    split: str = "train"
    columns: Mapping[str, str] = {}
    """What its columns are called where not prompt, chosen, rejected, completion, label, system and so on:
    {chosen: better}."""
    where: dict[str, str | int | bool] | None = None
    """Only the rows with these values in these columns, held-out ones too: `{group: ann}`. Absent: all."""


def load_train(
    sources: Sequence[Source], seed: int, weights: str | None = None, note: Callable[[str], None] | None = None
) -> Dataset:
    """The training pairs, or unpaired rows, of all sources, weighted. Raises UserError where they are fewer than two,
    and for pairs in one source and unpaired rows in another.

    `note` is given each line on what was repaired in them.
    """

    parts = []
    for number, source in enumerate(sources):
        part = _load(source, source.split, weights, _noted(source, sources, note))
        if not len(part) and source.where:
            raise UserError(_no_such_rows(source))
        parts.append(part.select(_weighted(len(part), source.weight, seed + number)) if source.weight != 1 else part)
    kinds = {needed_columns(part): source.path for part, source in zip(parts, sources, strict=True)}
    if len(kinds) > 1:
        raise UserError(
            f"dataset {kinds[COLUMNS]} holds pairs and {kinds[UNPAIRED_COLUMNS]} unpaired rows; `clair export --as "
            "unpaired` makes rows of a folder's pairs"
        )
    pairs = _joined(parts, sources)
    if len(pairs) < 2:
        told = ", ".join(source.path + (f" where {source.where}" if source.where else "") for source in sources)
        raise UserError(f"dataset {told} has {len(pairs)} row(s) to train on; at least 2 are needed")
    return pairs


def load_eval(
    sources: Sequence[Source],
    which: bool | str,
    weights: str | None = None,
    note: Callable[[str], None] | None = None,
) -> Dataset | None:
    """The held-out pairs: of the split named `which`, of a file or folder of that name, or (True) of `test` wherever
    there is one. False: none."""

    if which is False:
        return None
    split = "test" if which is True else which
    found = [source for source in sources if split in split_names(source.path, source.name)]
    if not found and which is not True:
        if not _is_path(which):
            names = ", ".join(split_names(sources[0].path, sources[0].name))
            raise UserError(
                f"eval: no dataset has a split {split!r}; found: {names}; no file is called so either; eval: false "
                "trains without"
            )
        found, split = [_eval_source(which, sources)], ""
    loaded = [
        (source, _load_unless_empty(source, split or source.split, weights, _noted(source, found, note)))
        for source in found
    ]
    parts = [(source, part) for source, part in loaded if part is not None]
    return _joined([part for _, part in parts], [source for source, _ in parts]) if parts else None


def _noted(
    source: Source, sources: Sequence[Source], note: Callable[[str], None] | None
) -> Callable[[str], None] | None:
    """`note`, which names the source where there are several."""
    return note if note is None or len(sources) == 1 else lambda line: note(f"{source.path}: {line}")


def _is_path(text: str) -> bool:
    return is_url(text) or _looks_local(text) or Path(text).exists()


def _eval_source(path: str, sources: Sequence[Source]) -> Source:
    """A file or folder of held-out rows as a source, with the `where` and `columns` that all the others have."""
    check_exists(path)
    names = split_names(path)
    where = dict(sources[0].where or {})
    where = {
        column: value for column, value in where.items() if all((s.where or {}).get(column) == value for s in sources)
    }
    columns = dict(sources[0].columns) if all(source.columns == sources[0].columns for source in sources) else {}
    return Source(path=path, split="test" if "test" in names else names[0], where=where or None, columns=columns)


def _joined(parts: Sequence[Dataset], sources: Sequence[Source]) -> Dataset:
    """Datasets one behind the other. An id may be text in one and a number in another, and messages may have more keys
    in one."""
    from datasets import Features, Value, concatenate_datasets

    if len(parts) == 1:
        return parts[0]
    features: dict[str, Any] = {}
    for part, source in zip(parts, sources, strict=True):
        for column, feature in part.features.items():
            try:
                features[column] = _common(features.get(column, feature), feature)
            except TypeError as error:
                raise UserError(
                    f"the datasets cannot be put together: {column!r} of {source.path} is {feature}, and of those "
                    f"before {features[column]}; give all as text or all as messages"
                ) from error
    if "id" in features and any(part.features.get("id", features["id"]) != features["id"] for part in parts):
        features["id"] = Value("string")
    parts = [part.cast(Features({column: features[column] for column in part.column_names})) for part in parts]
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise UserError(f"the datasets cannot be put together: {one_line(error)}") from error


def _common(one: Any, other: Any) -> Any:
    """The feature that two others can be cast to. Raises TypeError for text and messages."""
    from datasets import List, Value

    if one == other:
        return one
    if isinstance(one, List) and isinstance(other, List):
        return List(_common(one.feature, other.feature))
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _common(one.get(key, other.get(key)), other.get(key, one.get(key))) for key in {**one, **other}}
    if isinstance(one, Value) and isinstance(other, Value):
        numbers = all("int" in value.dtype or "float" in value.dtype for value in (one, other))
        return Value("float64") if numbers else Value("string")
    raise TypeError


def hash_pairs(dataset: Dataset, weights: str | None = None) -> str:
    """SHA-256 over the token ids (and masks, and weights) of all rows in order: what a resumed run compares."""
    digest = hashlib.sha256()
    if weights is not None:
        digest.update(repr([float(value) for value in dataset[weights][:]]).encode())
    names = [name for name in (*ID_COLUMNS, *MASK_COLUMNS) if name in dataset.column_names]
    for batch in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            column = batch[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


def column_values(sources: Sequence[Source], column: str) -> tuple[list[str | int | bool], int]:
    """The values that a column has in the rows to train on, sorted, and how many rows have none.

    Raises UserError where a source has no such column, where a value is neither text nor a whole number or a truth
    value, and where no row has one.
    """
    found: dict[tuple[str, str | int | bool], None] = {}
    missing = 0
    for source in sources:
        rows = _where(_read(source, source.split).dataset, source)
        for value in _column(rows, column, source):
            if value is None:
                missing += 1
            elif isinstance(value, str | int | bool):
                found[type(value).__name__, value] = None
            else:
                raise UserError(f"by: {column!r} of a row of {source.path} is {value!r}; text or a whole number needed")
    if not found:
        raise UserError(f"by: no row of {', '.join(source.path for source in sources)} says its {column!r}")
    return [value for _, value in sorted(found)], missing


def _column(rows: Dataset, column: str, source: Source) -> list[object]:
    if column not in rows.column_names:
        near, found = near_miss(column, rows.column_names), ", ".join(rows.column_names)
        raise UserError(f"dataset {source.path} has no column {column!r}{near}; found: {found}")
    return list(rows[column][:])


def _where(rows: Dataset, source: Source) -> Dataset:
    """The rows that the source's `where` asks for."""
    for column, wanted in (source.where or {}).items():
        values = _column(rows, column, source)
        # As types too: 1 is not true.
        kept = [place for place, value in enumerate(values) if value == wanted and type(value) is type(wanted)]
        rows = rows.select(kept)
    return rows


def _no_such_rows(source: Source) -> str:
    """What to say where `where` leaves no row: which values there are instead."""
    found = []
    for column in source.where or {}:
        values = list(dict.fromkeys(_read(source, source.split).dataset[column][:]))
        more = f" and {len(values) - _NAMED} more" if len(values) > _NAMED else ""
        found.append(f"{column}: {', '.join(map(repr, values[:_NAMED]))}{more}")
    return f"dataset {source.path} has no row where {source.where}; found: {'; '.join(found)}"


def _read(source: Source, split: str) -> Preferences:
    check_exists(source.path)
    return load_preferences(source.path, split, name=source.name, columns=source.columns)


def _load(source: Source, split: str, weights: str | None = None, note: Callable[[str], None] | None = None) -> Dataset:
    path = source.path
    read = _read(source, split)
    for line in read.notes if note else ():
        note(line)
    pairs = _where(read.dataset, source)
    if weights is not None and weights not in pairs.column_names:
        near, found = near_miss(weights, pairs.column_names), ", ".join(pairs.column_names)
        raise UserError(f"weights: dataset {path}, split {split!r}, has no column {weights!r}{near}; found: {found}")
    kept = [*_KEPT, weights] if weights is not None and weights not in _KEPT else _KEPT
    for column in {"image", "images"} & set(pairs.column_names):
        if any(pairs[column]):
            raise UserError(
                f"dataset {path}: the column {column!r} holds images, and `apo train` trains text only; take it out or "
                "train with APOTrainer and shared_prefix=False"
            )
    return pairs.select_columns([column for column in kept if column in pairs.column_names])


def _load_unless_empty(
    source: Source, split: str, weights: str | None, note: Callable[[str], None] | None
) -> Dataset | None:
    try:
        pairs = _load(source, split, weights, note)
    except UserError as error:
        if "corresponds to no data" in str(error) or "has no rows" in str(
            error
        ):  # what `datasets` says of a Parquet split without rows
            return None
        raise
    return pairs if len(pairs) else None


def check_exists(path: str) -> None:
    """Raises UserError for a path that is neither there nor a name on the hub, and for a URL that holds a secret."""
    if is_url(path):
        parts = urlsplit(path)
        if parts.username or parts.password or parts.query:
            raise UserError(
                f"dataset {public_path(path)}: its URL holds a password or a query, and is written down with what is "
                "made of it; leave that out and give credentials by the environment"
            )
    elif _looks_local(path) and not Path(path).exists():
        raise UserError(f"dataset {path} does not exist; give a folder made by `clair build`, a file, or a hub name")


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or kind_of(Path(path)) is not None


def _weighted(rows: int, weight: float, seed: int) -> list[int]:
    """Row numbers, each floor(weight) times, and a random part of them once more for what is left of the weight."""
    whole, part = divmod(weight, 1)
    drawn = sorted(random.Random(seed).sample(range(rows), round(part * rows)))
    return [row for row in range(rows) for _ in range(int(whole))] + drawn


def check_weights(dataset: Dataset, column: str, name: str) -> None:
    """Raises UserError where a weight is missing, not a finite number or negative, or where all are 0."""
    if column not in dataset.column_names:
        found = ", ".join(dataset.column_names)
        near = near_miss(column, dataset.column_names)
        raise UserError(f"weights: the {name} dataset has no column {column!r}{near}; found: {found}")
    values = dataset[column][:]
    for row, value in enumerate(values):
        check_weight(value, f"{column!r} of row {row} of the {name} dataset")
    if values and not any(values):
        raise UserError(f"weights: every {column!r} of the {name} dataset is 0, so nothing would be learned")
