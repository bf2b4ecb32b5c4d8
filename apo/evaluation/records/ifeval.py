"""Records of IFEval: an item with its instructions, and the shares of prompts and instructions that are followed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from apo.evaluation.records.benchmark import BenchmarkItem, BenchmarkScore, Scored, ScoreInterval
from clair.core.recipe import Recipe

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


class IFEvalItem(BenchmarkItem):
    """One answer to one prompt of IFEval. (row, sample) is unique. Without an answer it follows no instruction."""

    prompt_key: int | str
    """The prompt's `key` in the benchmark."""
    instructions: tuple[Instruction, ...] = Field(min_length=1)

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

    loose: ScoreInterval
    strict: ScoreInterval


class IFEvalScore(BenchmarkScore):
    """The score on IFEval: shares of prompts and of instructions, with their intervals."""

    benchmark: Literal["IFEval"] = "IFEval"
    prompt_loose: float | None
    """The share of prompts all of whose instructions are followed. None if an item is `unanswered`."""
    prompt_strict: float | None
    instruction_loose: float | None
    """The share of instructions that are followed."""
    instruction_strict: float | None
    intervals: Mapping[Measure, ScoreInterval]
    by_type: Mapping[str, InstructionScore]
    groups: Mapping[str, tuple[str, ...]] = {}
    """Groups of instruction types, by name, as in the recipe."""
    by_group: Mapping[str, InstructionScore] = {}
    checkers: Mapping[str, str]
    """The versions of the packages that check the instructions."""

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
