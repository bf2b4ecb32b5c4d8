"""The attention kernels of packed rows on the same numbers, with torch and transformers alone."""

from __future__ import annotations

import torch

from apo.packing import attention
from apo.packing.layout import PackedRow, PairSpan

SHAPES = ([(130, 200, 300), (90, 0, 70)], [(20, 10, 10)], [(300, 120, 10), (200, 150, 260), (5, 9, 0)])
KERNELS = {
    "varlen": ("varlen", None, None), "flex": ("flex", None, None), "split": ("split", None, None),
    "varlen, window": ("varlen", 100, None), "flex, window": ("flex", 100, None),
    "flex, window, soft cap": ("flex", 100, 20.0),
}  # fmt: skip
"""Backend, sliding window and soft cap of each kernel that a GPU must run."""


def packed_row(shapes, device="cpu"):
    """A packed row of spans alone. A shape counts the shared, the chosen and the rejected tokens of a pair."""
    spans, start = [], 0
    for shared, chosen, rejected in shapes:
        spans.append(PairSpan(start, shared, chosen, rejected))
        start += shared + chosen + rejected
    unused = torch.zeros(0)
    return PackedRow(torch.zeros(1, start, device=device), unused, spans, *[unused] * 4)


def attended(backend, row, dtype, window, softcap, width=64):
    """Values and gradients of one backend on the same numbers, on the row's device."""
    generator, device = torch.Generator().manual_seed(0), row.input_ids.device
    tokens = row.input_ids.shape[1]
    q, k, v = (torch.randn(1, heads, tokens, width, generator=generator) for heads in (4, 2, 2))
    q, k, v = (t.to(device, dtype).requires_grad_() for t in (q, k, v))
    out = attention.BACKENDS[backend](q, k, v, row, width**-0.5, 0.0, window, softcap)
    out.backward(torch.ones_like(out))
    return [t.float().cpu() for t in (out.detach(), q.grad, k.grad, v.grad)]


def largest_difference(backend, window, softcap, device):
    """The largest relative difference of a kernel in bfloat16 from `split` in float32 on a CPU."""
    differences = []
    for shapes in SHAPES:
        actual = attended(backend, packed_row(shapes, device), torch.bfloat16, window, softcap)
        expected = attended("split", packed_row(shapes), torch.float32, window, softcap)
        differences += [(a - e).norm() / e.norm() for a, e in zip(actual, expected, strict=True)]
    return max(differences).item()
