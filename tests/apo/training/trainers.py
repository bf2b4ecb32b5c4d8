"""Tiny APOTrainers, and what their training did: losses, gradient norms and weights."""

from __future__ import annotations

import torch
from peft import LoraConfig

from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from tests.apo.conftest import make_model


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def options(tmp_path, **more):
    return {
        "output_dir": str(tmp_path), "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
        "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, **more,
    }  # fmt: skip


def apo_trainer(tmp_path, tokenizer, pairs, model=None, peft_config=None, eval_dataset=None, **more):
    model = make_model() if model is None else model
    return APOTrainer(
        model=model, args=APOConfig(**options(tmp_path, **more)), train_dataset=pairs, processing_class=tokenizer,
        peft_config=peft_config, eval_dataset=eval_dataset,
    )  # fmt: skip


def trained(trainer):
    """Train. Returns the loss and the gradient norm of each step, and the trained parameters."""
    trainer.train()
    steps = [row for row in trainer.state.log_history if "grad_norm" in row]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return [row["loss"] for row in steps], [row["grad_norm"] for row in steps], weights


def assert_same_run(actual, expected, atol=1e-5):
    torch.testing.assert_close(torch.tensor(actual[0]), torch.tensor(expected[0]), rtol=0, atol=atol)
    torch.testing.assert_close(torch.tensor(actual[1]), torch.tensor(expected[1]), rtol=1e-4, atol=atol)
    assert actual[2].keys() == expected[2].keys()
    for name in actual[2]:
        torch.testing.assert_close(actual[2][name], expected[2][name], rtol=0, atol=atol, msg=name)
