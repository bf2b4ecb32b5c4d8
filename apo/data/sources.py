"""Load the pairs or unpaired rows to train on and to evaluate on, from one source or several, weighted.

A source can be limited to the rows that have a given value in a column (`where`); `column_values` lists the values.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from apo.data.tokenize import COLUMNS, ID_COLUMNS, MASK_COLUMNS, UNPAIRED_COLUMNS, needed_columns
from clair.core.errors import UserError, check_name, list_some, one_line
from clair.core.recipe import Recipe, TemplateVariable
from clair.core.urls import public_url
from clair.data.preference_sources import load_preferences, split_names
from clair.data.row_files import kind_of
from clair.storage.location import Location

if TYPE_CHECKING:
    from datasets import Dataset

    from clair.data.preferences import Preferences

_MAX_VALUES = 5
"""Values of a column that a message lists."""
_COLUMNS = (*dict.fromkeys([*COLUMNS, *UNPAIRED_COLUMNS]), "id", "tools", "chat_template_kwargs")


class Source(Recipe):
    """One dataset of a training recipe."""

    path: str
    """A folder made by `clair build`; a .jsonl, .ndjson, .json, .csv, .tsv (these also as .gz) or .parquet file, local
    or at a URL (s3://...); a `datasets` folder or one of `save_to_disk`; or a name on the hub."""
    name: str | None = None
    """The configuration of a dataset that has several."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Repetitions of each row per epoch: 2 is twice, 0.5 is a random half, the same in every epoch."""
    split: str = "train"
    columns: Mapping[str, str] = {}
    """Names of its columns if they are not prompt, chosen, rejected, completion, label, system and so on:
    {chosen: better}."""
    chat_template_kwargs: dict[str, TemplateVariable] | None = None
    """Variables of the chat template for rows without a column of that name: {enable_thinking: false}. Absent: none."""
    where: dict[str, str | int | bool] | None = None
    """Use only the rows with these values in these columns, also held out: `{group: ann}`. Absent: all rows."""


def load_train(
    sources: Sequence[Source],
    seed: int,
    weights: str | None = None,
    note: Callable[[str], None] | None = None,
    states: str | None = None,
) -> Dataset:
    """The training pairs, or unpaired rows, of all sources, weighted.

    `weights` and `states` are columns that they have besides. `note` receives a line for each kind of repair. Raises
    UserError for fewer than two rows, and for pairs in one source and unpaired rows in another.
    """
    datasets = []
    for number, source in enumerate(sources):
        rows = _load(source, source.split, weights, _prefixed(source, sources, note), states)
        if not len(rows) and source.where:
            raise UserError(_no_rows_message(source))
        if source.weight != 1:
            rows = rows.select(_repeated_indices(len(rows), source.weight, seed + number))
        datasets.append(rows)
    kinds = {needed_columns(rows): source.path for rows, source in zip(datasets, sources, strict=True)}
    if len(kinds) > 1:
        raise UserError(
            f"dataset {kinds[COLUMNS]} holds pairs and {kinds[UNPAIRED_COLUMNS]} unpaired rows; `clair export --as "
            "unpaired` makes rows of a folder's pairs"
        )
    pairs = _concatenated(datasets, sources)
    if len(pairs) < 2:
        names = ", ".join(source.path + (f" where {source.where}" if source.where else "") for source in sources)
        raise UserError(f"dataset {names} has {len(pairs)} row(s) to train on; at least 2 are needed")
    return pairs


def load_eval(
    sources: Sequence[Source],
    split_or_path: bool | str,
    weights: str | None = None,
    note: Callable[[str], None] | None = None,
    states: str | None = None,
    label: str | None = None,
) -> Dataset | None:
    """The held-out pairs: of the split of that name, of a file or folder, or (True) of the split `test` of all sources
    that have it. None if there are none, and for False. The column `label` is kept.

    Raises UserError for a name that is neither a split nor a path.
    """
    if split_or_path is False:
        return None
    split = "test" if split_or_path is True else split_or_path
    with_split = [source for source in sources if split in split_names(source.path, source.name)]
    if not with_split and split_or_path is not True:
        if not (Location(split).is_url or _looks_local(split) or Path(split).exists()):
            names = ", ".join(split_names(sources[0].path, sources[0].name))
            raise UserError(
                f"eval: no dataset has a split {split!r}; found: {names}; no file is called so either; eval: false "
                "trains without"
            )
        with_split, split = [_eval_source(split, sources)], ""
    loaded = [
        (
            source,
            _load_unless_empty(
                source, split or source.split, weights, _prefixed(source, with_split, note), states, label
            ),
        )
        for source in with_split
    ]
    present = [(source, pairs) for source, pairs in loaded if pairs is not None]
    return _concatenated([pairs for _, pairs in present], [source for source, _ in present]) if present else None


def _prefixed(
    source: Source, sources: Sequence[Source], note: Callable[[str], None] | None
) -> Callable[[str], None] | None:
    """`note`, with the path of the source before each line if there are several sources."""
    return note if note is None or len(sources) == 1 else lambda line: note(f"{source.path}: {line}")


def _eval_source(path: str, sources: Sequence[Source]) -> Source:
    """A file or folder of held-out rows as a source, with what all training sources share."""
    check_exists(path)
    names = split_names(path)
    first = sources[0].where or {}
    shared = {
        column: value for column, value in first.items() if all((s.where or {}).get(column) == value for s in sources)
    }
    columns = dict(sources[0].columns) if all(source.columns == sources[0].columns for source in sources) else {}
    options = {str(source.chat_template_kwargs): source.chat_template_kwargs for source in sources}
    return Source(
        path=path,
        split="test" if "test" in names else names[0],
        where=shared or None,
        columns=columns,
        chat_template_kwargs=next(iter(options.values())) if len(options) == 1 else None,
    )


def _concatenated(datasets: Sequence[Dataset], sources: Sequence[Source]) -> Dataset:
    """Concatenate datasets. An id may be text in one and a number in another, and messages may have more keys in one.

    Raises UserError if a column is text in one and messages in another.
    """
    from datasets import Features, Value, concatenate_datasets

    if len(datasets) == 1:
        return datasets[0]
    features: dict[str, Any] = {}
    for dataset, source in zip(datasets, sources, strict=True):
        for column, feature in dataset.features.items():
            try:
                features[column] = _common_feature(features.get(column, feature), feature)
            except TypeError as error:
                raise UserError(
                    f"the datasets cannot be put together: {column!r} of {source.path} is {feature}, and of those "
                    f"before {features[column]}; give all as text or all as messages"
                ) from error
    if "id" in features and any(dataset.features.get("id", features["id"]) != features["id"] for dataset in datasets):
        features["id"] = Value("string")
    common = [
        dataset.cast(Features({column: features[column] for column in dataset.column_names})) for dataset in datasets
    ]
    try:
        return concatenate_datasets(common)
    except ValueError as error:
        raise UserError(f"the datasets cannot be put together: {one_line(error)}") from error


def _common_feature(a: Any, b: Any) -> Any:
    """The feature that both can be cast to. Raises TypeError for text and messages."""
    from datasets import List, Value

    if a == b:
        return a
    if isinstance(a, List) and isinstance(b, List):
        return List(_common_feature(a.feature, b.feature))
    if isinstance(a, dict) and isinstance(b, dict):
        return {key: _common_feature(a.get(key, b.get(key)), b.get(key, a.get(key))) for key in {**a, **b}}
    if isinstance(a, Value) and isinstance(b, Value):
        numbers = all("int" in value.dtype or "float" in value.dtype for value in (a, b))
        return Value("float64") if numbers else Value("string")
    raise TypeError


def hash_pairs(dataset: Dataset, weights: str | None = None, states: str | None = None) -> str:
    """SHA-256 over the token ids (and masks, weights and states) of all rows in order. A resumed run compares it."""
    digest = hashlib.sha256()
    if states is not None:
        digest.update(repr(dataset[states][:]).encode())
    if weights is not None:
        digest.update(repr([float(value) for value in dataset[weights][:]]).encode())
    names = [name for name in (*ID_COLUMNS, *MASK_COLUMNS) if name in dataset.column_names]
    batches: Any = dataset.select_columns(names).with_format("arrow").iter(batch_size=1000)  # of pyarrow.Table
    for batch in batches:
        for name in names:
            column = batch[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


def column_values(sources: Sequence[Source], column: str) -> tuple[list[str | int | bool], int]:
    """The values of a column in the training rows, sorted, and the number of rows without one.

    Raises UserError if a source lacks the column, if a value is neither text nor an integer or a boolean, and if no row
    has a value.
    """
    values: dict[tuple[str, str | int | bool], None] = {}
    missing = 0
    for source in sources:
        rows = _filter_rows(_read(source, source.split).dataset, source)
        for value in _column(rows, column, source):
            if value is None:
                missing += 1
            elif isinstance(value, str | int | bool):
                values[type(value).__name__, value] = None
            else:
                raise UserError(f"by: {column!r} of a row of {source.path} is {value!r}; text or an integer needed")
    if not values:
        raise UserError(f"by: no row of {', '.join(source.path for source in sources)} has a value for {column!r}")
    return [value for _, value in sorted(values)], missing


def _column(rows: Dataset, column: str, source: Source) -> list[object]:
    check_name(f"dataset {source.path} has no column", column, rows.column_names, "found")
    return list(rows[column][:])


def _filter_rows(rows: Dataset, source: Source) -> Dataset:
    """The rows that match the source's `where`."""
    for column, expected in (source.where or {}).items():
        values = _column(rows, column, source)
        # Types must match too: 1 is not true.
        indices = [index for index, value in enumerate(values) if value == expected and type(value) is type(expected)]
        rows = rows.select(indices)
    return rows


def _no_rows_message(source: Source) -> str:
    """The message for a `where` that matches no row, with the values that exist."""
    columns = []
    for column in source.where or {}:
        values = list(dict.fromkeys(_read(source, source.split).dataset[column][:]))
        columns.append(f"{column}: {list_some(values, _MAX_VALUES)}")
    return f"dataset {source.path} has no row where {source.where}; found: {'; '.join(columns)}"


def _read(source: Source, split: str) -> Preferences:
    check_exists(source.path)
    return load_preferences(source.path, split, name=source.name, columns=source.columns)


def _load(
    source: Source,
    split: str,
    weights: str | None = None,
    note: Callable[[str], None] | None = None,
    states: str | None = None,
    label: str | None = None,
) -> Dataset:
    path = source.path
    read = _read(source, split)
    if note:
        for line in read.notes:
            note(line)
    pairs = _filter_rows(read.dataset, source)
    named = {"weights": weights, "soft_prompt": states, "prediction": label}
    extra = {key: column for key, column in named.items() if column is not None}
    for key, column in extra.items():
        check_name(f"{key}: dataset {path}, split {split!r}, has no column", column, pairs.column_names, "found")
    users = [] if states is None else ["user"]
    columns = [*dict.fromkeys([*_COLUMNS, *extra.values(), *users])]
    for column in {"image", "images"} & set(pairs.column_names):
        if any(pairs[column]):
            raise UserError(
                f"dataset {path}: the column {column!r} holds images, and `apo train` trains text only; take it out or "
                "train with APOTrainer and shared_prefix=False"
            )
    pairs = pairs.select_columns([column for column in columns if column in pairs.column_names])
    return _with_template_options(pairs, source.chat_template_kwargs)


def _with_template_options(rows: Dataset, options: Mapping[str, Any] | None) -> Dataset:
    """The rows, with `options` as the chat template's variables of those that have none of their own."""
    name = "chat_template_kwargs"
    if not options:
        return rows
    values = rows[name][:] if name in rows.column_names else [None] * len(rows)
    rows = rows.remove_columns([column for column in rows.column_names if column == name])
    return rows.add_column(name, [value or json.dumps(options) for value in values])  # pyright: ignore[reportCallIssue]


def _load_unless_empty(
    source: Source,
    split: str,
    weights: str | None,
    note: Callable[[str], None] | None,
    states: str | None,
    label: str | None,
) -> Dataset | None:
    try:
        pairs = _load(source, split, weights, note, states, label)
    except UserError as error:
        if "corresponds to no data" in str(error) or "has no rows" in str(
            error
        ):  # what `datasets` says of a Parquet split without rows
            return None
        raise
    return pairs if len(pairs) else None


def check_exists(path: str) -> None:
    """Raises UserError for a path that neither exists nor is a hub name, and for a URL that contains a secret."""
    if Location(path).is_url:
        url = urlsplit(path)
        if url.username or url.password or url.query:
            raise UserError(
                f"dataset {public_url(path)}: its URL contains a password or a query, and is recorded in outputs; "
                "leave that out and give credentials by the environment"
            )
    elif _looks_local(path) and not Path(path).exists():
        raise UserError(f"dataset {path} does not exist; give a folder made by `clair build`, a file, or a hub name")


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or kind_of(Path(path)) is not None


def _repeated_indices(rows: int, weight: float, seed: int) -> list[int]:
    """Row indices, each floor(weight) times, and a random sample of them once more for the fraction of the weight."""
    repeats, fraction = divmod(weight, 1)
    sample = sorted(random.Random(seed).sample(range(rows), round(fraction * rows)))
    return [row for row in range(rows) for _ in range(int(repeats))] + sample
