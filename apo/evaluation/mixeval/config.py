"""The settings of a MixEval run, and what is checked before it costs anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from apo.evaluation.config import Evaluation, check_folder
from apo.evaluation.mixeval import benchmark as mixeval
from apo.evaluation.mixeval.answers import Answer, check_system_prompt, read_responses
from apo.evaluation.mixeval.benchmark import Benchmark, JudgeWords
from apo.evaluation.mixeval.judging import request_options
from apo.evaluation.results import SCORE, Profile
from clair.inference.config import ModelConfig
from clair.inference.open import check_models


class MixEvalConfig(Evaluation):
    """All of an evaluation, resolved before any work."""

    data: str
    version: str = mixeval.VERSIONS[0]
    split: mixeval.HardOrFull = "hard"
    profile: Profile = "faithful"
    model: ModelConfig | None = None
    """Who answers; absent where there are responses."""
    responses: str | None = None
    judge: ModelConfig | Literal["rule"]
    """Who judges. What its requests hold is for the profile to say."""
    system: str | None = None
    samples: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1)
    seed: int = Field(42, ge=0)
    """What random draws start from: upstream's fallback, a strict judge, a local model's sampling."""
    independent_judgements: bool = False
    upstream_files: bool = False

    @model_validator(mode="after")
    def _fits(self) -> MixEvalConfig:
        if (self.model is None) == (self.responses is None):
            raise ValueError("give either a model that answers or a folder of responses")
        if self.responses is not None and (self.system is not None or self.samples > 1):
            raise ValueError("a system prompt and samples are for a model that answers, and the responses are given")
        if self.judge == "rule" and self.independent_judgements:
            raise ValueError("independent judgements are for a judge that is asked, and the rule parser is not")
        if self.upstream_files and self.samples > 1:
            raise ValueError("upstream's files hold one answer a row; leave out samples or the upstream files")
        return self

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that are asked, by role; the judge's requests as the profile has them."""
        roles = {"model": self.model} if self.model else {}
        if self.judge != "rule":
            options = request_options(self.profile, self.seed)
            own = {"temperature": options.pop("temperature", None), "max_tokens": options.pop("max_tokens")}
            roles["judge"] = self.judge.model_copy(update={**own, "extra": {**self.judge.extra, **options}})
        return roles


@dataclass(frozen=True, slots=True)
class Checked:
    """What an evaluation starts from, found to be right. `given` are answers that exist already."""

    benchmark: Benchmark
    words: JudgeWords | None
    given: Sequence[Answer] | None


def check(config: MixEvalConfig) -> Checked:
    """Everything that can be wrong before a request is sent. Raises UserError; spends nothing, writes nothing."""
    check_folder(Path(config.out), SCORE)
    benchmark = mixeval.load(config.data, config.version, config.split, config.limit)
    words = mixeval.load_judge_words(config.data) if config.judge != "rule" else None
    given = read_responses(config.responses, benchmark) if config.responses is not None else None
    check_models(config.models, config.budget, config.seed)
    if config.model is not None and config.model.path is not None and config.system is not None:
        check_system_prompt(config.model.path, config.system)
    return Checked(benchmark, words, given)
