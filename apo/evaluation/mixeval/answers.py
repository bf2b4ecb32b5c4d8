"""The answers to score: which to request from a model, and how to read them from response files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apo.evaluation.answers import AnswerRequest, RowAnswer
from apo.evaluation.mixeval.benchmark import Benchmark, BenchmarkRow
from apo.evaluation.records.mixeval import SPLITS, Split
from clair.core.errors import UserError
from clair.core.files import read_text
from clair.inference.model import visible_answer

_UPSTREAM_NAMES: Mapping[Split, str] = {"free-form": "close_freeform", "multiple-choice": "close_multichoice"}
_MAX_REPEATS = 10_000  # above the number of rows that repeat one question in any benchmark


def answer_requests(benchmark: Benchmark, samples: int, *, greedy: bool) -> list[AnswerRequest]:
    """The requests for all answers of an evaluation, in the benchmark's order.

    If decoding is `greedy`, rows that repeat a question share one answer; otherwise each samples its own, as upstream.
    """
    repeats: Counter[str] = Counter()
    requests = []
    for row in benchmark.all_rows:
        draw = 0 if greedy else repeats[row.text]
        repeats[row.text] += 1
        requests += [AnswerRequest(row, sample, sample * _MAX_REPEATS + draw) for sample in range(samples)]
    return requests


# ---- response files


def read_responses(folder: str | Path, benchmark: Benchmark) -> list[RowAnswer]:
    """Read existing answers in the benchmark's row format: free-form first, each split in the order of its file.

    Raises UserError for a row that is missing, occurs twice, or differs from the benchmark's row.
    """
    answers: list[RowAnswer] = []
    for split in SPLITS:
        file = _response_file(Path(folder), split, benchmark)
        rows = {str(row.row): row for row in benchmark.rows[split]}
        lines: dict[str, int] = {}
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if not line.strip():
                continue
            value = _parse_response(line, file, number)
            name = value["id"]
            if name in lines:
                raise UserError(
                    f"{file}, line {number}: row {name} is in line {lines[name]} already; leave one of them"
                )
            lines[name] = number
            if name in rows:
                answers.append(
                    RowAnswer(_check_row(rows[name], value, file, number, benchmark), visible_answer(value["response"]))
                )
        missing = [name for name in rows if name not in lines]
        if missing:
            raise UserError(
                f"{file} has no answer to {len(missing)} of {len(rows)} rows (the first: row {missing[0]}); answer "
                f"them, or evaluate the first rows only with --limit"
            )
    return answers


def _response_file(folder: Path, split: Split, benchmark: Benchmark) -> Path:
    """The response file of a split: `free-form.jsonl`, or upstream's `MODEL_close_freeform_hard.jsonl`."""
    file = folder / f"{split}.jsonl"
    if file.is_file():
        return file
    ending = f"_{_UPSTREAM_NAMES[split]}{'_hard' if benchmark.split == 'hard' else ''}.jsonl"
    files = sorted(file for file in folder.glob("*.jsonl") if file.name.endswith(ending))
    if len(files) != 1:
        problem = f"{len(files)} files *{ending}" if files else f"neither {file.name} nor a file *{ending}"
        raise UserError(f"responses {folder}: there is {problem}; give a folder with the answers of one model")
    return files[0]


def _parse_response(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
        value["id"] = str(value["id"])
        if not isinstance(value["response"], str):
            raise TypeError(f"response is {type(value['response']).__name__}, not text")
    except (ValueError, KeyError, TypeError) as error:
        problem = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file}, line {number} is no response row: {problem}; each needs id and response") from error
    return value


def _check_row(
    row: BenchmarkRow, value: Mapping[str, Any], file: Path, number: int, benchmark: Benchmark
) -> BenchmarkRow:
    """Return `row` if the response belongs to it. Raises UserError if its keys differ from the row's."""
    expected = row.as_upstream(value["id"])
    compared = ("context", "prompt", "options", "target", "benchmark_name")
    differing = [key for key in compared if key in value and value[key] != expected.get(key)]
    if differing or "prompt" not in value:
        raise UserError(
            f"{file}, line {number}: its {(differing or ['prompt'])[0]} is not that of row {value['id']} of MixEval "
            f"{benchmark.version} ({benchmark.split}); give the --version and --split that were answered"
        )
    return row
