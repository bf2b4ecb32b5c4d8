"""TRL's stacked batch of pairs: its collators, and its conversion back to examples.

A batch is what TRL's collator makes of B pairs: `input_ids`, `attention_mask` and `completion_mask`, each [2B, L], the
B chosen sequences first, prompts included. If an answer contains turns that the model does not write,
`completion_mask` is 0 on them. An unpaired row is a pair whose other response is empty: a prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Batch = Mapping[str, Any]
SIDES = ("chosen", "rejected")
IDS = ("input_ids", "attention_mask", "completion_mask")
"""Keys of a stacked batch for its tokens, each [2B, L]."""
PAIR_WEIGHT = "pair_weight"
"""Key of the weight of each pair, [B], if a dataset column holds weights."""
DUMMY = "dummy"
"""Key of a batch that runs only because all processes must run equally many, and that counts for nothing."""


def response_mask(example: Mapping[str, Any], side: str) -> list[int]:
    """1 for each trained token of a response, 0 for tokens of turns that the model does not write."""
    return example.get(f"{side}_mask") or [1] * len(example[f"{side}_ids"])


@dataclass(frozen=True)
class TurnCollator:
    """A collator of pairs whose `completion_mask` leaves out what `chosen_mask` and `rejected_mask` leave out."""

    pad: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The stacked batch."""
        batch = self.pad(examples)
        for row, (side, example) in enumerate((side, example) for side in SIDES for example in examples):
            if mask := example.get(f"{side}_mask"):
                start, trained = len(example["prompt_ids"]), batch["completion_mask"][row]
                trained[start : start + len(mask)] *= trained.new_tensor(mask)
        return batch


@dataclass(frozen=True)
class WeightedCollator:
    """A collator of pairs that adds their weights, from a column of the dataset."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    column: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The stacked batch, with `PAIR_WEIGHT` [B] in float32."""
        import torch

        return {**self.collate(examples), PAIR_WEIGHT: torch.tensor([float(e[self.column]) for e in examples])}


def uncollate(batch: Batch) -> list[dict[str, list[int]]]:
    """The examples of a stacked batch: `prompt_ids`, `chosen_ids` and `rejected_ids` per pair, and a mask for each
    response that is not trained as a whole."""
    rows = []
    for ids, attention, completion in zip(*(batch[key].tolist() for key in IDS), strict=True):
        length = sum(attention)
        start = completion.index(1) if 1 in completion else length
        rows.append((ids[:length], completion[:length], start))
    half = len(rows) // 2
    return [_example(*pair) for pair in zip(rows[:half], rows[half:], strict=True)]


def _example(*rows: tuple[list[int], list[int], int]) -> dict[str, list[int]]:
    start = min(first for *_, first in rows)
    example = {"prompt_ids": rows[0][0][:start]}
    for side, (ids, mask, _) in zip(SIDES, rows, strict=True):
        example[f"{side}_ids"] = ids[start:]
        if 0 in mask[start:]:
            example[f"{side}_mask"] = mask[start:]
    return example


def select_pairs(batch: Batch, indices: Sequence[int]) -> dict[str, Any]:
    """The stacked batch of some of its pairs, in this order."""
    pairs = len(batch["input_ids"]) // 2
    rows = [*indices, *(index + pairs for index in indices)]
    return {key: value[list(indices) if len(value) == pairs else rows] for key, value in batch.items()}


def dummy_batch(batch: Batch) -> dict[str, Any]:
    """The first pair of a batch, marked to count for nothing."""
    import torch

    return {**select_pairs(batch, [0]), DUMMY: torch.ones(1, dtype=torch.bool, device=batch["input_ids"].device)}


def rotate_responses(
    batches: Sequence[Batch],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    gather: Callable[[list[Any]], list[Any]] = list,
    rank: int = 0,
) -> list[Batch]:
    """The same pairs, with each prompt followed by the responses of the next pair, rotating over all the batches.

    KTO estimates its divergence on these (arXiv 2402.01306: x_i with y_j, j = i + 1 modulo their number). The batches
    keep their sizes. `gather` concatenates the lists of all processes; pairs then follow one another as they would in
    one process. A single pair has no other responses: its batch is a dummy.
    """
    rows = [uncollate(batch) for batch in batches]
    firsts = gather([[None if DUMMY in batch else row[0] for batch, row in zip(batches, rows, strict=True)]])
    order = sorted((step, process) for process, steps in enumerate(firsts) for step, first in enumerate(steps) if first)
    successors = dict(zip(order, order[1:] + order[:1], strict=True))
    rotated: list[Batch] = []
    for step, (batch, examples) in enumerate(zip(batches, rows, strict=True)):
        if DUMMY in batch or (len(order) == 1 and len(examples) == 1):
            rotated.append(dummy_batch(batch))
            continue
        next_step, next_process = successors[step, rank]
        following = [*examples[1:], firsts[next_process][next_step]]
        pairs = zip(examples, following, strict=True)
        rotated.append(collate([{**later, "prompt_ids": example["prompt_ids"]} for example, later in pairs]))
    return rotated


def pair_weights(batch: Batch) -> Tensor:
    """The weights of the pairs of a stacked batch, [B], float32: 1 without a column of weights, 0 in a dummy batch."""
    import torch

    if DUMMY in batch:
        return torch.zeros(1, device=logps_device(batch))
    weights = batch.get(PAIR_WEIGHT)
    return torch.ones(len(batch["input_ids"]) // 2, device=logps_device(batch)) if weights is None else weights.float()


def logps_device(batch: Batch) -> torch.device:
    """The device for the log-probs of a stacked batch. The ids of a batch for packed rows stay on the host."""
    return batch.get(PAIR_WEIGHT, batch["input_ids"]).device
