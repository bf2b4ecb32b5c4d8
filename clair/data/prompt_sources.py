"""Prompt sources: JSONL, JSON, CSV and Parquet files, and whatever `datasets.load_dataset` reads, row by row.

The whole source is read once before any work, so that a broken row is an error with its number at the start and not
after an hour of spending. A million rows are never in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from clair.core.errors import UserError, error_chain, near_miss
from clair.core.files import content_hash
from clair.core.recipe import Recipe
from clair.data.deduplication import Benchmark, NearDuplicates, RepeatedKeys
from clair.data.prompt_rows import read_prompt
from clair.data.records import LABELS, Prompt, task_text
from clair.data.row_files import drop_nulls, file_rows, kind_of, load_split, number_rows
from clair.storage.location import Location


class PromptSource(Recipe):
    """`prompts:` of a data recipe."""

    path: Location
    """A .jsonl, .ndjson, .json, .csv, .tsv or .parquet file (text also as .gz) or a dataset that clair built, here or
    at a URL that fsspec reads (s3://...), a folder `datasets.load_dataset` reads, or a dataset name on the hub."""
    split: str = "train"
    """The split, if `path` is a folder or a name."""
    columns: Mapping[str, str] = {}
    """The source's names of columns, if they are not prompt, answer, id, answers, scores, tools, user, group, behaviour
    and source: {prompt: instruction}. `stronger`, a stronger model's answers, is read only if it is named here."""
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
    with closing(RepeatedKeys()) as contents, closing(RepeatedKeys()) as ids:
        return _scan(source, limit, holds, contents, ids)


def _scan(
    source: PromptSource, limit: int | None, holds: Callable[[str], bool], contents: RepeatedKeys, ids: RepeatedKeys
) -> Scan:
    import numpy as np

    digest, similarity, held, tools = _PromptDigest(), _similarity_check(source), 0, False
    # Keys are 8 bytes of each hash: the odds of a collision among 10^6 are 3 in 10^8.
    counts, row = [0] * 5, -1  # the counts of unique, answered, compared, scored and preferred
    for row, prompt in enumerate(read_prompts(source, limit)):
        content = digest.add(prompt)
        held += holds(prompt.id)
        tools |= not prompt.plain
        unique = similarity(prompt) is None
        has = (True, prompt.answer is not None, bool(prompt.answers), bool(prompt.scores), prompt.stronger is not None)
        flags = [unique and flag for flag in has]
        counts = [count + flag for count, flag in zip(counts, flags, strict=True)]
        contents.add(int(content, 16), row << 5 | sum(flag << bit for bit, flag in enumerate(flags)))
        if prompt.id != content:
            ids.add(int(content_hash(prompt.id)[:16], 16), row)
    if row < 0:
        raise UserError(f"{source.path} has no rows; give at least one prompt")
    repeated = np.zeros(row // 8 + 1, dtype=np.uint8)
    for values in contents.repeated():
        counts = [count - int((values >> bit & 1).sum()) for bit, count in enumerate(counts)]
        np.bitwise_or.at(repeated, values >> 8, np.uint8(1) << (values >> 5 & 7).astype(np.uint8))
    collisions = ids.repeated(lambda rows: repeated[rows >> 3] >> (rows & 7).astype(np.uint8) & 1 == 0)
    if collision := min((int(rows.min()) for rows in collisions if len(rows)), default=None):
        id = next(islice(read_prompts(source, limit), collision, None)).id
        raise UserError(f"{source.path.public}, row {collision + 1}: the id {id!r} stands for two different prompts")
    unique, answered, compared, scored, preferred = counts
    bits = repeated.tobytes() if repeated.any() else b""
    return Scan(row + 1, held, unique, answered, compared, scored, preferred, digest.hexdigest(), tools, bits)


class _PromptDigest:
    """A hash over the ids and contents of all prompts, in order."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, prompt: Prompt) -> str:
        """Add a prompt. Returns its `content_id`."""
        content = prompt.content_id
        labels = f"\0{content_hash(dict(prompt.labels))}" if prompt.labels else ""
        self._sha256.update(f"{prompt.id}\0{content}{labels}\n".encode())
        return content

    def hexdigest(self) -> str:
        """The hash of the prompts added."""
        return self._sha256.hexdigest()


def each_prompt(
    source: PromptSource, limit: int | None = None, scanned: Scan | None = None
) -> Iterator[tuple[Prompt, str | None]]:
    """Every prompt and the reason that leaves it out: `duplicate`, `near_duplicate`, `in_benchmark`, or None.

    `scanned` is the result of `scan`, if the caller has it. Raises UserError as `scan` does, and at the end if the
    prompts are no longer those that were scanned.
    """
    scanned, similarity, digest = scanned or scan(source, limit), _similarity_check(source), _PromptDigest()
    for row, prompt in enumerate(read_prompts(source, limit)):
        digest.add(prompt)
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
    benchmark = _benchmark(source.not_in) if source.not_in else None

    def check(prompt: Prompt) -> str | None:
        text = task_text(prompt.messages) if near or benchmark else ""
        if benchmark and benchmark.overlaps(text):
            return "in_benchmark"
        return "near_duplicate" if near and near.is_duplicate(text) else None

    return check


def _benchmark(path: Location) -> Benchmark:
    return Benchmark(task_text(prompt.messages) for prompt in read_prompts(PromptSource(path=path)))


def read_prompts(source: PromptSource, limit: int | None = None) -> Iterator[Prompt]:
    """The rows of the source as prompts, in order. Raises UserError with the number of a row that cannot be used."""
    names = {name: name for name in ("prompt", "answer", "id", "answers", "scores", "tools", *LABELS)}
    allowed = (*names, "stronger")
    for key in source.columns:
        if key not in allowed:
            raise UserError(
                f"prompts.columns: unknown name {key!r}{near_miss(key, allowed)}; allowed: {', '.join(allowed)}"
            )
    names |= source.columns
    for location, row in islice(_rows(source), limit):
        yield read_prompt(row, names, location)


def _rows(source: PromptSource) -> Iterator[tuple[str, Any]]:
    """(location, row) of every row."""
    with source.path.local_copy() as path:
        if kind_of(path) is None and not path.is_file():
            yield from _dataset_rows(source, str(path))
            return
        name = source.path.public
        for location, row in file_rows(path, "prompt file"):
            yield location.replace(str(path), name, 1), row


def _dataset_rows(source: PromptSource, path: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = load_split(path, source.split)
        is_json = {name: "Json(" in str(feature) for name, feature in rows.features.items()}
    except UserError:
        raise
    except Exception as error:  # an unknown name or split, or no network: report the library's message
        problem = "" if Path(path).exists() else "no such file, and "
        raise UserError(f"prompts {source.path!r}: {problem}load_dataset says: {error_chain(error)}") from error
    values = ({name: value if is_json[name] else drop_nulls(value) for name, value in row.items()} for row in rows)
    yield from number_rows(Path(source.path), values)
