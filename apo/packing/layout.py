"""Packed rows: many pairs in one row without padding, each prompt once.

A pair is laid out as `shared, chosen branch, rejected branch`. `shared` is the longest common prefix of the two
sequences: the prompt and any common beginning of the responses. The positions of the rejected branch continue from the
shared tokens, and the branch attends to the shared tokens and to itself, never to the chosen branch (attention.py).
Pairs follow one another in a single row and do not attend to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
from typing import Any, TypeVar

import torch

from apo.data.encoding import common_prefix
from apo.packing.async_copy import to_device

T = TypeVar("T")
SIDES = ("chosen", "rejected")
SHARED_LENGTH = "shared_length"
"""Key of an example's `shared_response_length`, if it is computed already."""


def response_mask(example: Mapping[str, Any], side: str) -> list[int]:
    """1 for each trained token of a response, 0 for tokens of turns that the model does not write."""
    return example.get(f"{side}_mask") or [1] * len(example[f"{side}_ids"])


@dataclass(frozen=True)
class PairSpan:
    """The position of one pair in the row: `shared` tokens from `start`, then `chosen` and `rejected` branch tokens."""

    start: int
    shared: int
    chosen: int
    rejected: int

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Start and end of the shared tokens, end of the chosen branch, end of the rejected branch."""
        shared_end = self.start + self.shared
        return self.start, shared_end, shared_end + self.chosen, shared_end + self.chosen + self.rejected


@dataclass
class PackedRow:
    """A packed row of T tokens with M trained response tokens.

    `input_ids` and `position_ids` are [1, T]. Hidden state `predictors[m]` predicts token `labels[m]`, both [M].
    `owner` [M] is 3 * pair + (0 for a response token that both responses share, 1 for chosen, 2 for rejected).
    `lengths` is [pairs, 2]: the trained tokens of the chosen and of the rejected response.
    `counts` is the work of each pair, on the host (apo.monitoring.metrics.token_counts).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    spans: list[PairSpan]
    predictors: torch.Tensor
    labels: torch.Tensor
    owner: torch.Tensor
    lengths: torch.Tensor
    counts: list[list[int]] = field(default_factory=list)
    backend: str = "split"
    """A key of `attention.BACKENDS`."""
    cache: dict[Hashable, Any] = field(default_factory=dict)
    """Masks and indices: computed once per row and used by every layer."""

    @property
    def pairs(self) -> int:
        """The number of pairs in the row."""
        return len(self.lengths)

    def cached(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The cached value of `key`, computed on first use."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]


def shared_response_length(example: Mapping[str, Any]) -> int:
    """The number of tokens that both responses of a pair begin with, trained in both or in neither."""
    if SHARED_LENGTH in example:
        return example[SHARED_LENGTH]
    shared = common_prefix(example["chosen_ids"], example["rejected_ids"])
    if example.get("chosen_mask") or example.get("rejected_mask"):
        chosen, rejected = (response_mask(example, side)[:shared] for side in SIDES)
        return common_prefix(chosen, rejected)
    return shared


def packed_length(example: Mapping[str, Any]) -> int:
    """The number of tokens of a pair in a packed row."""
    prompt, chosen, rejected = (example[f"{name}_ids"] for name in ("prompt", *SIDES))
    return len(prompt) + len(chosen) + len(rejected) - shared_response_length(example)


def crop_around_divergence(example: dict[str, Any], context: int = 16) -> dict[str, Any]:
    """Crop a pair to at most `context` tokens before and after a point shortly before its responses diverge."""
    prompt, chosen, rejected = (example[f"{name}_ids"] for name in ("prompt", *SIDES))
    start = max(0, shared_response_length(example) - context // 4)
    window = slice(start, start + context)
    ids = {
        "prompt_ids": [*prompt, *chosen[:start]][-context:],
        "chosen_ids": chosen[window],
        "rejected_ids": rejected[window],
    }
    masks = {f"{side}_mask": response_mask(example, side)[window] for side in SIDES if example.get(f"{side}_mask")}
    # The first token stays trained, so that the prompt of the cropped pair ends where `prompt_ids` does.
    return {**example, **ids, **{name: [1, *mask[1:]][: len(mask)] for name, mask in masks.items()}}


def pack_pairs(
    examples: Sequence[Mapping[str, Any]], device: torch.device | str = "cpu", multiple: int = 1
) -> PackedRow:
    """Pack pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`) into one row, in their order.

    Tokens and predictors are filled up to a `multiple`; no pair reads the filler and no loss counts it.
    In an unpaired row one response is empty; the other is part of the shared tokens, and both branches are empty.
    Raises ValueError for a pair with an empty prompt or no response: nothing would predict its first token.
    """
    ids: list[int] = []
    positions: list[int] = []
    spans: list[PairSpan] = []
    predictors: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    lengths: list[int] = []
    counts: list[list[int]] = []
    for pair, example in enumerate(examples):
        prompt, chosen, rejected = (example[f"{name}_ids"] for name in ("prompt", *SIDES))
        if not (prompt and (chosen or rejected)):
            raise ValueError("a pair with an empty prompt or no response cannot be packed")
        paired = bool(chosen and rejected)
        common = shared_response_length(example) if paired else len(chosen or rejected)
        chosen_mask, rejected_mask = (response_mask(example, side) for side in SIDES)
        lengths += [sum(chosen_mask), sum(rejected_mask)]
        shared, start = len(prompt) + common, len(ids)
        span = PairSpan(start, shared, len(chosen[common:]), len(rejected[common:]))
        spans.append(span)
        ids += [*prompt, *(chosen or rejected), *rejected[common:]]
        positions += [*range(shared + span.chosen), *range(shared, shared + span.rejected)]
        last_shared = start + shared - 1
        chosen_end, rejected_end = last_shared + span.chosen, last_shared + span.chosen + span.rejected
        segments = (
            (
                0 if paired else 1 if chosen else 2,
                (chosen or rejected)[:common],
                (chosen_mask or rejected_mask)[:common],
                range(start + len(prompt) - 1, last_shared),
            ),
            (1, chosen[common:], chosen_mask[common:], chain([last_shared], range(last_shared + 1, chosen_end))),
            (2, rejected[common:], rejected_mask[common:], chain([last_shared], range(chosen_end + 1, rejected_end))),
        )
        for offset, tokens, mask, states in segments:
            predictors += compress(states, mask)
            labels += compress(tokens, mask)
            owner += [3 * pair + offset] * sum(mask)
        first, second = shared + span.chosen, shared + span.rejected if paired else 0
        scored = sum(sum(mask) for _, _, mask, _ in segments)
        computed, products = first + span.rejected, first**2 + span.rejected * second
        counts.append([first + second, computed, computed, scored, products])
    if filler := -len(ids) % multiple:
        spans.append(PairSpan(len(ids), filler, 0, 0))
        ids += [0] * filler
        positions += range(filler)
    predictors += [0] * (-len(predictors) % multiple)
    columns = (ids, positions, predictors, labels, owner, lengths)
    # One transfer for all columns.
    stacked = to_device(torch.tensor([*chain(*columns)]), torch.device(device))
    tensors = stacked.split([len(column) for column in columns])
    return PackedRow(
        input_ids=tensors[0][None],
        position_ids=tensors[1][None],
        spans=spans,
        predictors=tensors[2],
        labels=tensors[3],
        owner=tensors[4],
        lengths=tensors[5].view(-1, 2),
        counts=counts,
    )


def pack_bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` in few bins of at most `capacity`, by first-fit decreasing; a larger one gets its own bin."""
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for bin, (filled, indices) in enumerate(bins):
            if filled + sizes[index] <= capacity:
                indices.append(index)
                bins[bin] = (filled + sizes[index], indices)
                break
        else:
            bins.append((sizes[index], [index]))
    return [sorted(indices) for _, indices in bins]
