"""A small invented benchmark in the layout of the real one, and the folder of the real one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from apo.evaluation.mixeval import benchmark as mixeval
from apo.evaluation.mixeval.benchmark import letter

FREE_FORM = [
    {"context": None, "prompt": "Who wrote Faust?", "target": ["Goethe", "J. W. Goethe"], "benchmark_name": "TriviaQA"},
    {"context": "Ann has 3 pears.", "prompt": "How many pears?", "target": ["3", "3"], "benchmark_name": "DROP"},
    {"context": None, "prompt": "What is 2 + 2?", "target": ["4"], "benchmark_name": "GSM8k"},
    {"context": None, "prompt": "Who wrote Faust?", "target": ["Goethe", "J. W. Goethe"], "benchmark_name": "TriviaQA"},
]
MULTIPLE_CHOICE = [
    {"context": None, "prompt": "Hot?", "options": ["ice", "fire"], "target": [1], "benchmark_name": "PIQA"},
    {"context": "none", "prompt": "Cold?", "options": ["ice", "fire", "sun"], "target": [0], "benchmark_name": "ARC"},
    {"context": None, "prompt": "Hot?", "options": ["ice", "fire"], "target": [1], "benchmark_name": "PIQA"},
]
JUDGE = {
    "free_form": {"system": "Judge.", "user": "[[0.5]] as an example.\nQ: {P}\nGold: {G}\nAnswer: {R}\n"},
    "multiple_choice": {"system": "Extract.", "user": "[[A]] as an example.\nQ: {P}\n{G}\nAnswer: {R}\n"},
}


def write_data(folder: Path, rows: Mapping[str, list[dict[str, Any]]] | None = None) -> Path:
    """A data folder with our questions as those of 2024-06-01."""
    target = folder / "2024-06-01" / "mixeval-hard"
    target.mkdir(parents=True)
    rows = rows or {"free-form": FREE_FORM, "multiple-choice": MULTIPLE_CHOICE}
    for split, values in rows.items():
        (target / f"{split}.json").write_text(json.dumps({str(n): value for n, value in enumerate(values)}))
    (folder / "judge_prompts.json").write_text(json.dumps(JUDGE))
    return folder


def accept(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the hashes of this folder be the expected ones."""
    files = {
        ("2024-06-01", split): hashlib.sha256(
            (folder / f"2024-06-01/mixeval-hard/{split}.json").read_bytes()
        ).hexdigest()
        for split in mixeval.SPLITS
    }
    judge = {s: hashlib.sha256(JUDGE[s.replace("-", "_")]["user"].encode()).hexdigest() for s in mixeval.SPLITS}
    monkeypatch.setattr(mixeval, "FILES_SHA256", files)
    monkeypatch.setattr(mixeval, "JUDGE_SHA256", judge)


def responses_of(folder: Path, out: Path, say: Any = None) -> Path:
    """Response files with right answers, or with what `say(row)` says."""
    out.mkdir(parents=True, exist_ok=True)
    benchmark = mixeval.load(folder, "2024-06-01")
    for split in mixeval.SPLITS:
        lines = []
        for row in benchmark.rows[split]:
            text = say(row) if say else row.right[0]
            lines.append(json.dumps({**row.as_upstream(str(row.row)), "response": text}) + "\n")
        (out / f"{split}.jsonl").write_text("".join(lines))
    return out


__all__ = ["FREE_FORM", "JUDGE", "MULTIPLE_CHOICE", "accept", "letter", "responses_of", "write_data"]
