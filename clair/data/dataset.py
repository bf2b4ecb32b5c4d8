"""The dataset folder: Parquet splits, dropped.jsonl, manifest, card. And reading pairs, ours and the published ones.

    data/train-00000-of-00001.parquet, data/test-00000-of-00001.parquet     the pairs
    dropped.jsonl     every prompt that gave no pair, with stage and reason
    manifest.json     counts, models, sampling, recipe, versions: what made this
    README.md         the dataset card
    ledger.sqlite     every call, so that nothing is paid for twice

`datasets.load_dataset(folder)` and TRL read it as it is. See docs/format.md.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from clair.core.files import content_hash, file_sha256, publish, read_json
from clair.data.preference_sources import load_preferences
from clair.data.records import LABELS, Dropped, Pair
from clair.data.row_files import is_json_list, parquet_rows
from clair.storage.object_store import joined, local_copy, local_manifest, report_as

SPLITS = ("train", "test")
CONTRAST = ("jaccard", "levenshtein", "kept", "prefix", "length_ratio")
ROWS_PER_GROUP = 5000
"""Rows of a Parquet row group: a writer keeps 18 kB of each group until the file ends."""


def schema(*, tools: bool = False, calls: bool = False) -> Any:
    """The Arrow schema of a pair. `tools`: of a dataset whose prompts have tools, or turns with more than role and
    content; `calls`: one whose answers call tools.

    Such turns, and the tools, are JSON values: Arrow's structs would give each the keys of all the others, filled with
    null.
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
        ]
    )


def table_of(rows: Sequence[Mapping[str, Any]], schema: Any) -> Any:
    """Rows of the dataset as an Arrow table of this schema."""
    import pyarrow as pa

    columns = []
    for one in schema:
        values = [row.get(one.name) for row in rows]
        if is_json_list(one.type):
            texts = [None if v is None else [json.dumps(inner, ensure_ascii=False) for inner in v] for v in values]
            lists = pa.array(texts, pa.list_(pa.string()))
            inner = pa.ExtensionArray.from_storage(pa.json_(), lists.flatten())
            columns.append(pa.ListArray.from_arrays(lists.offsets, inner, type=one.type, mask=lists.is_null()))
        else:
            columns.append(pa.array(values, one.type))
    return pa.Table.from_arrays(columns, schema=schema)


def split_of(id: str, seed: int, test_fraction: float) -> str:
    """`test` for a `test_fraction` of all ids, by hash: the same id falls into the same split in every build."""
    return "test" if int(content_hash([seed, id])[:13], 16) / 16**13 < test_fraction else "train"


def split_file(split: str) -> str:
    """Where a split lies inside the folder."""
    return f"data/{split}-00000-of-00001.parquet"


# ---- where each row of a shard stands among all: one number a row, its place times 4 plus what became of it

ORDER = "order.bin"
KINDS = ("train", "test", "dropped")
_ORDER_BYTES_AT_ONCE = 8 * 4096


def entry(place: int, kind: str) -> bytes:
    """The 8 bytes of a row in the order file."""
    return (place * 4 + KINDS.index(kind)).to_bytes(8, "little")


def read_order(folder: Path) -> Iterator[tuple[int, str]]:
    """(place among all prompts, train, test or dropped) of each row of a shard, in order."""
    with open(folder / ORDER, "rb") as file:
        while part := file.read(_ORDER_BYTES_AT_ONCE):
            for at in range(0, len(part), 8):
                number = int.from_bytes(part[at : at + 8], "little")
                yield number // 4, KINDS[number % 4]


class DatasetWriter:
    """Writes pairs and drops as they come, under temporary names, and puts them in place all at the end.

    Equal pairs in equal order give equal bytes.
    """

    def __init__(
        self, folder: Path, *, seed: int, test_fraction: float, order: bool = False, tools: bool = False
    ) -> None:
        """`order`: also write where each row stands among all prompts, which `place` tells; for one shard of many.

        `tools`: turns may have more than role and content.
        """
        self.tools, self.calls = tools, False
        self.folder = folder
        self.seed = seed
        self.test_fraction = test_fraction
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.failed = 0
        self.sums: Counter[str] = Counter()
        (folder / "data").mkdir(parents=True, exist_ok=True)
        for left_behind in (*folder.glob(".*.tmp"), *(folder / "data").glob(".*.tmp")):  # by a run that was killed
            left_behind.unlink()
        self._rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self._files = {split: self._temporary(split_file(split)) for split in SPLITS}
        self._parquet = {split: self._opened(split) for split in SPLITS}
        self._dropped_file = self._temporary("dropped.jsonl")
        self._dropped = open(self._dropped_file, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.place = 0
        self.ahead = 0
        """Rows that have come to their end and wait for one before them."""
        self._order_file = self._temporary(ORDER) if order else None
        self._order = open(self._order_file, "wb") if self._order_file else None  # noqa: SIM115 (closed by close)

    def _opened(self, split: str) -> Any:
        import pyarrow.parquet as pq

        self._schema = schema(tools=self.tools, calls=self.calls)
        return pq.ParquetWriter(self._files[split], self._schema, compression="zstd")

    def _write_calls(self) -> None:
        """From now on answers call tools: what is written already is written anew, in the schema that has them."""
        self.calls = True
        for split in SPLITS:
            self._parquet[split].close()
            before = self._files[split].with_suffix(".before.tmp")
            self._files[split].rename(before)
            self._parquet[split] = self._opened(split)
            rows = parquet_rows(before, ROWS_PER_GROUP)
            while group := list(islice(rows, ROWS_PER_GROUP)):
                self._write(split, group)
            before.unlink()

    def _temporary(self, name: str) -> Path:
        target = self.folder / name
        return target.with_name(f".{target.name}.{os.getpid()}.tmp")

    def add(self, pair: Pair) -> None:
        """One more pair."""
        self.add_row(pair.row())

    def add_row(self, row: dict[str, Any]) -> None:
        """One more pair, as a row of the dataset."""
        split = split_of(row["id"], self.seed, self.test_fraction)
        self.counts[split] += 1
        self.sums.update({name: value for name, value in row["contrast"].items() if value is not None})
        self._rows[split].append(row)
        if not self.calls and any(turn.get("tool_calls") for side in ("chosen", "rejected") for turn in row[side]):
            self._write_calls()
        self._note(split)
        if len(self._rows[split]) == ROWS_PER_GROUP:
            self._flush(split)

    def drop(self, id: str, why: Dropped) -> None:
        """One more prompt that gave no pair."""
        self.drop_row(why.row(id))

    def drop_row(self, row: Mapping[str, Any]) -> None:
        """One more prompt that gave no pair, as a line of dropped.jsonl."""
        self.counts["dropped"] += 1
        self.failed += row["failed"]
        self.reasons[f"{row['stage']}.{row['reason']}"] += 1
        self._dropped.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._note("dropped")

    def _note(self, kind: str) -> None:
        if self._order:
            self._order.write(entry(self.place, kind))

    def all_counts(self) -> dict[str, int]:
        """Prompts, pairs, pairs by split, and drops."""
        counts = {"prompts": self.pairs + self.counts["dropped"], "pairs": self.pairs}
        return counts | {name: self.counts[name] for name in (*SPLITS, "dropped")}

    @property
    def pairs(self) -> int:
        """How many pairs so far."""
        return sum(self.counts[split] for split in SPLITS)

    @property
    def done(self) -> int:
        """Rows that have come to their end, written or not."""
        return self.pairs + self.counts["dropped"] + self.ahead

    def contrast_means(self) -> dict[str, float]:
        """The mean of each contrast number over all pairs; empty without pairs."""
        return {name: self.sums[name] / self.pairs for name in CONTRAST} if self.pairs else {}

    def _flush(self, split: str) -> None:
        rows, self._rows[split] = self._rows[split], []
        self._write(split, rows)

    def _write(self, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._parquet[split].write_table(table_of(rows, self._schema), row_group_size=ROWS_PER_GROUP)

    def close(self, *, keep: bool) -> dict[str, str]:
        """Put the files in place (`keep`), or take the temporary ones away. Returns the SHA-256 of each by name."""
        written = {split_file(split): file for split, file in self._files.items()}
        written["dropped.jsonl"] = self._dropped_file
        if self._order_file:
            written[ORDER] = self._order_file
        try:
            return self._publish(written) if keep else {}
        finally:
            for file in (*self._parquet.values(), self._dropped, *((self._order,) if self._order else ())):
                with suppress(OSError):  # on a full disk the end of a file that nobody wants cannot be written either
                    file.close()
            for temporary in written.values():
                temporary.unlink(missing_ok=True)

    def _publish(self, written: Mapping[str, Path]) -> dict[str, str]:
        for split in SPLITS:
            if self._rows[split]:
                self._flush(split)
            self._parquet[split].close()
        self._dropped.close()
        if self._order:
            self._order.close()
        hashes = {}
        for name, file in written.items():
            hashes[name] = file_sha256(file)
            publish(file, self.folder / name)
        return hashes


def card(manifest: Mapping[str, Any]) -> str:
    """The dataset card: what `datasets` and the hub need in front, what a reader wants behind."""
    counts, contrast = manifest["counts"], manifest["contrast"]
    # A split without rows would make `datasets.load_dataset` fail for the other one too.
    splits = [split for split in SPLITS if counts[split]] or ["train"]
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        # `datasets` keys its cache by this text, not by the data: without the hash a rebuilt folder reads as it was.
        f"  description: files {content_hash(manifest['files'])[:16]}",
        "  data_files:",
        *(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in splits),
        "task_categories:\n- text-generation",
        "tags:\n- preference\n- clair\n- dpo",
        "---",
        "",
        "# Preference pairs",
        "",
        f"{counts['pairs']} pairs ({counts['train']} train, {counts['test']} test) from {counts['prompts']} prompts, "
        f"built by the `{manifest['pipeline']}` pipeline of clair-apo.",
        "",
        *(f"- {role}: `{model['model']}`, {manifest['sampling'][role]}" for role, model in manifest["models"].items()),
        *(f"- dropped, {reason}: {count}" for reason, count in manifest["drop_reasons"].items()),
        *(f"- mean {name}: {value:.3f}" for name, value in contrast.items()),
        *_position_lines(manifest),
        "",
        "`manifest.json` holds the exact recipe, versions and hashes; `dropped.jsonl` every prompt without a pair.",
        "",
    ]
    return "\n".join(lines)


def _position_lines(manifest: Mapping[str, Any]) -> list[str]:
    position = manifest.get("position")
    if not position:
        return []
    told = "; **the judge is biased by position: do not trust these labels**" if position["biased"] else ""
    return [f"- the judge preferred what was shown first in {position['share_first']:.1%} of its verdicts{told}"]


MISSED, ALLUDED = 0.2, 0.2
"""Shares of a reviser's first replies that cannot be read, and of its revisions that speak of themselves, from which
on its work is doubtful: of recorded GPT-4 revisions all can be read and 3 of 20 allude."""
HELD_OUT = 5
"""Held-out pairs below which a split is called too small to measure anything on."""


def doubts(manifest: Mapping[str, Any]) -> list[str]:
    """What a person should know before training on a dataset, in sentences with their numbers; often nothing."""
    told, counts, test = [], manifest["counts"], manifest["recipe"]["test_fraction"]
    if test and counts["pairs"] and counts["test"] < HELD_OUT:
        told.append(
            f"{counts['test']} of {counts['pairs']} pairs are held out (test_fraction {test:g}), too few to measure "
            f"on; a larger one, such as 0.2, with --update pays for no reply again"
        )
    return [*told, *_doubtful_reviser(manifest)]


def _doubtful_reviser(manifest: Mapping[str, Any]) -> Iterator[str]:
    first, pairs = manifest["first_replies"], manifest["counts"]["pairs"]
    asked, read = sum(first.values()), first.get("read", 0)
    filtered = {r.removeprefix("filter."): n for r, n in manifest["drop_reasons"].items() if r.startswith("filter.")}
    revisions, alluded = pairs + sum(filtered.values()), filtered.get("allusion", 0) + filtered.get("comment", 0)
    if asked - read <= MISSED * asked and alluded <= ALLUDED * revisions:
        return
    why = ", ".join(f"{name} {count}" for name, count in first.items() if name != "read")
    missed = f"{asked - read} of {asked} first replies could not be read" + (f" ({why})" if why else "")
    yield (
        f"the reviser's work is doubtful: {missed}; of {revisions} revisions {alluded} speak of the correction and "
        f"{filtered.get('identical', 0)} change nothing. Nobody has judged whether the {pairs} winners are better: "
        f"look at them, or let a judge compare them (apo advise), before you train"
    )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a dataset folder, here or at a URL. Raises UserError where there is none."""
    file = local_manifest(str(folder))
    with report_as(file, joined(str(folder), "manifest.json")):
        return read_json(file)


def read_rows(folder: str | Path, splits: Sequence[str] = SPLITS) -> Iterator[dict[str, Any]]:
    """The pairs of a dataset folder, here or at a URL, as plain rows, split by split."""
    with local_copy(str(folder)) as here:
        for split in splits:
            yield from parquet_rows(here / split_file(split), 1000)


def load_pairs(path: str | Path, split: str = "train", **options: Any) -> Any:
    """A `datasets.Dataset` with prompt, chosen and rejected as message lists, from a folder or file, here or at a URL,
    or from a hub name.

    Reads the formats of docs/format.md, each row by itself. Text with an implicit prompt stays text. Other columns
    stay. `name` and `columns` are those of `loading.load_preferences`. What had to be repaired is counted in a warning
    of the logger `clair`. Raises UserError for a missing column (naming those found), a row that cannot be read (with
    its number), and a source that is not there.
    """
    read = load_preferences(path, split, pairs=True, **options)
    for note in read.notes:
        logging.getLogger("clair").warning("%s: %s", path, note)
    return read.dataset
