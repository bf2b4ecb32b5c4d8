"""APOConfig: TRL's DPOConfig with an objective and the options of packing and caching."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl.trainer.dpo_config import DPOConfig

from apo.losses.mixture import resolve_mixture
from clair.core.errors import UserError

IGNORED = (
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "label_smoothing_factor",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
    "discopop_tau",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "padding_free",
    "truncation_mode",
    "pad_token",
)
"""Options of TRL's own losses and batches: refused beside `objective`, never ignored."""
_OBJECTIVES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "{dpo: {length_normalised: true}}",
    "ipo": "ipo",
    "robust": "robust",
    "sft": "sft",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
}
"""The objective that equals each of TRL's `loss_type`s."""
_UPLOADS_STATES = ("checkpoint", "all_checkpoints")
_POSITIVE = ("max_length", "pack_tokens", "pad_to_multiple_of", "precompute_ref_batch_size", "soft_prompt_tokens")
PACK_TOKENS_ON_CPU = 2048
"""Measured: more tokens per pass are no faster on a CPU, and need more memory (docs/log/2026-11-22-memory.md)."""

if TYPE_CHECKING:
    Spec = str | Callable[..., torch.Tensor] | dict[Any, Any]
else:
    Spec = str  # TrlParser makes a command-line option from this type


@dataclass
class APOConfig(DPOConfig):
    """TRL's DPOConfig with an `objective`, a name or a function, in place of `loss_type`.

    Defaults follow the hardware: on a CPU float32 without activation checkpointing, on a GPU bfloat16 if it supports
    it. Raises UserError for an unknown objective, beta <= 0, and options that would be ignored.
    """

    objective: Spec = field(
        default="apo_zero",
        metadata={"help": "An objective's name, a function, or several with weights and options (as JSON in a text)."},
    )
    weights: str | None = field(
        default=None, metadata={"help": "The dataset column with the weight of each pair; none: all weigh the same."}
    )
    shared_prefix: bool = field(
        default=True, metadata={"help": "Run each prompt once for both answers, without padding, if that is exact."}
    )
    pack_tokens: int | None = field(
        default=None,
        metadata={"help": "Maximum tokens per forward pass; a larger micro-batch is split. On a CPU: 2048."},
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Folder that stores precomputed reference log-probs; none: computed in every run."},
    )
    soft_prompt: str | None = field(
        default=None, metadata={"help": "The dataset column with the state of each pair's user; none: no soft prompt."}
    )
    soft_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Embeddings of the soft prompt; none: all that prompts share, at most 8."}
    )
    loss_type: list[str] = field(default_factory=list, metadata={"help": "Refused: `objective` sets the loss."})
    # None: not set.
    truncation_mode: str | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]  # TRL: str
        default=None, metadata={"help": "keep_start or none: a row over max_length is left out, not cut."}
    )
    gradient_checkpointing: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]  # TRL: bool
        default=None, metadata={"help": "Default: on, except on a CPU."}
    )
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step."})
    # TRL's filter replaces a NaN loss by the running mean, and waits for the device at every step to do so.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses in the logs."})

    def __post_init__(self) -> None:
        if isinstance(self.objective, str) and self.objective.lstrip().startswith("{"):
            self.objective = _from_json(self.objective)
        objective = resolve_mixture(self.objective)
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be above 0 (0.1 is usual)")
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        for name in IGNORED:
            value = getattr(self, name)
            if value != defaults[name] and value != [] and (name, value) != ("truncation_mode", "keep_start"):
                raise UserError(ignored_reason(name, value, objective.name))
        for name in _POSITIVE:
            if isinstance(value := getattr(self, name), int) and value < 1:
                raise UserError(f"{name} is {value}; it must be 1 or above, or leave it out")
        if self.neftune_noise_alpha is not None and self.neftune_noise_alpha < 0:
            raise UserError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}; it must be 0 or above, or leave it out"
            )
        if self.use_liger_kernel and find_spec("liger_kernel") is None:
            raise UserError(
                "use_liger_kernel: liger-kernel is not installed; pip install liger-kernel, or leave it out"
            )
        if self.push_to_hub and getattr(self.hub_strategy, "value", self.hub_strategy) in _UPLOADS_STATES:
            raise UserError(
                f"hub_strategy {getattr(self.hub_strategy, 'value', self.hub_strategy)!r} would upload the optimizer's "
                "states, which are pickled; take 'every_save' (each model saved) or 'end'"
            )
        if self.precompute_ref_log_probs and not objective.needs_reference:
            raise UserError(f"precompute_ref_log_probs: objective {objective.name} has no reference; leave it out")
        if self.pack_tokens is not None and not self.shared_prefix:
            raise UserError("pack_tokens would be ignored without shared_prefix; leave it out")
        if self.soft_prompt_tokens is not None and self.soft_prompt is None:
            raise UserError("soft_prompt_tokens would be ignored without soft_prompt; leave it out")
        self._choose_by_hardware()
        self.prediction_loss_only = True  # logits are never built
        # TRL's collator needs a mode, and never has a row to cut.
        self.truncation_mode = "keep_start"  # pyright: ignore[reportIncompatibleVariableOverride]  # as above
        super().__post_init__()
        dtype = self.loading_options().get("dtype")
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"model_init_kwargs: no dtype {dtype!r}; give float32, bfloat16 or float16")

    def _choose_by_hardware(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu and self.activation_offloading:
            raise UserError(
                "activation_offloading moves activations from a GPU, and this run is on a CPU; leave it out"
            )
        if self.use_cpu and self.shared_prefix and self.pack_tokens is None:
            self.pack_tokens = PACK_TOKENS_ON_CPU
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.ddp_find_unused_parameters is None:  # every pair uses every trained weight
            self.ddp_find_unused_parameters = False
        # transformers 5.20 renamed gradient_checkpointing and warns about the old name alone; TRL reads it, and so does
        # an older transformers, which has no other.
        requested = getattr(self, "activation_checkpointing", None)
        requested = self.gradient_checkpointing if requested is None else requested
        requested = not self.use_cpu if requested is None else requested
        self.activation_checkpointing = requested
        self.gradient_checkpointing = requested  # pyright: ignore[reportIncompatibleVariableOverride]  # as above
        options = getattr(self, "activation_checkpointing_kwargs", None) or self.gradient_checkpointing_kwargs
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = options

    def check_dataset(self, columns: Collection[str]) -> None:
        """Raises UserError for an option that has no effect on a dataset with these columns."""
        length = self.length_column_name
        strategy = self.train_sampling_strategy
        if strategy in ("group_by_length", "batch_rebalance") and length not in columns:
            raise UserError(
                f"train_sampling_strategy {strategy} needs a column {length!r} of lengths, and the dataset has none; "
                "leave it out: packed rows have no padding to save"
            )

    def loading_options(self) -> dict[str, Any]:
        """A copy of `model_init_kwargs`."""
        options = self.model_init_kwargs or {}
        assert isinstance(options, dict)  # TRL has parsed JSON text
        return dict(options)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, the objective as its name."""
        return {**super().to_dict(), "objective": resolve_mixture(self.objective).name}


def ignored_reason(name: str, value: Any, objective: str) -> str:
    """Why an option of `IGNORED` is refused beside an objective, and what to set instead."""
    if name == "loss_type":
        types = [value] if isinstance(value, str) else list(value)
        equal = [_OBJECTIVES[name] for name in types if name in _OBJECTIVES]
        if len(equal) == len(types) == 1:
            return f"loss_type {types[0]!r} is an objective here: set objective: {equal[0]}, and leave it out"
        choices = ", ".join(f"objective: {name}" for name in equal) or "docs/objectives.md lists the objectives"
        return f"loss_type {types!r} would be ignored beside objective {objective!r}; set the objective ({choices})"
    if name == "label_smoothing":
        return f"label_smoothing is an option of the objective: set objective: {{dpo: {{label_smoothing: {value}}}}}"
    if name == "truncation_mode":
        return f"truncation_mode {value!r} would be ignored: rows longer than max_length are left out; leave it out"
    return f"{name} would be ignored beside objective {objective!r}; leave it out"


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"objective {text!r} is neither a name nor JSON ({error})") from error
