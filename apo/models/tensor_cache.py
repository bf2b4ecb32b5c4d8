"""A cache of tensors: one file per key, written atomically, shared by runs, checked when read.

The content of a key never changes, so processes need no locks: two that compute the same tensors write the same bytes,
and the last rename wins. A file that cannot be read counts as missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clair.core.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor, nn


def file_path(folder: Path, key: str) -> Path:
    """The file of a key."""
    return folder / key[:2] / f"{key}.safetensors"


def load(folder: Path, key: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """The tensors of a key, or None if they are missing, have other names or shapes, or are not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file_path(folder, key))
    except (FileNotFoundError, NotADirectoryError, PermissionError, SafetensorError):
        return None
    matches = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(shapes)
    return tensors if matches and all(bool(tensor.isfinite().all()) for tensor in tensors.values()) else None


def store(folder: Path, key: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Store tensors under a key. Returns a message if that fails (read-only or full disk), else None."""
    from safetensors.torch import save

    try:
        write_atomically(file_path(folder, key), save({name: tensor.cpu().clone() for name, tensor in tensors.items()}))
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error}); continuing without the cache"
    return None


_IRRELEVANT_CONFIG = {
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}
"""Keys of a model's config that do not affect the log-probs of given ids, like all that begin with `_`."""


def hash_model(model: nn.Module, *, adapter: bool = False) -> str:
    """SHA-256 over everything that determines the log-probs of a reference: the config, and the names, dtypes, shapes
    and bytes of the weights.

    For a model with a new adapter, this is the model below it, under the names without an adapter; for a model that
    continues an adapter, also the frozen copy named "ref" and its scaling. With `adapter`, the whole current model.
    """
    import hashlib

    import torch

    adapters = getattr(model, "peft_config", {})
    base: Any = cast(Any, model).get_base_model() if adapters else model
    config = {
        key: value
        for key, value in base.config.to_dict().items()
        if key not in _IRRELEVANT_CONFIG and not key.startswith("_")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".") if adapters else name
        if adapters and "lora_" in plain and ".ref." not in plain and not adapter:
            continue
        digest.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    for name, module in model.named_modules():
        by_adapter = scaling if isinstance(scaling := getattr(module, "scaling", None), dict) else {}
        factors = {key: factor for key, factor in by_adapter.items() if adapter or key == "ref"}
        digest.update(f"{name} {factors}\n".encode() if factors else b"")
    return digest.hexdigest()
