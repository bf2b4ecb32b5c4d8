"""Checkpoints that are whole or are not there: how they are finished, found again and, where damaged, set aside.

A checkpoint is written under `.unfinished/`, then given a list of its files with their sizes and SHA-256
(`complete.json`), flushed to disk, and only then renamed to `checkpoint-STEP`. A process killed at any instant leaves
either the finished checkpoint or something under `.unfinished/`. The list also catches what a rename cannot: a copy or
a deletion that stopped half way, a page that a power cut left empty, bytes that a disk gives back wrong.
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
class Search:
    """The newest checkpoint to go on from, and what was found broken on the way."""

    newest: Path | None = None
    notes: list[str] = field(default_factory=list)


def complete_checkpoint(folder: Path, final: Path, *, resumable: bool) -> None:
    """Declare the checkpoint in `folder` complete and put it in its place, in one rename."""
    files, hashes = {}, {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[name], hashes[name] = path.stat().st_size, file_sha256(path)
    write_json(folder / MARKER, {"resumable": resumable, "files": files, "sha256": hashes})
    if final.exists():
        if resume_problem(final) is None:  # the same step saved twice, as when Ctrl-C and an epoch's end meet
            shutil.rmtree(folder.parent)
            return
        shutil.rmtree(final)
    os.rename(folder, final)
    folder.parent.rmdir()
    _flush(final.parent)


def checkpoint_step(folder: Path) -> int | None:
    """The step of `checkpoint-STEP`, or None for any other name."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else None


def checkpoints(out: Path) -> list[Path]:
    """The folders named `checkpoint-STEP` in `out`, oldest step first."""
    found = [(step, folder) for folder in out.glob("checkpoint-*") if (step := checkpoint_step(folder)) is not None]
    return [folder for _, folder in sorted(found) if folder.is_dir()]


def resume_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, or None. Reads all its files."""
    if damage := find_damage(checkpoint):
        return damage
    marker = json.loads((checkpoint / MARKER).read_text("utf-8"))
    return None if marker.get("resumable") else "it holds the model only (save_only_model)"


def find_damage(checkpoint: Path) -> str | None:
    """What of a checkpoint is not as it was written, or None. Reads all its files."""
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


def find_newest_checkpoint(out: Path) -> Search:
    """The newest complete checkpoint of `out`. What a killed save left is removed; what is damaged is set aside."""
    search = Search()
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
        aside = _free_name(out / f"incomplete-{checkpoint.name}")
        os.rename(checkpoint, aside)
        search.notes.append(f"set aside {checkpoint.name} as {aside.name}: {problem}")
    return search


def _free_name(wanted: Path) -> Path:
    name, number = wanted, 2
    while name.exists():
        name, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return name


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
