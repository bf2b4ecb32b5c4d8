"""The pairs on which KTO's divergence is estimated; tests/apo/training/test_trainer.py has the estimate."""

from __future__ import annotations

from trl.trainer.dpo_trainer import DataCollatorForPreference

from apo.losses.divergence import rotate_responses
from apo.packing.batch import PairBatch

collate = DataCollatorForPreference(pad_token_id=0)


def test_mismatching_gives_each_prompt_the_next_pairs_answers_over_all_batches():
    pairs = [{"prompt_ids": [n], "chosen_ids": [10 + n], "rejected_ids": [20 + n]} for n in (1, 2, 3)]
    batches = rotate_responses([PairBatch(pairs[:2], collate), PairBatch(pairs[2:], collate)])
    swapped = [example for batch in batches for example in batch.examples]
    assert swapped == [
        {"prompt_ids": [1], "chosen_ids": [12], "rejected_ids": [22]},
        {"prompt_ids": [2], "chosen_ids": [13], "rejected_ids": [23]},
        {"prompt_ids": [3], "chosen_ids": [11], "rejected_ids": [21]},
    ]
    (alone,) = rotate_responses([PairBatch(pairs[:1], collate)])
    assert alone.dummy


def test_mismatching_over_two_processes_is_that_of_one():
    pairs = [{"prompt_ids": [n], "chosen_ids": [10 + n], "rejected_ids": [20 + n]} for n in range(1, 8)]
    (single,) = rotate_responses([PairBatch(pairs, collate)])
    # Batches of two are dealt out in turn; the last process has nothing left, and repeats a pair that is idle.
    parts = [[pairs[:2], pairs[4:6]], [pairs[2:4], pairs[6:]]]
    dealt = [[PairBatch(part, collate) for part in [*both, pairs[:1]]] for both in parts]
    for batches in dealt:
        batches[2] = batches[2].select([0], dummy=True)
    heads = []
    for batches in dealt:
        rotate_responses(batches, lambda local_heads: heads.extend(local_heads) or [local_heads[0], local_heads[0]], 0)
    rotated = [rotate_responses(batches, lambda _: heads, rank) for rank, batches in enumerate(dealt)]
    assert all(batches[2].dummy for batches in rotated)
    mixed = [example for step in (0, 1) for rank in (0, 1) for example in rotated[rank][step].examples]
    assert mixed == single.examples
