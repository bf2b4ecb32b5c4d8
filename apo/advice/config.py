"""The settings of `apo advise`, its sample of pairs, and the checks before any model is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from apo.advice.rule import COARSE, FINE, sample_size
from apo.evaluation.config import EvaluationConfig, check_result_folder, with_batch_tokens
from clair.core.errors import UserError, one_line
from clair.core.files import content_hash
from clair.core.recipe import Recipe
from clair.data.prompt_sources import PromptSource
from clair.data.records import Prompt
from clair.inference.config import JudgeConfig, ModelConfig
from clair.inference.open import check_models
from clair.pipeline.config import CheckerConfig
from clair.prompting.templates import JUDGE_NEEDS, load_template
from clair.storage.location import Location

RESULT = "advice.json"
OWN_ANSWERS = "own_answers.jsonl"
_MARKS = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:start_header_id|end_header_id|eot_id|endoftext|user|assistant|system|end)\|>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|^#{2,3} ?(?:Instruction|Response|Human|Assistant)\b"
    r"|^(?:Human|Assistant|USER|ASSISTANT):",
    re.MULTILINE,
)
"""Markers that other chat templates write around turns."""


class TrainedModelConfig(ModelConfig):
    """The model that will be trained, and how its own answers are sampled."""

    temperature: float | None = Field(default=0.3, ge=0)
    """At temperature 1, a small model finds its own answers less likely than any clean text."""
    max_tokens: int | None = Field(default=1024, ge=1)


class PilotConfig(Recipe):
    """`pilot:` of a recipe of `apo advise`: short training runs, and the metric that chooses among them."""

    recipe: str
    """A training recipe on this model and these pairs. Pilots replace its objective and its learning rate."""
    checker: CheckerConfig | None = None
    """A command that scores answers, to choose by. Absent: `benchmark`, or else the judge."""
    benchmark: str | None = None
    """A recipe of `apo eval ifeval` or `apo eval mixeval`, to choose by."""
    prompts: PromptSource | None = None
    """The prompts that checker or judge choose by. Absent: those of the held-out pairs."""
    one_in: int = Field(default=3, ge=1)
    """Pilots train on one in so many pairs."""
    objectives: tuple[str, ...] = Field(default=("sft", "dpo", "apo_zero", "apo_down"), min_length=1)
    displacements: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.03, 0.1), min_length=1)
    """How far the rates of each objective move held-out log-ratios in 20 steps, in nats a token."""
    max_kl: float = Field(default=0.3, ge=0)
    """The guard stops a pilot whose own answers become less likely by more, in nats a token."""

    @property
    def count(self) -> int:
        """The number of pilots."""
        return len(self.objectives) * len(self.displacements)


class AdviseConfig(EvaluationConfig):
    """The pairs, the model that will be trained on them, and an optional judge."""

    dataset: Location
    model: TrainedModelConfig
    judge: JudgeConfig | None = None
    difference: float = Field(default=FINE, gt=0, allow_inf_nan=False)
    """The difference from one half that the sample is large enough to detect; the gain that matters among pilots.

    With `pilot.checker` it is a gain in the checker's own unit, and the sample has its default size.
    """
    seed: int = 0
    pilot: PilotConfig | None = None
    """Short training runs to choose by, for `--pilot`."""

    @model_validator(mode="after")
    def _check_difference(self) -> AdviseConfig:
        if self.sample_difference >= 0.5:
            raise ValueError(
                "difference must be below 0.5: a share; with pilot.checker, any gain in the checker's unit"
            )
        return self

    @property
    def sample_difference(self) -> float:
        """The difference from one half that the sample is large enough to detect."""
        return FINE if self.pilot and self.pilot.checker else self.difference

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that get requests, by role."""
        return {"model": with_batch_tokens(self.model), **({"judge": self.judge} if self.judge else {})}


@dataclass(frozen=True, slots=True)
class AdviceInputs:
    """The sample: `rows` have distinct prompts, and come from `pairs` pairs of `prompts` distinct prompts.

    `winners_own` and `losers_own` are the shares that the model itself wrote, according to the dataset; None: unknown.
    """

    rows: Sequence[Mapping[str, Any]]
    pairs: int
    prompts: int
    winners_own: float | None
    losers_own: float | None
    strange: Mapping[str, int]
    """The number of prompts that do not fit the model's chat template, by reason."""
    template: str

    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        """Return the prompt of a row."""
        return Prompt(row["id"], tuple(row["prompt"]))


def load_inputs(config: AdviseConfig) -> AdviceInputs:
    """Load and check the sample before a request is sent or a file is written. Raises UserError."""
    from apo.analysis.features import read_rows
    from apo.models import load as models

    check_result_folder(config, RESULT)
    template = load_template(config.judge.template if config.judge else None, "judge.j2", JUDGE_NEEDS)
    check_models(config.models, config.budget, config.seed)
    assert config.model.path is not None
    tokenizer = models.load_tokenizer(models.find_model(config.model.path, config.model.trust_remote_code))
    options = config.model.chat_template_kwargs
    rows = [
        {**row, "chat_template_kwargs": row.get("chat_template_kwargs") or options}
        for row in read_rows([config.dataset])
        if row["chosen"] != row["rejected"]
    ]
    for reason, count in Counter(filter(None, map(_unsuitable, rows))).items():
        raise UserError(f"{config.dataset.public}: {count} of {len(rows)} pairs {reason}")
    different = {content_hash(row["prompt"]): row for row in reversed(rows)}
    if len(different) < sample_size(COARSE):
        raise UserError(
            f"{config.dataset.public} has pairs of {len(different)} different prompts, too few for any advice: "
            f"{sample_size(COARSE)} are needed to detect winners that win 3 times of 4, {sample_size(FINE)} for 3 of 5"
        )
    drawn = sorted(different, key=lambda prompt: content_hash([config.seed, prompt]))
    sample = [different[prompt] for prompt in drawn[: sample_size(config.sample_difference)]]
    strange = Counter(mismatch for row in sample if (mismatch := template_mismatch(row["prompt"], tokenizer)))
    return AdviceInputs(sample, len(rows), len(different), *own_shares(config), dict(strange), template)


def _unsuitable(row: Mapping[str, Any]) -> str | None:
    """Return why a pair cannot be compared with answers of the model, or None."""
    if isinstance(row["prompt"], str):
        return "are plain text without turns; give a column `prompt`, or conversations"
    if any(turn.get("tool_calls") for name in ("prompt", "chosen", "rejected") for turn in row[name]):
        return "call tools, and advice compares texts; give pairs without tool calls"
    return None


def template_mismatch(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> str | None:
    """Return why a prompt does not fit the chat template, such as a marker in its text or an omitted turn, or None."""
    from jinja2 import TemplateError

    for turn in messages:
        if match := _MARKS.search(turn["content"]):
            return f"its text contains {match[0]}"
        if match := next((token for token in tokenizer.all_special_tokens if token in turn["content"]), None):
            return f"its text contains the model's own {match}"
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        return f"the model's template rejects it: {one_line(error, 80)}"
    omitted = next((turn["role"] for turn in messages if turn["content"].strip() not in text), None)
    return f"the model's template omits its {omitted} turn" if omitted else None


def own_shares(config: AdviseConfig) -> tuple[float | None, float | None]:
    """Return the shares of winners and losers that this model wrote, according to the dataset's manifest, or None."""
    from clair.data.dataset import read_manifest, read_rows
    from clair.inference.model_folder import weights_identity

    with config.dataset.local_copy() as folder:
        if not (folder / "manifest.json").is_file():
            return None, None
        identity = weights_identity(config.model.path or "")
        own_names = {
            model["model"] for model in read_manifest(folder)["models"].values() if model["identity"] == identity
        }
        if not own_names:
            return None, None
        rows = [row["models"] or {} for row in read_rows(folder)]
    winners, losers = (sum(row.get(side) in own_names for row in rows) / len(rows) for side in ("chosen", "rejected"))
    return winners, losers
