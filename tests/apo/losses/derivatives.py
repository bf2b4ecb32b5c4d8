"""Derivatives of an objective by autograd, in float64."""

from __future__ import annotations

import torch


def gradients(objective, *inputs, **options):
    """The derivative of the loss with respect to each input."""
    leaves = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in inputs]
    objective(*leaves, **options).sum().backward()
    return tuple(leaf.grad.item() for leaf in leaves)
