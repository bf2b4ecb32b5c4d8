"""Attention of a packed row (layout.py): each pair apart, its rejected branch blind to its chosen branch.

Three backends compute the same: `split` calls SDPA twice per pair and runs everywhere; `varlen` is one call of the
flash kernel for sequences of unequal lengths; `flex` is FlexAttention with a block mask. The last two need an
accelerator, where `fastest_backend` measures all three. They are registered with transformers' AttentionInterface, so
that any model whose attention goes through it works, with grouped queries, sliding windows and soft caps.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from apo.packing.async_copy import to_device
from apo.packing.layout import PackedRow, PairSpan
from clair.core.errors import one_line

NAME = "shared_prefix"
"""The name of the attention of packed rows in transformers' AttentionInterface."""
BLOCK = 128
"""Queries, and keys, of a block of FlexAttention: its default."""
ORIGINAL_ATTENTION = "_attention_before_shared_prefix"
"""Attribute of an attention module: the name of the attention that packed attention replaced."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    shared_prefix: PackedRow | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row; the model's own for any other input. [1, heads, T, d] -> [1, T, heads, d]."""
    if shared_prefix is None:
        options |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        return _original_attention(module, query, key, value, attention_mask, **options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # in mixed precision, rotary embeddings are in float32
    attend = BACKENDS[shared_prefix.backend]
    return attend(query, key, value, shared_prefix, scale, dropout, sliding_window, softcap).transpose(1, 2), None


def _split(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedRow,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One call of SDPA for `shared + chosen` and one for `rejected` of each pair; on a CPU `_FlashBranches`."""
    if _has_flash_branches(query, value, packed, dropout, window, softcap):
        return cast(torch.Tensor, _FlashBranches.apply(query, key, value, packed, scale))
    attend = _capped(softcap) if softcap is not None else scaled_dot_product_attention
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    for span in packed.spans:
        start, shared_end, chosen_end, rejected_end = span.bounds
        first, second = slice(start, chosen_end), slice(chosen_end, rejected_end)
        masked = softcap is not None or (window is not None and chosen_end - start > window)
        mask = _mask(packed, span, "chosen", window) if masked else None
        outputs.append(
            attend(
                query[:, :, first],
                key[:, :, first],
                value[:, :, first],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
            )
        )
        if span.rejected:
            keys, values = (torch.cat([t[:, :, start:shared_end], t[:, :, second]], dim=2) for t in (key, value))
            mask = _mask(packed, span, "rejected", window)
            outputs.append(attend(query[:, :, second], keys, values, attn_mask=mask, dropout_p=dropout, scale=scale))
    return torch.cat(outputs, dim=2)


def _has_flash_branches(
    query: torch.Tensor,
    value: torch.Tensor,
    packed: PackedRow,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> bool:
    """True if `_FlashBranches` computes this row: float32 or float64 on a CPU, whole sequences within the window."""
    if torch.compiler.is_compiling() or query.device.type != "cpu" or dropout or softcap is not None:
        return False
    if query.dtype not in (torch.float32, torch.float64) or query.shape[-1] != value.shape[-1]:
        return False
    return window is None or all(span.shared + max(span.chosen, span.rejected) <= window for span in packed.spans)


class _FlashBranches(torch.autograd.Function):
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


def _mask(packed: PackedRow, span: PairSpan, branch: str, window: int | None) -> torch.Tensor:
    """True where a query of a branch attends to a key, [queries, keys]."""

    def compute() -> torch.Tensor:
        device = packed.input_ids.device
        keys = torch.arange(span.shared + (span.chosen if branch == "chosen" else span.rejected), device=device)
        queries = keys if branch == "chosen" else keys[span.shared :]
        causal = keys[None] <= queries[:, None]
        return causal if window is None else causal & (queries[:, None] - keys[None] < window)

    return packed.cached((span, branch, window), compute)


def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    """Attention with a soft cap on the scores (Gemma 2), which no fused kernel offers on a CPU."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        attn_mask: torch.Tensor,
        dropout_p: float,
        scale: float,
        is_causal: bool = False,
    ) -> torch.Tensor:
        scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
        weights = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min).float().softmax(-1).to(query.dtype)
        return torch.dropout(weights, dropout_p, train=dropout_p > 0) @ value

    return attend


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedRow,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Each branch as a sequence: its queries, causal from the end, over its pair's shared keys and its own.

    Raises ValueError for dropout and soft caps, which the kernel does not have.
    """
    from torch.nn.attention.varlen import varlen_attn

    if dropout or softcap is not None:
        raise ValueError("variable-length attention has no dropout and no soft cap")
    key_index, query_bounds, key_bounds, longest = packed.cached("varlen", lambda: _sequences(packed))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    k, v = k.index_select(0, key_index), v.index_select(0, key_index)
    window_size = (-1 if window is None else window - 1, 0)
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, query_bounds, key_bounds, *longest, scale=scale, window_size=window_size, enable_gqa=grouped
    )
    assert isinstance(out, torch.Tensor)  # a tuple only if auxiliary outputs are requested
    return out.transpose(0, 1)[None]


def _sequences(packed: PackedRow) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
    """The index of each key in the row, where queries and keys of each sequence start, and the longest of both."""
    key_index: list[int] = []
    queries, keys = [], []
    for span in packed.spans:
        start, shared_end, chosen_end, rejected_end = span.bounds
        key_index += range(start, chosen_end)
        queries.append(chosen_end - start)
        keys.append(chosen_end - start)
        if span.rejected:
            key_index += [*range(start, shared_end), *range(chosen_end, rejected_end)]
            queries.append(span.rejected)
            keys.append(span.shared + span.rejected)
    device = packed.input_ids.device
    query_bounds, key_bounds = (
        to_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device) for lengths in (queries, keys)
    )
    return to_device(torch.tensor(key_index), device), query_bounds, key_bounds, (max(queries), max(keys))


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedRow,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """FlexAttention: later tokens of the same pair attend to a key that is shared or of their own branch.

    Raises ValueError for dropout, which the kernel does not have.
    """
    if dropout:
        raise ValueError("FlexAttention has no dropout")
    mask = packed.cached(("flex", window), lambda: _block_mask(packed, window))
    score = None if softcap is None else packed.cached(("cap", softcap), lambda: _score(softcap, query.device))
    attend = _flex_attention(query.device.type)
    return attend(query, key, value, score, mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


def _score(softcap: float, device: torch.device) -> Callable[..., torch.Tensor]:
    cap = torch.full((), softcap, device=device)  # the compiler takes a Python number for a shape, and fails
    return lambda score, *_: torch.tanh(score / cap) * cap


def _block_mask(packed: PackedRow, window: int | None) -> Any:
    """FlexAttention's block mask, built span by span.

    `create_block_mask` would first build the dense mask of all queries and keys: some bytes for each of T^2.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device, tokens = packed.input_ids.device, packed.input_ids.shape[1]
    blocks = max(2, -(-tokens // BLOCK))  # the compiler would specialise on a dimension of 1
    columns = torch.full((3, blocks * BLOCK), -1)  # as long as the blocks, the last of which may exceed the row
    for number, span in enumerate(packed.spans):
        start, shared_end, chosen_end, rejected_end = span.bounds
        columns[0, start:rejected_end] = number
        columns[1, start:shared_end] = 0
        columns[1, shared_end:chosen_end] = 1
        columns[1, chosen_end:rejected_end] = 2
        columns[2, start:rejected_end] = torch.arange(rejected_end - start)
        columns[2, chosen_end:rejected_end] -= span.chosen
    pair, branch, position = to_device(columns, device)
    reach = None if window is None else torch.full((), window, device=device)

    def attends(_: Any, __: Any, query: Any, key: Any) -> Any:
        same = (pair[query] == pair[key]) & (key <= query) & ((branch[key] == 0) | (branch[key] == branch[query]))
        return same if reach is None else same & (position[query] - position[key] < reach)

    partial, full = _blocks(packed.spans, blocks, window)
    ordered = [*_ordered(partial & ~full, device), *_ordered(full, device)]
    return BlockMask.from_kv_blocks(*ordered, BLOCK_SIZE=BLOCK, mask_mod=attends, seq_lengths=(tokens, tokens))


def _blocks(spans: Sequence[PairSpan], blocks: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Two boolean tensors [query blocks, key blocks]: any query attends to any key, and every query to every key."""
    partial, full = (torch.zeros(blocks, blocks, dtype=torch.bool) for _ in range(2))
    ahead = torch.arange(blocks)[:, None] - torch.arange(blocks)[None]
    reach = math.inf if window is None else window
    for span in spans:
        start, shared_end, chosen_end, rejected_end = span.bounds
        # First and last query, first and last key, and by how much the row separates them more than their sequence.
        for q, q_end, k, k_end, offset in (
            (start, chosen_end, start, chosen_end, 0),
            (chosen_end, rejected_end, start, shared_end, span.chosen),
            (chosen_end, rejected_end, chosen_end, rejected_end, 0),
        ):
            if q == q_end:
                continue
            region = slice(q // BLOCK, -(-q_end // BLOCK)), slice(k // BLOCK, -(-k_end // BLOCK))
            partial[region] |= (ahead[region] >= 0) & (ahead[region] * BLOCK - (BLOCK - 1) - offset < reach)
            region = slice(-(-q // BLOCK), q_end // BLOCK), slice(-(-k // BLOCK), k_end // BLOCK)
            full[region] |= (ahead[region] > 0) & (ahead[region] * BLOCK + (BLOCK - 1) - offset < reach)
    return partial, full


def _ordered(blocks: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each query block the number of its key blocks, [1, 1, Q], and their indices first, [1, 1, Q, K]."""
    indices = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    counts, indices = (to_device(t.to(torch.int32)[None, None], device) for t in (blocks.sum(1), indices))
    return counts, indices


@functools.cache
def _flex_attention(device: str) -> Callable[..., Any]:
    """FlexAttention, compiled except on a CPU: uncompiled, it builds the whole score matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"split": _split, "varlen": _varlen, "flex": _flex}


def fastest_backend(config: Any, packed: PackedRow, dtype: torch.dtype, repeats: int = 3) -> tuple[str, str]:
    """The fastest backend for a row like `packed`, forward and backward, and a message with the measured times.

    On a CPU it is `split`, unmeasured: there the others have no backward pass. A backend that raises is left out, and
    the message says why.
    """
    return ("split", "") if packed.input_ids.device.type == "cpu" else _measured(config, packed, dtype, repeats)


def _measured(config: Any, packed: PackedRow, dtype: torch.dtype, repeats: int) -> tuple[str, str]:
    device = packed.input_ids.device
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    tokens = packed.input_ids.shape[1]
    window, softcap = getattr(config, "sliding_window", None), getattr(config, "attn_logit_softcapping", None)
    seconds: dict[str, float] = {}
    results = []
    for name, attend in BACKENDS.items():
        q, k, v = (
            torch.randn(1, n, tokens, width, device=device, dtype=dtype, requires_grad=True)
            for n in (heads, kv_heads, kv_heads)
        )
        try:
            for repeat in range(repeats + 1):
                torch.accelerator.synchronize(device)
                started = time.perf_counter()
                out = attend(q, k, v, packed, width**-0.5, 0.0, window, softcap)
                out.backward(torch.ones_like(out))
                torch.accelerator.synchronize(device)
                if repeat:  # the first compiles
                    seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - started)
            results.append(f"{name} {1000 * seconds[name]:.2f} ms")
        except Exception as error:  # kernels, compilers and drivers raise anything: the backend does not run here
            seconds.pop(name, None)
            results.append(f"{name} failed ({one_line(error, 80)})")
    best = min(seconds, key=seconds.__getitem__, default="split")
    return best, f"attention of packed rows, per layer: {', '.join(results)}; selected: {best}"


def _original_attention(module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """The attention that the model had before `enable_packing`, for input that is not packed.

    Raises RuntimeError if the model does not pass its keyword arguments on to its attention.
    """
    if mask is not None and mask.numel() == 1:  # the placeholder mask of a packed row, without the row
        raise RuntimeError("the model does not hand its options on to its attention")
    if getattr(module, ORIGINAL_ATTENTION) != "eager":
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **options)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
