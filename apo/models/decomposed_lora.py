"""Adapters that begin as a part of the weights below them, and take that part out: PiSSA and OLoRA.

W - s B0 A0 remains below such an adapter, so that switching it off does not give the model W. In memory, TRL's frozen
copy "ref" of the initial adapter is the reference. What is written is the same model as a plain LoRA on W, of twice the
rank: W - s B0 A0 + s B A = W + s [B, -B0] [A; A0].
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from apo.models.load import ADAPTER_WEIGHTS


def is_decomposed(config: Any) -> bool:
    """True if a PEFT config starts its adapter with a part of the weights."""
    return str(getattr(config, "init_lora_weights", "")).lower().startswith(("pissa", "olora"))


def decompose(model: Any, config: Any) -> Any:
    """Add such an adapter to a model. Every further use of `config` treats it as plain LoRA."""
    from peft import get_peft_model

    adapted: Any = get_peft_model(model, config)
    config.init_lora_weights = True
    adapted.load_adapter = lambda folder, name, **_: _load_trained(adapted, Path(folder), name)
    return adapted


def write_plain(model: Any, folder: Path, state_dict: dict[str, Any] | None) -> None:
    """Rewrite the adapter that `save_pretrained` has just written to `folder` as a plain LoRA on the model below."""
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    initial = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name="ref")
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for name, tensor in tensors.items():
        if (axis := _rank_axis(name)) is not None:
            tensors[name] = torch.cat([tensor, (-1) ** axis * initial[name].to(tensor)], axis)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config: Any = LoraConfig.from_pretrained(str(folder))
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
    config.save_pretrained(str(folder))


def _load_trained(model: Any, folder: Path, name: str) -> None:
    """Load the trained half of an adapter of `write_plain`."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(folder / ADAPTER_WEIGHTS)
    halves = {
        key: tensor if (axis := _rank_axis(key)) is None else tensor.chunk(2, axis)[0]
        for key, tensor in tensors.items()
    }
    set_peft_model_state_dict(model, halves, name)


def _rank_axis(name: str) -> int | None:
    """The axis of the rank in a tensor of the adapter, or None for other tensors, such as a module saved whole."""
    return 0 if ".lora_A." in name else 1 if ".lora_B." in name else None
