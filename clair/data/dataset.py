"""Write and read dataset folders: Parquet splits, dropped.jsonl, manifest, card.

    data/train-00000-of-00001.parquet, data/test-00000-of-00001.parquet     the pairs
    dropped.jsonl     every prompt without a pair, with stage and reason
    manifest.json     provenance: counts, models, sampling, recipe, versions
    README.md         the dataset card
    ledger.sqlite     every call, so that nothing is paid for twice

`datasets.load_dataset(folder)` and TRL read such a folder directly. See docs/format.md.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

from clair.core.files import content_hash, file_sha256, publish, read_json
from clair.data.contrast import Contrast
from clair.data.preference_sources import load_preferences
from clair.data.records import LABELS, Dropped
from clair.data.row_files import is_json_list, parquet_rows
from clair.storage.location import Location, report_as

SPLITS = ("train", "test")
CONTRAST = Contrast._fields
ROWS_PER_GROUP = 5000
"""Rows per Parquet row group. A writer holds 18 kB of metadata per group until the file ends."""


def schema(*, tools: bool = False, calls: bool = False, template_options: Mapping[str, Any] | None = None) -> Any:
    """The Arrow schema of a pair.

    `tools` is for prompts with tools, or turns with more than role and content; `calls` for answers that call tools or
    have thoughts; `template_options` for a column of variables of the chat template. Such turns, and the tools, are
    JSON values, because Arrow's structs would give each the keys of all others as nulls.
    """
    import pyarrow as pa

    values = pa.list_(pa.json_())
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    answer = values if calls else messages
    return pa.schema(
        [
            ("id", pa.string()),
            ("prompt", values if tools else messages),
            ("chosen", answer),
            ("rejected", answer),
            ("reasoning", pa.string()),
            ("models", pa.struct([("chosen", pa.string()), ("rejected", pa.string())])),
            ("contrast", pa.struct([(name, pa.float64()) for name in CONTRAST])),
            ("score_chosen", pa.float64()),
            ("score_rejected", pa.float64()),
            *((name, pa.string()) for name in LABELS),
            *([("tools", values)] if tools else []),
            *([("chat_template_kwargs", pa.array([template_options]).type)] if template_options else []),
        ]
    )


def _prepare_conversion() -> None:
    """Let pyarrow import pandas, as it does at its first conversion: 0.25 s, while the first replies are awaited."""
    import pyarrow as pa

    pa.array([])


def to_table(rows: Sequence[Mapping[str, Any]], schema: Any) -> Any:
    """Rows of the dataset as an Arrow table with the given schema."""
    import pyarrow as pa

    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if is_json_list(field.type):
            texts = [None if v is None else [json.dumps(inner, ensure_ascii=False) for inner in v] for v in values]
            lists = pa.array(texts, pa.list_(pa.string()))
            inner = pa.ExtensionArray.from_storage(pa.json_(), lists.flatten())
            columns.append(pa.ListArray.from_arrays(lists.offsets, inner, type=field.type, mask=lists.is_null()))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def assign_split(id: str, seed: int, test_fraction: float) -> str:
    """`test` for a `test_fraction` of all ids, else `train`. By hash: an id has the same split in every build."""
    return "test" if int(content_hash([seed, id])[:13], 16) / 16**13 < test_fraction else "train"


def split_file(split: str) -> str:
    """The path of a split inside the folder."""
    return f"data/{split}-00000-of-00001.parquet"


# ---- the order file of a shard: 4 * index + kind of each row, where the index counts the prompts of all shards

ORDER = "order.bin"
KINDS = ("train", "test", "dropped")
_ORDER_BLOCK_BYTES = 8 * 4096


def read_order(folder: Path) -> Iterator[tuple[int, str]]:
    """(index among all prompts, kind) of each row of a shard, in order. The kind is one of `KINDS`."""
    with open(folder / ORDER, "rb") as file:
        while block := file.read(_ORDER_BLOCK_BYTES):
            for offset in range(0, len(block), 8):
                number = int.from_bytes(block[offset : offset + 8], "little")
                yield number // 4, KINDS[number % 4]


class DatasetWriter:
    """Writes pairs and drops to temporary files, and moves all of them to their final names at the end.

    Equal pairs in equal order give equal bytes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        test_fraction: float,
        order: bool = False,
        tools: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the temporary files in `folder`.

        `order` also writes the order file of a shard, of the `index` among all prompts that each row is added with.
        `tools` allows turns with more than role and content. `template_options` are the chat template's variables, a
        column of every pair.
        """
        self.template_options = template_options
        self.tools, self.calls = tools, False
        self.folder = folder
        self.seed = seed
        self.test_fraction = test_fraction
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.failed = 0
        self.sums: Counter[str] = Counter()
        Thread(target=_prepare_conversion).start()
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob(".*.tmp"), *(folder / "data").glob(".*.tmp")):  # of a run that was killed
            leftover.unlink()
        self.waiting = 0
        """Finished rows that wait for an earlier row, because rows are written in order."""
        self._rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        names = (*map(split_file, SPLITS), "dropped.jsonl", *((ORDER,) if order else ()))
        self._files = {name: self._temporary(name) for name in names}
        self._parquet = {split: self._open_parquet(split) for split in SPLITS}
        self._dropped = open(self._files["dropped.jsonl"], "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._order = open(self._files[ORDER], "wb") if order else None  # noqa: SIM115 (closed by close)

    def _open_parquet(self, split: str) -> Any:
        import pyarrow.parquet as pq

        self._schema = schema(tools=self.tools, calls=self.calls, template_options=self.template_options)
        return pq.ParquetWriter(self._files[split_file(split)], self._schema, compression="zstd")

    def _rewrite(self, split: str, is_kept: Callable[[Mapping[str, Any]], bool]) -> None:
        """Write the rows of a split that are in its file again, with the present schema, if `is_kept` says so."""
        self._parquet[split].close()
        file = self._files[split_file(split)]
        old_file = file.rename(file.with_suffix(".before.tmp"))
        self._parquet[split] = self._open_parquet(split)
        rows = filter(is_kept, parquet_rows(old_file, ROWS_PER_GROUP))
        while group := list(islice(rows, ROWS_PER_GROUP)):
            self._write(split, group)
        old_file.unlink()

    def remove(self, dropped: Mapping[str, Dropped]) -> None:
        """Drop pairs that were added, by id: they go to the end of dropped.jsonl, in the order of the splits."""
        if not dropped:
            return
        self.sums.clear()

        def keep_or_drop(split: str, row: Mapping[str, Any]) -> bool:
            if drop := dropped.get(row["id"]):
                self.counts[split] -= 1
                self.drop(drop.row(row["id"]))
            else:
                self.sums.update({name: value for name, value in row["contrast"].items() if value is not None})
            return drop is None

        for split in SPLITS:
            self._write(split, self._rows[split])
            self._rewrite(split, partial(keep_or_drop, split))

    def _temporary(self, name: str) -> Path:
        target = self.folder / name
        return target.with_name(f".{target.name}.{os.getpid()}.tmp")

    def add(self, row: dict[str, Any], index: int = 0) -> None:
        """Add a pair, as `Pair.row` gives it."""
        split = assign_split(row["id"], self.seed, self.test_fraction)
        self.counts[split] += 1
        self.sums.update({name: value for name, value in row["contrast"].items() if value is not None})
        self._rows[split].append(
            row | ({"chat_template_kwargs": options} if (options := self.template_options) else {})
        )
        if not self.calls and any(len(turn) > 2 for side in ("chosen", "rejected") for turn in row[side]):
            self.calls = True  # the schema with tool calls and thoughts in answers
            for name in SPLITS:
                self._rewrite(name, lambda _: True)
        self._record_order(index, split)
        if len(self._rows[split]) == ROWS_PER_GROUP:
            self._write(split, self._rows[split])

    def drop(self, row: Mapping[str, Any], index: int = 0) -> None:
        """Add a prompt without a pair, as `Dropped.row` gives it."""
        self.counts["dropped"] += 1
        self.failed += row["failed"]
        self.reasons[f"{row['stage']}.{row['reason']}"] += 1
        self._dropped.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._record_order(index, "dropped")

    def _record_order(self, index: int, kind: str) -> None:
        if self._order:
            self._order.write((index * 4 + KINDS.index(kind)).to_bytes(8, "little"))

    def all_counts(self) -> dict[str, int]:
        """The counts of prompts, pairs, pairs by split, and drops."""
        counts = {"prompts": self.pairs + self.counts["dropped"], "pairs": self.pairs}
        return counts | {name: self.counts[name] for name in (*SPLITS, "dropped")}

    @property
    def pairs(self) -> int:
        """The number of pairs added."""
        return sum(self.counts[split] for split in SPLITS)

    @property
    def finished(self) -> int:
        """The number of finished rows, written or waiting."""
        return self.pairs + self.counts["dropped"] + self.waiting

    def contrast_means(self) -> dict[str, float]:
        """The mean of each contrast measure over all pairs; empty without pairs."""
        return {name: self.sums[name] / self.pairs for name in CONTRAST} if self.pairs else {}

    def _write(self, split: str, rows: list[dict[str, Any]]) -> None:
        """Write the rows as a row group, if there are any, and empty the list."""
        if rows:
            self._parquet[split].write_table(to_table(rows, self._schema), row_group_size=ROWS_PER_GROUP)
        rows.clear()

    def close(self, *, keep: bool) -> dict[str, str]:
        """Move the files to their final names if `keep`, else delete them. Returns the SHA-256 of each file by name."""
        try:
            return self._publish() if keep else {}
        finally:
            for file in (*self._parquet.values(), self._dropped, *((self._order,) if self._order else ())):
                with suppress(OSError):  # on a full disk, the end of a discarded file cannot be written either
                    file.close()
            for temporary in self._files.values():
                temporary.unlink(missing_ok=True)

    def _publish(self) -> dict[str, str]:
        for split in SPLITS:
            self._write(split, self._rows[split])
            self._parquet[split].close()
        self._dropped.close()
        if self._order:
            self._order.close()
        hashes = {}
        for name, file in self._files.items():
            hashes[name] = file_sha256(file)
            publish(file, self.folder / name)
        return hashes


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a dataset folder or URL. Raises UserError if there is none."""
    location = Location(folder)
    file = location.manifest()
    with report_as(file, location / "manifest.json"):
        return read_json(file)


def read_rows(folder: str | Path, splits: Sequence[str] = SPLITS) -> Iterator[dict[str, Any]]:
    """The pairs of a dataset folder or URL as plain rows, split by split."""
    with Location(folder).local_copy() as path:
        for split in splits:
            yield from parquet_rows(path / split_file(split), 1000)


def read_dropped(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of dropped.jsonl of a dataset folder, in order."""
    with open(folder / "dropped.jsonl", "rb") as lines:
        yield from map(json.loads, lines)


def load_pairs(path: str | Path, split: str = "train", **options: Any) -> Any:
    """Load pairs as a `datasets.Dataset` with prompt, chosen and rejected as lists of messages.

    `path` is a folder, a file, a URL, or a name on the hub, in any format of docs/format.md; each row is read by
    itself. Text with an implicit prompt stays text. Other columns are copied. `name` and `columns` are those of
    `load_preferences`. The logger `clair` warns of repairs with their counts. Raises UserError for a missing column
    (naming those found), a row that cannot be read (with its number), and a source that does not exist.
    """
    preferences = load_preferences(path, split, pairs=True, **options)
    for note in preferences.notes:
        logging.getLogger("clair").warning("%s: %s", path, note)
    return preferences.dataset
