"""APOConfig: what the trainer is told, which is TRL's DPOConfig with an objective and what packing and caching need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig

from apo.mixture import mixture_of
from clair.recipe import UserError

IGNORED = (
    "loss_type", "loss_weights", "label_smoothing", "label_smoothing_factor", "f_divergence_type",
    "f_alpha_divergence_coef", "ld_alpha", "use_weighting", "discopop_tau", "sync_ref_model", "ref_model_mixup_alpha",
    "ref_model_sync_steps", "padding_free", "truncation_mode", "pad_token",
)  # fmt: skip
"""Options of TRL that say something about its own losses or batches: refused beside `objective`, never ignored."""
PACK_TOKENS_ON_CPU = 2048
"""Measured: more tokens a pass are no faster on a CPU, and take more memory (docs/log.md)."""


@dataclass
class APOConfig(DPOConfig):
    """TRL's DPOConfig with an `objective`, a name or a function, in place of `loss_type`.

    Runs on what is there: without an accelerator on the CPU in float32 and without activation checkpointing, on a GPU
    in bfloat16 where it can. Raises UserError for an unknown objective, beta <= 0, and options that would be ignored.
    """

    objective: str | Callable[..., torch.Tensor] | dict[Any, Any] = field(
        default="apo_zero", metadata={"help": "An objective's name, a function, or several with weights and options."}
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
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Default: on, except on a CPU."})
    logging_first_step: bool = field(default=True, metadata={"help": "Whether to log the first step."})
    # TRL's loop would show the running mean in place of a NaN loss, and wait for the device at every step to do so.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Whether to hide NaN losses in the logs."})

    def __post_init__(self) -> None:
        objective = mixture_of(self.objective)
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be above 0 (0.1 is usual)")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        ignored = [name for name in IGNORED if getattr(self, name) != defaults[name] and getattr(self, name) != []]
        if ignored:
            raise UserError(f"{ignored[0]} would be ignored beside objective {objective.name!r}; leave it out")
        if self.precompute_ref_log_probs and (not objective.needs_reference or objective.needs_divergence):
            why = "has no reference" if not objective.needs_reference else "needs it for responses made on the way"
            raise UserError(f"precompute_ref_log_probs: objective {objective.name} {why}; leave it out")
        if self.pack_tokens is not None and not self.shared_prefix:
            raise UserError("pack_tokens would be ignored without shared_prefix; leave it out")
        self._choose_by_hardware()
        super().__post_init__()

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the objective by its name."""
        return {**super().to_dict(), "objective": mixture_of(self.objective).name}
