"""The file of results: one JSON line for each finished thing, appended atomically and flushed to disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clair.core.errors import UserError

COMMITTED = Path("recipes/experiments/paper_mini/results/evidence.jsonl")


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Append one line and flush it to disk. A partial line that a killed run left at the end is cut off first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as out:
        out.seek(0)
        content = out.read()
        out.truncate(content.rfind(b"\n") + 1)
        out.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        out.flush()
        os.fsync(out.fileno())


def read(file: Path) -> list[dict[str, Any]]:
    """All complete lines. Raises UserError with the line's number if one is damaged."""
    lines = []
    for number, text in enumerate(file.read_bytes().split(b"\n")[:-1] if file.exists() else [], 1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            raise UserError(f"{file}: line {number} is damaged; delete that line, and its run is repeated") from None
    return lines
