"""IFEval's prompts in the format of its authors, and existing answers to them.

A row of the prompts has `key`, `prompt`, `instruction_id_list` and `kwargs`, one mapping for each instruction. The
prompts are not part of this package: https://github.com/google-research/google-research (instruction_following_eval,
data/input_data.jsonl), or the data set google/IFEval, both Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from apo.evaluation.answers import RowAnswer
from apo.evaluation.ifeval.checkers import check_instruction
from clair.core.errors import UserError
from clair.core.files import content_hash
from clair.data.row_files import file_rows
from clair.inference.model import visible_answer

_KEYS = ("key", "prompt", "instruction_id_list", "kwargs")
MISSING = "answer_missing"


@dataclass(frozen=True, slots=True)
class IFEvalRow:
    """One prompt with its instructions: their types, and the arguments of each. `row` is its index in the file."""

    row: int
    key: int | str
    text: str
    instructions: tuple[str, ...]
    arguments: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        """The row's name in the ledger."""
        return str(self.key)

    @property
    def question(self) -> str:
        """16 hex digits of the hash of prompt and instructions, equal for rows that repeat them."""
        return content_hash([self.text, self.instructions, self.arguments])[:16]


def read_benchmark(path: str, limit: int | None = None) -> tuple[IFEvalRow, ...]:
    """Read the first `limit` rows of a prompts file. Raises UserError for a row that cannot be scored."""
    rows: dict[int | str, IFEvalRow] = {}
    for number, (location, value) in enumerate(islice(file_rows(Path(path), "prompts"), limit)):
        try:
            row = _parse(number, value)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{location}: {problem}; a row has {', '.join(_KEYS)}, as IFEval's own") from error
        if row.key in rows:
            raise UserError(f"{location}: the key {row.key} occurs twice; leave one of them")
        rows[row.key] = row
    return tuple(rows.values())


def _parse(number: int, value: Any) -> IFEvalRow:
    if not isinstance(value, Mapping):
        raise TypeError(f"{type(value).__name__}, not an object")
    key, prompt, names, arguments = (value[key] for key in _KEYS)
    if not isinstance(key, int | str) or not isinstance(prompt, str) or not prompt.strip():
        raise TypeError(f"key is {key!r} and prompt {prompt!r}; a number or a name, and a text that is not empty")
    if not isinstance(names, Sequence) or not names or not isinstance(arguments, Sequence):
        raise TypeError("instruction_id_list and kwargs are lists, with at least one instruction")
    if len(names) != len(arguments):
        raise ValueError(f"{len(names)} instructions and {len(arguments)} kwargs; give one mapping an instruction")
    # A null stands for a key that another instruction has: so the data set google/IFEval writes its rows.
    kwargs_list = [{name: item for name, item in (kwargs or {}).items() if item is not None} for kwargs in arguments]
    for name, kwargs in zip(names, kwargs_list, strict=True):
        check_instruction(name, kwargs)
    return IFEvalRow(number, key, prompt, tuple(names), tuple(kwargs_list))


def read_responses(path: str, rows: Sequence[IFEvalRow]) -> list[RowAnswer[IFEvalRow]]:
    """Read existing answers, rows of `prompt` and `response`. A prompt without one has an empty, unresolved answer.

    Raises UserError if a prompt has two answers, or if no answer is to one of the prompts.
    """
    texts: dict[str, str] = {}
    for location, value in file_rows(Path(path), "responses"):
        prompt, text = (value.get(key) if isinstance(value, Mapping) else None for key in ("prompt", "response"))
        if not isinstance(prompt, str) or not isinstance(text, str):
            raise UserError(f"{location}: a row of answers has prompt and response, both texts")
        if prompt in texts:
            raise UserError(f"{location}: this prompt has an answer already; leave one of them")
        texts[prompt] = visible_answer(text)
    answers = [
        RowAnswer(row, texts[row.text]) if row.text in texts else RowAnswer(row, "", unresolved=MISSING) for row in rows
    ]
    if all(answer.unresolved for answer in answers):
        raise UserError(f"{path} answers none of the {len(rows)} prompts; `prompt` has to equal theirs, word for word")
    return answers
