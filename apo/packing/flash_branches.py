"""Attention of packed rows by torch's flash kernel of the CPU, with a backward pass by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from apo.packing.layout import PackedRow


def has_flash_branches(
    query: torch.Tensor,
    value: torch.Tensor,
    packed: PackedRow,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> bool:
    """True if `FlashBranches` computes this row: float32 or float64 on a CPU, whole sequences within the window."""
    if torch.compiler.is_compiling() or query.device.type != "cpu" or dropout or softcap is not None:
        return False
    if query.dtype not in (torch.float32, torch.float64) or query.shape[-1] != value.shape[-1]:
        return False
    return window is None or all(span.shared + max(span.chosen, span.rejected) <= window for span in packed.spans)


class FlashBranches(torch.autograd.Function):
    """Attention of all pairs by torch's flash kernel of the CPU, without masks and without copies of keys.

    Queries of a rejected branch attend to the shared keys and, causally, to those of their branch, in two calls. Both
    results are merged by the logarithms of their softmax totals; with the merged output and total, the backward kernel
    of each call gives its part of the gradients. Calling SDPA on slices instead would, for each slice, allocate and add
    gradients of the whole row.
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, packed: PackedRow, scale: float) -> Any:
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        groups, (q, k, v, o) = _grouped(query, key, value, out)
        totals = query.new_empty(*groups, query.shape[2])

        def attend(queries: slice, keys: slice, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
            )

        for span in packed.spans:
            start, shared_end, chosen_end, rejected_end = span.bounds
            first, second = slice(start, chosen_end), slice(chosen_end, rejected_end)
            o[:, :, first], totals[:, :, first] = attend(first, first, True)
            if span.rejected:
                (shared, shared_total), (branch, branch_total) = (
                    attend(second, slice(start, shared_end), False), attend(second, second, True),
                )  # fmt: skip
                total = torch.logaddexp(shared_total, branch_total, out=totals[:, :, second])
                torch.mul(shared, (shared_total - total).exp_()[..., None], out=o[:, :, second])
                o[:, :, second].addcmul_(branch, (branch_total - total).exp_()[..., None])
        ctx.save_for_backward(query, key, value, out, totals)
        ctx.packed, ctx.scale = packed, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator
        query, key, value, out, totals = ctx.saved_tensors
        grads = [torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
                 for t in (query, key, value)]  # fmt: skip
        _, (q, k, v, o, grad_out, grad_q) = _grouped(query, key, value, out, grad_outputs[0], grads[0])
        grad_k, grad_v = (grad[0] for grad in grads[1:])

        def backward(queries: slice, keys: slice, causal: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], o[:, :, queries],
                totals[:, :, queries], 0.0, causal, scale=ctx.scale,
            )  # fmt: skip
            return of_q, of_k.sum(1), of_v.sum(1)

        for span in ctx.packed.spans:
            start, shared_end, chosen_end, rejected_end = span.bounds
            first, shared, second = (
                slice(start, chosen_end), slice(start, shared_end), slice(chosen_end, rejected_end),
            )  # fmt: skip
            grad_q[:, :, first], grad_k[:, first], grad_v[:, first] = backward(first, first, True)
            if span.rejected:
                grad_q[:, :, second], grad_k[:, second], grad_v[:, second] = backward(second, second, True)
                of_q, of_k, of_v = backward(second, shared, False)
                grad_q[:, :, second] += of_q
                grad_k[:, shared] += of_k
                grad_v[:, shared] += of_v
        return *grads, None, None


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *like_query: torch.Tensor
) -> tuple[tuple[int, int], list[torch.Tensor]]:
    """Views of [1, heads, T, d] as [key heads, queries per key head, T, d], and these two numbers; keys repeat
    without a copy."""
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    q, *others = (t[0].unflatten(0, (heads, groups)) for t in (query, *like_query))
    k, v = (t[0][:, None].expand(heads, groups, -1, -1) for t in (key, value))
    return (heads, groups), [q, k, v, *others]
