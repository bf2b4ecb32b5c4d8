"""The answers to score: read from response files, or requested from a model through the ledger."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo.evaluation.mixeval.benchmark import Benchmark, BenchmarkRow
from apo.evaluation.results import SPLITS, Split
from clair.core.errors import UserError, one_line
from clair.core.files import read_text
from clair.data.records import Dropped, Message
from clair.inference.client import ModelClient
from clair.inference.model import visible_answer
from clair.inference.model_folder import adapter_base

_UPSTREAM_NAMES: Mapping[Split, str] = {"free-form": "close_freeform", "multiple-choice": "close_multichoice"}
_MAX_REPEATS = 10_000  # above the number of rows that repeat one question in any benchmark


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to one row. `unresolved` names the reason if there is none, or none that ended normally."""

    row: BenchmarkRow
    text: str
    sample: int = 0
    truncated: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    unresolved: str | None = None

    @property
    def name(self) -> str:
        """The row's name in the ledger."""
        return f"{self.row.split}:{self.row.row}"


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """An answer to request from the model. `draw` differs for equal questions that get answers of their own."""

    row: BenchmarkRow
    sample: int
    draw: int


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


def messages_for(row: BenchmarkRow, system: str | None) -> list[Message]:
    """The messages of a request: one user turn, after a system prompt if there is one (the benchmark has none)."""
    first: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": row.text}]


async def request_answer(client: ModelClient, request: AnswerRequest, system: str | None) -> Answer:
    """Request the model's answer, or take it from the ledger. Raises Dropped if there is none.

    An answer that the token limit cut off counts; one that was filtered, refused or interrupted is unresolved.
    """
    name = f"{request.row.split}:{request.row.row}"
    reply = await client.ask(list(messages_for(request.row, system)), row=name, sample=request.draw)
    incomplete = reply.incomplete()
    cut_off = incomplete == "truncated"
    unresolved = f"answer_{incomplete}" if incomplete and not cut_off else None
    return Answer(
        request.row,
        reply.text or reply.refusal,
        request.sample,
        truncated=cut_off,
        prompt_tokens=reply.usage.get("prompt_tokens"),
        completion_tokens=reply.usage.get("completion_tokens"),
        unresolved=unresolved,
    )


def refused_answer(request: AnswerRequest, dropped: Dropped) -> Answer:
    """The empty, unresolved answer to a question that the model refused for good."""
    return Answer(request.row, "", request.sample, unresolved=f"answer_{dropped.reason}")


def check_system_prompt(path: str, system: str) -> None:
    """Check that a local model's template includes a system prompt. Raises UserError if it refuses or omits it."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    base = adapter_base(path)
    has_tokenizer = base is None or (Path(path) / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(path if has_tokenizer else base)
    turns = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        message = one_line(error)
        raise UserError(
            f"the chat template of {path} refuses a system prompt ({message}); leave out --system"
        ) from error
    if system.strip() not in text:
        raise UserError(f"the chat template of {path} omits a system prompt; leave out --system")


# ---- response files


def read_responses(folder: str | Path, benchmark: Benchmark) -> list[Answer]:
    """Read existing answers in the benchmark's row format: free-form first, each split in the order of its file.

    Raises UserError for a row that is missing, occurs twice, or differs from the benchmark's row.
    """
    answers: list[Answer] = []
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
                    Answer(_check_row(rows[name], value, file, number, benchmark), visible_answer(value["response"]))
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
