"""Records that all benchmarks share: one item, its score, the uncertainty of a mean, and what a score belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field

from clair.core.recipe import Recipe

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


class BenchmarkItem(Recipe):
    """One answer to one question of a benchmark: a line of items.jsonl."""

    row: int = Field(ge=0)
    """Index of the question in the benchmark's file, from 0."""
    sample: int = Field(default=0, ge=0)
    """Index among the answers to the same question."""
    question: str = Field(min_length=1)
    """Hash of the question's content. Rows that repeat a question share it."""
    prompt: str
    """The user turn that the model was sent."""
    response: str
    truncated: bool = False
    """The response ended at the token limit, without an end-of-turn token."""
    unresolved: str | None = None
    """The reason if the score is not the answer's own: there is no answer, or no verdict on it."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def unanswered(self) -> bool:
        """True if a server refused the model's or the judge's request: the score is unknown, not 0."""
        refused = ("answer_http_", "judge_http_", "judge_content_filter")
        return self.unresolved is not None and self.unresolved.startswith(refused)


class ScoreInterval(Recipe):
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


class BenchmarkScore(Recipe):
    """score.json: what the scores of all benchmarks have in common, beside the scores themselves."""

    format: Literal[1] = 1
    model: ModelUsed
    system: str | None = None
    """The system prompt sent with each question; the benchmarks have none."""
    samples: int = Field(default=1, ge=1)
    limit: int | None = None
    """The number of rows that were used, the first ones; None: all."""
    seed: int = 0
    unresolved: int
    unresolved_reasons: Mapping[str, int] = {}
    unanswered: int = 0
    """Those that a server refused."""
    truncated: int
    """Items whose answer reached the token limit."""
    usage: Mapping[Role, Usage] = {}
    data: Mapping[str, str]
    """SHA-256 of the benchmark's data, by name."""
    items_sha256: str
    python: str = ""
    versions: Mapping[str, str | None] = {}
    git_commit: str | None = None
    seconds: float | None = None
