"""A batch of pairs: examples of token ids, packed into one row or stacked into TRL's tensors, each once and on demand.

TRL's stacked batch of B pairs has `input_ids`, `attention_mask` and `completion_mask`, each [2B, L], the B chosen
sequences first, prompts included. If an answer contains turns that the model does not write, `completion_mask` is 0 on
them. An unpaired row is a pair whose other response is empty: a prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from apo.packing.layout import SIDES, PackedRow, pack_pairs
from clair.inference.generation.onednn import rows_multiple

Stacked = Mapping[str, Any]
"""TRL's stacked batch."""
PAIR_WEIGHT = "pair_weight"
"""Key of an example's weight, if a dataset column holds weights."""
STATE = "user_state"
"""Key of an example's state of its user, if a dataset column holds states."""


@dataclass(frozen=True, eq=False)
class PairBatch:
    """B pairs: their `examples`, with id columns and, if there are any, masks, a weight and reference log-probs.

    `pad` stacks examples into TRL's tensors. `user_stacked` is what a user's own collator has stacked. A `dummy` batch
    runs only because all processes must run equally many, and counts for nothing.

    transformers reads it as it reads TRL's batch, by key, and leaves it on the host: it is no Mapping.
    """

    examples: list[dict[str, Any]]
    pad: Callable[[list[dict[str, Any]]], Stacked]
    user_stacked: Stacked | None = None
    dummy: bool = False
    _rows: dict[torch.device, PackedRow] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.examples)

    def __contains__(self, key: str) -> bool:
        return key in self.stacked

    def __getitem__(self, key: str) -> Any:
        return self.stacked[key]

    @cached_property
    def stacked(self) -> Stacked:
        """TRL's stacked batch, on the host."""
        return mask_turns(self.pad(self.examples), self.examples) if self.user_stacked is None else self.user_stacked

    def row(self, device: torch.device) -> PackedRow:
        """The pairs in one packed row on `device`, which policy and reference share."""
        if device not in self._rows:
            self._rows[device] = pack_pairs(self.examples, device, rows_multiple(device))
        return self._rows[device]

    @property
    def weights(self) -> torch.Tensor:
        """The weights of the pairs, [B], float32: 1 without a column of weights, 0 in a dummy batch."""
        return torch.tensor([0.0 if self.dummy else example.get(PAIR_WEIGHT, 1.0) for example in self.examples])

    @property
    def reference(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The cached log-probs of both responses under the reference, [B] each, or None."""
        if "ref_chosen_logps" not in self.examples[0]:
            return None
        chosen, rejected = (torch.tensor([example[f"ref_{side}_logps"] for example in self.examples]) for side in SIDES)
        return chosen, rejected

    def select(self, indices: Sequence[int], *, dummy: bool = False) -> PairBatch:
        """The batch of some of its pairs, in this order; of a dummy always a dummy."""
        user_stacked = self.user_stacked
        if user_stacked is not None:
            rows = [*indices, *(index + len(self) for index in indices)]
            user_stacked = {
                key: value[list(indices) if len(value) == len(self) else rows] for key, value in user_stacked.items()
            }
        return replace(
            self,
            examples=[self.examples[index] for index in indices],
            user_stacked=user_stacked,
            dummy=dummy or self.dummy,
        )


def mask_turns(stacked: Stacked, examples: Sequence[Mapping[str, Any]]) -> Stacked:
    """Set `completion_mask`, in place, to 0 where `chosen_mask` and `rejected_mask` of the examples are 0."""
    for row, (side, example) in enumerate((side, example) for side in SIDES for example in examples):
        if mask := example.get(f"{side}_mask"):
            start, trained = len(example["prompt_ids"]), stacked["completion_mask"][row]
            trained[start : start + len(mask)] *= trained.new_tensor(mask)
    return stacked


def unstack(stacked: Stacked) -> list[dict[str, list[int]]]:
    """The examples of a stacked batch: `prompt_ids`, `chosen_ids` and `rejected_ids` per pair, and a mask for each
    response that is not trained as a whole."""
    rows = []
    keys = ("input_ids", "attention_mask", "completion_mask")
    for ids, attention, completion in zip(*(stacked[key].tolist() for key in keys), strict=True):
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
