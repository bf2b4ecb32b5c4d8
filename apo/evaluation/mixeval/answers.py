"""The answers that are scored: read from response files, or asked of a model once and kept in the ledger."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo.evaluation.mixeval.benchmark import Benchmark, Row
from apo.evaluation.results import SPLITS, Split
from clair.core.errors import UserError, one_line
from clair.core.files import read_text
from clair.data.records import Dropped, Message
from clair.inference.client import ModelClient
from clair.inference.model import visible_answer
from clair.inference.model_folder import adapter_base

_UPSTREAM_NAMES: Mapping[Split, str] = {"free-form": "close_freeform", "multiple-choice": "close_multichoice"}
_ALIKE = 10_000  # more than any benchmark has rows of one question


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to one row. `unresolved` says by name why there is none, or none that ended as an answer does."""

    row: Row
    text: str
    sample: int = 0
    truncated: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    unresolved: str | None = None

    @property
    def name(self) -> str:
        """The row, for the ledger."""
        return f"{self.row.split}:{self.row.row}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """An answer that is to be asked for. `draw` tells equal questions apart that want answers of their own."""

    row: Row
    sample: int
    draw: int


def wanted(benchmark: Benchmark, samples: int, *, alike: bool) -> list[Wanted]:
    """All answers of an evaluation, in the benchmark's order.

    Where decoding is greedy (`alike`), rows that repeat a question share its answer; else each draws its own, as
    upstream does.
    """
    seen: Counter[str] = Counter()
    found = []
    for row in benchmark.all_rows:
        draw = 0 if alike else seen[row.text]
        seen[row.text] += 1
        found += [Wanted(row, sample, sample * _ALIKE + draw) for sample in range(samples)]
    return found


def batch_tokens_here() -> int:
    """Tokens of a batch on this machine: a GPU wants many; a CPU's caches hold few, and more only slow it down."""
    import torch

    return 131_072 if torch.cuda.is_available() else 16_384


def messages_of(row: Row, system: str | None) -> list[Message]:
    """The conversation a model is asked in: the benchmark has one user turn, and no system prompt of its own."""
    first: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": row.text}]


async def answer(client: ModelClient, want: Wanted, system: str | None) -> Answer:
    """The model's answer, from the ledger or asked for now. Raises Dropped where it gave none.

    One that a limit of tokens cut off is an answer; one that was filtered, refused or broken off is unresolved.
    """
    name = f"{want.row.split}:{want.row.row}"
    reply = await client.ask(list(messages_of(want.row, system)), row=name, sample=want.draw)
    tokens = (reply.usage.get(key) for key in ("prompt_tokens", "completion_tokens"))
    incomplete = reply.incomplete()
    cut_off = incomplete == "truncated"
    unresolved = f"answer_{incomplete}" if incomplete and not cut_off else None
    return Answer(want.row, reply.text or reply.refusal, want.sample, cut_off, *tokens, unresolved)


def no_answer(want: Wanted, dropped: Dropped) -> Answer:
    """What stands for an answer that the model refused to give for good."""
    return Answer(want.row, "", want.sample, unresolved=f"answer_{dropped.reason}")


def check_system_prompt(path: str, system: str) -> None:
    """See that a local model's template takes a system prompt. Raises UserError where it refuses or leaves it out."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    base = adapter_base(path)
    own = base is None or (Path(path) / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(path if own else base)
    turns = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        told = one_line(error)
        raise UserError(f"the chat template of {path} refuses a system prompt ({told}); leave out --system") from error
    if system.strip() not in text:
        raise UserError(f"the chat template of {path} leaves a system prompt out; leave out --system")


# ---- response files


def read_responses(folder: str | Path, benchmark: Benchmark) -> list[Answer]:
    """Existing answers in the benchmark's own row format, free-form first, each split in the order of its file.

    Raises UserError for a row that is missing, stands twice, or asks something else than the benchmark's row.
    """
    answers: list[Answer] = []
    for split in SPLITS:
        file = _response_file(Path(folder), split, benchmark)
        rows = {str(row.row): row for row in benchmark.rows[split]}
        lines: dict[str, int] = {}
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if not line.strip():
                continue
            value = _value(line, file, number)
            name = value["id"]
            if name in lines:
                raise UserError(f"{file}, line {number}: row {name} stands in line {lines[name]} already; keep one")
            lines[name] = number
            if name in rows:
                answers.append(
                    Answer(_same(rows[name], value, file, number, benchmark), visible_answer(value["response"]))
                )
        missing = [name for name in rows if name not in lines]
        if missing:
            raise UserError(
                f"{file} has no answer to {len(missing)} of {len(rows)} rows (the first: row {missing[0]}); answer "
                f"them, or evaluate the first rows only with --limit"
            )
    return answers


def _response_file(folder: Path, split: Split, benchmark: Benchmark) -> Path:
    """`free-form.jsonl`, or upstream's `MODEL_close_freeform_hard.jsonl`."""
    own = folder / f"{split}.jsonl"
    if own.is_file():
        return own
    ending = f"_{_UPSTREAM_NAMES[split]}{'_hard' if benchmark.split == 'hard' else ''}.jsonl"
    found = sorted(file for file in folder.glob("*.jsonl") if file.name.endswith(ending))
    if len(found) != 1:
        told = f"{len(found)} files *{ending}" if found else f"neither {own.name} nor a file *{ending}"
        raise UserError(f"responses {folder}: there is {told}; give a folder with the answers of one model")
    return found[0]


def _value(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
        value["id"] = str(value["id"])
        if not isinstance(value["response"], str):
            raise TypeError(f"response is {type(value['response']).__name__}, not text")
    except (ValueError, KeyError, TypeError) as error:
        told = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file}, line {number} is no response row: {told}; each needs id and response") from error
    return value


def _same(row: Row, value: Mapping[str, Any], file: Path, number: int, benchmark: Benchmark) -> Row:
    """The row, where the response is to it."""
    asked = row.as_upstream(value["id"])
    compared = ("context", "prompt", "options", "target", "benchmark_name")
    other = [key for key in compared if key in value and value[key] != asked.get(key)]
    if other or "prompt" not in value:
        raise UserError(
            f"{file}, line {number}: its {(other or ['prompt'])[0]} is not that of row {value['id']} of MixEval "
            f"{benchmark.version} ({benchmark.split}); give the --version and --split that were answered"
        )
    return row


def distinct(answers: Iterable[Answer]) -> int:
    """How many different judge requests answers make."""
    return len(
        {
            (a.row.split, a.row.prompt, a.row.lettered, a.row.target if not a.row.options else (), a.text)
            for a in answers
        }
    )
