"""Checks before the first step: one line about what would otherwise train silently and wrongly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from apo.data.tokenize import eos_ids, first_rows
from apo.packing.layout import packed_length
from clair.core.errors import UserError

if TYPE_CHECKING:
    from apo.packing.batch import PairBatch
    from apo.training.trainer import APOTrainer

PER_TOKEN = {"float32": 1e-4, "half": 2e-2}
"""Nats per token by which policy and reference may differ before training: rounding, not another model."""
PER_ANSWER = {"float32": 1e-3, "half": 0.3}
"""Added for each answer: a logit in bfloat16 is a multiple of 1/16 from 8 on, and an answer of one token has one.
Rounding also differs if the reference's log-probs are from the cache, computed in other batches."""


def check_before_training(trainer: APOTrainer, rows: int = 64) -> dict[str, float]:
    """Check rows as the trainer prepares them. Returns the rewards of the shortest, 0 up to rounding.

    One row shows whether the reference is another model; more would only delay the first step. Raises UserError if the
    end of a response is not trained, or if the policy is not its own reference.
    """
    examples = first_rows(trainer.train_dataset, rows)
    batch = trainer.data_collator(examples)
    present = [bool(example[f"{name}_ids"]) for name in ("chosen", "rejected") for example in examples]
    _check_ends(trainer, batch, torch.tensor(present).nonzero().squeeze(1))
    if not trainer.objective.needs_reference:
        return {}
    shortest = min(range(len(batch)), key=lambda index: packed_length(batch.examples[index]))
    return _check_initial_rewards(trainer, batch.select([shortest]))


def _check_ends(trainer: APOTrainer, batch: PairBatch, rows: torch.Tensor) -> None:
    """Raises UserError unless the last token of each sequence is an end of turn and is trained, even if pad = eos."""
    last = batch["attention_mask"].sum(1)[rows] - 1
    eos = eos_ids(trainer.processing_class, trainer._generation_config)
    tokens = batch["input_ids"][rows, last].tolist()
    if others := [token for token in tokens if token not in eos]:
        text = trainer.processing_class.decode([others[0]])
        raise UserError(f"the last token of an answer is {text!r}, not the end of turn; was the batch cut?")
    if not batch["completion_mask"][rows, last].all():
        raise UserError("the end of turn is masked out of training; give the tokenizer a pad_token of its own")


def _check_initial_rewards(trainer: APOTrainer, batch: PairBatch) -> dict[str, float]:
    """Before the first step the policy is its reference: every reward is 0 up to rounding."""
    with trainer.evaluation_mode():
        policy, reference = trainer.logps(trainer.model, batch), trainer.reference_logps(batch)
    exact = policy.chosen.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
    precision = "float32" if exact else "half"
    ratios = {"chosen": policy.chosen - reference[0], "rejected": policy.rejected - reference[1]}
    lengths = {"chosen": policy.chosen_len, "rejected": policy.rejected_len}
    for name, ratio in ratios.items():
        if not (ratio.abs() <= PER_TOKEN[precision] * lengths[name] + PER_ANSWER[precision]).all():
            largest = ratio.abs().nan_to_num(float("inf")).max().item()
            raise UserError(
                f"the {name} reward is not 0 before the first step (log-ratio up to {largest:.3g} nats): the reference "
                "is not the model that is trained; leave ref_model out, or load both from one folder"
            )
    return {name: (trainer.beta * ratio).mean().item() for name, ratio in ratios.items()}
