"""Attention of a packed row (layout.py): each pair apart, its rejected branch blind to its chosen branch.

Three backends compute the same: `split` calls SDPA twice per pair and runs everywhere; `varlen` is one call of the
flash kernel for sequences of unequal lengths; `flex` is FlexAttention with a block mask. The last two need an
accelerator, where `fastest_backend` measures all three. They are registered with transformers' AttentionInterface, so
that any model whose attention goes through it works, with grouped queries, sliding windows and soft caps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from apo.packing.async_copy import to_device
from apo.packing.flash_branches import FlashBranches, has_flash_branches
from apo.packing.flex import flex
from apo.packing.layout import PackedRow, PairSpan
from clair.core.errors import one_line

NAME = "shared_prefix"
"""The name of the attention of packed rows in transformers' AttentionInterface."""
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
    """One call of SDPA for `shared + chosen` and one for `rejected` of each pair; on a CPU `FlashBranches`."""
    if has_flash_branches(query, value, packed, dropout, window, softcap):
        return cast(torch.Tensor, FlashBranches.apply(query, key, value, packed, scale))
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


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"split": _split, "varlen": _varlen, "flex": flex}


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
