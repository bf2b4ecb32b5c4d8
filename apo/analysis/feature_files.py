"""Features from a file: embeddings of prompts, answers or images that another program computed.

    .npz       arrays `chosen` and `rejected` [n, D], and optionally `prompt` [n, C], `id` [n] and `encoder`, a text
    .parquet   columns of these names, each value a list of numbers; `encoder` is metadata of the file

Rows with ids are matched with the pairs by id; rows without ids are the pairs in their order. `encoder` names what
computed the embeddings, so that those of two encoders are never mixed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apo.analysis.features import Features
from clair.core.errors import UserError, list_some, near_miss, one_line
from clair.core.files import content_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".npz", ".parquet")
_VECTORS = ("prompt", "chosen", "rejected")
_NAMES = (*_VECTORS, "id", "encoder")
_MAX_IDS = 3


@dataclass(frozen=True)
class _Content:
    """The columns of a file: vectors [n, width] in float32, ids or None, and the name of the encoder or None."""

    vectors: Mapping[str, NDArray[np.float32]]
    ids: Sequence[str] | None
    encoder: str | None


def file_features(path: Path, rows: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> Features:
    """Return the features of pairs from a file, in the order of `rows`.

    A file without prompts gives each the feature [0]; with `prompt`, it is refused. Raises UserError that names file,
    row and column for vectors of different widths, missing or non-finite values, and rows that are not those of the
    pairs.
    """
    import torch

    content = _read(path)
    for name in ("chosen", "rejected", *(["prompt"] if prompt else [])):
        if name not in content.vectors:
            raise UserError(f"features {path} have no column {name!r}; needed: chosen, rejected, and prompt by prompt")
    chosen, rejected = (content.vectors[side] for side in ("chosen", "rejected"))
    if chosen.shape[1] != rejected.shape[1]:
        raise UserError(
            f"features {path}: 'chosen' is {chosen.shape[1]} wide and 'rejected' {rejected.shape[1]}; embed both "
            "answers by the same encoder"
        )
    lengths = {name: len(values) for name, values in content.vectors.items()}
    lengths |= {} if content.ids is None else {"id": len(content.ids)}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {count:,}" for name, count in lengths.items())
        raise UserError(f"features {path}: the columns have different numbers of rows ({counts}); give one row a pair")
    indices = _indices(path, content.ids, len(chosen), rows)
    prompts = content.vectors.get("prompt", np.zeros((len(chosen), 1), np.float32))
    prompt_, chosen_, rejected_ = (torch.from_numpy(values[indices]) for values in (prompts, chosen, rejected))
    identity = content_hash(["feature file", content.encoder, prompts.shape[1], chosen.shape[1]])
    return Features(identity, prompt_, *(chosen_, rejected_) * 3)


def _indices(path: Path, ids: Sequence[str] | None, count: int, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the row of the file of each pair."""
    if ids is None:
        if count != len(rows):
            raise UserError(
                f"features {path} have {count:,} rows and the dataset {len(rows):,} pairs; give one row a pair, in "
                "their order, or a column id"
            )
        return list(range(count))
    by_id: dict[str, int] = {}
    for index, id in enumerate(ids):
        if by_id.setdefault(id, index) != index:
            raise UserError(f"features {path}, row {index + 1}: the id {id!r} stands twice; give each pair one row")
    if missing := [row["id"] for row in rows if row["id"] not in by_id]:
        raise UserError(
            f"features {path} lack {len(missing):,} of {len(rows):,} pairs by their id: {list_some(missing, _MAX_IDS)}"
        )
    return [by_id[row["id"]] for row in rows]


def _read(path: Path) -> _Content:
    if path.suffix not in SUFFIXES:
        raise UserError(f"features {path} is of no kind that is read: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"features {path} does not exist; give a file with one row a pair")
    try:
        return _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"features {path} cannot be read ({one_line(error)}); write it again") from error


def _read_npz(path: Path) -> _Content:
    with np.load(path, allow_pickle=False) as arrays:
        _check_names(path, arrays.files)
        vectors = {name: _vectors(path, name, arrays[name]) for name in _VECTORS if name in arrays.files}
        ids = [str(id) for id in arrays["id"]] if "id" in arrays.files else None
        encoder = str(arrays["encoder"]) if "encoder" in arrays.files else None
    return _Content(vectors, ids, encoder)


def _read_parquet(path: Path) -> _Content:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    _check_names(path, table.column_names)
    vectors = {}
    for name in _VECTORS:
        if name not in table.column_names:
            continue
        column = table.column(name).combine_chunks()
        types = pa.types
        if not (
            types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type)
        ):
            raise UserError(f"features {path}: {name!r} is {column.type}, not lists of numbers")
        widths = pc.fill_null(pc.call_function("list_value_length", [column]), 0).to_numpy(zero_copy_only=False)
        if len(widths) and (different := np.flatnonzero((widths != widths[0]) | (widths == 0))).size:
            row = int(different[0])
            raise UserError(
                f"features {path}, row {row + 1}: {name!r} is {widths[row]} wide, and the first row {widths[0]}; all "
                "rows have one width above 0"
            )
        values = pc.call_function("list_flatten", [column]).to_numpy(zero_copy_only=False)
        vectors[name] = _vectors(path, name, values.reshape(len(column), -1) if len(column) else values)
    ids = [str(id) for id in table.column("id").to_pylist()] if "id" in table.column_names else None
    encoder = (table.schema.metadata or {}).get(b"encoder")
    return _Content(vectors, ids, encoder.decode() if encoder else None)


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raise UserError for a name that nothing reads: it may be a misspelt one."""
    for name in names:
        if name not in _NAMES:
            raise UserError(
                f"features {path}: unknown column {name!r}{near_miss(name, _NAMES)}; allowed: {', '.join(_NAMES)}"
            )


def _vectors(path: Path, name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """Return vectors as float32 [n, width], all numbers finite."""
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in "fiu":
        raise UserError(
            f"features {path}: {name!r} is {values.dtype} of shape {values.shape}; numbers of shape [pairs, width] "
            "needed"
        )
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(values, np.float32)
    if (wrong := np.argwhere(~np.isfinite(vectors))).size:
        row, column = (int(index) for index in wrong[0])
        raise UserError(
            f"features {path}, row {row + 1}: {name!r} has {values[row, column]} in column {column + 1}; leave the "
            "pair out, or embed it again"
        )
    return vectors
