"""Prompt sources: JSONL, JSON, CSV and Parquet files, and whatever `datasets.load_dataset` reads, row by row.

The whole source is read once before any work, so that a broken row is an error with its number at the start and not
after an hour of spending. Of each row 17 bytes stay in memory, and about 65 while repeated rows are searched.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from clair.core.errors import UserError, check_name, error_chain
from clair.core.files import content_hash
from clair.core.recipe import Recipe
from clair.data.deduplication import BenchmarkQuestions, NearDuplicates, repeated_keys
from clair.data.prompt_rows import read_prompt
from clair.data.records import LABELS, Prompt, task_text
from clair.data.row_files import TABLES, check_columns_exist, drop_nulls, file_rows, kind_of, load_split, number_rows
from clair.storage.location import Location

_COLUMNS = ("prompt", "answer", "id", "answers", "scores", "tools", *LABELS)
"""The columns that are read unless the recipe says otherwise."""


class PromptSource(Recipe):
    """`prompts:` of a data recipe."""

    path: Location
    """A .jsonl, .ndjson, .json, .csv, .tsv or .parquet file (text also as .gz) or a dataset that clair built, here or
    at a URL that fsspec reads (s3://...), a folder `datasets.load_dataset` reads, or a dataset name on the hub."""
    split: str = "train"
    """The split, if `path` is a folder or a name."""
    columns: Mapping[str, str | None] = {}
    """The source's names of columns, if they are not prompt, answer, id, answers, scores, tools, user, group, behaviour
    and source: {prompt: instruction}. `stronger`, a stronger model's answers, and `reference`, what a checker compares
    with, are read only if they are named here. A column named here is not read under its own name too; null leaves one
    unread."""
    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    """Leave out prompts that share at least this much of their 5-word runs with an earlier one. Off by default, because
    it compares words alone, and tasks made from a template differ in few."""
    not_in: Location | None = None
    """A prompt file (a benchmark's questions). Prompts that share 13 words in a row with it are left out."""


@dataclass(frozen=True, slots=True)
class Scan:
    """Counts over a whole source, its hash, and its repeated rows."""

    rows: int
    held: int
    """Rows that the caller of `scan` holds; all rows by default."""
    unique: int
    answered: int
    """Different prompts with a ready answer."""
    compared: int
    """Different prompts with several ready answers."""
    scored: int
    """Different prompts whose answers have scores."""
    preferred: int
    """Different prompts with a stronger model's ready answer."""
    sha256: str
    tools: bool = False
    """True if any row has tools, or turns with more than role and content."""
    json_messages: int = 0
    """Rows whose messages were JSON text."""
    repeated: bytes = field(default=b"", repr=False)
    """A bit per row, set if an earlier row is equal; empty if no row is."""

    def repeats(self, row: int) -> bool:
        """True if a row, counted from 0, is equal to an earlier one."""
        return row >> 3 < len(self.repeated) and bool(self.repeated[row >> 3] >> (row & 7) & 1)


def scan(source: PromptSource, limit: int | None = None, holds: Callable[[str], bool] = lambda _: True) -> Scan:
    """Read every row once. `holds` says of the id of a row whether it counts as held.

    Raises UserError, with the number of the row, for the first row that cannot be used, and if one id stands for two
    different prompts.
    """
    import numpy as np

    digest, similarity, held, tools, json_messages = hashlib.sha256(), _similarity_check(source), 0, False, 0
    # Keys are 8 bytes of each hash: the odds of a collision among 10^6 are 3 in 10^8.
    contents, ids, flags = array("Q"), array("Q"), bytearray()
    for prompt in read_prompts(source, limit):
        content = prompt.content_id
        digest.update(_digest_line(prompt, content))
        held += holds(prompt.id)
        tools |= not prompt.plain
        json_messages += prompt.from_json
        is_unlike = similarity(prompt) is None
        has = (True, prompt.answer is not None, bool(prompt.answers), bool(prompt.scores), prompt.stronger is not None)
        flags.append(sum((is_unlike and flag) << bit for bit, flag in enumerate(has)))
        contents.append(int(content, 16))
        ids.append(contents[-1] if prompt.id == content else int(content_hash(prompt.id)[:16], 16))
    if not flags:
        raise UserError(f"{source.path.public} has no rows; give at least one prompt")
    repeated = repeated_keys(np.frombuffer(contents, np.uint64))
    first_rows = np.flatnonzero(~repeated)
    collisions = first_rows[repeated_keys(np.frombuffer(ids, np.uint64)[first_rows])]
    if len(collisions):
        collision = int(collisions[0])
        id = next(islice(read_prompts(source, limit), collision, None)).id
        raise UserError(f"{source.path.public}, row {collision + 1}: the id {id!r} stands for two different prompts")
    first_flags = np.frombuffer(flags, np.uint8)[first_rows]
    unique, answered, compared, scored, preferred = (int((first_flags >> bit & 1).sum()) for bit in range(5))
    bits = np.packbits(repeated, bitorder="little").tobytes() if repeated.any() else b""
    counts = len(flags), held, unique, answered, compared, scored, preferred
    return Scan(*counts, digest.hexdigest(), tools, json_messages, bits)


def _digest_line(prompt: Prompt, content: str) -> bytes:
    """The bytes that a prompt adds to the hash over all prompts; `content` is its `content_id`."""
    labels = f"\0{content_hash(dict(prompt.labels))}" if prompt.labels else ""
    return f"{prompt.id}\0{content}{labels}\n".encode()


def each_prompt(
    source: PromptSource, limit: int | None = None, scanned: Scan | None = None
) -> Iterator[tuple[Prompt, str | None]]:
    """Every prompt and the reason that leaves it out: `duplicate`, `near_duplicate`, `in_benchmark`, or None.

    `scanned` is the result of `scan`, if the caller has it. Raises UserError as `scan` does, and at the end if the
    prompts are no longer those that were scanned.
    """
    scanned, similarity, digest = scanned or scan(source, limit), _similarity_check(source), hashlib.sha256()
    for row, prompt in enumerate(read_prompts(source, limit)):
        digest.update(_digest_line(prompt, prompt.content_id))
        yield prompt, "duplicate" if scanned.repeats(row) else similarity(prompt)
    if digest.hexdigest() != scanned.sha256:
        raise UserError(
            f"{source.path.public} was changed during the run; what came of it is not written, every reply is "
            f"kept: run the same command again, and leave the file alone until it ends"
        )


def _similarity_check(source: PromptSource) -> Callable[[Prompt], str | None]:
    """A function that gives the reason to leave out a prompt which is similar to a benchmark's or to an earlier one.

    It is called with one prompt after another. It may be called with repeated prompts or not, because it remembers only
    prompts that are similar to no other.
    """
    near = NearDuplicates(source.near_duplicates) if source.near_duplicates else None
    questions = read_prompts(PromptSource(path=source.not_in)) if source.not_in else ()
    benchmark = BenchmarkQuestions(task_text(question.messages) for question in questions) if source.not_in else None

    def check(prompt: Prompt) -> str | None:
        text = task_text(prompt.messages) if near or benchmark else ""
        if benchmark and benchmark.overlaps(text):
            return "in_benchmark"
        return "near_duplicate" if near and near.is_duplicate(text) else None

    return check


def read_prompts(source: PromptSource, limit: int | None = None) -> Iterator[Prompt]:
    """The rows of the source as prompts, in order. Raises UserError with the number of a row that cannot be used.

    Raises UserError at the end if none of the rows has a column that the recipe names.
    """
    names = _column_names(source)
    named = {name: names[name] for name in source.columns if name in names}
    missing, existing = set(named.values()), dict[str, None]()
    for location, row in islice(_rows(source, names["prompt"]), limit):
        yield read_prompt(row, names, location)
        if missing:
            existing |= dict.fromkeys(row)
            missing -= existing.keys()
    if missing and existing:
        first_rows = f" (first {limit} rows)" if limit else ""
        check_columns_exist(named, existing, source.path.public + first_rows, "prompts.columns")


def _column_names(source: PromptSource) -> dict[str, str]:
    """The source's name of each column that is read. A column that the recipe maps is read under that name only."""
    for key in source.columns:
        check_name("prompts.columns: unknown name", key, (*_COLUMNS, "stronger", "reference"))
    mapped = set(source.columns.values())
    defaults = _COLUMNS if "answers" in source.columns else (*_COLUMNS, "completions")
    names = {name: name for name in defaults if name not in mapped} | dict(source.columns)
    if names.get("prompt") is None:
        raise UserError("prompts.columns leaves no column for the prompt; name it, such as {prompt: instruction}")
    return {name: column for name, column in names.items() if column is not None}


def _rows(source: PromptSource, prompt_column: str) -> Iterator[tuple[str, Any]]:
    """(location, row) of every row. An empty cell of a table is a null, but that of the prompt, which is required."""
    with source.path.local_copy() as path:
        if kind_of(path) is None and not path.is_file():
            yield from _dataset_rows(source, str(path))
            return
        name, is_table = source.path.public, kind_of(path) in TABLES
        for location, row in file_rows(path, "prompt file"):
            if is_table:
                row = {column: cell or ("" if column == prompt_column else None) for column, cell in row.items()}
            yield location.replace(str(path), name, 1), row


def _dataset_rows(source: PromptSource, path: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = load_split(path, source.split)
        is_json = {name: "Json(" in str(feature) for name, feature in rows.features.items()}
        values = ({name: value if is_json[name] else drop_nulls(value) for name, value in row.items()} for row in rows)
        yield from number_rows(Path(source.path), values)
    except UserError:
        raise
    except Exception as error:  # an unknown name or split, no network, or text not in UTF-8: report its message
        problem = "" if Path(path).exists() else "no such file, and "
        raise UserError(f"prompts {source.path!r}: {problem}load_dataset says: {error_chain(error)}") from error
