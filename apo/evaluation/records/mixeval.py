"""Records of MixEval: an item with its verdict, and the score with that of each underlying benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from apo.evaluation.records.benchmark import BenchmarkItem, BenchmarkScore, Scored, ScoreInterval
from clair.core.recipe import Recipe

MAX_NEW_TOKENS = 512
"""The benchmark's limit of an answer, in tokens."""

Split = Literal["free-form", "multiple-choice"]
SPLITS: tuple[Split, ...] = ("free-form", "multiple-choice")
Profile = Literal["faithful", "strict"]


class MixEvalItem(BenchmarkItem):
    """One answer to one row of MixEval with its verdict. (split, row, sample) is unique."""

    split: Split
    passage: str | None = None
    """Hash of the passage that the question is about, shared by all questions about it; None for none."""
    benchmark: str
    target: tuple[str, ...]
    """Right answers: the golden ones of a free-form question, the letter of a multiple-choice question."""
    judgement: str = ""
    """The judge's last reply; empty for the rule parser."""
    verdict: str | None = None
    """The number or letter read from the judgement, the value drawn for a fallback, or None."""
    score: float = Field(ge=0, le=1)
    """Without a verdict the fallback's, or 0."""
    fallback: bool = False
    """The score was drawn at random (profile faithful)."""
    rounds: int = Field(default=1, ge=0)
    """Requests to the judge; 0 for the rule parser."""
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

    def scored(self, profile: Profile) -> Scored:
        """The score; under *strict* an answer that was cut off may as well be right or wrong."""
        resolved = self.unresolved is None and not (self.truncated and profile == "strict")
        return Scored(
            self.split, self.benchmark, self.row, self.question, self.cluster, self.score, resolved, self.unanswered
        )

    @model_validator(mode="after")
    def _consistent(self) -> MixEvalItem:
        if self.fallback and self.unresolved is None:
            raise ValueError("fallback without unresolved: only what has no verdict gets a random score")
        return self


class SubsetScore(Recipe):
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


class MixEvalScore(BenchmarkScore):
    """The score on MixEval with its intervals, and the judge it belongs to. `limit` is of each split."""

    benchmark: Literal["MixEval"] = "MixEval"
    version: str
    split: Literal["hard", "full"]
    profile: Profile
    judge: JudgeUsed
    overall: float | None
    """None if an item is `unanswered`, as in each split: only the bracket is known then."""
    free_form: float | None
    multiple_choice: float | None
    by_benchmark: Mapping[Split, Mapping[str, SubsetScore]]
    intervals: Mapping[Literal["overall", "free_form", "multiple_choice"], ScoreInterval]
    fallbacks: int
    shared_judgements: bool
    """True if equal judge requests were sent once and share their reply."""

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
