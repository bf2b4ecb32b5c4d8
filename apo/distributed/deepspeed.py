"""DeepSpeed's ZeRO under the trainer: the model stays unsharded, in its training dtype, until training starts.

Under ZeRO-3 transformers shards the weights as soon as it loads them. A sharded model cannot compute the reference's
log-probs or pass the checks before the first step, and its weights cannot be hashed for the cache. So ZeRO-3 is
registered with transformers when training starts, at which point DeepSpeed shards the unsharded model itself.
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
    """Unregister the DeepSpeed config from transformers so that models load unsharded.

    Returns it for `register_zero3`, or None.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    return reference() if reference is not None else None


def register_zero3(config: Any) -> None:
    """Register a config that `unregister_zero3` returned with transformers."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config

    if config is not None:
        set_hf_deepspeed_config(config)


@contextlib.contextmanager
def unsharded_loading() -> Iterator[None]:
    """Load models unsharded in this context, also under ZeRO-3."""
    config = unregister_zero3()
    try:
        yield
    finally:
        register_zero3(config)


def check_zero3_saves(args: Any) -> None:
    """Raises UserError for a ZeRO-3 config with which no loadable weights would be saved."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
        raise UserError(
            "ZeRO-3 is on, and would save no weights that a model can be loaded from; set zero3_save_16bit_model: "
            "true in accelerate's config (zero_optimization.stage3_gather_16bit_weights_on_model_save in DeepSpeed's)"
        )


def cast_for_deepspeed(model: nn.Module, args: Any) -> None:
    """Cast weights, in place, to the dtype in which DeepSpeed will train them, so that policy and reference agree.

    Raises UserError if they are sharded already.
    """
    import torch

    plugin = getattr(args, "deepspeed_plugin", None)
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise UserError(
            "ZeRO-3 sharded the weights when the model was loaded, and the reference's log-probs are computed from "
            "unsharded ones; load the model before APOConfig is made, or inside "
            "apo.distributed.deepspeed.unsharded_loading()"
        )
    for name, dtype in _TYPES.items():
        if plugin is not None and plugin.deepspeed_config.get(name, {}).get("enabled") is True:
            for weight in model.parameters():
                if weight.is_floating_point():
                    weight.data = weight.data.to(getattr(torch, dtype))


@contextlib.contextmanager
def accumulate_gradients(accelerator: Any) -> Iterator[None]:
    """Accumulate the gradients of backward passes in this context: more passes of the same micro-batch follow.

    Outside, accelerate lets DeepSpeed take its step after a backward pass that synchronizes gradients.
    """
    synchronizes, accelerator.sync_gradients = accelerator.sync_gradients, False
    try:
        yield
    finally:
        accelerator.sync_gradients = synchronizes


def local_shard(weight: Tensor) -> Tensor:
    """This process's shard of a weight that FSDP or ZeRO-3 may have sharded."""
    if hasattr(weight, "to_local"):  # FSDP's DTensor
        shard: Any = weight.detach()
        return shard.to_local()
    return getattr(weight, "ds_tensor", weight).detach()
