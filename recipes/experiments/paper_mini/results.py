"""The file of results: one JSON line for a world and for each finished run, appended atomically and flushed to disk.

world   the common settings of the runs of this id: the questions, the target model's answers, the four data sets
run     one training run: its settings, and the answers and the metrics of pairs at each of its checkpoints
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clair.core.errors import UserError

COMMITTED = Path("recipes/experiments/paper_mini/results/runs.jsonl")


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
            raise UserError(
                f"{file}: line {number} is damaged; delete that line, and the grid repeats its run"
            ) from None
    return lines


def world_of(lines: list[dict[str, Any]], file: Path) -> dict[str, Any]:
    """The newest world. Raises UserError if there is none."""
    worlds = [line for line in lines if line["kind"] == "world"]
    if not worlds:
        raise UserError(f"{file} holds no results; make them with: python -m recipes.experiments.paper_mini.grid")
    return worlds[-1]


def runs_of(lines: list[dict[str, Any]], world: str) -> dict[str, dict[str, Any]]:
    """The runs of one world by their key."""
    return {line["key"]: line for line in lines if line["kind"] == "run" and line["world"] == world}
