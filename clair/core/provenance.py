"""Provenance of an output: package versions, and the commit of the code."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import Any

PROVENANCE_PACKAGES = ("clair-apo", "torch", "transformers", "trl", "peft", "datasets", "openai", "accelerate")


def provenance() -> dict[str, Any]:
    """The versions of Python and of packages, and the git commit of the working directory (or None)."""
    versions = {}
    for name in PROVENANCE_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": sys.version.split()[0], "versions": versions, "git_commit": git_commit()}


def git_commit() -> str | None:
    """The commit of the working directory, with `-dirty` if tracked files differ from it; None outside of git."""
    try:
        process = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None
