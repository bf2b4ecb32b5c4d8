"""A file of results: one JSON line per finished world, run or step, flushed to disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clair.core.errors import UserError

COMMITTED = Path("recipes/experiments/paper_mini/results/evidence.jsonl")


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Append a line and flush it to disk. First remove a partial line that a killed process left at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as out:
        out.seek(0)
        content = out.read()
        out.truncate(content.rfind(b"\n") + 1)
        out.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def read(file: Path) -> list[dict[str, Any]]:
    """Return all complete lines. Raises UserError with the number of a damaged line."""
    lines = []
    for number, text in enumerate(file.read_bytes().split(b"\n")[:-1] if file.exists() else [], 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise UserError(f"{file}: line {number} is damaged; delete that line to repeat its run") from None
    return lines
