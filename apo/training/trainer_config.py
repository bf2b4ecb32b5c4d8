"""APOConfig: what the trainer is told, which is TRL's DPOConfig with an objective and what packing and caching need."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig

from apo.losses.mixture import resolve_mixture
from clair.core.errors import UserError

IGNORED = (
    "loss_type", "loss_weights", "label_smoothing", "label_smoothing_factor", "f_divergence_type",
    "f_alpha_divergence_coef", "ld_alpha", "use_weighting", "discopop_tau", "sync_ref_model", "ref_model_mixup_alpha",
    "ref_model_sync_steps", "padding_free", "truncation_mode", "pad_token",
)  # fmt: skip
"""Options of TRL that say something about its own losses or batches: refused beside `objective`, never ignored."""
_OBJECTIVES = {
    "sigmoid": "dpo", "sigmoid_norm": "{dpo: {length_normalised: true}}", "ipo": "ipo", "robust": "robust",
    "sft": "sft", "apo_zero": "apo_zero", "apo_down": "apo_down",
}  # fmt: skip
"""The objective that is TRL's `loss_type`."""
_PUSH_ALL = ("checkpoint", "all_checkpoints")
_ABOVE_0 = ("max_length", "pack_tokens", "pad_to_multiple_of", "precompute_ref_batch_size")
PACK_TOKENS_ON_CPU = 2048
"""Measured: more tokens a pass are no faster on a CPU, and take more memory (docs/log.md)."""

if TYPE_CHECKING:
    Spec = str | Callable[..., torch.Tensor] | dict[Any, Any]
else:
    Spec = str  # what a command line can say of it: TrlParser makes its option from this type


@dataclass
class APOConfig(DPOConfig):
    """TRL's DPOConfig with an `objective`, a name or a function, in place of `loss_type`.

    Runs on what is there: without an accelerator on the CPU in float32 and without activation checkpointing, on a GPU
    in bfloat16 where it can. Raises UserError for an unknown objective, beta <= 0, and options that would be ignored.
    """

    objective: Spec = field(
        default="apo_zero",
        metadata={"help": "An objective's name, a function, or several with weights and options (as JSON in a text)."},
    )
    weights: str | None = field(
        default=None, metadata={"help": "The dataset column that says how much each pair weighs; none: all alike."}
    )
    shared_prefix: bool = field(
        default=True, metadata={"help": "Whether to run each prompt once for both answers, without padding, if exact."}
    )
    pack_tokens: int | None = field(
        default=None,
        metadata={"help": "The most tokens in one forward pass; a micro-batch of more is cut up. On a CPU: 2048."},
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps precomputed reference log-probs; none: computed every run."}
    )
    loss_type: list[str] = field(default_factory=list, metadata={"help": "Refused: `objective` says it."})
    truncation_mode: str | None = field(
        default=None, metadata={"help": "keep_start or none: a row over max_length is left out, not cut."}
    )
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Default: on, except on a CPU."})
    logging_first_step: bool = field(default=True, metadata={"help": "Whether to log the first step."})
    # TRL's loop would show the running mean in place of a NaN loss, and wait for the device at every step to do so.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to hide NaN losses in the logs."})

    def __post_init__(self) -> None:
        if isinstance(self.objective, str) and self.objective.lstrip().startswith("{"):
            self.objective = _from_json(self.objective)
        objective = resolve_mixture(self.objective)
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be above 0 (0.1 is usual)")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in IGNORED:
            value = getattr(self, name)
            if value != defaults[name] and value != [] and (name, value) != ("truncation_mode", "keep_start"):
                raise UserError(why_ignored(name, value, objective.name))
        for name in _ABOVE_0:
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
        if self.push_to_hub and getattr(self.hub_strategy, "value", self.hub_strategy) in _PUSH_ALL:
            raise UserError(
                f"hub_strategy {getattr(self.hub_strategy, 'value', self.hub_strategy)!r} would upload the optimizer's "
                "states, which are pickled; take 'every_save' (each model saved) or 'end'"
            )
        if self.precompute_ref_log_probs and not objective.needs_reference:
            raise UserError(f"precompute_ref_log_probs: objective {objective.name} has no reference; leave it out")
        if self.pack_tokens is not None and not self.shared_prefix:
            raise UserError("pack_tokens would be ignored without shared_prefix; leave it out")
        self._choose_by_hardware()
        self.truncation_mode = "keep_start"  # TRL's collator wants one, and never has a row to cut
        super().__post_init__()
        dtype = (self.model_init_kwargs or {}).get("dtype")
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"model_init_kwargs: no dtype {dtype!r}; give float32, bfloat16 or float16")

    def _choose_by_hardware(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu and self.shared_prefix and self.pack_tokens is None:
            self.pack_tokens = PACK_TOKENS_ON_CPU
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.ddp_find_unused_parameters is None:  # every pair passes all that is trained: DDP need not look
            self.ddp_find_unused_parameters = False
        # transformers 5 renamed gradient_checkpointing and warns about the old name, TRL still sets it.
        if self.activation_checkpointing is None:
            asked = self.gradient_checkpointing
            self.activation_checkpointing = not self.use_cpu if asked is None else asked
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs

    def check_dataset(self, columns: Collection[str]) -> None:
        """Raises UserError for an option that the columns of a dataset would make void."""
        length = self.length_column_name
        strategy = self.train_sampling_strategy
        if strategy in ("group_by_length", "batch_rebalance") and length not in columns:
            raise UserError(
                f"train_sampling_strategy {strategy} needs a column {length!r} of lengths, and the dataset has none; "
                "leave it out: packed rows have no padding to save"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the objective by its name."""
        return {**super().to_dict(), "objective": resolve_mixture(self.objective).name}


def why_ignored(name: str, value: Any, objective: str) -> str:
    """Why an option of `IGNORED` is refused beside an objective, and what says the same here."""
    if name == "loss_type":
        types = [value] if isinstance(value, str) else list(value)
        same = [_OBJECTIVES[one] for one in types if one in _OBJECTIVES]
        if len(same) == len(types) == 1:
            return f"loss_type {types[0]!r} is said by the objective here: set objective: {same[0]}, and leave it out"
        told = ", ".join(f"objective: {one}" for one in same) or "docs/objectives.md has those there are"
        return f"loss_type {types!r} would be ignored beside objective {objective!r}; say it there ({told})"
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
