"""Bootstrap intervals over pairs, for numbers that are means of products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DRAWS = 500
"""Bootstrap samples of an interval."""


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval over pairs."""

    value: float
    lo: float
    hi: float


def bootstrap_weights(n: int, draws: int, seed: int) -> Tensor:
    """Return the weights of n pairs in `draws` samples with replacement, [draws, n]; each row sums to 1."""
    import torch

    random = torch.Generator().manual_seed(seed)
    indices = torch.randint(n, (draws, n), generator=random)
    return torch.zeros(draws, n).scatter_add_(1, indices, torch.full((draws, n), 1 / n))


def bootstrap_interval(value: Tensor, drawn: Tensor) -> Interval:
    """Return `value` with the interval of `value` minus the quantiles of the samples' deviations from their mean.

    The samples' own mean is not used: a pair that is drawn twice makes its products too large, in every sample.
    """
    import torch

    low, high = torch.quantile(drawn - drawn.mean(), torch.tensor([0.025, 0.975], dtype=drawn.dtype))
    return Interval(float(value), float(value - high), float(value - low))
