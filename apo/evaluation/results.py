"""The result folder of an evaluation: score.json and items.jsonl, read with checks and written whole.

The page docs/evaluation.md is the contract. items.jsonl is written first and score.json, which holds its hash, last: a
folder whose two files belong to different runs is told from a finished one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from clair.core.errors import UserError
from clair.core.files import read_json, write_atomically, write_json
from clair.core.recipe import Recipe

SCORE = "score.json"
ITEMS = "items.jsonl"
FORMAT = 1

MAX_NEW_TOKENS = 512
"""The benchmark's own limit of an answer."""

Split = Literal["free-form", "multiple-choice"]
SPLITS: tuple[Split, ...] = ("free-form", "multiple-choice")
Profile = Literal["faithful", "strict"]


class Item(Recipe):
    """One answer to one row of the benchmark, and what became of it: a line of items.jsonl."""

    split: Split
    row: int = Field(ge=0)
    """Place in the benchmark's file of this split, from 0. (split, row, sample) is unique."""
    sample: int = Field(0, ge=0)
    """Which of several answers to the same row."""
    question: str = Field(min_length=1)
    """Hash of the question's content. Rows that repeat a question share it."""
    passage: str | None = None
    """Hash of the passage that the question is about, shared by all questions about it; None for none."""
    benchmark: str
    prompt: str
    """What the model was sent, as a user turn."""
    target: tuple[str, ...]
    """Right answers: the golden ones of a free-form question, the letter of a multiple-choice question."""
    response: str
    truncated: bool = False
    """The response ended at a limit of tokens, the model's own end of turn not reached."""
    judgement: str = ""
    """The judge's last reply; empty for the rule parser."""
    verdict: str | None = None
    """What was read out of the judgement, a number or a letter; what was drawn, of a fallback; or None."""
    score: float = Field(ge=0, le=1)
    unresolved: str | None = None
    """Why there is no verdict, by name; the score is then `fallback`'s, or 0."""
    fallback: bool = False
    """The score was drawn at random (profile faithful)."""
    rounds: int = Field(1, ge=0)
    """How many times the judge was asked; 0 for the rule parser."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    judge_prompt_tokens: int = 0
    judge_completion_tokens: int = 0

    @property
    def key(self) -> tuple[str, int, int]:
        """What pairs this item with the same item of another run."""
        return self.split, self.row, self.sample

    @property
    def cluster(self) -> str:
        """What is drawn independently: the passage, or the question where there is none."""
        return self.passage or self.question

    @property
    def unanswered(self) -> bool:
        """A server refused the request, the model's or the judge's: its score is unknown, not 0."""
        refused = ("answer_http_", "judge_http_", "judge_content_filter")
        return self.unresolved is not None and self.unresolved.startswith(refused)

    @model_validator(mode="after")
    def _consistent(self) -> Item:
        if self.fallback and self.unresolved is None:
            raise ValueError("fallback without unresolved: only what has no verdict gets a random score")
        return self


class Interval(Recipe):
    """How sure a mean over items is. Shares, not per cent; `score` of the part may be rounded, `mean` is not.

    Where an item is `unanswered`, only `bracket` is known and the rest None.
    """

    mean: float | None
    n: int
    """Items."""
    questions: int
    """Distinct questions."""
    clusters: int | None = None
    """Distinct passages, and questions without one: what is drawn independently."""
    se_naive: float | None
    """As if all items were independent: sqrt(variance / n). None for fewer than two items."""
    se_clustered: float | None
    """Items of one cluster may be correlated in any way. None for fewer than two clusters."""
    ci95: tuple[float, float] | None
    """The 95 % interval by the clustered standard error."""
    unique_mean: float | None
    """Mean over distinct questions of the mean of their items."""
    bracket: tuple[float, float]
    """The mean if all unresolved items were wrong, and if all were right; under *strict* cut off answers likewise."""


class Part(Recipe):
    """The items of one underlying benchmark in one split; no score where one of them is `unanswered`."""

    score: float | None
    n: int
    right: float
    """Sum of the items' scores."""
    unresolved: int


class JudgeUsed(Recipe):
    """Who judged. `options` are all request options but the messages; `prompts_sha256` is of the judge's words."""

    kind: Literal["model", "rule"]
    model: str | None = None
    identity: str | None = None
    options: Mapping[str, Any] = {}
    answered_by: tuple[str, ...] = ()
    """The model names that the replies carried: a snapshot that an alias stood for."""
    prompts_sha256: str | None = None


class ModelUsed(Recipe):
    """Who answered: `identity` is the hash of the weights, or name and URL; `options` how it generated."""

    name: str
    identity: str
    options: Mapping[str, Any] = {}


class Usage(Recipe):
    """Tokens and calls of one role; `cost` in the currency of the given price, as a decimal text, or None."""

    prompt: int = 0
    completion: int = 0
    calls: int = 0
    reused: int = 0
    """Replies that the ledger or an equal request of this run already had."""
    cost: str | None = None


class Score(Recipe):
    """score.json: the score, what it is of, and how sure it is."""

    format: Literal[1] = 1
    benchmark: Literal["MixEval"] = "MixEval"
    version: str
    split: Literal["hard", "full"]
    profile: Profile
    judge: JudgeUsed
    model: ModelUsed
    system: str | None = None
    """The system prompt before each question; the benchmark has none."""
    samples: int = Field(1, ge=1)
    limit: int | None = None
    """Only the first so many rows of each split were asked."""
    seed: int = 0
    overall: float | None
    """None where an item is `unanswered`, here and of each part: only the bracket is known then."""
    free_form: float | None
    multiple_choice: float | None
    by_benchmark: Mapping[Split, Mapping[str, Part]]
    intervals: Mapping[Literal["overall", "free_form", "multiple_choice"], Interval]
    unresolved: int
    unresolved_reasons: Mapping[str, int] = {}
    unanswered: int = 0
    """How many of them a server refused."""
    fallbacks: int
    truncated: int
    shared_judgements: bool
    """Equal judge requests were asked once and share their reply."""
    usage: Mapping[Literal["model", "judge"], Usage] = {}
    data: Mapping[str, str]
    """SHA-256 of each data file."""
    items_sha256: str
    python: str = ""
    versions: Mapping[str, str | None] = {}
    git_commit: str | None = None
    seconds: float | None = None

    def comparable(self) -> dict[str, Any]:
        """What two results must agree in, by dotted name, for a difference of their scores to mean anything."""
        return {
            "benchmark": self.benchmark,
            "version": self.version,
            "split": self.split,
            "data": dict(sorted(self.data.items())),
            "limit": self.limit,
            "profile": self.profile,
            "system": self.system,
            "max_tokens": self.model.options.get("max_tokens", MAX_NEW_TOKENS),
            "judge.kind": self.judge.kind,
            "judge.model": self.judge.model,
            "judge.options": dict(self.judge.options),
            "judge.answered_by": sorted(self.judge.answered_by),
            "judge.prompts_sha256": self.judge.prompts_sha256,
        }


class Results(NamedTuple):
    """A result folder: its score and its items, ordered by split, row and sample."""

    folder: Path
    score: Score
    items: tuple[Item, ...]


def write_results(folder: str | Path, score: Score, items: Sequence[Item]) -> Score:
    """Write items.jsonl, then score.json with its hash; each file is at any instant wholly old or wholly new."""
    out = Path(folder)
    ordered = sorted(items, key=lambda item: (SPLITS.index(item.split), item.row, item.sample))
    lines = "".join(json.dumps(i.model_dump(mode="json"), ensure_ascii=False) + "\n" for i in ordered)
    content = lines.encode("utf-8", "backslashreplace")
    score = score.model_copy(update={"items_sha256": hashlib.sha256(content).hexdigest()})
    write_atomically(out / ITEMS, content)
    write_json(out / SCORE, score.model_dump(mode="json"))
    return score


def read_results(folder: str | Path) -> Results:
    """The results in a folder. Raises UserError where there are none, or where its two files do not belong together."""
    out = Path(folder)
    if not (out / SCORE).is_file():
        raise UserError(f"{out} holds no {SCORE}; give the --out of a finished `apo eval mixeval`")
    score = _checked(Score, read_json(out / SCORE), out / SCORE)
    if not (out / ITEMS).is_file():
        raise UserError(f"{out} has a {SCORE} but no {ITEMS}; run the same `apo eval mixeval` again")
    content = (out / ITEMS).read_bytes()
    if hashlib.sha256(content).hexdigest() != score.items_sha256:
        raise UserError(f"{out / ITEMS} is not what {SCORE} was made of; run the same `apo eval mixeval` again")
    lines = content.decode("utf-8").split("\n")[:-1]
    items = tuple(_checked(Item, _line(line, n, out), out / ITEMS, n) for n, line in enumerate(lines, 1))
    keys = {item.key for item in items}
    if len(keys) != len(items) or len(items) != score.intervals["overall"].n:
        raise UserError(f"{out / ITEMS} has rows twice or too few; run the same `apo eval mixeval` again")
    return Results(out, score, items)


def _line(line: str, number: int, out: Path) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{out / ITEMS}, line {number} is no JSON ({error}); evaluate again") from error


def _checked(model: type[Any], value: Any, file: Path, line: int | None = None) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = f"{file}" + (f", line {line}" if line else "")
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{where} is no result of this version ({place}: {first['msg']}); evaluate again") from error
