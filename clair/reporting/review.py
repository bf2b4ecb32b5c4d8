"""Apply a reviewer's decisions about the pairs of a dataset: `clair keep DIR decisions.json`.

The decisions come from the page that `clair report` writes. Pairs marked drop move from the Parquet files to
dropped.jsonl with stage "review" and reason "marked", so that the counts still add up. The result is deterministic.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from clair.core.errors import UserError, list_some
from clair.core.files import content_hash, file_sha256, publish, write_atomically, write_json
from clair.data.dataset import (
    CONTRAST,
    ROWS_PER_GROUP,
    SPLITS,
    read_dropped,
    read_manifest,
    schema,
    split_file,
    to_table,
)
from clair.data.dataset_card import card
from clair.data.records import Dropped
from clair.data.row_files import is_json_list, parquet_rows
from clair.pipeline.output_dir import lock_output
from clair.storage.location import Location, report_as

FORMAT = 1
DECISIONS = ("keep", "drop")
STAGE, REASON = "review", "marked"
_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Decisions:
    """A decisions file: the `fingerprint` of its dataset, the decisions by pair id, and the file's hash."""

    dataset: str
    by_id: Mapping[str, str]
    sha256: str

    @property
    def dropped(self) -> frozenset[str]:
        """The ids marked drop."""
        return frozenset(id for id, decision in self.by_id.items() if decision == "drop")


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """16 hex digits that identify the state of a dataset's files."""
    return content_hash(manifest["files"])[:16]


def read_decisions(file: str | Path) -> Decisions:
    """Read and check a decisions file. Raises UserError if it is missing or malformed."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"decisions file {path} does not exist; give the file that the page of `clair report` saved")
    content = path.read_bytes()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"decisions file {path} is not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        problem = f"format {value.get('format')!r}" if isinstance(value, dict) else type(value).__name__
        raise UserError(f'decisions file {path}: found {problem}; this version reads {{"format": {FORMAT}, ...}}')
    if not isinstance(value.get("dataset"), str) or not isinstance(value.get("decisions"), dict):
        raise UserError(f"decisions file {path} needs dataset (text) and decisions (keep or drop by pair id)")
    for id, decision in value["decisions"].items():
        if decision not in DECISIONS:
            raise UserError(f"decisions file {path}, {id}: found {decision!r}; allowed: {', '.join(DECISIONS)}")
    return Decisions(value["dataset"], value["decisions"], hashlib.sha256(content).hexdigest())


def apply_decisions(folder: str | Path, decisions: Decisions, out: str | Path | None = None) -> dict[str, Any]:
    """Apply decisions to the dataset `folder`, in place or into the new folder `out`. Returns the new manifest.

    Applying the same decisions in place again changes nothing; after an interruption it completes the first run.
    Raises UserError as `check_decisions` does, before anything is written.
    """
    source = Path(folder)
    manifest = check_decisions(source, decisions, out)
    if out is None and _applied(manifest, decisions):
        return manifest
    return _write(source, source if out is None else Path(out), manifest, decisions)


def apply_decisions_locked(folder: str, decisions: Decisions, out: str | None = None) -> None:
    """Apply decisions with the written folder locked. For a URL, change its local copy and upload it.

    Raises UserError as `apply_decisions` does, and if `out` is a URL.
    """
    location = Location(folder)
    if out is not None:
        if Location(out).is_url:
            name = Location(out).public
            raise UserError(f"--out {name} is a URL; give a folder, or leave --out away to change in place")
        with location.local_copy() as source:
            check_decisions(source, decisions, out)
            with lock_output(out):
                apply_decisions(source, decisions, out)
        return
    if location.is_url:
        read_manifest(location)
    else:
        check_decisions(location, decisions)
    with report_as(location.folder, location.public), lock_output(location) as output:
        output.fetch(read_manifest(output.folder)["files"])
        apply_decisions(output.folder, decisions)
        output.publish()


def check_decisions(folder: str | Path, decisions: Decisions, out: str | Path | None = None) -> dict[str, Any]:
    """Check that the decisions can be applied to `folder`, and return its manifest. Writes nothing.

    Raises UserError if they belong to another state of the dataset or name pairs that it does not hold, or if `out`
    holds something else.
    """
    source = Path(folder)
    manifest = read_manifest(source)
    if out is not None:
        _check_target(source, Path(out), manifest)
    if out is not None or not _applied(manifest, decisions):
        _check_fits(source, manifest, decisions)
    return manifest


def _applied(manifest: Mapping[str, Any], decisions: Decisions) -> bool:
    return any(review["decisions_sha256"] == decisions.sha256 for review in manifest.get("review", []))


def _check_target(source: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    if target.resolve() == source.resolve():
        raise UserError(f"{target} is the dataset itself; leave --out away to change it in place")
    if not target.exists() or (target.is_dir() and all(entry.name == ".lock" for entry in target.iterdir())):
        return
    old = read_manifest(target) if (target / "manifest.json").is_file() else {}
    reviews = old.get("review", [])
    if not reviews or reviews[-1]["dataset"] != fingerprint(manifest):
        raise UserError(f"{target} is not empty and no finished review of this dataset; choose another --out")


def _check_fits(source: Path, manifest: Mapping[str, Any], decisions: Decisions) -> None:
    dataset = fingerprint(manifest)
    if decisions.dataset != dataset:
        raise UserError(
            f"the decisions are about dataset {decisions.dataset}, and {source} is {dataset}: it was built or reviewed "
            f"since; make the page again with `clair report {source}` and open the decisions file in it"
        )
    known_ids = {id for split in SPLITS for id in _ids(source, split)}
    known_ids |= {row["id"] for row in read_dropped(source) if (row["stage"], row["reason"]) == (STAGE, REASON)}
    unknown = sorted(decisions.by_id.keys() - known_ids)
    if unknown:
        raise UserError(f"{source} has no pair {list_some(unknown, _MAX_NAMED)}; decisions may name only its pairs")


def _ids(folder: Path, split: str) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(folder / split_file(split), columns=["id"])["id"].to_pylist()


def _write(source: Path, target: Path, manifest: Mapping[str, Any], decisions: Decisions) -> dict[str, Any]:
    """Write the reviewed folder: dropped.jsonl first, the manifest last.

    So the same decisions still fit the folder after an interruption, and complete it.
    """
    (target / "data").mkdir(parents=True, exist_ok=True)
    _write_dropped(source, target, decisions)
    files = {"dropped.jsonl": file_sha256(target / "dropped.jsonl")}
    counts: Counter[str] = Counter()
    values: dict[str, list[float]] = {name: [] for name in CONTRAST}
    for split in SPLITS:
        counts[split] = _write_split(source, target, split, decisions.dropped, values)
        files[split_file(split)] = file_sha256(target / split_file(split))
    new = _reviewed(manifest, decisions, counts, values)
    new["files"] = {name: files.get(name, old) for name, old in manifest["files"].items()}
    write_atomically(target / "README.md", card(new))
    write_json(target / "manifest.json", new)
    return new


def _write_dropped(source: Path, target: Path, decisions: Decisions) -> None:
    """Write the old drops, then the pairs marked drop in the order of the Parquet files.

    Pairs that an interrupted run of the same decisions wrote are among the old drops, in that order.
    """
    marked = decisions.dropped
    drop = Dropped(STAGE, REASON, f"marked drop in the decisions file {decisions.sha256[:12]}")
    old_rows = list(read_dropped(source))
    written_before = {row["id"] for row in old_rows if row == drop.row(row["id"])}
    new_ids = [id for split in SPLITS for id in _ids(source, split) if id in marked and id not in written_before]
    rows = [*old_rows, *map(drop.row, new_ids)]
    write_atomically(target / "dropped.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_split(
    source: Path, target: Path, split: str, dropped_ids: frozenset[str], values: dict[str, list[float]]
) -> int:
    """Copy one Parquet file without `dropped_ids`; append the contrast to `values`. Returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = source / split_file(split)
    temporary = (target / split_file(split)).with_name(f".{split}.tmp")
    written = pq.read_schema(file)
    names = written.names  # an older build has fewer columns
    full_schema = schema(tools="tools" in names, calls=is_json_list(written.field("chosen").type))
    layout = pa.schema([(full_schema if name in full_schema.names else written).field(name) for name in names])
    rows = (row for row in parquet_rows(file, ROWS_PER_GROUP) if row["id"] not in dropped_ids)
    count = 0
    with pq.ParquetWriter(temporary, layout, compression="zstd") as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(to_table(group, layout), row_group_size=ROWS_PER_GROUP)
            count += len(group)
            for name in CONTRAST:
                values[name] += [value for row in group if (value := row["contrast"][name]) is not None]
    publish(temporary, target / split_file(split))
    return count


def _reviewed(
    manifest: Mapping[str, Any], decisions: Decisions, counts: Mapping[str, int], values: Mapping[str, list[float]]
) -> dict[str, Any]:
    """The manifest after the review, with counts that add up."""
    old = manifest["counts"]
    pairs = sum(counts[split] for split in SPLITS)
    marked = old["pairs"] - pairs
    new = {**old, "pairs": pairs, **{split: counts[split] for split in SPLITS}, "dropped": old["dropped"] + marked}
    reasons = Counter(manifest["drop_reasons"])
    if marked:
        reasons[f"{STAGE}.{REASON}"] += marked
    contrast = {name: math.fsum(numbers) / len(numbers) for name, numbers in values.items() if numbers}
    review = {
        "decisions_sha256": decisions.sha256,
        "dataset": decisions.dataset,
        "kept": sum(decision == "keep" for decision in decisions.by_id.values()),
        "dropped": marked,
    }
    # After a review, the lengths are no longer those that were balanced.
    unchanged = {key: value for key, value in manifest.items() if key != "balance" or not marked}
    return {
        **unchanged,
        "counts": new,
        "drop_reasons": dict(sorted(reasons.items())),
        "contrast": contrast if marked else manifest["contrast"],
        "review": [*manifest.get("review", []), review],
    }
