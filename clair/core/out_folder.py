"""Checks of an output folder before any work: it is free or of the expected kind, and of the same recipe."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from clair.core.errors import UserError

ANOTHER_RUN = "the run of another recipe"


def check_out_folder(out: Path, kind: str, markers: Collection[str]) -> None:
    """Check that `out` is new, empty, or a folder with one of the files `markers`. Raises UserError."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out {out} is a file, not a folder; choose another --out")
    check_entries(str(out), kind, markers, [entry.name for entry in out.iterdir()] if out.is_dir() else [])


def check_entries(name: str, kind: str, markers: Collection[str], entries: Sequence[str]) -> None:
    """Check the entries of the folder or URL `name`: nothing but hidden files and ledgers, or one of `markers`."""
    unknown = sorted(entry for entry in entries if not entry.startswith((".", "ledger", "hold/")))
    if unknown and not set(markers) & set(entries):
        raise UserError(f"{name} is not a {kind} and not empty (it holds {unknown[0]}); choose another --out")


def check_unchanged(name: str, content: str, changed: Sequence[str], remedy: str = "") -> None:
    """Raise UserError if `changed`, the keys in which a folder's recipe differs from the given one, are not empty."""
    if changed:
        differences = ", ".join(changed)
        raise UserError(f"{name} holds {content} (it differs in {differences}); choose another --out{remedy}")
