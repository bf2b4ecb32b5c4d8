"""Read the pairs of a dataset as plain rows: what is scored, calibrated, certified and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apo.data.sources import check_exists
from clair.core.errors import UserError
from clair.core.files import content_hash
from clair.data.dataset import SPLITS, load_pairs, read_manifest, read_rows
from clair.data.preference_sources import split_names
from clair.data.preferences import restore_row
from clair.storage.location import Location


def read_pair_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the pairs of a dataset folder (train and test), a file, or a name on the hub (train), with all columns.

    Turns, tools and variables of the chat template are plain values. `split` is train or test. A missing `id` becomes
    the hash of the content, so a pair has the same id wherever it is read. A missing `source` becomes the pipeline that
    built the folder, or the path's last component. Raises UserError for a folder with neither split.
    """
    location = Location(path)
    check_exists(location)
    with location.local_copy() as folder:
        if (folder / "manifest.json").is_file():
            source = read_manifest(folder)["pipeline"]
            rows = [(split, row) for split in SPLITS for row in read_rows(folder, [split])]
        else:
            source = Path(location).stem
            names = split_names(location) if folder.is_dir() else ["train"]
            present = [split for split in SPLITS if split in names]
            if not present:
                raise UserError(
                    f"dataset {location.public} has the splits {', '.join(names)}; needed: train or test; give one file"
                )
            rows = [(split, restore_row(row)) for split in present for row in load_pairs(location, split)]
    return [{**row, "id": _row_id(row), "source": row.get("source") or source, "split": split} for split, row in rows]


def pair_id(row: Mapping[str, Any]) -> str:
    """Return the id of the pair that a row is, or that `apo reward score` with `by_group` derived the row from."""
    return str(row.get("pair") or row["id"])


def _row_id(row: Mapping[str, Any]) -> str:
    id, content = row.get("id"), [row["prompt"], row["chosen"], row["rejected"]]
    return content_hash(content)[:16] if id in (None, "") else str(id)
