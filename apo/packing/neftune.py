"""NEFTune: noise on the embeddings while training, at TRL's scale also in packed rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def neftune_noise(trainer: Any, length: Callable[[], int]) -> Iterator[None]:
    """Train with the noise of `trainer.neftune_noise_alpha`; `length` is that of a micro-batch's longest sequence.

    transformers, which this replaces, would scale it by the length of the packed row.
    """
    alpha, trainer.neftune_noise_alpha = trainer.neftune_noise_alpha, None

    def add_noise(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        scale = alpha / (length() * output.shape[-1]) ** 0.5
        return output + torch.empty_like(output).uniform_(-scale, scale)

    embeddings = trainer.accelerator.unwrap_model(trainer.model).get_input_embeddings()
    hook = embeddings.register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
        trainer.neftune_noise_alpha = alpha
