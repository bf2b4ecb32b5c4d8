"""Atomic checkpoints: complete them, find the newest, verify them, and set damaged ones aside.

A checkpoint is written under `.unfinished/`, receives a list of its files with sizes and SHA-256 (`complete.json`), is
flushed to disk, and only then is renamed to `checkpoint-STEP`. A process killed at any moment leaves either the
complete checkpoint or something under `.unfinished/`. The list also detects what a rename cannot prevent: an incomplete
copy or deletion, a page that a power failure left empty, bytes that a disk returns wrong.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from clair.core.files import file_sha256, write_json

UNFINISHED = ".unfinished"
MARKER = "complete.json"


@dataclass
class CheckpointSearch:
    """The newest checkpoint to resume from, and notes on those that were unusable."""

    newest: Path | None = None
    notes: list[str] = field(default_factory=list)


def complete_checkpoint(folder: Path, final: Path, *, resumable: bool) -> None:
    """Write the file list of the checkpoint in `folder`, and move it to `final` by one rename."""
    files, hashes = {}, {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[name], hashes[name] = path.stat().st_size, file_sha256(path)
    write_json(folder / MARKER, {"resumable": resumable, "files": files, "sha256": hashes})
    if final.exists():
        if resume_problem(final) is None:  # the same step is saved twice if Ctrl-C comes at the end of an epoch
            shutil.rmtree(folder.parent)
            return
        shutil.rmtree(final)
    os.rename(folder, final)
    folder.parent.rmdir()
    _sync(final.parent)


def checkpoint_step(folder: Path) -> int | None:
    """The step of `checkpoint-STEP`, or None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


def checkpoints(out: Path) -> list[Path]:
    """The folders named `checkpoint-STEP` in `out`, oldest step first."""
    by_step = [(step, folder) for folder in out.glob("checkpoint-*") if (step := checkpoint_step(folder)) is not None]
    return [folder for _, folder in sorted(by_step) if folder.is_dir()]


def resume_problem(checkpoint: Path) -> str | None:
    """The reason why a run cannot resume from a checkpoint, or None. Reads all its files."""
    if damage := find_damage(checkpoint):
        return damage
    marker = json.loads((checkpoint / MARKER).read_text("utf-8"))
    return None if marker.get("resumable") else "it holds the model only (save_only_model)"


def find_damage(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is not as it was written, and how, or None. Reads all its files."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text("utf-8"))
        files, hashes = dict(marker["files"]), dict(marker["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no readable {MARKER}"
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
        try:
            if file_sha256(file) != hashes.get(name):
                return f"{name} is damaged: its content is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def find_newest_checkpoint(out: Path) -> CheckpointSearch:
    """The newest complete checkpoint of `out`. Removes what a killed save left, and renames damaged checkpoints."""
    search = CheckpointSearch()
    for leftover in sorted((out / UNFINISHED).glob("*")):
        search.notes.append(f"removed {leftover.name}, which was being written when the run was stopped")
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    for checkpoint in reversed(checkpoints(out)):
        problem = resume_problem(checkpoint)
        if problem is None:
            search.newest = checkpoint
            break
        if "save_only_model" in problem:
            search.notes.append(f"cannot go on from {checkpoint.name}: {problem}")
            continue
        aside = _unused_path(out / f"incomplete-{checkpoint.name}")
        os.rename(checkpoint, aside)
        search.notes.append(f"set aside {checkpoint.name} as {aside.name}: {problem}")
    return search


def _unused_path(path: Path) -> Path:
    unused, number = path, 2
    while unused.exists():
        unused, number = path.with_name(f"{path.name}-{number}"), number + 1
    return unused


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
