"""Preference rows from where they lie: a file, a folder, a folder of `save_to_disk`, a URL or a name on the hub.

JSON and CSV files are read here, row by row, and never by Arrow's guess: a key that only some rows have is in no other
row, an id may be a number here and text there, and an error names the line. All else is read by `datasets`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError, near_miss, words_of
from clair.core.files import file_sha256
from clair.data.preferences import (
    CODE,
    FOUND,
    READ,
    ROW,
    Preferences,
    check_columns,
    checked,
    decode,
    encode_row,
    encoded_features,
    read_dataset,
)
from clair.data.prompt_sources import KINDS, file_rows, is_saved, kind_of, load_split
from clair.storage.object_store import public_path, read_here

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

NAMES = (
    *("prompt", "chosen", "rejected", "completion", "label", "system", "input", "tools", "chat_template_kwargs"),
    *("id", "reasoning", "user", "group", "behaviour", "source"),
)
"""The names that columns of a source may be given."""

_CODE = CODE + file_sha256(__file__)
_SCANNED = 1000
_NAMED = "say by `columns` what yours are called"
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
    """The rows of a source as preferences.py reads them: pairs, or unpaired rows where there are completions and no
    chosen. With them comes what was repaired.

    `name` is a configuration of a data set with several; `columns` says what columns are called where not as `NAMES`
    has them; `pairs` refuses unpaired rows; `options` go to `datasets.load_dataset`. Raises UserError for a source or
    column that is not there, and for the first row that cannot be read, with where it stands.
    """
    columns = dict(columns or {})
    if unknown := next((key for key in columns if key not in NAMES), None):
        allowed = ", ".join(NAMES)
        raise UserError(f"columns: unknown name {unknown!r}{near_miss(unknown, NAMES)}; allowed: {allowed}")
    where = f"dataset {public_path(str(path))}"
    try:
        with read_here(str(path)) as here:
            files = [] if options else _files(here, split, name)
            if not files:
                return _read(_renamed(_loaded(here, split, name, options), columns, where), where, pairs)
            read = _read_files(files, str(here), where, columns, pairs)
            return Preferences(read.dataset, [*_left_out(here, files), *read.notes])
    except UserError:
        raise
    except Exception as error:  # a name that is not there, no network, no such split: told with the library's words
        if words := _user_error(error):
            raise words from error
        raise UserError(f"dataset {public_path(str(path))!r}, split {split!r}: {words_of(error)}") from error


def split_names(path: str, name: str | None = None) -> list[str]:
    """The splits of a source. A single file is one split, `train`."""
    import datasets

    try:
        with read_here(path) as here:
            if here.is_file():
                return ["train"]
            if is_saved(here):
                saved = datasets.load_from_disk(str(here))
                return list(saved) if isinstance(saved, dict) else ["train"]
            _check_configuration(here, name)
            return list(datasets.get_dataset_split_names(str(here), config_name=name))
    except UserError:
        raise
    except Exception as error:  # a name that is not there, no network: told with the library's words
        raise UserError(f"dataset {public_path(path)!r}: {words_of(error)}") from error


def _check_configuration(folder: Path, name: str | None) -> None:
    """Raises UserError where a data set has several configurations and none is named, or one that it has not."""
    import datasets

    if name is None and not folder.is_dir():
        return  # a hub name: asking costs a request, and load_dataset says it too
    names = datasets.get_dataset_config_names(str(folder))
    if name is None and "default" not in names and len(names) > 1:
        raise UserError(f"dataset {folder} has several configurations: {', '.join(names)}; say which by `name:`")
    if name is not None and name not in names:
        found = ", ".join(names)
        raise UserError(f"dataset {folder} has no configuration {name!r}{near_miss(name, names)}; found: {found}")


def _files(here: Path, split: str, name: str | None) -> list[Path]:
    """The JSON and CSV files that hold a split; none where it is held otherwise."""
    import datasets

    if here.is_file() and kind_of(here) is None:
        raise UserError(f"dataset {here} is of no kind that is read: {', '.join(KINDS)}, and text packed as .gz")
    if here.is_file():
        return [here] if kind_of(here) != ".parquet" else []
    if kind_of(here) and not here.exists():
        raise UserError(f"dataset {here} does not exist")
    if not here.is_dir() or is_saved(here):
        return []
    _check_configuration(here, name)
    found = datasets.load_dataset_builder(str(here), name).config.data_files or {}
    if split not in found:
        if found:
            names = ", ".join(map(str, found))
            raise UserError(f"dataset {here} has no split {split!r}; found: {names}")
        return []
    files = [Path(file) for file in found[split]]
    return files if all(file.is_file() and kind_of(file) not in (None, ".parquet") for file in files) else []


def _left_out(here: Path, files: Sequence[Path]) -> list[str]:
    """What to tell of files beside `files` that hold rows too: `datasets` reads one kind of them, the most frequent."""
    kinds, folders = {kind_of(file) for file in files}, {file.parent for file in files}
    others = {file.name for folder in folders for file in folder.iterdir() if kind_of(file) not in {None, *kinds}}
    if not here.is_dir() or not others:
        return []
    read = ", ".join(sorted(map(str, kinds)))
    return [
        f"{', '.join(sorted(others))} is not read: of a folder one kind of file is, here {read}; name it as a source"
    ]


def _loaded(here: Path, split: str, name: str | None, options: Mapping[str, Any]) -> Dataset:
    import datasets

    if here.is_file():
        builder = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}.get(kind_of(here) or "", "json")
        separator = {"sep": "\t"} if kind_of(here) == ".tsv" else {}
        return datasets.load_dataset(builder, data_files=str(here), split="train", **{**separator, **options})
    return load_split(str(here), split, **({"name": name} if name else {}), **options)


def _read(dataset: Dataset, where: str, pairs: bool) -> Preferences:
    check_columns(dataset.column_names, where, pairs=pairs, change=_NAMED)
    if "rational" in dataset.column_names and "reasoning" not in dataset.column_names:
        dataset = dataset.rename_column("rational", "reasoning")  # the published CLAIR sets
    return read_dataset(dataset, where)


def _renamed(dataset: Dataset, columns: Mapping[str, str], where: str) -> Dataset:
    _check_named(columns, dataset.column_names, where)
    columns = {name: column for name, column in columns.items() if name != column}
    taken = [name for name in columns if name in dataset.column_names and name not in columns.values()]
    dataset = dataset.remove_columns(taken)
    return dataset.rename_columns({column: name for name, column in columns.items()})


def _check_named(columns: Mapping[str, str], found: Sequence[str], where: str) -> None:
    for name, column in columns.items():
        if column not in found:
            near, names = near_miss(column, found), ", ".join(found) or "none"
            raise UserError(f"columns.{name}: {where} has no column {column!r}{near}; found: {names}")


# ---- JSON and CSV files


def _read_files(files: Sequence[Path], path: str, where: str, columns: Mapping[str, str], pairs: bool) -> Preferences:
    from datasets import Dataset

    arguments = {"files": tuple(map(str, files)), "path": path, "where": where, "columns": dict(columns)}
    types, found = _scan(**arguments)
    if any(name not in found for name in columns):
        _check_named(columns, _scan(**{**arguments, "columns": {}})[1], where)
    check_columns(found, where, pairs=pairs, change=_NAMED)
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    texts = tuple(name for name, type in types.items() if type is None)
    encoded = Dataset.from_generator(
        _encoded_rows, features=encoded_features(_features(types)),
        gen_kwargs={**arguments, "texts": texts, "others": {name: str(type) for name, type in types.items() if type},
                    "key": json.dumps([state, _CODE])},
    )  # fmt: skip
    return decode(encoded, where)


def _rows(files: Sequence[str], path: str, where: str, columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of every row, with the columns' names in place."""
    index = -1
    for file in files:
        kind = kind_of(Path(file))
        for stands, row in file_rows(Path(file)):
            index += 1
            named, line = stands.replace(path, where, 1).rsplit(", ", 1)
            place = f"{named}, row {index}" + (f" ({line})" if line.startswith("line") else "")
            if not isinstance(row, Mapping):
                raise UserError(
                    f"{place}: {type(row).__name__}, not an object with columns; a list of rows is a .json file"
                )
            for name in row:
                checked(str(name), f"{place}: the name of a column")
            if kind in (".csv", ".tsv"):
                if None in row:
                    raise UserError(f"{place} has more cells than the header; put texts with the separator in quotes")
                row = {name: value or None for name, value in row.items()}
            renamed = {name: row[column] for name, column in columns.items() if column in row}
            gone = {*columns, *columns.values()}
            row = {name: value for name, value in row.items() if name not in gone} | renamed
            if "rational" in row and "reasoning" not in row:
                row["reasoning"] = row.pop("rational")  # the published CLAIR sets
            yield place, row


def _scan(
    files: Sequence[str], path: str, where: str, columns: Mapping[str, str]
) -> tuple[dict[str, pa.DataType | None], list[str]]:
    """The Arrow types of the columns that are handed on as they are, None for those whose values have none in common;
    and the names of all columns."""
    as_text = all(kind_of(Path(file)) in (".csv", ".tsv") for file in files)
    types: dict[str, pa.DataType | None] = {}
    found: dict[str, None] = {}
    rows = (row for _, row in _rows(files, path, where, columns))
    while batch := list(islice(rows, _SCANNED)):
        for name in dict.fromkeys(chain.from_iterable(batch)):
            found[name] = None
            if name not in READ:
                values = [row.get(name) for row in batch]
                types[name] = _type_of(list(map(_cell, values)) if as_text else values, types.get(name, ...))
    if not found:
        raise UserError(f"{where} has no rows")
    return types, list(found)


def _type_of(values: list[Any], before: Any) -> pa.DataType | None:
    """The Arrow type of values, and of those before; None where they have none in common."""
    import pyarrow as pa

    if before is None:
        return None
    try:
        type = pa.array(values).type
        if before is ...:
            return type
        fields = [pa.schema([("column", one)]) for one in (before, type)]
        return pa.unify_schemas(fields, promote_options="permissive").field("column").type
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def _cell(value: Any) -> Any:
    """The number or truth value that the text of a CSV cell writes; any other value as it is."""
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

    known = [(name, pa.string() if type is None or pa.types.is_null(type) else type) for name, type in types.items()]
    return dict(Features.from_arrow_schema(pa.schema(known)))


def _encoded_rows(
    files: Sequence[str], path: str, where: str, columns: Mapping[str, str], texts: Sequence[str],
    others: Mapping[str, str], key: str,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows as `preferences.decode` takes them: the columns `texts` as text, the `others` of their types.

    `key` is what the files and this code are now, for the cache alone.
    """
    for place, row in _rows(files, path, where, columns):
        encoded, found = encode_row(row, place)
        kept = {name: _cell(row.get(name)) if type != "string" else row.get(name) for name, type in others.items()}
        kept |= {name: _text(row.get(name)) for name in texts}
        yield {**kept, ROW: encoded, FOUND: found}


def _text(value: Any) -> str | None:
    """A value as text, which UTF-8 can hold: JSON where it is none."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def _user_error(error: BaseException | None) -> UserError | None:
    """The UserError that a library's error came from, as `datasets` hides it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
