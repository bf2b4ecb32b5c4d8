"""Tensors by content: a file per key, written whole or not at all, shared by runs, checked when read.

What is stored under a key never changes, so processes need no locks: two that compute the same thing write the same
bytes, and the last rename wins. A file that cannot be read is as good as none.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from clair.core.files import publish
from clair.storage.object_store import default_folder as default_folder

if TYPE_CHECKING:
    from torch import Tensor, nn


def file_path(folder: Path, key: str) -> Path:
    """Where the tensors of a key lie."""
    return folder / key[:2] / f"{key}.safetensors"


def load(folder: Path, key: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """The tensors of a key, or None where there are none, or not these names and shapes, or not a number in them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file_path(folder, key))
    except (FileNotFoundError, NotADirectoryError, PermissionError, SafetensorError):
        return None
    whole = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(shapes)
    return tensors if whole and all(bool(tensor.isfinite().all()) for tensor in tensors.values()) else None


def store(folder: Path, key: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Keep tensors under a key. Returns what to tell where that is not possible (read-only, full), else None."""
    from safetensors.torch import save_file

    target = file_path(folder, key)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
        os.close(handle)
        save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, temporary)
        publish(temporary, target)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        return f"{folder} cannot be written ({error.strerror or error}); going on without keeping it"
    return None


_NO_NUMBER = {"architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version",
              "use_cache"}  # fmt: skip
"""Keys of a model's config that change no log-prob of given ids; nor do those that begin with `_`."""


def hash_model(model: nn.Module, *, adapter: bool = False) -> str:
    """SHA-256 over all that the numbers of a reference are made of: its config, which says what is done with the
    weights, and their names, types, shapes and bytes.

    Of a model with a new adapter that is the model below it, by the names it has without one; of a model that goes on
    with an adapter, also the frozen copy named "ref", and what it is scaled by. With `adapter`, of the whole model as
    it computes.
    """
    import hashlib

    import torch

    adapters = getattr(model, "peft_config", {})
    config = (model.get_base_model() if adapters else model).config.to_dict()
    config = {key: value for key, value in config.items() if key not in _NO_NUMBER and not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".") if adapters else name
        if adapters and "lora_" in plain and ".ref." not in plain and not adapter:
            continue
        digest.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    for name, module in model.named_modules():
        of_adapters = scaling if isinstance(scaling := getattr(module, "scaling", None), dict) else {}
        scaled = {key: by for key, by in of_adapters.items() if adapter or key == "ref"}
        digest.update(f"{name} {scaled}\n".encode() if scaled else b"")
    return digest.hexdigest()
