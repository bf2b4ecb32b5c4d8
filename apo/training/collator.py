"""PairCollator: rows of a dataset to a `PairBatch`, which TRL's collator or a user's own stacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForPreference

from apo.packing.batch import PAIR_WEIGHT, STATE, PairBatch, Stacked, mask_turns, unstack
from apo.packing.layout import SHARED_LENGTH, shared_response_length


@dataclass(frozen=True)
class PairCollator:
    """`stack` is TRL's collator of pairs, or a user's own, whose batches may hold images. `weights` and `states`
    are columns."""

    stack: Callable[[list[dict[str, Any]]], Stacked | PairBatch]
    weights: str | None = None
    states: str | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> PairBatch:
        """The batch. Only a user's collator is called at once, as it may change the pairs or read images."""
        examples, pad, user_stacked = [dict(row) for row in rows], self.stack, None
        if not isinstance(pad, DataCollatorForPreference):
            user_stacked, pad = pad(list(rows)), DataCollatorForPreference(pad_token_id=0)
            if isinstance(user_stacked, PairBatch):  # it called another PairCollator
                return user_stacked
            mask_turns(user_stacked, rows)
            if "prompt_ids" in rows[0]:
                unmasked = {"chosen_mask": [], "rejected_mask": []}
                examples = [{**row, **unmasked, **pair} for row, pair in zip(rows, unstack(user_stacked), strict=True)]
        for example in examples:
            if self.weights is not None:
                example[PAIR_WEIGHT] = float(example.get(self.weights, 1.0))
            if self.states is not None and example.get(self.states) is not None:
                example[STATE] = example[self.states]
            if "prompt_ids" in example:
                example[SHARED_LENGTH] = shared_response_length(example)
        return PairBatch(examples, pad, user_stacked)
