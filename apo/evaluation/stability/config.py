"""The recipe of `apo eval judge-stability`, and its inputs, which are checked before any request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field, model_validator

from apo.evaluation.answers import RowAnswer
from apo.evaluation.config import EvaluationConfig, check_result_folder
from apo.evaluation.mixeval.benchmark import BenchmarkRow, JudgePrompts, load, load_judge_prompts
from apo.evaluation.mixeval.judging import with_profile
from apo.evaluation.records.mixeval import MixEvalItem, MixEvalScore, Profile
from apo.evaluation.results import read_results
from clair.core.errors import UserError
from clair.inference.config import ModelConfig
from clair.inference.open import check_models

RESULT = "stability.json"
ROWS = "judgements.jsonl"
JUDGES = ("judge", "second_judge")
SIDES = ("base", "tuned")


class StabilityConfig(EvaluationConfig):
    """The recipe: answers of two models to MixEval, one or two judges, and the number of judgements per answer."""

    data: str
    base: str
    """The result folder of `apo eval mixeval` whose answers are judged again."""
    tuned: str
    judge: ModelConfig
    second_judge: ModelConfig | None = None
    repeats: int = Field(default=5, ge=2)
    profile: Profile = "faithful"
    limit: int | None = Field(default=None, ge=1)
    """Only the first rows of each split."""
    seed: int = Field(default=42, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> StabilityConfig:
        if self.second_judge == self.judge:
            raise ValueError("second_judge is the same as judge; give another one, or remove it")
        return self

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The judges by role, with the profile's request options."""
        judges = {role: getattr(self, role) for role in JUDGES}
        return {role: with_profile(judge, self.profile, self.seed) for role, judge in judges.items() if judge}


@dataclass(frozen=True, slots=True)
class StabilityInputs:
    """The answers to judge, by model. Rows without an answer of both models are left out and counted."""

    answers: Mapping[str, list[RowAnswer[BenchmarkRow]]]
    judge_prompts: JudgePrompts
    names: Mapping[str, str]
    left_out: int


def load_inputs(config: StabilityConfig) -> StabilityInputs:
    """Load and check all inputs before a request is sent or a file is written. Raises UserError."""
    check_result_folder(config, RESULT)
    check_models(config.models, config.budget, config.seed)
    results = {side: read_results(getattr(config, side)) for side in SIDES}
    scores: dict[str, MixEvalScore] = {}
    for side, result in results.items():
        if not isinstance(result.score, MixEvalScore):
            raise UserError(f"{side}: {result.folder} is of {result.score.benchmark}, not of MixEval; give MixEval's")
        scores[side] = result.score
    base, tuned = scores.values()
    for key in ("version", "split", "data", "limit", "samples", "system"):
        values = getattr(tuned, key), getattr(base, key)
        if values[0] != values[1]:
            raise UserError(f"{config.tuned} and {config.base} differ in {key}: {values[0]!r} and {values[1]!r}")
    benchmark = load(config.data, base.version, base.split)
    if dict(benchmark.sha256) != dict(base.data):
        raise UserError(f"data {config.data} is not the data that {config.base} was evaluated on; give that folder")
    rows = {(row.split, row.row): row for row in benchmark.all_rows if config.limit is None or row.row < config.limit}
    items = {
        side: {item.key: item for item in result.items if isinstance(item, MixEvalItem) and item.key[:2] in rows}
        for side, result in results.items()
    }
    shared = [key for key in items["base"] if all(_is_answered(items[side].get(key)) for side in SIDES)]
    if not shared:
        raise UserError(f"{config.base} and {config.tuned} have no answers to the same rows; evaluate both on the same")
    answers = {
        side: [RowAnswer(rows[key[0], key[1]], items[side][key].response, key[2]) for key in shared] for side in SIDES
    }
    names = {side: score.model.name for side, score in scores.items()}
    return StabilityInputs(answers, load_judge_prompts(config.data), names, len(items["base"]) - len(shared))


def _is_answered(item: MixEvalItem | None) -> bool:
    return item is not None and not (item.unresolved or "").startswith("answer_")
