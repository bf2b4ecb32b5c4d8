"""Failures that end a run: one line with what to change, and the last good checkpoint stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from apo import cli
from apo.monitoring.failures import (
    NonFiniteLossCheck,
    TrainingStopped,
    is_out_of_memory,
    memory_suggestions,
    pair_names,
)
from apo.run_dir.checkpoints import checkpoints, resume_problem
from apo.training.config import TrainConfig
from apo.training.logprobs import LogprobComputer
from apo.training.train import train
from tests.apo.conftest import make_model, make_pairs
from tests.apo.training.trainers import apo_trainer, lora

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def saved(folder):
    return [(checkpoint.name, resume_problem(checkpoint)) for checkpoint in checkpoints(Path(folder))]


def losing(lost_step, lost=(1,)):
    """An objective with a NaN loss for some pairs of one step. (Metrics call it in float64.)"""
    steps = []

    def objective(chosen, rejected, *, beta):
        losses = (-beta * (chosen - rejected)).sigmoid()
        if chosen.dtype == torch.float32:
            steps.append(len(steps) + 1)
            if steps[-1] == lost_step:
                losses = losses + torch.tensor([torch.nan if i in lost else 0.0 for i in range(len(losses))])
        return losses

    return objective


def recorded_batches(trainer):
    """The ids of the pairs of each micro-batch, as the trainer takes them."""
    batches, collate = [], trainer.data_collator
    ids = {tuple(row["prompt_ids"]): row["id"] for row in trainer.train_dataset}

    def collating(examples):
        batches.append([ids[tuple(example["prompt_ids"])] for example in examples])
        return collate(examples)

    trainer.data_collator = collating
    return batches


# A loss that is no number


def test_a_lost_loss_names_its_pairs_and_leaves_the_last_good_checkpoint(tmp_path, tokenizer, pairs):
    trainer = apo_trainer(tmp_path, tokenizer, pairs, objective=losing(lost_step=5), **SAVING)
    batches = recorded_batches(trainer)
    with pytest.raises(TrainingStopped) as stop:
        trainer.train()
    first, lost, *others = batches[4]
    message = str(stop.value)
    assert message == (
        f"step 5: the loss is not finite for 1 of 4 pairs of its batch ({lost!r}; the others: "
        f"{', '.join(map(repr, [first, *others]))}); look at these pairs and take them out, or lower "
        f"trainer.learning_rate; the last good checkpoint is {tmp_path / 'checkpoint-4'}"
    )
    assert saved(tmp_path) == [("checkpoint-2", None), ("checkpoint-4", None)]


def test_a_training_that_has_diverged_is_reported_as_such(tmp_path, tokenizer, pairs):
    trainer = apo_trainer(tmp_path, tokenizer, pairs, objective=losing(lost_step=1, lost=range(4)), **SAVING)
    with pytest.raises(
        TrainingStopped, match=r"for all 4 pairs of its batch \('p.*training has diverged.*no checkpoint had been"
    ):
        trainer.train()
    assert saved(tmp_path) == []


def test_a_rate_that_is_far_too_high_is_stopped_before_anything_broken_is_saved(tmp_path, tokenizer, pairs):
    more = {"optim": "sgd", "learning_rate": 1e38, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = apo_trainer(tmp_path, tokenizer, pairs, **more, **SAVING | {"save_steps": 1, "max_steps": 4})
    with pytest.raises(TrainingStopped, match=r"not finite.*trainer\.learning_rate"):
        trainer.train()
    for folder in checkpoints(tmp_path):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_a_non_finite_loss_is_noticed_at_a_synchronisation_before_it_is_logged_or_saved(tmp_path, tokenizer, pairs):
    for more, step in (({"logging_steps": 100, "logging_first_step": False}, 4), ({"logging_steps": 1}, 2)):
        options = {**SAVING, "save_steps": 100, **more}
        trainer = apo_trainer(tmp_path / str(step), tokenizer, pairs, objective=losing(lost_step=2), **options)
        trainer._losses = NonFiniteLossCheck(torch.device("meta"))
        with pytest.raises(TrainingStopped, match=r"^step 2: the loss is not finite for 1 of 4"):
            trainer.train()
        assert trainer.state.global_step == step - (step == 4)  # two micro-batches later, or when step 2 is logged


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path, tokenizer, pairs):
    def flat(chosen, rejected, *, beta):
        return (0 * chosen).sqrt() + (-beta * (chosen - rejected)).sigmoid()  # 0, whose slope is infinity times 0

    trainer = apo_trainer(tmp_path, tokenizer, pairs, objective=flat, **SAVING)
    with pytest.raises(
        TrainingStopped, match=r"step 1: the gradient is not finite, although the loss is; lower trainer\."
    ):
        trainer.train()


def test_a_broken_weight_is_never_saved(tmp_path, tokenizer, pairs):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 4:
                model.lm_head.weight.data[0, 0] = float("inf")

    trainer = apo_trainer(tmp_path, tokenizer, pairs, **SAVING)
    trainer.add_callback(Break())
    with pytest.raises(
        TrainingStopped, match=r"step 4: trained weights are not finite, so nothing is saved.*checkpoint-2$"
    ):
        trainer.train()
    assert saved(tmp_path) == [("checkpoint-2", None)]


def test_pairs_are_named_by_id_or_row(tokenizer, tmp_path):
    trainer = apo_trainer(tmp_path, tokenizer, Dataset.from_list(make_pairs(6)))
    rows = [trainer.train_dataset[i] for i in (4, 1)]
    assert pair_names(rows, trainer.train_dataset) == ["p4", "p1"]
    assert pair_names(rows, trainer.train_dataset.remove_columns("id")) == ["row 4", "row 1"]
    assert pair_names([{**rows[0], "chosen_ids": [99]}], trainer.train_dataset) == ["unknown"]


# Memory


def raising(error, failing_call):
    from apo.packing.logps import padded_logps

    calls = []

    def pair_logps(model, batch, **options):
        calls.append(1)
        if len(calls) == failing_call:
            raise error
        return padded_logps(model, batch, **options)

    return pair_logps


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "cublas", "python"])
def test_running_out_of_memory_is_reported_with_the_settings_to_change(error, tmp_path, tokenizer, pairs):
    tmp_path = tmp_path / "Of Ann"
    trainer = apo_trainer(tmp_path, tokenizer, pairs, gradient_accumulation_steps=2, **SAVING)
    trainer.logps = LogprobComputer(trainer.args, trainer.accelerator, raising(error, failing_call=10))
    with pytest.raises(TrainingStopped) as stop:
        trainer.train()
    message = str(stop.value)
    assert message.startswith("out of memory in training, after step ")
    assert "with 4 pairs of " in message
    assert (
        "set trainer.per_device_train_batch_size: 2 with trainer.gradient_accumulation_steps: 4 (the same result); or"
        in message
    )
    assert "trainer.gradient_checkpointing: true" in message
    assert "reference: cached" in message
    assert message.endswith(f"; the last good checkpoint is {tmp_path / 'checkpoint-2'}")
    assert "\n" not in message


def test_running_out_of_memory_in_the_references_pass_is_reported_too(tmp_path, tokenizer, pairs, monkeypatch):
    from apo.training import logprobs as module

    monkeypatch.setattr(module, "packed_logps", raising(MemoryError(), failing_call=1))
    with pytest.raises(TrainingStopped, match=r"out of memory in the reference's log-probs with 24 pairs of .*; or "):
        apo_trainer(tmp_path, tokenizer, pairs, precompute_ref_log_probs=True)


def test_any_other_error_passes(tmp_path, tokenizer, pairs):
    trainer = apo_trainer(tmp_path, tokenizer, pairs)
    trainer.logps = LogprobComputer(
        trainer.args, trainer.accelerator, raising(RuntimeError("shapes differ"), failing_call=1)
    )
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        trainer.train()
    assert not is_out_of_memory(ValueError("out of cheese"))


def test_the_suggested_changes_fit_the_settings(tmp_path, tokenizer, pairs):
    def changes(peft=None, model=None, **more):
        trainer = apo_trainer(tmp_path, tokenizer, pairs, model, peft, **more)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        return memory_suggestions(trainer, batch)

    packed = changes()
    tokens = int(packed[0].split(": ")[1].split(" ")[0])
    assert packed[0] == f"trainer.pack_tokens: {tokens} (more passes, the same result)"
    assert 20 < tokens < 100
    small = apo_trainer(tmp_path, tokenizer, pairs, pack_tokens=20)
    single = small.data_collator([small.train_dataset[0]])
    assert not any("pack_tokens" in change for change in memory_suggestions(small, single))  # one pair cannot be cut up
    few = changes(lora(), make_model().to(torch.bfloat16), gradient_checkpointing=True, shared_prefix=False,
                  per_device_train_batch_size=1, precompute_ref_log_probs=True)  # fmt: skip
    assert few == ["trainer.max_length below 1024 (leaves the longest pairs out)"]


# From the command line


@pytest.mark.slow
def test_running_out_of_memory_has_its_exit_code_and_the_same_command_resumes_with_other_settings(
    tmp_path, model_dir, monkeypatch, capsys
):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_pairs(24)))
    trainer = {**SAVING, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    recipe = {"model": str(model_dir), "dataset": str(tmp_path / "p.jsonl"), "out": str(tmp_path / "run")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "trainer": trainer}))
    from apo.training import logprobs as module

    original = module.packed_logps
    calls, failing = [], 6  # one of the reference, one of the anchor, then training

    def fails_once(model, batch, **options):
        calls.append(1)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, batch, **options)

    monkeypatch.setattr(module, "packed_logps", fails_once)
    command = ["apo", "train", str(tmp_path / "r.yaml")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 5
    stderr = capsys.readouterr().err
    assert "error: out of memory in training, after step" in stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["stopped"][0]["why"] in stderr
    assert "finished" not in run
    pack_tokens = stderr.split("trainer.pack_tokens: ")[1].split(" ")[0]
    monkeypatch.setattr("sys.argv", [*command, "--set", f"trainer.pack_tokens={pack_tokens}"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    stderr = capsys.readouterr().err
    assert "going on from step" in stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recipe"]["trainer"]["pack_tokens"] == int(pack_tokens)
    assert run["finished"]
    undisturbed = train(
        TrainConfig(**{**recipe, "trainer": trainer, "out": str(tmp_path / "other")}), log=lambda _: None
    )
    assert run["metrics"]["loss"] == pytest.approx(undisturbed["metrics"]["loss"], abs=1e-6)
