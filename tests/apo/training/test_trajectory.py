"""Twenty steps of training are the same with every log-prob function, on models of several families."""

from __future__ import annotations

import statistics

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from apo.packing.logps import PairLogps, plain_logps
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from tests.apo.conftest import make_pairs
from tests.apo.training.families import FAMILIES, tiny

STEPS, BATCH = 20, 8
LOGGED = ("loss", "grad_norm", "logps/chosen", "logps/rejected")


def one_row_at_a_time(model, batch):
    """Each sequence by itself, without padding, through `plain_logps`: padding-free and as plain as possible."""
    logps = []
    pairs = len(batch["input_ids"]) // 2
    for index in range(pairs):
        single = {key: value[[index, index + pairs]] for key, value in batch.items() if len(value) == 2 * pairs}
        halves = []
        for row in (0, 1):
            attended = single["attention_mask"][row].bool()
            alone = {
                key: single[key][row : row + 1, attended] for key in ("input_ids", "attention_mask", "completion_mask")
            }
            doubled = {key: torch.cat([value, value]) for key, value in alone.items()}
            halves.append(plain_logps(model, doubled))
        (chosen, rejected) = halves
        logps.append((chosen.chosen, rejected.chosen, chosen.chosen_len, rejected.chosen_len))
    return PairLogps(*(torch.cat(columns) for columns in zip(*logps, strict=True)))


class Reversed:
    """The pairs of each batch in another order."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, examples):
        return self.collate(examples[::-1])


def trajectory(out, family, tokenizer, how="shared prefix", objective="apo_zero", loss=None):
    """The log of the steps, [STEPS][len(LOGGED)], and the weights after them."""
    common = {
        "output_dir": str(out), "report_to": "none", "logging_steps": 1, "learning_rate": 1e-4, "max_steps": STEPS,
        "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": BATCH, "use_cpu": True,
        "bf16": False, "warmup_steps": 2,
    }  # fmt: skip
    data = {"train_dataset": Dataset.from_list(make_pairs(STEPS * BATCH)), "processing_class": tokenizer}
    model = tiny(family)
    if how == "TRL":
        theirs = loss or {"loss_type": [objective]}
        options = DPOConfig(**common, **theirs, activation_checkpointing=False)
        ref_model = tiny(family)
        trainer = DPOTrainer(model, ref_model=ref_model, args=options, **data)
    else:
        options = {
            "one by one": {}, "TRL's batch": {"shared_prefix": False}, "shared prefix": {},
            "passes of 60 tokens": {"pack_tokens": 60}, "reference cached": {"precompute_ref_log_probs": True},
            "checkpointing": {"gradient_checkpointing": True}, "another order": {},
            "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH},
        }[how]  # fmt: skip
        computer = one_row_at_a_time if how == "one by one" else None
        trainer = APOTrainer(
            model, args=APOConfig(**common | options, objective=objective), pair_logps=computer, **data
        )
        assert trainer.is_packed == (how not in ("one by one", "TRL's batch"))
        if how == "another order":
            trainer.data_collator = Reversed(trainer.data_collator)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row and "train_loss" not in row]
    assert len(logs) == STEPS
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return torch.tensor([[float(row[name]) for name in LOGGED] for row in logs], dtype=torch.float64), weights


def assert_same(ours, theirs, case):
    """Each logged number and the weights to 1e-5 of their norm, and residuals of the loss that do not drift."""
    (our_steps, our_weights), (their_steps, their_weights) = ours, theirs
    off = ((our_steps - their_steps).norm(dim=0) / their_steps.norm(dim=0)).tolist()
    assert max(off) < 1e-5, (case, dict(zip(LOGGED, off, strict=True)))
    assert (our_weights - their_weights).norm() < 1e-5 * their_weights.norm(), case
    residuals = (our_steps[:, 0] - their_steps[:, 0]).tolist()
    noise = 3 * statistics.stdev(residuals) / STEPS**0.5
    ulp = 6e-8 * max(1, float(their_steps[:, 0].abs().max()))  # of a loss in float32
    assert abs(statistics.fmean(residuals)) <= noise + ulp, (case, residuals)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_are_the_same_however_they_are_computed(tmp_path, family, tokenizer):
    theirs = trajectory(tmp_path / "trl", family, tokenizer, "TRL")
    computers = (
        "one by one", "TRL's batch", "shared prefix", "passes of 60 tokens", "reference cached", "checkpointing",
        "another order", "accumulation",
    )  # fmt: skip
    start = torch.cat([p.detach().flatten() for p in tiny(family).parameters()])
    assert (theirs[1] - start).norm() > 1e-3 * theirs[1].norm()  # so that equal weights mean something
    for number, how in enumerate(computers):
        assert_same(trajectory(tmp_path / str(number), family, tokenizer, how), theirs, how)


ARMS = {
    "qwen3": ("apo_down", None),
    "mistral, window of 12": ("ipo", None),
    "gemma2, soft caps, window of 12": ("dpo", {"loss_type": "sigmoid"}),
    "llama": ({"robust": {"label_smoothing": 0.2}}, {"loss_type": "robust", "label_smoothing": 0.2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ARMS)
def test_twenty_steps_are_those_of_trls_other_arms(tmp_path, family, tokenizer):
    """Each of them on another family; apo_zero is compared on all above."""
    objective, loss = ARMS[family]
    theirs = trajectory(tmp_path / "trl", family, tokenizer, "TRL", objective, loss)
    assert_same(trajectory(tmp_path / "ours", family, tokenizer, objective=objective), theirs, objective)
