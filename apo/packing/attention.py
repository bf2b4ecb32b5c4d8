"""Attention of a packed row (prefix.py): each pair by itself, its rejected rest blind to its chosen rest.

Three ways of the same: `split` calls SDPA twice a pair and runs everywhere; `varlen` is one call of the flash kernel
for sequences of unequal lengths; `flex` is FlexAttention with a block mask. The last two need an accelerator, where
`fastest_backend` measures all three. They are put in through transformers' AttentionInterface, so that any model whose
attention goes through it works: grouped queries, sliding windows and soft caps included.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from apo.packing.async_copy import to_device
from clair.core.errors import one_line

NAME = "shared_prefix"
BLOCK = 128
"""Queries, and keys, of a block of FlexAttention: its default."""
ORIGINAL_ATTENTION = "_attention_before_shared_prefix"
"""Attribute of an attention module: the name of the attention it had."""


@dataclass(frozen=True)
class PairSpan:
    """Where one pair stands in the row: `shared` tokens from `start`, then `chosen` and `rejected` more."""

    start: int
    shared: int
    chosen: int
    rejected: int

    @property
    def branches(self) -> tuple[int, int, int, int]:
        """Where shared tokens begin and end, where the chosen rest ends, and the rejected rest."""
        middle = self.start + self.shared
        return self.start, middle, middle + self.chosen, middle + self.chosen + self.rejected


@dataclass
class PackedRow:
    """A packed row. `rows` and `labels` say which hidden states predict which tokens, [M]; `owner` whose they are.

    `owner` is 3 * pair + (0 for a response token both share, 1 for chosen, 2 for rejected).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    spans: list[PairSpan]
    rows: torch.Tensor
    labels: torch.Tensor
    owner: torch.Tensor
    lengths: torch.Tensor
    way: str = "split"
    """Which of `BACKENDS` attends."""
    made: dict[Any, Any] = field(default_factory=dict)
    """Masks and places, made once a row and used by every layer."""

    @property
    def pairs(self) -> int:
        """How many pairs stand in the row."""
        return len(self.lengths)

    def kept(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes, once."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


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
    """Attention of a packed row, or transformers' own for any other input. [1, heads, T, d] -> [1, T, heads, d]."""
    if shared_prefix is None:
        given = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        return _original_attention(module, query, key, value, attention_mask, **given, **options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # in mixed precision rotating puts them into float32
    way = BACKENDS[shared_prefix.way]
    return way(query, key, value, shared_prefix, scale, dropout, sliding_window, softcap).transpose(1, 2), None


def _split(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedRow,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One call of SDPA for `shared + chosen` and one for `rejected` of each pair."""
    attend = _capped(softcap) if softcap is not None else scaled_dot_product_attention
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts = []
    for span in layout.spans:
        start, middle, end, last = span.branches
        first, second = slice(start, end), slice(end, last)
        masked = softcap is not None or (window is not None and end - start > window)
        mask = _mask(layout, span, "chosen", window) if masked else None
        parts.append(
            attend(
                query[:, :, first], key[:, :, first], value[:, :, first], attn_mask=mask, dropout_p=dropout,
                is_causal=mask is None, scale=scale,
            )
        )  # fmt: skip
        if span.rejected:
            keys, values = (torch.cat([t[:, :, start:middle], t[:, :, second]], dim=2) for t in (key, value))
            mask = _mask(layout, span, "rejected", window)
            parts.append(attend(query[:, :, second], keys, values, attn_mask=mask, dropout_p=dropout, scale=scale))
    return torch.cat(parts, dim=2)


def _mask(layout: PackedRow, span: PairSpan, branch: str, window: int | None) -> torch.Tensor:
    """Which keys each query of a branch sees, [queries, keys]."""

    def make() -> torch.Tensor:
        device = layout.input_ids.device
        keys = torch.arange(span.shared + (span.chosen if branch == "chosen" else span.rejected), device=device)
        queries = keys if branch == "chosen" else keys[span.shared :]
        seen = keys[None] <= queries[:, None]
        return seen if window is None else seen & (queries[:, None] - keys[None] < window)

    return layout.kept((span, branch, window), make)


def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    """Attention with a soft cap on the scores (Gemma 2), which no fused kernel offers on a CPU."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attn_mask: torch.Tensor, dropout_p: float,
        scale: float, is_causal: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
        weights = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min).float().softmax(-1).to(query.dtype)
        return torch.dropout(weights, dropout_p, train=dropout_p > 0) @ value

    return attend


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedRow,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Every branch a sequence of its own queries, causal from the end, and of its pair's shared keys before its own."""
    from torch.nn.attention.varlen import varlen_attn

    if dropout or softcap is not None:
        raise ValueError("variable-length attention has no dropout and no soft cap")
    places, queries, keys, longest = layout.kept("varlen", lambda: _sequences(layout))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    k, v = k.index_select(0, places), v.index_select(0, places)
    seen = (-1 if window is None else window - 1, 0)
    out = varlen_attn(
        q, k, v, queries, keys, *longest, scale=scale, window_size=seen, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(0, 1)[None]


def _sequences(layout: PackedRow) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Which keys stand where, where queries and keys of each sequence begin, and the longest of both."""
    places: list[int] = []
    queries, keys = [], []
    for span in layout.spans:
        start, middle, end, last = span.branches
        places += range(start, end)
        queries.append(end - start)
        keys.append(end - start)
        if span.rejected:
            places += [*range(start, middle), *range(end, last)]
            queries.append(span.rejected)
            keys.append(span.shared + span.rejected)
    begins = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (queries, keys)]
    device = layout.input_ids.device
    return *(to_device(t, device) for t in (torch.tensor(places), *begins)), (max(queries), max(keys))


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedRow,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """FlexAttention: a key is seen by later tokens of its pair, if it is shared or of the same branch."""
    if dropout:
        raise ValueError("FlexAttention has no dropout")
    mask = layout.kept(("flex", window), lambda: _block_mask(layout, window))
    score = None if softcap is None else layout.kept(("cap", softcap), lambda: _score(softcap, query.device))
    attend = _flex_attention(query.device.type)
    return attend(query, key, value, score, mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


def _score(softcap: float, device: torch.device) -> Callable[..., torch.Tensor]:
    cap = torch.full((), softcap, device=device)  # as a number it is a shape to the compiler, which then fails
    return lambda score, *_: torch.tanh(score / cap) * cap


def _block_mask(layout: PackedRow, window: int | None) -> Any:
    """What FlexAttention computes and what it leaves out, laid down span by span.

    `create_block_mask` would make the mask of all queries with all keys first, some bytes for each of tokens^2.
    """
    from torch.nn.attention.flex_attention import BlockMask

    device, tokens = layout.input_ids.device, layout.input_ids.shape[1]
    blocks = max(2, -(-tokens // BLOCK))  # a dimension of 1 would be compiled anew
    facts = torch.full((3, blocks * BLOCK), -1)  # as long as the blocks, whose last may reach past the row
    for number, span in enumerate(layout.spans):
        start, middle, end, last = span.branches
        facts[0, start:last] = number
        facts[1, start:middle], facts[1, middle:end], facts[1, end:last] = 0, 1, 2
        facts[2, start:last] = torch.arange(last - start)
        facts[2, end:last] -= span.chosen
    pair, branch, position = to_device(facts, device)
    far = None if window is None else torch.full((), window, device=device)

    def seen(_: Any, __: Any, query: Any, key: Any) -> Any:
        same = (pair[query] == pair[key]) & (key <= query) & ((branch[key] == 0) | (branch[key] == branch[query]))
        return same if far is None else same & (position[query] - position[key] < far)

    some, whole = _blocks(layout.spans, blocks, window)
    ordered = [part for kind in (some & ~whole, whole) for part in _ordered(kind, device)]
    return BlockMask.from_kv_blocks(*ordered, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(tokens, tokens))


def _blocks(spans: Sequence[PairSpan], blocks: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of keys [queries, keys] each block of queries sees something of, and which of these wholly."""
    some, whole = (torch.zeros(blocks, blocks, dtype=torch.bool) for _ in range(2))
    ahead = torch.arange(blocks)[:, None] - torch.arange(blocks)[None]
    far = math.inf if window is None else window
    for span in spans:
        start, middle, end, last = span.branches
        # Queries from, to; keys from, to; how much farther apart they stand in the row than in their sequence.
        for q, q_end, k, k_end, apart in (
            (start, end, start, end, 0), (end, last, start, middle, span.chosen), (end, last, end, last, 0),
        ):  # fmt: skip
            if q == q_end:
                continue
            part = slice(q // BLOCK, -(-q_end // BLOCK)), slice(k // BLOCK, -(-k_end // BLOCK))
            some[part] |= (ahead[part] >= 0) & (ahead[part] * BLOCK - (BLOCK - 1) - apart < far)
            part = slice(-(-q // BLOCK), q_end // BLOCK), slice(-(-k // BLOCK), k_end // BLOCK)
            whole[part] |= (ahead[part] > 0) & (ahead[part] * BLOCK + (BLOCK - 1) - apart < far)
    return some, whole


def _ordered(kind: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys each block of queries has, [1, 1, Q], and which, these first, [1, 1, Q, K]."""
    places = kind.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return tuple(to_device(part.to(torch.int32)[None, None], device) for part in (kind.sum(1), places))


@functools.cache
def _flex_attention(device: str) -> Callable[..., torch.Tensor]:
    """Compiled where it can be: without, scores are made whole."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"split": _split, "varlen": _varlen, "flex": _flex}


def fastest_backend(config: Any, layout: PackedRow, dtype: torch.dtype, repeats: int = 3) -> tuple[str, str]:
    """The way that is fastest for a row like `layout`, forward and backward, and what was measured, in words.

    On a CPU it is `split`, unmeasured: there the others have no backward. A way that raises is left out and said.
    """
    return ("split", "") if layout.input_ids.device.type == "cpu" else _measured(config, layout, dtype, repeats)


def _measured(config: Any, layout: PackedRow, dtype: torch.dtype, repeats: int) -> tuple[str, str]:
    device = layout.input_ids.device
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    few = getattr(config, "num_key_value_heads", None) or heads
    tokens = layout.input_ids.shape[1]
    window, softcap = getattr(config, "sliding_window", None), getattr(config, "attn_logit_softcapping", None)
    seconds, told = {}, []
    for name, way in BACKENDS.items():
        q, k, v = (
            torch.randn(1, n, tokens, width, device=device, dtype=dtype, requires_grad=True) for n in (heads, few, few)
        )
        try:
            for repeat in range(repeats + 1):
                torch.accelerator.synchronize(device)
                started = time.perf_counter()
                out = way(q, k, v, layout, width**-0.5, 0.0, window, softcap)
                out.backward(torch.ones_like(out))
                torch.accelerator.synchronize(device)
                if repeat:  # the first compiles
                    seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - started)
            told.append(f"{name} {1000 * seconds[name]:.2f} ms")
        except Exception as error:  # whatever a kernel, a compiler or a driver raises: the way is not for this machine
            seconds.pop(name, None)
            told.append(f"{name} cannot ({one_line(error, 80)})")
    best = min(seconds, key=seconds.__getitem__, default="split")
    return best, f"attention of packed rows, a layer: {', '.join(told)}; taken: {best}"


def _original_attention(module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """The attention that the model had before `enable_packing`, for input that is not packed."""
    if mask is not None and mask.numel() == 1:
        raise RuntimeError("the model does not hand its options on to its attention")
    if getattr(module, ORIGINAL_ATTENTION) != "eager":
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **options)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
