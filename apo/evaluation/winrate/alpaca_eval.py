"""AlpacaEval's answer files: a JSON list of {instruction, output, generator}, one answer to each instruction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from apo.evaluation.winrate.verdicts import SIDES, Comparison
from clair.core.errors import UserError, list_some
from clair.core.files import write_atomically
from clair.data.prompt_sources import PromptSource
from clair.data.row_files import file_rows, kind_of

_COLUMNS = {"prompt": "instruction", "answer": "output"}


def is_answer_file(file: str | Path) -> bool:
    """True if the first row of a file has AlpacaEval's columns."""
    path = Path(file)
    if kind_of(path) is None or not path.is_file():
        return False
    first = next(islice(file_rows(path), 1), (None, None))[1]
    return isinstance(first, Mapping) and "prompt" not in first and set(_COLUMNS.values()) <= set(first)


def with_columns(source: PromptSource) -> PromptSource:
    """The source with AlpacaEval's names of columns, if its file has them and the recipe names none."""
    if source.columns or source.path.is_url or not is_answer_file(source.path):
        return source
    return source.model_copy(update={"columns": _COLUMNS})


def generator_of(file: str) -> str | None:
    """The name of the model that gave the answers of a file; None if it has none. Raises UserError for several."""
    if not is_answer_file(file):
        return None
    names = {str(row["generator"]): None for _, row in file_rows(Path(file)) if row.get("generator")}
    if len(names) > 1:
        raise UserError(f"{file} has answers of several models, {list_some(list(names), 3)}; give a file of one")
    return next(iter(names), None)


def write_answer_files(out: Path, compared: Sequence[Comparison], names: Mapping[str, str]) -> None:
    """Write base.json and tuned.json, unless a prompt is no single user turn or has several answers."""
    if any(comparison.sample or not _is_single_turn(comparison) for comparison in compared):
        return
    for side in SIDES:
        rows: list[dict[str, Any]] = [
            {
                "instruction": comparison.prompt.messages[0]["content"],
                "output": getattr(comparison, side).text,
                "generator": names[side],
            }
            for comparison in compared
            if not (comparison.unresolved or "").startswith("answer_")
        ]
        content = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        write_atomically(out / f"{side}.json", content.encode("utf-8", "backslashreplace"))


def _is_single_turn(comparison: Comparison) -> bool:
    messages = comparison.prompt.messages
    return len(messages) == 1 and messages[0]["role"] == "user" and not comparison.prompt.tools
