"""Write a result in the benchmark's own file format, for tools that read it.

MODEL/mixeval_hard/VERSION/{MODEL_close_freeform_hard,MODEL_close_multichoice_hard}.jsonl   rows with their responses
    judge_results_{ff,mp}_{model_judge_JUDGE,rule}.jsonl                                  the same with judgements
    score.json                                                                           per benchmark, and the overall
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apo.evaluation.mixeval.benchmark import Benchmark
from apo.evaluation.records.mixeval import SPLITS, MixEvalItem, MixEvalScore, Split
from clair.core.files import write_atomically

_KINDS: Mapping[Split, tuple[str, str]] = {
    "free-form": ("close_freeform", "ff"),
    "multiple-choice": ("close_multichoice", "mp"),
}


def write_upstream_files(out: Path, benchmark: Benchmark, score: MixEvalScore, items: Sequence[MixEvalItem]) -> Path:
    """Write the files under `out` and return their folder. `items` has one answer to each row."""
    model = _file_name(score.model.name)
    hard = score.split == "hard"
    folder = out / model / ("mixeval_hard" if hard else "mixeval") / score.version
    by = "rule" if score.judge.kind == "rule" else f"model_judge_{_file_name(score.judge.model or '')}"
    for split in SPLITS:
        answered, judged = _KINDS[split]
        pairs = [(benchmark.rows[split][item.row], item) for item in items if item.split == split]
        rows = [{**row.as_upstream(str(row.row)), "response": item.response} for row, item in pairs]
        write_atomically(folder / f"{model}_{answered}{'_hard' if hard else ''}.jsonl", _lines(rows))
        verdicts = [{**row, **_judgement(item, score.judge.kind)} for row, (_, item) in zip(rows, pairs, strict=True)]
        write_atomically(folder / f"judge_results_{judged}_{by}.jsonl", _lines(verdicts))
    # Upstream writes one number for a benchmark that is in both splits: that of the second split.
    scores = {
        name: benchmark_score.score for split in SPLITS for name, benchmark_score in score.by_benchmark[split].items()
    }
    numbers = {"overall score (final score)": score.overall, **scores}
    write_atomically(folder / "score.json", json.dumps(numbers, indent=4) + "\n")
    return folder


def _judgement(item: MixEvalItem, kind: str) -> dict[str, Any]:
    if kind == "rule":
        return {"parsed_result": item.verdict, "eval_result": item.score == 1}
    verdict = {"judge_option": item.verdict} if item.split == "multiple-choice" else {"judge_score": item.score}
    return {"judge_response": item.judgement, **verdict}


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "model"
