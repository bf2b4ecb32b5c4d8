"""Load preference rows from a source: a file, a folder, a folder of `save_to_disk`, a URL, or a name on the hub.

JSON and CSV files are read here row by row, without Arrow's type inference: a row gets no key that only other rows
have, an id may be a number in one row and text in another, and an error names the line. `datasets` reads all else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError, check_name, error_chain, find_cause
from clair.core.files import file_sha256
from clair.data.comparison_rows import as_pair, is_comparison
from clair.data.message_reader import require_utf8
from clair.data.preferences import (
    CODE,
    ROW,
    TRAITS,
    Preferences,
    check_columns,
    decode,
    encode_row,
    encoded_features,
    read_dataset,
)
from clair.data.row_files import KINDS, TABLES, check_columns_exist, file_rows, is_saved, kind_of, load_split
from clair.data.row_formats import CONSUMED_COLUMNS
from clair.storage.location import Location

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

NAMES = (
    *("prompt", "chosen", "rejected", "completion", "label", "system", "input", "tools", "chat_template_kwargs"),
    *("id", "reasoning", "user", "group", "behaviour", "source"),
)
"""The keys that `columns` may have."""

_CODE = CODE + file_sha256(__file__)
_SCAN_BATCH_SIZE = 1000
_RENAME_ADVICE = "say by `columns` what yours are called"
_NUMBER = re.compile(r"[+-]?(?:0|[1-9][0-9]*)((?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")


def load_preferences(
    path: str | Path,
    split: str = "train",
    *,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
    pairs: bool = False,
    **options: Any,
) -> Preferences:
    """Load the rows of a source, with notes on repairs: pairs, or unpaired rows if it has completions and no chosen.

    `name` selects one of several configurations of a dataset. `columns` maps `NAMES` to the source's names of columns.
    `pairs` refuses unpaired rows. `options` are passed to `datasets.load_dataset`. Raises UserError for a source or
    column that does not exist, and for the first row that cannot be read, with its location.
    """
    columns = dict(columns or {})
    for key in columns:
        check_name("columns: unknown name", key, NAMES)
    path = Location(path)
    location = f"dataset {path.public}"
    try:
        with path.local_copy() as source:
            files = [] if options else _row_files(source, split, name)
            if not files:
                dataset = _rename_columns(_load(source, split, name, options), columns, location)
                return _read(dataset, location, pairs)
            preferences = _read_files(files, str(source), location, columns, pairs)
            return Preferences(preferences.dataset, [*_ignored_files(source, files), *preferences.notes])
    except UserError:
        raise
    except Exception as error:  # an unknown name or split, or no network: report the library's message
        if cause := find_cause(error, UserError):
            raise cause from error
        raise UserError(f"dataset {path.public!r}, split {split!r}: {error_chain(error)}") from error


def split_names(path: str, name: str | None = None) -> list[str]:
    """The names of the splits of a source. A single file is one split, `train`."""
    import datasets

    path = Location(path)
    try:
        with path.local_copy() as source:
            if source.is_file():
                return ["train"]
            if is_saved(source):
                saved = datasets.load_from_disk(str(source))
                return list(map(str, saved)) if isinstance(saved, dict) else ["train"]
            _check_configuration(source, name)
            return list(datasets.get_dataset_split_names(str(source), config_name=name))
    except UserError:
        raise
    except Exception as error:  # an unknown name, or no network: report the library's message
        raise UserError(f"dataset {path.public!r}: {error_chain(error)}") from error


def _check_configuration(folder: Path, name: str | None) -> None:
    """Raise UserError if a dataset has several configurations and none is named, or lacks the named one."""
    import datasets

    if name is None and not folder.is_dir():
        return  # a name on the hub: a check costs a request, and load_dataset reports it too
    names = datasets.get_dataset_config_names(str(folder))
    if name is None and "default" not in names and len(names) > 1:
        raise UserError(f"dataset {folder} has several configurations: {', '.join(names)}; say which by `name:`")
    if name is not None:
        check_name(f"dataset {folder} has no configuration", name, names, "found")


def _row_files(source: Path, split: str, name: str | None) -> list[Path]:
    """The JSON and CSV files of a split; empty if it is stored in another form."""
    import datasets

    if source.is_file() and kind_of(source) is None:
        raise UserError(f"dataset {source} is of no kind that is read: {', '.join(KINDS)}, and text packed as .gz")
    if source.is_file():
        return [source] if kind_of(source) != ".parquet" else []
    if kind_of(source) and not source.exists():
        raise UserError(f"dataset {source} does not exist")
    if not source.is_dir() or is_saved(source):
        return []
    _check_configuration(source, name)
    splits = datasets.load_dataset_builder(str(source), name).config.data_files or {}
    if splits:
        check_name(f"dataset {source} has no split", split, list(map(str, splits)), "found")
    files = [Path(file) for file in splits.get(split, ())]
    return files if all(file.is_file() and kind_of(file) not in (None, ".parquet") for file in files) else []


def _ignored_files(source: Path, files: Sequence[Path]) -> list[str]:
    """A note on files of rows beside `files`: of a folder, `datasets` reads only the most frequent kind of file."""
    kinds, folders = {kind_of(file) for file in files}, {file.parent for file in files}
    others = {file.name for folder in folders for file in folder.iterdir() if kind_of(file) not in {None, *kinds}}
    if not source.is_dir() or not others:
        return []
    kind = ", ".join(sorted(map(str, kinds)))
    return [
        f"{', '.join(sorted(others))} is not read: of a folder one kind of file is, here {kind}; name it as a source"
    ]


def _load(source: Path, split: str, name: str | None, options: Mapping[str, Any]) -> Dataset:
    import datasets

    if source.is_file():
        builder = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}.get(kind_of(source) or "", "json")
        separator = {"sep": "\t"} if kind_of(source) == ".tsv" else {}
        return datasets.load_dataset(builder, data_files=str(source), split="train", **{**separator, **options})
    return load_split(str(source), split, **({"name": name} if name else {}), **options)


def _read(dataset: Dataset, location: str, pairs: bool) -> Preferences:
    if is_comparison(dataset.column_names):
        dataset = dataset.map(
            _located_pair,
            with_indices=True,
            remove_columns=dataset.column_names,
            fn_kwargs={"location": location, "code": _CODE},
        )
    check_columns(dataset.column_names, location, pairs=pairs, change=_RENAME_ADVICE)
    if "rational" in dataset.column_names and "reasoning" not in dataset.column_names:
        dataset = dataset.rename_column("rational", "reasoning")  # the published CLAIR sets
    return read_dataset(dataset, location)


def _located_pair(row: Mapping[str, Any], index: int, location: str, code: str) -> dict[str, Any]:
    """`_pair_of` a row of a dataset. Only the cache of `datasets` reads `code`."""
    return _pair_of(row, f"{location}, row {index}")


def _pair_of(row: Mapping[str, Any], row_location: str) -> dict[str, Any]:
    """The row, a comparison as a pair. Raises UserError with the row's location."""
    try:
        return as_pair(row)
    except UserError as error:
        raise UserError(f"{row_location}: {error}") from error


def _rename_columns(dataset: Dataset, columns: Mapping[str, str], location: str) -> Dataset:
    check_columns_exist(columns, dataset.column_names, location, "columns")
    columns = {name: column for name, column in columns.items() if name != column}
    replaced = [name for name in columns if name in dataset.column_names and name not in columns.values()]
    return dataset.remove_columns(replaced).rename_columns({column: name for name, column in columns.items()})


# ---- JSON and CSV files


def _read_files(
    files: Sequence[Path], path: str, location: str, columns: Mapping[str, str], pairs: bool
) -> Preferences:
    from datasets import Dataset

    names = tuple(map(str, files))
    types, existing = _scan_columns(names, path, location, columns)
    if any(name not in existing for name in columns):
        check_columns_exist(columns, _scan_columns(names, path, location, {})[1], location, "columns")
    check_columns(existing, location, pairs=pairs, change=_RENAME_ADVICE)
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    encoded = Dataset.from_generator(
        _encoded_rows,
        features=encoded_features(_features(types)),
        gen_kwargs={
            "files": names,
            "path": path,
            "location": location,
            "columns": dict(columns),
            "mixed": tuple(name for name, type in types.items() if type is None),
            "typed": {name: str(type) for name, type in types.items() if type},
            "cache_key": json.dumps([state, _CODE]),
        },
    )
    assert isinstance(encoded, Dataset)
    return decode(encoded, location)


def _rows(files: Sequence[str], path: str, location: str, columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """(location, row) of every row, with the columns renamed. `location` replaces `path` in the locations."""
    index = -1
    for file in files:
        kind = kind_of(Path(file))
        for file_location, row in file_rows(Path(file)):
            index += 1
            source, line = file_location.replace(path, location, 1).rsplit(", ", 1)
            row_location = f"{source}, row {index}" + (f" ({line})" if line.startswith("line") else "")
            if not isinstance(row, Mapping):
                raise UserError(
                    f"{row_location}: {type(row).__name__}, not an object with columns; a list of rows is a .json file"
                )
            for name in row:
                require_utf8(str(name), f"{row_location}: the name of a column")
            if kind in TABLES:
                row = {name: value or None for name, value in row.items()}
            renamed = {name: row[column] for name, column in columns.items() if column in row}
            replaced = {*columns, *columns.values()}
            row = {name: value for name, value in row.items() if name not in replaced} | renamed
            if "rational" in row and "reasoning" not in row:
                row["reasoning"] = row.pop("rational")  # the published CLAIR sets
            yield row_location, _pair_of(row, row_location)


def _scan_columns(
    files: Sequence[str], path: str, location: str, columns: Mapping[str, str]
) -> tuple[dict[str, pa.DataType | None], list[str]]:
    """The Arrow types of the copied columns, None if their values have no common type; and the names of all columns."""
    as_text = all(kind_of(Path(file)) in TABLES for file in files)
    types: dict[str, pa.DataType | None] = {}
    names: dict[str, None] = {}
    rows = (row for _, row in _rows(files, path, location, columns))
    while batch := list(islice(rows, _SCAN_BATCH_SIZE)):
        for name in dict.fromkeys(chain.from_iterable(batch)):
            names[name] = None
            if name not in CONSUMED_COLUMNS:
                values = [row.get(name) for row in batch]
                types[name] = _common_type(list(map(_parse_cell, values)) if as_text else values, types.get(name, ...))
    if not names:
        raise UserError(f"{location} has no rows")
    return types, list(names)


def _common_type(values: list[Any], previous: Any) -> pa.DataType | None:
    """The Arrow type of values, unified with the `previous` one (... for none); None if they have no common type."""
    import pyarrow as pa

    if previous is None:
        return None
    try:
        type = pa.array(values).type
        if previous is ...:
            return type
        schemas = [pa.schema([("column", either)]) for either in (previous, type)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("column").type
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def _parse_cell(value: Any) -> Any:
    """The number or truth value in the text of a CSV cell; any other value unchanged."""
    if not isinstance(value, str):
        return value
    if value in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return value.lower() == "true"
    if not (number := _NUMBER.fullmatch(value)):
        return value
    return float(value) if number[1] else int(value)


def _features(types: Mapping[str, pa.DataType | None]) -> dict[str, Any]:
    import pyarrow as pa
    from datasets import Features

    fields = [(name, pa.string() if type is None or pa.types.is_null(type) else type) for name, type in types.items()]
    return dict(Features.from_arrow_schema(pa.schema(fields)))


def _encoded_rows(
    files: Sequence[str],
    path: str,
    location: str,
    columns: Mapping[str, str],
    mixed: Sequence[str],
    typed: Mapping[str, str],
    cache_key: str,
) -> Iterator[dict[str, Any]]:
    """Encoded rows, as `preferences.decode` takes them, with the `mixed` columns as text and the `typed` ones copied.

    `cache_key` is the state of the files and of this code. Only the cache of `datasets` reads it.
    """
    for row_location, row in _rows(files, path, location, columns):
        encoded, traits = encode_row(row, row_location)
        copied = {
            name: row.get(name) if type == "string" else _parse_cell(row.get(name)) for name, type in typed.items()
        }
        copied |= {name: _to_text(row.get(name)) for name in mixed}
        yield {**copied, ROW: encoded, TRAITS: traits}


def _to_text(value: Any) -> str | None:
    """A value as text that UTF-8 can encode: JSON unless it is text."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()
