"""The result folder of an evaluation: score.json and items.jsonl, written atomically and checked when read.

docs/evaluation.md specifies both. items.jsonl is written first and score.json, which holds its hash, last: so a folder
whose files belong to different runs is recognised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from apo.evaluation.records.benchmark import Scored
from apo.evaluation.records.ifeval import MEASURES, IFEvalItem, IFEvalScore
from apo.evaluation.records.mixeval import MixEvalItem, MixEvalScore
from clair.core.errors import UserError, one_line
from clair.core.files import read_json, write_atomically, write_json

SCORE = "score.json"
ITEMS = "items.jsonl"

AnyItem = MixEvalItem | IFEvalItem
AnyScore = TypeVar("AnyScore", MixEvalScore, IFEvalScore)


class Results(NamedTuple):
    """The content of a result folder. Items are ordered by split, row and sample."""

    folder: Path
    score: MixEvalScore | IFEvalScore
    items: tuple[AnyItem, ...]

    def scored(self) -> Iterator[Scored]:
        """The scores that are averaged and compared."""
        for item in self.items:
            if isinstance(item, IFEvalItem):
                for measure in MEASURES:
                    yield from item.scored(measure)
            elif isinstance(self.score, MixEvalScore):
                yield item.scored(self.score.profile)


_KINDS: Mapping[str, tuple[type[MixEvalScore | IFEvalScore], type[AnyItem]]] = {
    "MixEval": (MixEvalScore, MixEvalItem),
    "IFEval": (IFEvalScore, IFEvalItem),
}


def write_results(folder: str | Path, score: AnyScore, items: Sequence[AnyItem]) -> AnyScore:
    """Write items.jsonl, then score.json with its hash, each atomically."""
    out = Path(folder)
    ordered = sorted(items, key=lambda item: item.key)
    lines = "".join(json.dumps(i.model_dump(mode="json"), ensure_ascii=False) + "\n" for i in ordered)
    content = lines.encode("utf-8", "backslashreplace")
    score = score.model_copy(update={"items_sha256": hashlib.sha256(content).hexdigest()})
    write_atomically(out / ITEMS, content)
    write_json(out / SCORE, score.model_dump(mode="json"))
    return score


def read_results(folder: str | Path) -> Results:
    """Read a result folder. Raises UserError if it has no result, or if its two files belong to different runs."""
    out = Path(folder)
    if not (out / SCORE).is_file():
        raise UserError(f"{out} holds no {SCORE}; give the --out of a finished `apo eval mixeval` or `apo eval ifeval`")
    value = read_json(out / SCORE)
    benchmark = value.get("benchmark", "MixEval") if isinstance(value, dict) else "MixEval"
    if benchmark not in _KINDS:
        raise UserError(f"{out / SCORE} is of the benchmark {one_line(repr(benchmark))}; known: {', '.join(_KINDS)}")
    score_type, item_type = _KINDS[benchmark]
    score, again = _validated(score_type, value, out / SCORE), f"run the same `apo eval {benchmark.lower()}` again"
    if not (out / ITEMS).is_file():
        raise UserError(f"{out} has a {SCORE} but no {ITEMS}; {again}")
    content = (out / ITEMS).read_bytes()
    if hashlib.sha256(content).hexdigest() != score.items_sha256:
        raise UserError(f"{out / ITEMS} is not what {SCORE} was made of; {again}")
    lines = content.decode("utf-8").split("\n")[:-1]
    items = tuple(_validated(item_type, _line(line, n, out), out / ITEMS, n) for n, line in enumerate(lines, 1))
    keys = {item.key for item in items}
    if len(keys) != len(items) or len(items) != score.items:
        raise UserError(f"{out / ITEMS} has rows twice or too few; {again}")
    return Results(out, score, items)


def _line(line: str, number: int, out: Path) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{out / ITEMS}, line {number} is no JSON ({error}); evaluate again") from error


def _validated(model: type[Any], value: Any, file: Path, line: int | None = None) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = f"{file}" + (f", line {line}" if line else "")
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{location} is no result of this version ({key}: {first['msg']}); evaluate again") from error
