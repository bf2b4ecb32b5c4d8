"""The settings of an IFEval run, and its inputs, which are checked before anything is paid for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from apo.evaluation.answers import RowAnswer, check_folder_and_models
from apo.evaluation.config import BenchmarkConfig, with_batch_tokens
from apo.evaluation.ifeval.benchmark import IFEvalRow, read_benchmark, read_responses
from apo.evaluation.ifeval.checkers import instruction_types
from apo.evaluation.results import SCORE
from clair.core.errors import check_name
from clair.inference.config import ModelConfig


class IFEvalModelConfig(ModelConfig):
    """The model that answers. The defaults are those of lm-evaluation-harness: greedy, 1280 tokens."""

    temperature: float | None = Field(default=0.0, ge=0)
    max_tokens: int | None = Field(default=1280, ge=1)


class IFEvalConfig(BenchmarkConfig):
    """The settings of an evaluation on IFEval. `responses` is a file of rows of `prompt` and `response`."""

    prompts: str = Field(min_length=1)
    """The benchmark's input_data.jsonl, or prompts of the same format."""
    model: IFEvalModelConfig | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen
    groups: Mapping[str, tuple[str, ...]] = {}
    """Groups of instruction types that are reported apart, by name."""

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that get requests, by role."""
        return {"model": with_batch_tokens(self.model)} if self.model else {}


@dataclass(frozen=True, slots=True)
class IFEvalInputs:
    """The checked inputs of an evaluation. `ready_answers` are existing responses; None: the model answers."""

    rows: Sequence[IFEvalRow]
    ready_answers: Sequence[RowAnswer[IFEvalRow]] | None


def load_inputs(config: IFEvalConfig) -> IFEvalInputs:
    """Load and check all inputs before a request is sent or a file is written. Raises UserError."""
    check_folder_and_models(config, SCORE)
    types = instruction_types()
    for group, names in config.groups.items():
        for name in names:
            check_name(f"groups.{group}: no instruction type", name, types)
    rows = read_benchmark(config.prompts, config.limit)
    answers = read_responses(config.responses, rows) if config.responses is not None else None
    return IFEvalInputs(rows, answers)
