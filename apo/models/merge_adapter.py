"""Merge an adapter into its base, so that any server can load the result as an ordinary model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from apo.models.load import ADAPTER_CONFIG, ModelName, find_model, load_model, load_tokenizer, refuse_soft_prompt
from clair.core.errors import UserError, one_line


def merge(adapter: str | Path, out: str | Path, *, base: str | None = None) -> Path:
    """Write base plus adapter to `out` as one model, with tokenizer, chat template and generation config.

    Summed in float32 and saved in the dtype of the base's weights. `base` replaces the path that the adapter records.
    Raises UserError for a folder that is no adapter, and for an `out` that is not empty.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"out: {target} is not empty; choose another folder")
    if not (Path(adapter) / ADAPTER_CONFIG).is_file():
        raise UserError(f"{adapter} has no {ADAPTER_CONFIG}; give the folder of an adapter, such as a LoRA run's out")
    refuse_soft_prompt(Path(adapter))
    name = ModelName(str(adapter), find_model(base).path) if base else find_model(str(adapter))
    tokenizer = load_tokenizer(name)
    model: Any = load_model(name)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"adapter {adapter} cannot be merged: {one_line(error)}; serve it beside its base") from error
    merged = merged.to(_base_dtype(name.base))
    unfinished = target.resolve().with_name(f".{target.resolve().name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    merged.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if not target.exists():
        os.rename(unfinished, target)
        return target
    for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):  # last: then it is a model
        os.rename(file, target / file.name)  # the folder stays: it may be the one that the user works in
    unfinished.rmdir()
    return target


def _base_dtype(base: str) -> object:
    import torch
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(base).dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
