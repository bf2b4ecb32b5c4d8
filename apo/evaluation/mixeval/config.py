"""The settings of a MixEval run, and its inputs, which are checked before anything is paid for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from apo.evaluation.answers import RowAnswer, check_folder_and_models
from apo.evaluation.config import BenchmarkConfig, with_batch_tokens
from apo.evaluation.mixeval.answers import read_responses
from apo.evaluation.mixeval.benchmark import VERSIONS, Benchmark, HardOrFull, JudgePrompts, load, load_judge_prompts
from apo.evaluation.mixeval.judging import with_profile
from apo.evaluation.records.mixeval import Profile
from apo.evaluation.results import SCORE
from clair.inference.config import ModelConfig


class MixEvalConfig(BenchmarkConfig):
    """The settings of an evaluation on MixEval. `responses` is a folder, with a file of rows for each split."""

    data: str
    version: str = VERSIONS[0]
    split: HardOrFull = "hard"
    profile: Profile = "faithful"
    judge: ModelConfig | Literal["rule"]
    """The judge. The profile sets its request options."""
    seed: int = Field(default=42, ge=0)
    """Seed of upstream's random fallback scores, a strict judge, and a local model's sampling."""
    independent_judgements: bool = False
    upstream_files: bool = False

    @model_validator(mode="after")
    def _fits(self) -> MixEvalConfig:
        if self.judge == "rule" and self.independent_judgements:
            raise ValueError("independent judgements are for a judge that is a model, not the rule parser")
        if self.upstream_files and self.samples > 1:
            raise ValueError("upstream's files hold one answer a row; leave out samples or the upstream files")
        return self

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that get requests, by role; the judge with the profile's request options."""
        roles = {"model": with_batch_tokens(self.model)} if self.model else {}
        if self.judge != "rule":
            roles["judge"] = with_profile(self.judge, self.profile, self.seed)
        return roles


@dataclass(frozen=True, slots=True)
class MixEvalInputs:
    """The checked inputs of an evaluation. `ready_answers` are existing responses; None: the model answers."""

    benchmark: Benchmark
    judge_prompts: JudgePrompts | None
    ready_answers: Sequence[RowAnswer] | None


def load_inputs(config: MixEvalConfig) -> MixEvalInputs:
    """Load and check all inputs before a request is sent or a file is written. Raises UserError."""
    check_folder_and_models(config, SCORE)
    benchmark = load(config.data, config.version, config.split, config.limit)
    prompts = load_judge_prompts(config.data) if config.judge != "rule" else None
    answers = read_responses(config.responses, benchmark) if config.responses is not None else None
    return MixEvalInputs(benchmark, prompts, answers)
