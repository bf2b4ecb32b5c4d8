"""Mixed precision: log-probs outside of a training step are computed in the step's precision.

On a rate of 0 policy and reference stay one model, so every reward, divergence and difference is 0, and 0 exactly where
both are asked in one batch.
"""

from __future__ import annotations

import itertools
import random

import accelerate
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from apo.monitoring.token_diagnostics import TokenDiagnostics
from apo.training.preflight import check_before_training
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError
from tests.apo.conftest import VOCABULARY, make_model


def long_pairs(n=6):
    """Pairs with answers of 100 to 130 tokens."""
    rng = random.Random(0)

    def turn(role, low, high):
        return [{"role": role, "content": " ".join(rng.choices(VOCABULARY, k=rng.randint(low, high)))}]

    return Dataset.from_list(
        [{"prompt": turn("user", 2, 9)} | {side: turn("assistant", 100, 130) for side in ("chosen", "rejected")}
         for _ in range(n)]
    )  # fmt: skip


SIDES = ("chosen", "rejected")


@pytest.fixture(params=["bf16", "fp16"])
def mixed(request, monkeypatch):
    """An option of mixed precision; accelerate computes fp16 on CPUs in float32, which torch need not."""
    if request.param == "fp16":
        always, scaler = property(lambda self: True, lambda self, value: None), torch.amp.GradScaler("cpu")
        monkeypatch.setattr(accelerate.Accelerator, "native_amp", always, raising=False)
        monkeypatch.setattr(accelerate.Accelerator, "scaler", property(lambda self: scaler, lambda self, value: None),
                            raising=False)  # fmt: skip
    return {request.param: True}


def trainer_of(tmp_path, tokenizer, adapter=False, **more):
    """A trainer at rate 0. The model's weights are large enough for its answers to be rounded visibly."""
    args = APOConfig(
        output_dir=str(tmp_path), max_steps=2, learning_rate=0.0, logging_steps=1, save_strategy="no",
        per_device_train_batch_size=3, per_device_eval_batch_size=3, report_to="none", disable_tqdm=True, **more,
    )  # fmt: skip
    peft = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    return APOTrainer(
        make_model(initializer_range=0.4), args=args, train_dataset=long_pairs(), eval_dataset=long_pairs(3),
        processing_class=tokenizer, peft_config=peft,
    )  # fmt: skip


ALL = [("bf16", *switches) for switches in itertools.product([False, True], repeat=3)]


@pytest.mark.parametrize(
    ("mixed", "adapter", "cached", "packed"),
    [*ALL, ("fp16", False, False, True), ("fp16", True, True, False)], indirect=["mixed"],
)  # fmt: skip
def test_every_reward_is_0_before_and_on_a_rate_of_0(tmp_path, tokenizer, mixed, adapter, cached, packed):
    trainer = trainer_of(tmp_path, tokenizer, adapter, precompute_ref_log_probs=cached, shared_prefix=packed, **mixed)
    assert trainer.is_packed == packed
    near = 1e-2 if cached else 0.0  # computed in other batches, with other rounding
    assert check_before_training(trainer) == pytest.approx({"chosen": 0.0, "rejected": 0.0}, abs=near)
    initial = trainer.evaluate()
    trainer.train()
    steps = [row for row in trainer.state.log_history if "rewards/chosen" in row]
    assert [row[f"rewards/{side}"] for row in steps for side in SIDES] == pytest.approx([0.0] * 4, abs=near)
    assert [initial[f"eval_rewards/{side}"] for side in SIDES] == pytest.approx([0.0] * 2, abs=near)
    trained = trainer.evaluate()
    assert {k: trained[k] for k in trained if "logps" in k} == {k: initial[k] for k in initial if "logps" in k}


def test_monitors_see_no_change_at_a_rate_of_0(tmp_path, tokenizer, mixed):
    trainer = trainer_of(tmp_path, tokenizer, objective="kto", **mixed)
    examples = [trainer.train_dataset[row] for row in range(3)]
    initial, probe = trainer.response_logps(examples), TokenDiagnostics(trainer, examples)
    trainer.train()
    assert trainer.response_logps(examples) == initial
    assert all(value == 0 for value in probe.measure().values())
    assert [row["kl/mismatched"] for row in trainer.state.log_history if "kl/mismatched" in row] == [0.0, 0.0]


def test_another_model_is_no_reference_in_mixed_precision_either(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, bf16=True)
    with torch.no_grad():
        for weight in trainer.ref_model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    with pytest.raises(UserError, match="is not 0 before the first step"):
        check_before_training(trainer)
