"""The probe: which tokens are shared, where log-probs move, and the exact divergence of the next token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import apo.evaluation.pairs
import apo.monitoring.token_diagnostics
from apo.monitoring.token_diagnostics import (
    METRICS,
    POSITIONS,
    TokenDiagnostics,
    TokenLogps,
    build_token_diagnostics,
    diagnostic_metrics,
)
from apo.training.config import TrainConfig
from apo.training.plan import plan
from apo.training.train import build_trainer, train
from clair.data.contrast import shared_tokens
from tests.apo.conftest import make_model, make_pairs
from tests.apo.training.trainers import apo_trainer, lora


def test_shared_tokens_are_the_longest_common_subsequence():
    chosen, rejected = shared_tokens([7, 8, 9, 10, 3], [7, 9, 11, 10, 10, 3])
    assert chosen == [True, False, True, True, True]
    assert sum(rejected) == 4
    assert rejected[:3] == [True, True, False]
    assert shared_tokens([1, 2], [3]) == ([False, False], [False])


def test_training_and_evaluation_mark_the_same_tokens():
    assert apo.evaluation.pairs.shared_tokens is apo.monitoring.token_diagnostics.shared_tokens is shared_tokens


def test_a_comparison_by_hand():
    # Two pairs. Of the first chosen response, token 1 is edited and falls by 2 nats, the shared one rises by 1.
    start = TokenLogps(
        [torch.tensor(t) for t in ([-1.0, -1.0], [-3.0], [-1.0], [-1.0])], torch.tensor([[0.5, 0.5]]).log()
    )
    now = TokenLogps(
        [torch.tensor(t) for t in ([0.0, -3.0], [-4.0], [-2.0], [-0.5])], torch.tensor([[0.25, 0.75]]).log()
    )
    shared = [torch.tensor(mark) for mark in ([True, False], [False], [True], [True])]
    result = diagnostic_metrics(start, now, shared)
    assert result == pytest.approx({
        "probe/kl": 0.25 * torch.tensor(0.5).log().item() + 0.75 * torch.tensor(1.5).log().item(),
        "probe/shared_chosen": (1 - 1) / 2, "probe/edited_chosen": -2.0, "probe/shared_rejected": 0.5,
        "probe/edited_rejected": -1.0, "probe/shared_falls": 0.5, "probe/edited_falls": 1.0,
    }, abs=1e-6)  # fmt: skip


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_view_is_what_the_models_logits_say(tmp_path, tokenizer, pairs, adapter):
    trainer = apo_trainer(tmp_path, tokenizer, pairs, None, lora() if adapter else None)
    rows = [trainer.train_dataset[row] for row in range(3)]
    probe = TokenDiagnostics(trainer, rows)
    model, distributions = make_model(), []
    for row in rows:
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            distributions.append(logps[-len(row[side]) :])
            expected = distributions[-1].gather(-1, torch.tensor(row[side])[:, None]).squeeze(-1)
            torch.testing.assert_close(probe.baseline.tokens[len(distributions) - 1], expected, rtol=1e-4, atol=1e-4)
    everywhere = torch.cat(distributions)
    torch.testing.assert_close(probe.baseline.positions, everywhere, rtol=1e-4, atol=1e-4)  # fewer than POSITIONS
    first = probe.measure()
    assert all(abs(value) < 1e-5 for name, value in first.items() if "falls" not in name)
    assert set(first) == set(METRICS)
    trainer.train()
    moved = probe.measure()
    assert moved["probe/kl"] > 1e-4
    assert moved["probe/edited_chosen"] > moved["probe/edited_rejected"]


def test_positions_are_spread_and_bounded(tmp_path, tokenizer):
    trainer = apo_trainer(tmp_path, tokenizer, Dataset.from_list(make_pairs(24)))
    probe = TokenDiagnostics(trainer, [trainer.train_dataset[row] for row in range(24)])
    total = sum(len(mark) for mark in probe.shared)
    assert total > POSITIONS
    assert POSITIONS / 2 < len(probe.baseline.positions) <= POSITIONS


def test_unpaired_rows_have_a_divergence_and_no_edits(tmp_path, tokenizer):
    trainer = apo_trainer(tmp_path, tokenizer, Dataset.from_list(make_pairs(4)))
    row = trainer.train_dataset[0]
    probe = TokenDiagnostics(trainer, [{**row, "rejected_ids": []}, {**row, "chosen_ids": []}])
    assert set(probe.measure()) == {"probe/kl"}


def test_a_probe_grows_with_the_run_and_prefers_held_out_pairs(tmp_path, tokenizer):
    train_pairs, held_out = Dataset.from_list(make_pairs(24)), Dataset.from_list(make_pairs(30, seed=4))

    def size(steps, size=None, eval_dataset=None):
        trainer = apo_trainer(tmp_path, tokenizer, train_pairs, eval_dataset=eval_dataset, max_steps=steps)
        probe = build_token_diagnostics(trainer, size)
        return probe and (len(probe.pairs), probe.pairs[0]["prompt_ids"] == trainer.train_dataset[0]["prompt_ids"])

    assert size(20) is None
    assert size(50) == (2, True)
    assert size(1_000_000) == (16, True)
    assert size(50, size=5) == (5, True)
    assert size(50, size=0) is None
    assert size(50, eval_dataset=held_out) == (2, False)


def test_a_run_logs_its_probe_ten_times_and_is_not_changed_by_it(tmp_path, model_dir):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(24)))
    trainer = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    trainer["logging_steps"] = 2
    recipe = {"model": str(model_dir), "dataset": str(data), "trainer": trainer}
    weights = []
    for probe in (4, 0):
        out = tmp_path / str(probe)
        train(TrainConfig(**recipe, probe=probe, out=str(out)), log=lambda _: None)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        logged = [row for row in rows if "probe/kl" in row]
        assert [row["step"] for row in rows if "loss" in row] == [1, *range(2, 21, 2)]  # inspections suppress no line
        assert [row["step"] for row in logged] == ([*range(2, 21, 2)] if probe else [])
        weights.append(AutoModelForCausalLM.from_pretrained(out).state_dict())
        if probe:
            assert logged[-1]["probe/kl"] > logged[0]["probe/kl"] > 0
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_a_run_that_resumes_compares_with_the_model_before_the_first_step(tmp_path, model_dir):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(24)))
    trainer = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 5}
    recipe = {"model": str(model_dir), "dataset": str(data), "trainer": trainer, "probe": 2, "out": str(tmp_path / "o")}
    trained = build_trainer(plan(TrainConfig(**recipe)))
    trained.train()
    uninterrupted = [row["probe/kl"] for row in trained.state.log_history if "probe/kl" in row]
    again = build_trainer(plan(TrainConfig(**recipe)))
    again.train(resume_from_checkpoint=str(Path(recipe["out"]) / "checkpoint-5"))
    resumed = [row["probe/kl"] for row in again.state.log_history if "probe/kl" in row]
    assert resumed[-5:] == pytest.approx(uninterrupted[-5:], rel=1e-4)
