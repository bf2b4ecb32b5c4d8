"""DeepSpeed's ZeRO under the trainer: until training starts the weights are whole, and what they will be in training.

Under ZeRO-3 transformers shares the weights out as soon as it loads them. Nothing could then ask the model: not the
reference's log-probs, not the checks before the first step, and the cache would know no reference by its weights. So
transformers hears of ZeRO-3 when training starts, which is when DeepSpeed shares out whole models by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

_TYPES = {"bf16": "bfloat16", "fp16": "float16"}


def unregister_zero3() -> Any:
    """Let transformers forget the DeepSpeed config it was told of. Returns it for `register_zero3`, or None."""
    from transformers.integrations import deepspeed

    told = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    return told() if told is not None else None


def register_zero3(config: Any) -> None:
    """Let transformers know a config that `unregister_zero3` returned."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config

    if config is not None:
        set_hf_deepspeed_config(config)


@contextlib.contextmanager
def unsharded_loading() -> Iterator[None]:
    """Models that are loaded meanwhile are whole in every process."""
    config = unregister_zero3()
    try:
        yield
    finally:
        register_zero3(config)


def check_zero3_saves(args: Any) -> None:
    """Raises UserError for ZeRO-3 that would save no weights."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
        raise UserError(
            "ZeRO-3 was asked for, and would save no weights that a model is loaded from; set zero3_save_16bit_model: "
            "true in accelerate's config (zero_optimization.stage3_gather_16bit_weights_on_model_save in DeepSpeed's)"
        )


def cast_for_deepspeed(model: nn.Module, args: Any) -> None:
    """Bring weights, in place, into the type that DeepSpeed will train them in, so that they are their own reference.

    Raises UserError where they are no longer whole.
    """
    import torch

    plugin = getattr(args, "deepspeed_plugin", None)
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise UserError(
            "the weights were shared out by ZeRO-3 when the model was loaded, and the reference's log-probs are "
            "computed from whole ones; load the model before APOConfig is made, or inside "
            "apo.distributed.deepspeed.whole()"
        )
    for name, dtype in _TYPES.items():
        if plugin is not None and plugin.deepspeed_config.get(name, {}).get("enabled") is True:
            for weight in model.parameters():
                if weight.is_floating_point():
                    weight.data = weight.data.to(getattr(torch, dtype))


@contextlib.contextmanager
def accumulate_gradients(accelerator: Any) -> Iterator[None]:
    """Backward passes meanwhile are parts of a micro-batch whose last is yet to come.

    DeepSpeed then adds up their gradients; accelerate tells it to take its step where gradients are in sync.
    """
    before, accelerator.sync_gradients = accelerator.sync_gradients, False
    try:
        yield
    finally:
        accelerator.sync_gradients = before


def local_shard(weight: Tensor) -> Tensor:
    """What this process holds of a weight that may be shared out by FSDP or ZeRO-3."""
    if hasattr(weight, "to_local"):
        return weight.detach().to_local()
    return getattr(weight, "ds_tensor", weight).detach()
