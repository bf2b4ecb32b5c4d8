"""The result folder of an evaluation: score.json and items.jsonl, written atomically and checked when read.

docs/evaluation.md specifies both. items.jsonl is written first and score.json, which holds its hash, last: so a folder
whose files belong to different runs is recognised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError, model_validator

from clair.core.errors import UserError, one_line
from clair.core.files import read_json, write_atomically, write_json
from clair.core.recipe import Recipe

SCORE = "score.json"
ITEMS = "items.jsonl"
FORMAT = 1

MAX_NEW_TOKENS = 512
"""The benchmark's limit of an answer, in tokens."""

Split = Literal["free-form", "multiple-choice"]
SPLITS: tuple[Split, ...] = ("free-form", "multiple-choice")
Profile = Literal["faithful", "strict"]
Role = Literal["model", "judge"]


class Scored(NamedTuple):
    """One number that is averaged and compared: a score in [0, 1] and the unit of independent sampling it belongs to.

    `section` is the split or the measure that it belongs to, `kind` the underlying benchmark or the instruction type;
    (section, row) identifies it in every result. `resolved` is False if the score may as well be 0 or 1.
    """

    section: str
    kind: str
    row: int | tuple[int, int]
    question: str
    cluster: str
    score: float
    resolved: bool
    unanswered: bool


class Item(Recipe):
    """One answer to one row of the benchmark with its verdict: a line of items.jsonl."""

    split: Split
    row: int = Field(ge=0)
    """Index in the benchmark's file of this split, from 0. (split, row, sample) is unique."""
    sample: int = Field(default=0, ge=0)
    """Index among the answers to the same row."""
    question: str = Field(min_length=1)
    """Hash of the question's content. Rows that repeat a question share it."""
    passage: str | None = None
    """Hash of the passage that the question is about, shared by all questions about it; None for none."""
    benchmark: str
    prompt: str
    """The user turn that the model was sent."""
    target: tuple[str, ...]
    """Right answers: the golden ones of a free-form question, the letter of a multiple-choice question."""
    response: str
    truncated: bool = False
    """The response ended at the token limit, without an end-of-turn token."""
    judgement: str = ""
    """The judge's last reply; empty for the rule parser."""
    verdict: str | None = None
    """The number or letter read from the judgement, the value drawn for a fallback, or None."""
    score: float = Field(ge=0, le=1)
    unresolved: str | None = None
    """The reason if there is no verdict; the score is then the fallback's, or 0."""
    fallback: bool = False
    """The score was drawn at random (profile faithful)."""
    rounds: int = Field(default=1, ge=0)
    """Requests to the judge; 0 for the rule parser."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    judge_prompt_tokens: int = 0
    judge_completion_tokens: int = 0

    @property
    def key(self) -> tuple[str, int, int]:
        """Identifies the same item in another run."""
        return self.split, self.row, self.sample

    @property
    def cluster(self) -> str:
        """The unit of independent sampling: the passage, or the question if it has none."""
        return self.passage or self.question

    @property
    def unanswered(self) -> bool:
        """True if a server refused the model's or the judge's request: the score is unknown, not 0."""
        refused = ("answer_http_", "judge_http_", "judge_content_filter")
        return self.unresolved is not None and self.unresolved.startswith(refused)

    def scored(self, profile: Profile) -> Scored:
        """The score; under *strict* an answer that was cut off may as well be right or wrong."""
        resolved = self.unresolved is None and not (self.truncated and profile == "strict")
        return Scored(
            self.split, self.benchmark, self.row, self.question, self.cluster, self.score, resolved, self.unanswered
        )

    @model_validator(mode="after")
    def _consistent(self) -> Item:
        if self.fallback and self.unresolved is None:
            raise ValueError("fallback without unresolved: only what has no verdict gets a random score")
        return self


class Interval(Recipe):
    """The uncertainty of a mean over items, in shares. `mean` is never rounded.

    If an item is `unanswered`, only `bracket` is known and the rest is None.
    """

    mean: float | None
    n: int
    """Items."""
    questions: int
    """Distinct questions."""
    clusters: int | None = None
    """Distinct passages and questions without a passage: the independent units."""
    se_naive: float | None
    """Standard error if all items were independent: sqrt(variance / n). None for fewer than two items."""
    se_clustered: float | None
    """Standard error that allows any correlation within a cluster. None for fewer than two clusters."""
    ci95: tuple[float, float] | None
    """The 95 % interval by the clustered standard error."""
    unique_mean: float | None
    """Mean over distinct questions of the mean of their items."""
    bracket: tuple[float, float]
    """The mean if all unresolved items (under *strict* also cut off answers) are wrong, and if all are right."""


class BenchmarkScore(Recipe):
    """The score of one underlying benchmark in one split; None if one of its items is `unanswered`."""

    score: float | None
    n: int
    right: float
    """Sum of the items' scores."""
    unresolved: int


class JudgeUsed(Recipe):
    """The judge. `options` are all request options except the messages; `prompts_sha256` hashes its prompts."""

    kind: Literal["model", "rule"]
    model: str | None = None
    identity: str | None = None
    options: Mapping[str, Any] = {}
    answered_by: tuple[str, ...] = ()
    """The model names in the replies, such as the snapshot behind an alias."""
    prompts_sha256: str | None = None


class ModelUsed(Recipe):
    """The model that answered: `identity` is the hash of its weights, or name and URL; `options` are for generation."""

    name: str
    identity: str
    options: Mapping[str, Any] = {}


class Usage(Recipe):
    """Tokens and calls of one role; `cost` is a decimal text in the currency of its price, or None."""

    prompt: int = 0
    completion: int = 0
    calls: int = 0
    reused: int = 0
    """Replies taken from the ledger or from an equal request of this run."""
    cost: str | None = None


class Score(Recipe):
    """score.json: the score, its intervals, and the model, judge and data it belongs to."""

    format: Literal[1] = 1
    benchmark: Literal["MixEval"] = "MixEval"
    version: str
    split: Literal["hard", "full"]
    profile: Profile
    judge: JudgeUsed
    model: ModelUsed
    system: str | None = None
    """The system prompt sent with each question; the benchmark has none."""
    samples: int = Field(default=1, ge=1)
    limit: int | None = None
    """The number of rows of each split that were used, the first ones; None: all."""
    seed: int = 0
    overall: float | None
    """None if an item is `unanswered`, as in each split: only the bracket is known then."""
    free_form: float | None
    multiple_choice: float | None
    by_benchmark: Mapping[Split, Mapping[str, BenchmarkScore]]
    intervals: Mapping[Literal["overall", "free_form", "multiple_choice"], Interval]
    unresolved: int
    unresolved_reasons: Mapping[str, int] = {}
    unanswered: int = 0
    """Those that a server refused."""
    fallbacks: int
    truncated: int
    shared_judgements: bool
    """True if equal judge requests were sent once and share their reply."""
    usage: Mapping[Role, Usage] = {}
    data: Mapping[str, str]
    """SHA-256 of each data file."""
    items_sha256: str
    python: str = ""
    versions: Mapping[str, str | None] = {}
    git_commit: str | None = None
    seconds: float | None = None

    def comparable(self) -> dict[str, Any]:
        """The settings, by dotted name, that must be equal for two scores to be comparable."""
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

    @property
    def items(self) -> int:
        """The number of items."""
        return self.intervals["overall"].n

    @property
    def reported(self) -> dict[str, float | None]:
        """The scores by name."""
        return {"overall": self.overall, "free_form": self.free_form, "multiple_choice": self.multiple_choice}


# ---- IFEval

Measure = Literal["prompt_loose", "prompt_strict", "instruction_loose", "instruction_strict"]
MEASURES: tuple[Measure, ...] = ("prompt_loose", "prompt_strict", "instruction_loose", "instruction_strict")


class Instruction(Recipe):
    """One instruction of a prompt, and whether the answer follows it."""

    type: str
    """Such as `length_constraints:number_words`."""
    kwargs: Mapping[str, Any] = {}
    loose: bool
    """The answer follows it, or would without its first line, its last line, both, or asterisks."""
    strict: bool


class IFEvalItem(Recipe):
    """One answer to one prompt of IFEval: a line of items.jsonl."""

    row: int = Field(ge=0)
    """Index in the file of prompts, from 0. (row, sample) is unique."""
    sample: int = Field(default=0, ge=0)
    """Index among the answers to the same prompt."""
    prompt_key: int | str
    """The prompt's `key` in the benchmark."""
    question: str = Field(min_length=1)
    """Hash of the prompt and its instructions."""
    prompt: str
    response: str
    truncated: bool = False
    """The response ended at the token limit; it is scored as it is."""
    instructions: tuple[Instruction, ...] = Field(min_length=1)
    unresolved: str | None = None
    """The reason if there is no answer; it then follows no instruction."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """Identifies the same item in another run."""
        return self.split, self.row, self.sample

    @property
    def split(self) -> str:
        """The measure that `score` belongs to."""
        return "prompt_loose"

    @property
    def benchmark(self) -> str:
        """The types of its instructions."""
        return ", ".join(instruction.type for instruction in self.instructions)

    @property
    def cluster(self) -> str:
        """The unit of independent sampling: the prompt."""
        return self.question

    @property
    def unanswered(self) -> bool:
        """True if the server refused the request: whether the answer follows the instructions is unknown."""
        return self.unresolved is not None and self.unresolved.startswith("answer_http_")

    @property
    def score(self) -> float:
        """1 if the answer follows all instructions loosely."""
        return float(all(instruction.loose for instruction in self.instructions))

    @property
    def target(self) -> tuple[str, ...]:
        """The instructions as text."""
        return tuple(
            f"{instruction.type} {json.dumps(instruction.kwargs, ensure_ascii=False)}"
            if instruction.kwargs
            else instruction.type
            for instruction in self.instructions
        )

    @property
    def judgement(self) -> str:
        """What each instruction's checker finds, a line each."""
        outcomes = {(True, True): "followed", (True, False): "followed loosely", (False, False): "not followed"}
        return "\n".join(f"{i.type}: {outcomes[i.loose, i.strict]}" for i in self.instructions)

    def scored(self, measure: Measure) -> Iterator[Scored]:
        """The prompt's score, or that of each instruction."""
        level, _, mode = measure.partition("_")
        followed = [float(getattr(instruction, mode)) for instruction in self.instructions]
        scores = (
            {self.row: ("", min(followed))}
            if level == "prompt"
            else {
                (self.row, index): (instruction.type, score)
                for index, (instruction, score) in enumerate(zip(self.instructions, followed, strict=True))
            }
        )
        for row, (kind, score) in scores.items():
            yield Scored(
                measure, kind, row, self.question, self.cluster, score, self.unresolved is None, self.unanswered
            )


class InstructionScore(Recipe):
    """How many instructions of some types are followed."""

    loose: Interval
    strict: Interval


class IFEvalScore(Recipe):
    """score.json of IFEval: shares of prompts and instructions, their intervals, and what they belong to."""

    format: Literal[1] = 1
    benchmark: Literal["IFEval"] = "IFEval"
    model: ModelUsed
    system: str | None = None
    samples: int = Field(default=1, ge=1)
    limit: int | None = None
    """The number of prompts that were used, the first ones; None: all."""
    seed: int = 0
    prompt_loose: float | None
    """The share of prompts all of whose instructions are followed. None if an item is `unanswered`."""
    prompt_strict: float | None
    instruction_loose: float | None
    """The share of instructions that are followed."""
    instruction_strict: float | None
    intervals: Mapping[Measure, Interval]
    by_type: Mapping[str, InstructionScore]
    groups: Mapping[str, tuple[str, ...]] = {}
    """Groups of instruction types, by name, as in the recipe."""
    by_group: Mapping[str, InstructionScore] = {}
    unresolved: int
    """Items without an answer."""
    unresolved_reasons: Mapping[str, int] = {}
    unanswered: int = 0
    """Those that a server refused."""
    truncated: int
    """Items whose answer reached the token limit."""
    usage: Mapping[Role, Usage] = {}
    data: Mapping[str, str]
    """SHA-256 of the prompts and their instructions."""
    checkers: Mapping[str, str]
    """The versions of the packages that check the instructions."""
    items_sha256: str
    python: str = ""
    versions: Mapping[str, str | None] = {}
    git_commit: str | None = None
    seconds: float | None = None

    def comparable(self) -> dict[str, Any]:
        """The settings, by name, that must be equal for two scores to be comparable."""
        return {
            "benchmark": self.benchmark,
            "data": dict(self.data),
            "limit": self.limit,
            "system": self.system,
            "max_tokens": self.model.options.get("max_tokens"),
            "checkers": dict(self.checkers),
            "groups": {name: list(types) for name, types in self.groups.items()},
        }

    @property
    def items(self) -> int:
        """The number of items."""
        return self.intervals["prompt_loose"].n

    @property
    def reported(self) -> dict[str, float | None]:
        """The scores by name."""
        return {measure: getattr(self, measure) for measure in MEASURES}


# ---- files


AnyItem = Item | IFEvalItem
AnyScore = TypeVar("AnyScore", Score, IFEvalScore)


class Results(NamedTuple):
    """The content of a result folder. Items are ordered by split, row and sample."""

    folder: Path
    score: Score | IFEvalScore
    items: tuple[AnyItem, ...]

    def scored(self) -> Iterator[Scored]:
        """The scores that are averaged and compared."""
        for item in self.items:
            if isinstance(item, IFEvalItem):
                for measure in MEASURES:
                    yield from item.scored(measure)
            elif isinstance(self.score, Score):
                yield item.scored(self.score.profile)


_KINDS: Mapping[str, tuple[type[Score | IFEvalScore], type[AnyItem]]] = {
    "MixEval": (Score, Item),
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
