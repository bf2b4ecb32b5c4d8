"""Attention of packed rows by FlexAttention, with a block mask built from the positions of the pairs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from apo.packing.async_copy import to_device
from apo.packing.layout import PackedRow, PairSpan

BLOCK = 128
"""Queries, and keys, of a block of FlexAttention: its default."""


def flex(
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
