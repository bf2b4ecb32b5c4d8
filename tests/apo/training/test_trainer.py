"""APOTrainer: agreement with TRL's own arms, equal weight of pairs, the anchor, and what is refused."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer, TrlParser
from trl.trainer.dpo_trainer import DataCollatorForPreference

from apo.losses.mixture import resolve_mixture
from apo.monitoring.failures import TrainingStopped
from apo.monitoring.metrics import aggregate_metrics, check_best_metric, per_pair_metrics
from apo.packing.logps import PairLogps, plain_logps
from apo.run_dir.checkpoints import UNFINISHED
from apo.training.preflight import check_before_training
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import IGNORED, APOConfig
from clair.core.errors import UserError
from tests.apo.conftest import TEMPLATE, make_model, make_pairs, make_tokenizer
from tests.apo.training.trainers import apo_trainer, assert_same_run, lora, options, trained


@pytest.mark.parametrize(
    ("ours", "theirs", "adapter", "precomputed"),
    [
        ("apo_zero", "apo_zero", False, False),
        ("apo_zero", "apo_zero", True, True),
        ("apo_down", "apo_down", True, False),
        ("dpo", "sigmoid", False, True),
    ],
)
def test_trains_as_trls_own_arm_does(tmp_path, model_dir, tokenizer, pairs, ours, theirs, adapter, precomputed):
    # SGD, because Adam turns the rounding of a gradient near 0 into a step of full size.
    shared = {"precompute_ref_log_probs": precomputed, "optim": "sgd", "learning_rate": 0.5}
    stock = DPOTrainer(
        model=str(model_dir),
        args=DPOConfig(
            **options(tmp_path, **shared), loss_type=theirs, use_cpu=True, bf16=False,
            gradient_checkpointing=False, activation_checkpointing=False,
        ),
        train_dataset=pairs, processing_class=tokenizer, peft_config=lora() if adapter else None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    peft = lora() if adapter else None
    tested = apo_trainer(tmp_path, tokenizer, pairs, model, peft, objective=ours, **shared)
    expected, actual = trained(stock), trained(tested)
    assert len(set(expected[0])) == 4  # something was learned, so there is something to agree on
    assert_same_run(actual, expected)


SMOOTHED = {"robust": {"label_smoothing": 0.2}}
NORMED = {"dpo": {"length_normalised": True}}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("ipo", {"loss_type": "ipo"}),
        (SMOOTHED, {"loss_type": "robust", "label_smoothing": 0.2}),
        (NORMED, {"loss_type": "sigmoid_norm", "beta": 5.0}),
        # Their sft weighs by tokens: one pair a batch, where that makes no difference.
        ({"apo_zero": 1.0, "sft": 0.1},
         {"loss_type": ["apo_zero", "sft"], "loss_weights": [1.0, 0.1], "per_device_train_batch_size": 1}),
    ],
    ids=["ipo", "robust", "sigmoid_norm", "apo_zero + sft"],
)  # fmt: skip
def test_later_objectives_train_as_trls_own_arms_do(tmp_path, model_dir, tokenizer, pairs, ours, theirs):
    both = {"beta": 1.0, "optim": "sgd", "learning_rate": 0.1, "seed": 3}
    common = {key: value for key, value in theirs.items() if key in ("beta", "per_device_train_batch_size")}
    stock = DPOTrainer(
        model=str(model_dir),
        args=DPOConfig(
            **options(tmp_path, **both | theirs), use_cpu=True, bf16=False, gradient_checkpointing=False,
            activation_checkpointing=False,
        ),
        train_dataset=pairs, processing_class=tokenizer,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tested = apo_trainer(tmp_path, tokenizer, pairs, model, objective=ours, **both | common)
    expected, actual = trained(stock), trained(tested)
    assert len(set(expected[0])) == 4
    assert_same_run(actual, expected)


def margin_loss(chosen, rejected, *, beta):
    return (1 - beta * (chosen - rejected)).relu()


START = {"apo_zero": 1, "apo_down": 1, "apo_zero_unpaired": 0.5, "kto": 0.5, "dpo": math.log(2), margin_loss: 1}
MIXED = {"apo_hinge_zero": {"length_normalised": True, "weight": 2}, "simpo": {"gamma": 0.1}, "kto": 0.5}
NAMED = ["apo_zero", "apo_down", "apo_zero_unpaired", "dpo", "kto", "sft", "ipo"]
OBJECTIVES = [*NAMED, pytest.param(MIXED, id="mixed"), pytest.param(margin_loss, id="margin_loss")]


@pytest.mark.parametrize("objective", ["apo_zero", "kto", "sft", *OBJECTIVES[-2:]], ids=str)  # of each kind
def test_accumulation_is_exact_also_over_a_last_incomplete_window(tmp_path, tokenizer, objective):
    pairs = Dataset.from_list(make_pairs(14))  # windows of 4, 4, 4 and 2; then the same again
    runs = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 6}
        run = apo_trainer(tmp_path, tokenizer, pairs, objective=objective, optim="sgd", learning_rate=0.1, **more)
        runs.append(trained(run))
    assert_same_run(runs[1], runs[0], atol=1e-6)
    assert_same_run(runs[2], runs[0], atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_objective_trains_with_full_weights_and_with_lora(tmp_path, tokenizer, pairs, objective):
    for peft in (None, lora()):
        trainer = apo_trainer(tmp_path, tokenizer, pairs, None, peft, objective=objective, max_steps=8)
        losses, _, _ = trained(trainer)
        if objective in list(START):
            assert losses[0] == pytest.approx(START[objective], abs=1e-6)
        if objective != "apo_down":
            assert losses[-1] < losses[0]
        assert trainer.state.log_history[0].get("rewards/margins", 0) == 0


def test_activation_checkpointing_changes_nothing(tmp_path, tokenizer, pairs):
    off, on = (trained(apo_trainer(tmp_path, tokenizer, pairs, gradient_checkpointing=on)) for on in (False, True))
    assert_same_run(on, off)


def test_another_log_prob_function_plugs_in(tmp_path, tokenizer, pairs):
    args = APOConfig(**options(tmp_path))
    plain = APOTrainer(make_model(), args=args, pair_logps=plain_logps, train_dataset=pairs, processing_class=tokenizer)
    assert_same_run(trained(plain), trained(apo_trainer(tmp_path, tokenizer, pairs)))


def test_the_divergence_of_kto_is_the_mean_log_ratio_of_mismatched_pairs(tmp_path, tokenizer, pairs):
    trainer = apo_trainer(tmp_path, tokenizer, pairs, objective="kto")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rows = [trainer.train_dataset[i] for i in range(3)]
    expected = []
    for row, following in zip(rows, [*rows[1:], rows[0]], strict=True):
        batch = trainer.data_collator([{**following, "prompt_ids": row["prompt_ids"]}]).stacked
        with torch.no_grad():
            policy, reference = plain_logps(trainer.model.eval(), batch), plain_logps(trainer.ref_model, batch)
        expected += [(policy.chosen - reference.chosen).item(), (policy.rejected - reference.rejected).item()]
    divergence = trainer._divergence([trainer.data_collator(rows[:2]), trainer.data_collator(rows[2:])])
    assert divergence[0].item() == pytest.approx(sum(expected) / 6, abs=1e-4)
    assert abs(divergence[0].item()) > 0.01


def test_the_reference_of_full_fine_tuning_stays_as_the_model_was(tmp_path, tokenizer, pairs):
    trainer = apo_trainer(tmp_path, tokenizer, pairs)
    trainer.train()
    for now, original in zip(trainer.ref_model.parameters(), make_model().parameters(), strict=True):
        assert torch.equal(now, original)
        assert not torch.equal(now, 0 * now)


def test_an_existing_adapter_is_its_own_reference_and_is_trained_on(tmp_path, tokenizer, pairs):
    first = apo_trainer(tmp_path / "first", tokenizer, pairs, None, lora())
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    second = apo_trainer(tmp_path / "second", tokenizer, pairs, model)
    assert check_before_training(second) == {"chosen": 0.0, "rejected": 0.0}
    frozen = {name: p.clone() for name, p in second.model.named_parameters() if ".ref." in name}
    losses, _, weights = trained(second)
    assert losses[0] == pytest.approx(1.0, abs=1e-6)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in second.model.named_parameters() if name in frozen)
    assert weights
    assert not any(".ref." in name for name in weights)
    second.save_model(str(tmp_path / "saved"))
    assert sorted(f.name for f in (tmp_path / "saved").iterdir() if f.is_dir()) == []


def test_a_wrong_reference_is_reported_before_the_first_step(tmp_path, tokenizer, pairs):
    args = APOConfig(**options(tmp_path))
    wrong = APOTrainer(make_model(), make_model(seed=1), args=args, train_dataset=pairs, processing_class=tokenizer)
    with pytest.raises(UserError, match=r"chosen reward is not 0 before the first step \(log-ratio up to"):
        check_before_training(wrong)
    adapter_on = get_peft_model(make_model(), lora())
    right = apo_trainer(tmp_path, tokenizer, pairs, adapter_on)
    assert check_before_training(right) == {"chosen": 0.0, "rejected": 0.0}
    with torch.no_grad():
        for name, parameter in right.model.named_parameters():
            if ".default." in name:
                parameter.add_(0.1)
    with pytest.raises(UserError, match="is not 0 before the first step"):
        check_before_training(right)


def test_a_batch_that_loses_its_end_is_reported_before_the_first_step(tmp_path, tokenizer, pairs):
    trainer = apo_trainer(tmp_path, tokenizer, pairs)
    original = trainer.data_collator

    def cut(examples):
        return {key: value[:, :12] for key, value in original(examples).stacked.items()}

    def masked(examples):  # as if pad = eos had been masked
        batch = original(examples).stacked
        return {**batch, "completion_mask": batch["completion_mask"] * (batch["input_ids"] != tokenizer.eos_token_id)}

    for collate, message in ((cut, "not the end of turn; was the batch cut"), (masked, "is masked out of training")):
        trainer.data_collator = collate
        with pytest.raises(UserError, match=message):
            check_before_training(trainer)


def test_pad_equal_to_end_of_turn_does_not_mask_the_end(tmp_path, tokenizer, pairs):
    tokenizer.pad_token = tokenizer.eos_token
    trainer = apo_trainer(tmp_path, tokenizer, pairs)
    assert check_before_training(trainer) == {"chosen": 0.0, "rejected": 0.0}


def test_likelihood_objectives_load_no_reference(tmp_path, tokenizer, pairs):
    trainer = apo_trainer(tmp_path, tokenizer, pairs, objective="sft")
    assert trainer.ref_model is None
    trainer.train()
    assert "rewards/chosen" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["logps/chosen"] < 0


def test_sft_is_the_mean_over_pairs_of_nats_per_token(tmp_path, tokenizer, pairs):
    trainer = apo_trainer(tmp_path, tokenizer, pairs, objective="sft")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        logps = plain_logps(make_model(), batch.stacked)
        loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx((-logps.chosen / logps.chosen_len).mean().item(), abs=1e-5)


# Weights of pairs


def weighted(n=14):
    weights = [0.0, 1.0, 2.5, 0.25, 1e-3, 4.0, 1.0]
    return Dataset.from_list([{**pair, "trust": weights[i % 7]} for i, pair in enumerate(make_pairs(n))])


def test_the_loss_is_the_weighted_mean_of_the_pairs_losses(tmp_path, tokenizer):
    pairs = weighted()
    trainer = apo_trainer(tmp_path, tokenizer, pairs, objective="sft", weights="trust")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        logps = plain_logps(make_model(), batch.stacked)
        loss = trainer.compute_loss(trainer.model, batch)
    a, b, c, d = (-logps.chosen / logps.chosen_len).tolist()
    assert loss.item() == pytest.approx((0 * a + 1 * b + 2.5 * c + 0.25 * d) / 3.75, abs=1e-5)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_collator_of_the_users_own_trains_the_pairs_that_it_stacks(packed, tmp_path, tokenizer):
    runs, pad = [], DataCollatorForPreference(pad_token_id=5)
    for collate in (None, lambda rows: {**pad(rows), "extra": torch.zeros(len(rows))} if packed else pad(rows)):
        limit = {"pack_tokens": 40} if packed else {}
        trainer = apo_trainer(
            tmp_path, tokenizer, weighted(), objective="kto", weights="trust", shared_prefix=packed, **limit
        )
        trainer.data_collator = collate or trainer.data_collator
        check_before_training(trainer)
        runs.append(trained(trainer))
    assert_same_run(*runs)


@pytest.mark.parametrize(("adapter", "cached"), [(False, False), (True, True)], ids=["full", "lora precomputed"])
def test_weights_are_exact_however_a_step_is_cut_up(tmp_path, tokenizer, adapter, cached):
    pairs, runs = weighted(), []
    cuts = ((4, 1, {}), (1, 4, {}), (2, 2, {"shared_prefix": False}), (4, 1, {"pack_tokens": 40}))
    for batch, accumulation, more in cuts:
        more |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 6}
        more |= {"objective": {"apo_zero": 1.0, "sft": 0.1}, "weights": "trust", "precompute_ref_log_probs": cached}
        peft = lora() if adapter else None
        runs.append(
            trained(apo_trainer(tmp_path, tokenizer, pairs, None, peft, optim="sgd", learning_rate=0.1, **more))
        )
    for run in runs[1:]:
        assert_same_run(run, runs[0], atol=2e-6)


def test_equal_weights_of_any_size_are_no_weights(tmp_path, tokenizer):
    pairs = Dataset.from_list([{**pair, "w": 7} for pair in make_pairs(14)])
    runs = [trained(apo_trainer(tmp_path, tokenizer, pairs, optim="sgd", weights=w)) for w in (None, "w")]
    assert_same_run(*runs, atol=1e-6)


def test_a_pair_of_weight_two_counts_twice_and_one_of_weight_zero_not_at_all(tmp_path, tokenizer):
    rows = make_pairs(3)
    light = Dataset.from_list([{**rows[0], "w": 2.0}, {**rows[1], "w": 1.0}, {**rows[2], "w": 0.0}])
    heavy = Dataset.from_list([rows[0], rows[0], rows[1]])
    more = {"per_device_train_batch_size": 3, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    actual = trained(apo_trainer(tmp_path, tokenizer, light, weights="w", **more))
    assert_same_run(actual, trained(apo_trainer(tmp_path, tokenizer, heavy, **more)), atol=1e-6)


def test_a_step_whose_pairs_all_weigh_nothing_changes_nothing(tmp_path, tokenizer):
    pairs = Dataset.from_list([{**pair, "w": float(i >= 7)} for i, pair in enumerate(make_pairs(8))])
    more = {"per_device_train_batch_size": 1, "max_steps": 8, "optim": "sgd", "weights": "w"}
    trainer = apo_trainer(tmp_path, tokenizer, pairs, **more)
    losses, norms, _ = trained(trainer)
    assert sorted(losses) == pytest.approx([0.0] * 7 + [1.0])
    assert sorted(norms)[:7] == [0.0] * 7


def test_evaluation_weighs_held_out_pairs_whatever_its_batches(tmp_path, tokenizer):
    held_out, losses = weighted(5), set()
    for size in (1, 2, 5):
        more = {"eval_dataset": held_out, "per_device_eval_batch_size": size, "eval_strategy": "steps", "eval_steps": 4}
        trainer = apo_trainer(tmp_path, tokenizer, weighted(), weights="trust", **more)
        trainer.train()
        losses |= {round(row["eval_loss"], 5) for row in trainer.state.log_history if "eval_loss" in row}
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -0.5], "'w' of row 1 of the train dataset is -0.5; finite and >= 0 needed"),
        ([float("nan"), 1.0], "'w' of row 0 of the train dataset is nan"),
        ([1.0, float("inf")], "'w' of row 1 of the train dataset is inf"),
        ([1.0, None], "'w' of row 1 of the train dataset is None"),
        (["1", "2"], "'w' of row 0 of the train dataset is '1'"),
        ([0.0, 0.0], "every 'w' of the train dataset is 0"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(tmp_path, tokenizer, values, message):
    pairs = Dataset.from_list([{**pair, "w": value} for pair, value in zip(make_pairs(2), values, strict=True)])
    with pytest.raises(UserError) as error:
        apo_trainer(tmp_path, tokenizer, pairs, weights="w")
    assert message in str(error.value)
    with pytest.raises(UserError, match=r"has no column 'ww' \(did you mean 'w'\?\); found: "):
        apo_trainer(tmp_path, tokenizer, pairs, weights="ww")


# Metrics


def test_metrics_by_hand():
    logps = torch.tensor([[-4.0, -9.0, -2.0], [-5.0, -9.0, -1.0]])
    policy = PairLogps(*logps, *torch.tensor([[1, 2, 3], [4, 4, 1]]))
    reference = torch.tensor([-5.0, -8.0, -2.0]), torch.tensor([-3.0, -8.0, -1.0])
    losses, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 1.0, 1.0])
    work = torch.tensor([[30.0, 20, 20, 9, 200], [10, 10, 10, 4, 50], [20, 20, 15, 7, 90]])
    means = aggregate_metrics(
        per_pair_metrics(losses, policy, reference, weights, (0.0, 0.0), work), resolve_mixture("dpo"), beta=0.5
    )
    assert means == pytest.approx({
        "loss": 2.0, "logps/chosen": -5.0, "logps/rejected": -5.0, "lengths/chosen": 2.0, "lengths/rejected": 3.0,
        "rewards/chosen": 0.0, "rewards/rejected": -0.5, "rewards/margins": 0.5,
        "rewards/accuracies": (1 + 0.5 + 0.5) / 3, "rewards/ties": 2 / 3,
        "logratios/chosen": 0.0, "logratios/rejected": -1.0, "chosen_falls": 1 / 3,
        "rewards/chosen_p10": -0.4, "rewards/chosen_p50": 0.0, "rewards/chosen_p90": 0.4,  # of -1/2, 0, 1/2
        "rewards/rejected_p10": -0.9, "rewards/rejected_p50": -0.5, "rewards/rejected_p90": -0.1,  # of -1, -1/2, 0
        "saturation": 0.0, "padding": 5 / 50, "shared": 15 / 60,
    })  # fmt: skip


def test_rewards_that_differ_by_rounding_are_ties_and_no_falls():
    lengths = torch.tensor([[20, 20], [10, 10]])
    policy = PairLogps(*torch.tensor([[-4.0, -4.0], [-5.0, -5.0]]), *lengths)
    reference = torch.tensor([-3.99999, -3.9999]), torch.tensor([-5.00001, -5.0])
    rows = per_pair_metrics(torch.ones(2), policy, reference, torch.ones(2), (0.0, 0.0), torch.ones(2, 5))
    means = aggregate_metrics(rows, resolve_mixture("dpo"), beta=0.5)
    values = [means[key] for key in ("rewards/ties", "rewards/accuracies", "chosen_falls")]
    assert values == [0.5, 0.25, 0.5]


def test_unpaired_rows_count_where_they_have_a_response():
    logps = torch.tensor([[-4.0, 0.0, -2.0], [0.0, -9.0, 0.0]])
    policy = PairLogps(*logps, *torch.tensor([[2, 0, 4], [0, 3, 0]]))
    reference = torch.tensor([-5.0, 0.0, -1.0]), torch.tensor([0.0, -7.0, 0.0])
    rows = per_pair_metrics(torch.ones(3), policy, reference, torch.ones(3), (0.0, 0.0), torch.ones(3, 5))
    means = aggregate_metrics(rows, resolve_mixture("kto"), beta=0.5)
    values = {key: means[key] for key in ("rewards/chosen", "rewards/rejected", "lengths/chosen", "chosen_falls")}
    assert values == {"rewards/chosen": 0.0, "rewards/rejected": -1.0, "lengths/chosen": 3.0, "chosen_falls": 0.5}
    assert not {"rewards/accuracies", "rewards/ties"} & set(means)
    assert (means["rewards/margins"], means["rows/chosen"], means["rows/rejected"]) == (1.0, 2, 1)
    assert means["rewards/rejected_p10"] == -1.0


def test_logged_means_are_over_all_pairs_since_the_last_log(tmp_path, tokenizer):
    pairs = Dataset.from_list(make_pairs(14))
    often = apo_trainer(tmp_path, tokenizer, pairs, logging_steps=1)
    often.train()
    seldom = apo_trainer(tmp_path, tokenizer, pairs, logging_steps=4, logging_first_step=False)
    seldom.train()
    steps = [row for row in often.state.log_history if "grad_norm" in row]
    (window,) = (row for row in seldom.state.log_history if "grad_norm" in row)
    weights = [4, 4, 4, 2]
    for key in ("loss", "rewards/chosen", "logps/rejected", "rewards/accuracies"):
        mean = sum(w * row[key] for w, row in zip(weights, steps, strict=True)) / 14
        assert window[key] == pytest.approx(mean, abs=1e-5)
    assert window["pairs_per_second"] > 0
    assert window["tokens_per_second"] > window["pairs_per_second"]


def test_evaluation_weighs_every_held_out_pair_alike(tmp_path, tokenizer, pairs):
    held_out = Dataset.from_list(make_pairs(5, seed=9))
    losses = set()
    for size in (1, 2, 5):
        more = {"eval_dataset": held_out, "per_device_eval_batch_size": size, "eval_strategy": "steps", "eval_steps": 4}
        trainer = apo_trainer(tmp_path, tokenizer, pairs, **more)
        trainer.train()
        (row,) = (row for row in trainer.state.log_history if "eval_loss" in row)
        margin = row["eval_rewards/chosen"] - row["eval_rewards/rejected"]
        assert row["eval_rewards/margins"] == pytest.approx(margin, abs=1e-6)
        losses.add(round(row["eval_loss"], 5))
    assert len(losses) == 1


# Files and refusals


def test_nothing_pickled_but_tensors_is_written(tmp_path, tokenizer, pairs):
    trainer = apo_trainer(tmp_path, tokenizer, pairs, save_strategy="steps", save_steps=2)
    trainer.train()
    names = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert "training_args.bin" not in names
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert not (tmp_path / "README.md").exists()


def test_a_run_on_this_machine_needs_no_flags():
    args = APOConfig()
    if not torch.accelerator.is_available():
        assert (args.use_cpu, args.bf16, args.gradient_checkpointing) == (True, False, False)
    assert args.objective == "apo_zero"
    assert json.loads(args.to_json_string())["objective"] == "apo_zero"
    assert APOConfig(objective=margin_loss).to_dict()["objective"] == "margin_loss"


IGNORED_VALUES = {
    "loss_type": "sigmoid", "loss_weights": [1.0], "label_smoothing": 0.1, "label_smoothing_factor": 0.1,
    "f_divergence_type": "js_divergence", "f_alpha_divergence_coef": 0.2, "ld_alpha": 0.5, "use_weighting": True,
    "discopop_tau": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 4,
    "padding_free": True, "truncation_mode": "keep_end", "pad_token": "x",
}  # fmt: skip


REASONS = {
    "loss_type": "'sigmoid' is an objective here: set objective: dpo, and leave it out",
    "label_smoothing": r"is an option of the objective: set objective: \{dpo: \{label_smoothing: 0\.1\}\}",
    "truncation_mode": "'keep_end' would be ignored: rows longer than max_length are left out; leave it out",
}


@pytest.mark.parametrize("option", IGNORED)
def test_an_option_that_would_be_ignored_is_refused(option):
    reason = REASONS.get(option, "would be ignored beside objective 'dpo'; leave it out")
    with pytest.raises(UserError, match=f"^{option} {reason}$"):
        APOConfig(objective="dpo", **{option: IGNORED_VALUES[option]})


@pytest.mark.parametrize(
    ("loss_type", "reason"),
    [
        ("apo_down", "set objective: apo_down"),
        ("sigmoid_norm", r"set objective: \{dpo: \{length_normalised: true\}\}"),
        (["sigmoid", "sft"], r"set the objective \(objective: dpo, objective: sft\)"),
        ("hinge", r"set the objective \(docs/objectives\.md lists the objectives\)"),
    ],
)
def test_a_loss_type_is_refused_by_the_objective_that_says_it(loss_type, reason):
    with pytest.raises(UserError, match=reason):
        APOConfig(loss_type=loss_type)


def test_a_command_line_can_say_every_option():
    def parse(*arguments):
        return TrlParser((APOConfig,)).parse_args_and_config(["--output_dir", "x", *arguments])[0]

    assert (parse().objective, parse().truncation_mode) == ("apo_zero", "keep_start")
    assert parse("--objective", "apo_down").objective == "apo_down"
    assert parse("--objective", '{"apo_zero": 1, "sft": 0.1}').to_dict()["objective"] == "apo_zero + 0.1 sft"
    with pytest.raises(UserError, match="is neither a name nor JSON"):
        parse("--objective", "{apo_zero: 1}")


# Notes, printed once, before the first step


def test_a_trainer_notes_the_rows_that_are_left_out(tmp_path, tokenizer, pairs, caplog):
    trainer = apo_trainer(tmp_path, tokenizer, pairs, max_length=20)
    left = len(trainer.train_dataset)
    rows = f"{24 - left} of 24 rows are longer than max_length 20"
    note = f"train: {rows} and left out; TRL would cut them (truncation_mode)"
    assert 0 < left < 24
    assert note in trainer.notes
    assert [record.getMessage() for record in caplog.records if record.name == "apo.training.trainer"].count(note) == 1


def test_trls_truncation_mode_is_accepted_and_the_note_on_long_rows_names_it(tmp_path, tokenizer, pairs):
    trainer = apo_trainer(tmp_path, tokenizer, pairs, truncation_mode="keep_start", max_length=20)
    assert any("left out; TRL would cut them (truncation_mode)" in note for note in trainer.notes)


@pytest.mark.parametrize(("packed", "note_count"), [(True, 2), (False, 0)])
def test_options_of_trls_batch_are_reported_where_rows_are_packed(packed, note_count, tmp_path, tokenizer, pairs):
    more = {"pad_to_multiple_of": 8, "precompute_ref_batch_size": 2, "precompute_ref_log_probs": True}
    trainer = apo_trainer(tmp_path, tokenizer, pairs, shared_prefix=packed, **more)
    assert len([note for note in trainer.notes if "has no effect on packed rows" in note]) == note_count
    assert trainer.data_collator.stack.pad_to_multiple_of == 8


def test_text_that_a_template_writes_after_the_end_of_turn_is_noted_once(tmp_path, pairs):
    tokenizer = make_tokenizer(TEMPLATE.replace("<|end|>", "<|end|>\n"))
    trainer = apo_trainer(tmp_path, tokenizer, pairs, eval_dataset=pairs.select(range(4)))
    notes = [note for note in trainer.notes if "after the end of turn" in note]
    assert len(notes) == 1
    assert "in 24 of 24 rows (first: row 0), for example with a line break;" in notes[0]
    assert "TRL trains it too" in notes[0]
    assert not [note for note in apo_trainer(tmp_path, make_tokenizer(), pairs).notes if "after the end" in note]


def test_half_precision_weights_that_a_step_would_not_move_are_reported_in_numbers(tmp_path, tokenizer, pairs):
    def precision_notes(**more):
        dtype = more.pop("dtype", torch.bfloat16)
        return [n for n in apo_trainer(tmp_path, tokenizer, pairs, make_model().to(dtype), **more).notes if "step" in n]

    (note,) = precision_notes(learning_rate=1e-6)
    assert note.startswith("a step of the learning rate, 1e-06, changes ")
    assert 0 < float(note.split("changes ")[1].split("%")[0]) < 5
    assert "they are in bfloat16" in note
    assert (
        precision_notes(learning_rate=1e-6, dtype=torch.float32)
        == precision_notes(learning_rate=1e-2)
        == precision_notes(learning_rate=0.0)
        == []
    )
    assert precision_notes(learning_rate=1e-6, peft_config=lora()) == []


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_neftunes_noise_has_trls_scale(packed, tmp_path, tokenizer, pairs):
    """alpha / sqrt(L h), L the longest sequence of the micro-batch: reached by uniform noise and never passed."""
    trainer = apo_trainer(tmp_path, tokenizer, pairs, neftune_noise_alpha=5.0, max_steps=2, shared_prefix=packed)
    model, scales = trainer.model, []

    def record(layer, inputs, options):
        if model.training:
            ids = trainer.seen_ids
            noise = (inputs[0] - model.get_input_embeddings().weight[ids]).detach()
            scales.append(float(noise.abs().max()) * (trainer.current_batch["input_ids"].shape[1] * 32) ** 0.5)

    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: setattr(trainer, "seen_ids", ids[0]))
    model.model.layers[0].register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    assert trainer.is_packed == packed
    assert len(scales) == 2
    assert all(4.95 < scale <= 5.0001 for scale in scales)
    model.train()
    ids = torch.tensor([[1, 5]])
    assert torch.equal(model.get_input_embeddings()(ids), model.get_input_embeddings().weight[ids])  # gone again


def test_the_loss_of_a_mixture_of_experts_is_trls_with_its_auxiliary_part(tmp_path, tokenizer, pairs):
    def new_model():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1}
        config = MixtralConfig(**sizes, **experts, vocab_size=40, num_key_value_heads=2, pad_token_id=0)
        return MixtralForCausalLM(config)

    shared = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    stock = DPOTrainer(
        model=new_model(), ref_model=new_model(),
        args=DPOConfig(
            **options(tmp_path, **shared), loss_type="apo_zero", use_cpu=True, bf16=False,
            gradient_checkpointing=False, activation_checkpointing=False,
        ),
        train_dataset=pairs, processing_class=tokenizer,
    )  # fmt: skip
    actual = trained(apo_trainer(tmp_path, tokenizer, pairs, new_model(), **shared))
    assert actual[0][0] > 1.05
    assert_same_run(actual, trained(stock))


def test_an_evaluation_under_another_prefix_logs_its_own_metrics_and_leaves_none_to_the_next(
    tmp_path, tokenizer, pairs
):
    trainer = apo_trainer(tmp_path, tokenizer, pairs, objective="sft")
    names = ("loss", "logps/chosen", "lengths/rejected")
    expected = [trainer.evaluate(pairs.select(range(6)))[f"eval_{name}"] for name in names]
    assert [trainer.evaluate(pairs.select(range(12)), metric_key_prefix="test")[f"test_{n}"] for n in names] != expected
    assert [trainer.evaluate(pairs.select(range(6)))[f"eval_{name}"] for name in names] == expected


# The hub


class Uploads:
    """Stands for the hub's API: keeps which files each upload would take."""

    def __init__(self):
        self.taken = []

    def create_repo(self, name, **_):
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns=None, ignore_patterns=None, **_):
        files = [str(f.relative_to(folder_path)) for f in Path(folder_path).rglob("*") if f.is_file()]
        names = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        self.taken.append((Path(folder_path).name, sorted(names)))
        future = Future()
        future.set_result(repo_id)
        return future


def test_a_push_takes_the_model_and_never_states_pickles_or_what_is_half_written(
    tmp_path, tokenizer, pairs, monkeypatch
):
    hub = Uploads()
    for module in ("transformers.trainer", "apo.training.checkpointing"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: hub)
    more = {"push_to_hub": True, "hub_model_id": "me/model", "save_strategy": "steps", "save_steps": 2}
    trainer = apo_trainer(tmp_path / "run", tokenizer, pairs, save_total_limit=1, **more)
    trainer.train()
    (tmp_path / "run" / "training_args.bin").write_bytes(b"pickle")
    (tmp_path / "run" / UNFINISHED / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "run" / UNFINISHED / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    assert trainer.push_to_hub() == "me/model"
    assert [folder for folder, _ in hub.taken] == ["checkpoint-2", "checkpoint-4", "run"]
    model = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert all(files == [*model, "tokenizer_config.json"] for _, files in hub.taken)


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_pushing_whole_checkpoints_is_refused(strategy):
    with pytest.raises(UserError, match=f"^hub_strategy '{strategy}' would upload the optimizer's states"):
        APOConfig(push_to_hub=True, hub_strategy=strategy)


# Checkpoints that changed since they were written


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x01
    file.write_bytes(content)


def test_a_trainer_resumes_from_the_newest_complete_checkpoint(tmp_path, tokenizer, pairs, caplog):
    more = {"save_strategy": "steps", "save_steps": 2}
    apo_trainer(tmp_path, tokenizer, pairs, **more).train()
    flip(tmp_path / "checkpoint-4" / "model.safetensors")
    trainer = apo_trainer(tmp_path, tokenizer, pairs, **more)
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged: model\.safetensors is damaged: its content is not"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)
    assert "set aside checkpoint-4 as incomplete-checkpoint-4: model.safetensors is damaged" in caplog.text
    assert [row["step"] for row in trainer.state.log_history if "grad_norm" in row] == [1, 2, 3, 4]
    assert trainer.state.global_step == 4
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        apo_trainer(tmp_path / "new", tokenizer, pairs).train(resume_from_checkpoint=True)


def test_a_damaged_best_model_is_not_loaded(tmp_path, tokenizer, pairs):
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = apo_trainer(
        tmp_path, tokenizer, pairs, eval_dataset=pairs.select(range(4)), load_best_model_at_end=True,
        metric_for_best_model="rewards/margins", **saving,
    )  # fmt: skip
    put = trainer._complete_checkpoint

    def then_damage():
        put()
        if trainer.state.best_global_step == trainer.state.global_step == 4:
            flip(tmp_path / "checkpoint-4" / "model.safetensors")

    trainer._complete_checkpoint = then_damage
    with pytest.raises(
        TrainingStopped, match=r"^the best model, .*/checkpoint-4, is damaged: model\.safetensors .*checkpoint-2$"
    ):
        trainer.train()


# Errors that would come late


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_length": 0}, "max_length is 0; it must be 1 or above"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha is -1; it must be 0 or above"),
        ({"model_init_kwargs": {"dtype": "bf17"}}, "no dtype 'bf17'; give float32"),
        ({"use_liger_kernel": True}, "use_liger_kernel: liger-kernel is not installed"),
        ({"metric_for_best_model": "eval_acuracy"}, "no held-out metric 'eval_acuracy'"),
        (
            {"metric_for_best_model": "rewards/acuracies"},
            r"did you mean 'rewards/accuracies'\?\); logged are loss, logps/",
        ),
        ({"metric_for_best_model": "rewards/margins", "objective": "sft"}, "no held-out metric 'rewards/margins'"),
        ({"metric_for_best_model": "saturation", "objective": "sft"}, "no held-out metric 'saturation'"),
        ({"metric_for_best_model": "train_loss"}, "no held-out metric 'train_loss'"),
        ({"metric_for_best_model": "kl/mismatched"}, "no held-out metric 'kl/mismatched'"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length needs a column 'length' of lengths"),
    ],
)
def test_errors_that_training_would_raise_are_raised_before_it(more, message, tmp_path, tokenizer, pairs):
    if find_spec("liger_kernel") and "use_liger_kernel" in more:
        pytest.skip("liger-kernel is installed")
    with pytest.raises(UserError, match=message):
        apo_trainer(tmp_path, tokenizer, pairs, **more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"adam_beta1": 2}, "optim adamw_torch.* cannot be set up: Invalid beta"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"waves": 1}}, "cosine cannot be set up: .*'waves'"),
    ],
)
def test_options_that_an_optimizer_or_schedule_does_not_take_are_reported(more, message, tmp_path, tokenizer, pairs):
    with pytest.raises(UserError, match=message):
        apo_trainer(tmp_path, tokenizer, pairs, **more).train()


@pytest.mark.parametrize(
    ("name", "sets"),
    [("loss", []), ("eval_loss", []), ("eval_rewards/accuracies", []), ("eval_two_rewards/chosen_p50", ["one", "two"])],
)
def test_every_metric_that_is_logged_may_choose_the_best_model(name, sets):
    check_best_metric(name, resolve_mixture("apo_zero"), sets)


def test_images_are_refused_in_packed_rows_with_the_option_to_set(tmp_path, tokenizer, pairs):
    with pytest.raises(
        UserError, match=r"has a column 'images', and packed rows hold text only; set shared_prefix=False"
    ):
        apo_trainer(tmp_path, tokenizer, pairs.add_column("images", [[]] * len(pairs)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"beta": 0}, "beta is 0; it must be above 0"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"objective": "dbo"}, r"unknown objective 'dbo' \(did you mean 'dpo'\?\)"),
        ({"objective": "sft", "precompute_ref_log_probs": True}, "objective sft has no reference"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(more, message):
    with pytest.raises(UserError, match=message):
        APOConfig(**more)


def test_kto_with_one_pair_a_step_is_refused(tmp_path, tokenizer, pairs):
    with pytest.raises(UserError, match="must be at least 2"):
        apo_trainer(tmp_path, tokenizer, pairs, objective="kto", per_device_train_batch_size=1)


def test_a_second_whole_model_beside_a_sharded_one_is_refused(tmp_path, tokenizer, pairs, monkeypatch):
    monkeypatch.setattr("apo.training.arguments.check_devices", lambda args: None)
    with pytest.raises(UserError, match=r"under FSDP the reference .* reference: cached"):
        apo_trainer(tmp_path, tokenizer, pairs, fsdp=True)


def test_trls_own_config_is_refused(tmp_path, tokenizer, pairs):
    args = DPOConfig(**options(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False)
    with pytest.raises(UserError, match="takes an APOConfig"):
        APOTrainer(make_model(), args=args, train_dataset=pairs, processing_class=tokenizer)


def test_the_option_tables_have_no_stale_names():
    assert set(IGNORED) == set(IGNORED_VALUES)
    assert set(IGNORED) <= {name for base in APOConfig.__mro__ for name in getattr(base, "__annotations__", {})}
    assert len(set(IGNORED)) == 15
