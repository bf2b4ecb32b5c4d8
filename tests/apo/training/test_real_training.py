"""A real model, SmolLM2-135M-Instruct: its runs start and learn in each precision, and equal TRL's on text rows."""

from __future__ import annotations

import gc

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from apo.training.config import TrainConfig
from apo.training.train import train
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from clair.core.files import write_json

pytestmark = pytest.mark.slow

ROWS = [
    {"prompt": f"Question: what is {a} plus {b}? Answer:", "chosen": f" {a + b}, since {b} more than {a} is {a + b}.",
     "rejected": f" It is {a * b + 1}."}
    for a, b in ((2, 3), (4, 5), (7, 1), (6, 6), (9, 2), (3, 8), (5, 5), (8, 4))
]  # fmt: skip
STEPS = 4
OPTIONS = {
    "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-5, "lr_scheduler_type": "constant",
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 1,
    "gradient_checkpointing": False, "use_cpu": True,
}  # fmt: skip


def run_of(trainer):
    """The log of each step: losses, rewards and gradient norms."""
    trainer.train()
    steps = [row for row in trainer.state.log_history if "grad_norm" in row]
    del trainer
    gc.collect()
    return {key: [row[key] for row in steps] for key in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm")}


def both(tmp_path, real_model, *, bf16, adapter):
    """The same run by TRL and here."""
    rate = {"learning_rate": 2e-4} if adapter else {}
    peft = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    data = {"train_dataset": Dataset.from_list(ROWS), "processing_class": tokenizer, "peft_config": peft}
    options = OPTIONS | rate | {"output_dir": str(tmp_path), "bf16": bf16}
    theirs = DPOConfig(**options, loss_type="apo_zero", activation_checkpointing=False)
    return (
        run_of(DPOTrainer(str(real_model), args=theirs, **data)),
        run_of(APOTrainer(str(real_model), args=APOConfig(**options, objective="apo_zero"), **data)),
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_in_float32_each_step_is_trls(tmp_path, real_model, adapter):
    theirs, ours = both(tmp_path, real_model, bf16=False, adapter=adapter)
    assert theirs["loss"][0] - theirs["loss"][-1] > 0.02  # something was learned, so there is something to agree on
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.01)
    for side in ("rewards/chosen", "rewards/rejected"):
        assert ours[side] == pytest.approx(theirs[side], rel=0.01, abs=1e-4)


def test_in_mixed_bfloat16_each_step_is_trls_within_its_rounding(tmp_path, real_model):
    """A logit is rounded to 1/16 and more, and differently in packed rows: some 0.03 nats a token, of either sign, and
    the square root of their number times as much for an answer. Of 25 tokens that is 0.15 nats, and beta a tenth of it.
    """
    theirs, ours = both(tmp_path, real_model, bf16=True, adapter=False)
    assert theirs["loss"][0] - theirs["loss"][-1] > 0.02
    assert ours["loss"][0] == pytest.approx(1, abs=1e-6)  # policy and reference are rounded alike: they are one model
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.01)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
    for side in ("rewards/chosen", "rewards/rejected"):
        assert ours[side] == pytest.approx(theirs[side], abs=0.02)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_recipe_trains_it(tmp_path, real_model, adapter, bf16):
    def turn(role, text):
        return [{"role": role, "content": text.strip()}]

    rows = [{"prompt": turn("user", row["prompt"]), "chosen": turn("assistant", row["chosen"]),
             "rejected": turn("assistant", row["rejected"])} for row in ROWS]  # fmt: skip
    write_json(tmp_path / "rows.json", rows)
    rate = 2e-4 if adapter else 1e-5
    recipe = {
        "model": str(real_model), "dataset": str(tmp_path / "rows.json"), "objective": "apo_zero", "eval": False,
        "out": str(tmp_path / "run"), "probe": 2,
        "trainer": {"bf16": bf16, "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": rate,
                    "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"},
    }  # fmt: skip
    run = train(TrainConfig(**recipe, **({"lora": {"r": 8}} if adapter else {})), log=lambda _: None)
    assert run["metrics"]["loss"] < 0.98
    assert run["metrics"]["rewards/chosen"] > run["metrics"]["rewards/rejected"]
    assert (tmp_path / "run" / ("adapter_model.safetensors" if adapter else "model.safetensors")).is_file()
