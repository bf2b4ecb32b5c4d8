"""Read rows from JSONL, JSON, CSV, TSV and Parquet files, and splits of datasets that the library `datasets` loads.

Files are read row by row, so that a large one is never in memory. An error names the file and the row or line.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clair.core.errors import UserError, check_name, one_line
from clair.core.files import content_hash

TABLES = (".csv", ".tsv")
"""The kinds of files whose cells are text; an empty cell is a null."""
_CSV_PROBLEMS = {
    "unexpected end": "a quote opens a cell and none closes it",
    "expected after": "text follows a cell in quotes",
}


def kind_of(path: Path) -> str | None:
    """The suffix of a file that is read row by row, without the `.gz` of a compressed one; None for any other."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in KINDS and (suffix != ".parquet" or path.suffix != ".gz") else None


def file_rows(path: Path, description: str = "file") -> Iterator[tuple[str, Any]]:
    """(location, value) of every row of a file. Raises UserError that names the row or line that cannot be read.

    `description` stands before the path in messages about the file itself.
    """
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{description} {path} is of no kind that is read: {', '.join(KINDS)}, and text packed as .gz")
    if not path.is_file():
        raise UserError(f"{description} {path} does not exist")
    if path.stat().st_size == 0:
        raise UserError(f"{description} {path} is empty; give at least one row")
    try:
        yield from KINDS[kind](path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is no whole .gz file ({one_line(error)}); pack it again") from error


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _decode(line: bytes, location: str, encoding: str = "utf-8") -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_utf8(location, error) from error


def _not_utf8(location: str, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{location}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8")


def number_rows(path: str | Path, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(location, row) of every row, counted from 1."""
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def check_columns_exist(columns: Mapping[str, str], existing: Collection[str], location: str, key: str) -> None:
    """Raise UserError unless each column that the recipe names under `key` is among the existing ones."""
    for name, column in columns.items():
        check_name(f"{key}.{name}: {location} has no column", column, existing, "found")


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """(location, value) of every line that is not blank. Raises UserError for a line that is not JSON."""
    with _open(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            location = f"{path}, line {number}"
            text = _decode(line, location, "utf-8-sig" if number == 1 else "utf-8")
            try:
                yield location, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{location}: not JSON ({error}); mend or remove the line") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        text = _decode(file.read(), str(path), "utf-8-sig")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():  # JSON Lines under another name
            yield from read_jsonl(path)
            return
        raise UserError(f"{path}: not JSON ({error}); mend that place") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} holds {type(rows).__name__}, not a list of rows; use a list, or JSONL")
    yield from number_rows(path, rows)


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 30)
    separator = "\t" if kind_of(path) == ".tsv" else ","
    with _open(path) as file:
        lines = (
            _decode(line, f"{path}, line {number}", "utf-8-sig" if number == 1 else "utf-8")
            for number, line in enumerate(file, 1)
        )
        rows = csv.DictReader(lines, delimiter=separator, strict=True)
        try:
            header = rows.fieldnames or ()
            if twice := next((name for number, name in enumerate(header) if name and name in header[:number]), None):
                raise UserError(f"{path}, line 1: two columns are called {twice!r}; rename one of them")
            for location, row in number_rows(path, rows):
                if None in row:
                    raise UserError(
                        f"{path}, line {rows.line_num} has more cells than the header; put texts with the separator in "
                        f"quotes"
                    )
                yield location, row
        except csv.Error as error:
            problem = next((text for pattern, text in _CSV_PROBLEMS.items() if pattern in str(error)), error)
            raise UserError(
                f"{path}, line {rows.line_num + 1}: not CSV ({problem}); put a cell that has quotes in quotes, and "
                "write those within it twice"
            ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    number = 0
    try:
        for number, row in enumerate(parquet_rows(path, 1000, keep_nulls=False), 1):
            yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not of Arrow
            raise
        location = f"{path}, after row {number}" if number else path
        raise UserError(
            f"{location}: not Parquet ({one_line(error)}); write the file again, or copy it from where it came"
        ) from error


KINDS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def parquet_rows(path: Path, batch_size: int, *, keep_nulls: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, `batch_size` in memory at a time; pyarrow's default buffers whole files.

    `keep_nulls` keeps the nulls that Arrow adds to structs.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 14) as file:
        json_columns = [field.name for field in file.schema_arrow if is_json_list(field.type)]
        first = 1
        for batch in file.iter_batches(batch_size=batch_size):
            for row in _batch_rows(batch, path, first):
                row = row if keep_nulls else {name: drop_nulls(value) for name, value in row.items()}
                yield row | {
                    name: [json.loads(text) for text in row[name]] for name in json_columns if row[name] is not None
                }
            first += len(batch)


def _batch_rows(batch: Any, path: Path, first: int) -> list[dict[str, Any]]:
    """The rows of an Arrow batch, numbered from `first`. Raises UserError for a cell that Python cannot hold."""
    try:
        return batch.to_pylist()
    except (UnicodeDecodeError, OverflowError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, cell in enumerate(column, first):
                location = f"{path}, row {number}, column {name!r}"
                try:
                    cell.as_py()
                except UnicodeDecodeError as error:
                    raise _not_utf8(location, error) from error
                except OverflowError as error:
                    raise UserError(f"{location}: {one_line(error)}; store the value as text") from error
        raise


def is_json_list(type: Any) -> bool:
    """True if an Arrow type is a list of JSON values."""
    import pyarrow as pa

    return pa.types.is_list(type) and isinstance(type.value_type, pa.JsonType)


def drop_nulls(value: Any) -> Any:
    """A value of Arrow without the nulls that Arrow added to its structs."""
    if isinstance(value, Mapping):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def is_saved(folder: Path) -> bool:
    """True for a folder that `save_to_disk` wrote."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_split(path: str, split: str, **options: Any) -> Any:
    """Load a split of a folder of `save_to_disk`, or of what `datasets.load_dataset` reads, never from a stale cache.

    The library caches a local folder that has a card under the folder's bare name and the hash of the card. A rebuilt
    folder, or another one of the same name, would therefore yield the old rows. So the state of its data files is made
    part of the cache key.
    """
    import datasets

    folder = Path(path)
    if is_saved(folder):
        saved = datasets.load_from_disk(path)
        if not isinstance(saved, dict):
            return saved
        check_name(f"dataset {path} has no split", split, list(map(str, saved)), "found")
        return saved[split]
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
        state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        options = {"description": content_hash(state), **options}
    return datasets.load_dataset(path, split=split, **options)
