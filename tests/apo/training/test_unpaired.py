"""Unpaired rows through the paired trainer: equal to TRL's KTOTrainer, to pairs cut in two, and to themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer

from apo.cost.memory import run_flops
from apo.data.tokenize import count_unpaired, eos_ids, tokenize
from apo.losses.mixture import resolve_mixture
from apo.losses.objectives import OBJECTIVES
from apo.packing.logps import padded_logps, plain_logps
from apo.training.config import TrainConfig
from apo.training.plan import estimate, plan
from apo.training.preflight import check_before_training
from apo.training.train import train
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError
from tests.apo.command import call
from tests.apo.conftest import make_model, make_pairs, make_tokenizer
from tests.apo.training.crashes import CRASHES, Crash, crash_in
from tests.apo.training.unpaired_rows import make_rows

CLASSES = {"desirable_weight": 0.5, "undesirable_weight": 1.5}


def cut_in_two(pairs):
    """Each pair as two rows, as `clair export --as unpaired` writes them."""
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]


def trainer(out, rows, model=None, adapter=False, pair_logps=None, **options):
    args = APOConfig(
        output_dir=str(out), report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, optim="sgd",
        **{"learning_rate": 0.5, "per_device_train_batch_size": 4, "max_steps": 5, **options},
    )  # fmt: skip
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    return APOTrainer(
        model or make_model(), args=args, train_dataset=rows, processing_class=make_tokenizer(), peft_config=lora,
        pair_logps=pair_logps,
    )  # fmt: skip


def trained(run):
    """Losses, gradient norms and kl of each step, and the parameters after the last."""
    kls = []
    estimate = getattr(run, "_divergence", None)
    if estimate is not None:
        run._divergence = lambda batches: kls.append(estimate(batches)) or kls[-1]
    run.train()
    steps = [row for row in run.state.log_history if "grad_norm" in row]
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])
    kls = [kl[0].clamp(min=0).item() for kl in kls] or [row["kl"] for row in steps if "kl" in row]
    return [row["loss"] for row in steps], [row["grad_norm"] for row in steps], kls, weights


def assert_same(actual, expected, least=5, atol=1e-5):
    assert len(actual[0]) == len(expected[0]) >= least
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=atol)
    assert (actual[3] - expected[3]).norm() < 1e-5 * expected[3].norm()


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize("weights", [pytest.param({}, marks=pytest.mark.slow), CLASSES], ids=["plain", "classes"])
@pytest.mark.parametrize("objective", ["kto", "apo_zero_unpaired"])
def test_trains_as_trls_kto_trainer_does(tmp_path, model_dir, objective, weights, adapter):
    """TRL answers each prompt with the response *before* it in the micro-batch, the paper and we with the one after it:
    the same rows in reverse order within each batch are the same mismatches."""
    rows = make_rows(20)
    both = {"train_sampling_strategy": "sequential", "beta": 0.5, "learning_rate": 0.3}
    backwards = [row for start in range(0, 20, 4) for row in reversed(rows[start : start + 4])]
    stock = KTOTrainer(
        model=str(model_dir),
        args=KTOConfig(
            output_dir=str(tmp_path), report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
            logging_first_step=True, optim="sgd", max_steps=5, per_device_train_batch_size=4, loss_type=objective,
            use_cpu=True, bf16=False, gradient_checkpointing=False, activation_checkpointing=False, **both, **weights,
        ),
        train_dataset=Dataset.from_list(backwards), processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        if adapter else None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tested = trainer(tmp_path, rows, model, adapter, objective={objective: weights}, **both)
    expected, actual = trained(stock), trained(tested)
    assert len(set(expected[0])) == 5
    assert_same(actual, expected)
    logged, theirs = ([r for r in run.state.log_history if "grad_norm" in r] for run in (tested, stock))
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        expected_values = [row[key] for row in theirs if key in row]
        assert [row[key] for row in logged if key in row] == pytest.approx(expected_values, abs=2e-4)
        assert len(expected_values) == 5
    assert [row["rows/chosen"] for row in logged] == [3, 2, 3, 3, 2]
    assert all(row["rows/chosen"] + row["rows/rejected"] == 4 for row in logged)
    if objective == "kto":
        assert [max(row["kl/mismatched"], 0) for row in logged] == pytest.approx(actual[2], abs=1e-6)
        assert actual[2] == pytest.approx(expected[2], abs=1e-5)
        assert max(actual[2]) > 1e-3  # so that there is something to agree on


def test_pairs_cut_in_two_are_half_of_apo_zero(tmp_path):
    pairs = make_pairs(20)
    both = {"train_sampling_strategy": "sequential", "beta": 0.5}
    half = trained(trainer(tmp_path, pairs, objective={"apo_zero": 0.5}, **both))
    paired = trained(trainer(tmp_path, pairs, objective="apo_zero_unpaired", **both))
    rows = trained(
        trainer(tmp_path, cut_in_two(pairs), objective="apo_zero_unpaired", **both, per_device_train_batch_size=8)
    )
    assert half[0][0] == pytest.approx(0.5)
    assert_same(paired, half, atol=1e-6)
    assert_same(rows, half, atol=1e-6)


# Every row weighs the same, however a step is cut up


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


MIXED = {"kto": {"undesirable_weight": 2.0}, "sft": 0.1}


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize("objective", [MIXED, *map(slow, ("apo_zero_unpaired", "kto"))], ids=str)
def test_a_step_is_the_same_however_it_is_cut_up(tmp_path, objective, adapter):
    rows = [{**row, "w": 0.5 + i % 3} for i, row in enumerate(make_rows(14))]  # windows of 4, 4, 4 and 2
    cuts = (
        (4, 1, {}), (1, 4, {}), (2, 2, {"pack_tokens": 30}), (4, 1, {"shared_prefix": False}),
        (4, 1, {"gradient_checkpointing": True}), (4, 1, {"pair_logps": plain_logps}),
    )  # fmt: skip
    runs = []
    for batch, accumulation, more in cuts:
        more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, **more}
        more |= {"objective": objective, "weights": "w", "max_steps": 6, "learning_rate": 0.1}
        runs.append(trained(trainer(tmp_path, rows, adapter=adapter, **more)))
    for run in runs[1:]:
        assert_same(run, runs[0], least=6, atol=2e-6)
        assert run[2] == pytest.approx(runs[0][2], abs=1e-5)


def test_the_loss_is_the_mean_over_rows_by_hand(tmp_path):
    run = trainer(tmp_path, make_rows(6), objective={"apo_zero_unpaired": {"desirable_weight": 3}, "sft": 0.5})
    batch = run.data_collator([run.train_dataset[i] for i in range(3)])  # desirable, undesirable, desirable
    with torch.no_grad():
        logps = plain_logps(run.model, batch.stacked)
        loss = run.compute_loss(run.model, batch).item()
    first, none, third = (logps.chosen / logps.chosen_len.clamp(min=1)).tolist()
    assert logps.chosen_len.bool().tolist() == [True, False, True]
    assert logps.rejected_len.bool().tolist() == [False, True, False]
    assert none == 0
    assert loss == pytest.approx((3 / 2 - first / 2 + 1 / 2 + 3 / 2 - third / 2) / 3, abs=1e-5)


def test_the_kl_of_kto_is_the_mean_log_ratio_of_each_prompt_with_the_next_rows_response(tmp_path):
    run = trainer(tmp_path, make_rows(5), objective="kto")
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rows = [run.train_dataset[i] for i in range(5)]
    ratios = []
    for row, following in zip(rows, [*rows[1:], rows[0]], strict=True):
        batch = run.data_collator([{**following, "prompt_ids": row["prompt_ids"]}]).stacked
        with torch.no_grad():
            policy, reference = (plain_logps(m, batch) for m in (run.model.eval(), run.ref_model))
        side = "chosen" if following["chosen_ids"] else "rejected"
        ratio = (getattr(policy, side) - getattr(reference, side)).item()
        ratios.append((ratio, ratio / len(following["chosen_ids"] or following["rejected_ids"])))
    divergence = run._divergence([run.data_collator(rows[:2]), run.data_collator(rows[2:])])
    assert divergence.tolist() == pytest.approx([sum(r[i] for r in ratios) / 5 for i in (0, 1)], abs=1e-4)
    assert abs(divergence[0].item()) > 0.01


def test_trls_batch_runs_only_the_response_that_is_there(tmp_path):
    run = trainer(tmp_path, make_rows(6), objective="apo_zero_unpaired", shared_prefix=False)
    batch = run.data_collator([run.train_dataset[i] for i in range(6)]).stacked
    inputs = []
    hook = run.model.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(kwargs["input_ids"]), with_kwargs=True
    )
    actual = padded_logps(run.model, batch)
    hook.remove()
    assert [tuple(ids.shape) for ids in inputs] == [(6, batch["input_ids"].shape[1])]
    for ours, theirs in zip(actual[:4], plain_logps(run.model, batch)[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rows_are_packed_by_default(tmp_path):
    assert trainer(tmp_path, make_rows(6), objective="kto").is_packed


# The reference


def test_cached_reference_log_probs_are_the_online_ones_and_computed_once(tmp_path):
    both = {"objective": {"apo_zero_unpaired": 1, "sft": 0.1}, "learning_rate": 0.1}
    cached = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "cache")}
    online = trained(trainer(tmp_path, make_rows(), **both))
    first, again = (trainer(tmp_path, make_rows(), **both, **cached) for _ in range(2))
    assert (first.reference_computed, again.reference_computed) == ({"train": 24}, {"train": 0})
    assert_same(trained(again), online)
    turned = [{**row, "label": not row["label"]} for row in make_rows()]
    assert trainer(tmp_path, turned, **both, **cached).reference_computed == {"train": 24}


def test_before_the_first_step_ends_and_anchor_are_checked(tmp_path):
    run = trainer(tmp_path, make_rows(), objective="kto")
    assert check_before_training(run) == {"chosen": 0.0, "rejected": 0.0}
    collate = run.data_collator
    run.data_collator = lambda examples: {key: value[:, :12] for key, value in collate(examples).stacked.items()}
    with pytest.raises(UserError, match="was the batch cut"):
        check_before_training(run)


# Input and refusals


def tokenized(rows, max_length=None, objective="kto"):
    tokenizer = make_tokenizer()
    end_tokens = eos_ids(tokenizer)
    return tokenize(Dataset.from_list(rows), tokenizer, max_length, end_tokens, objective=resolve_mixture(objective))


def test_rows_have_the_ids_of_the_pairs_they_come_from():
    pairs = make_pairs(5)
    encoded_pairs, rows = tokenized(pairs).dataset, tokenized(cut_in_two(pairs)).dataset
    for i, pair in enumerate(encoded_pairs):
        good, bad = rows[2 * i], rows[2 * i + 1]
        assert good["prompt_ids"] == bad["prompt_ids"] == pair["prompt_ids"]
        assert (good["chosen_ids"], good["rejected_ids"]) == (pair["chosen_ids"], [])
        assert (bad["chosen_ids"], bad["rejected_ids"]) == ([], pair["rejected_ids"])
    assert count_unpaired(encoded_pairs) is None
    assert count_unpaired(rows) == (5, 5)


def test_a_dataset_sorted_by_label_keeps_its_type():
    rows = make_rows(1100, label=lambda i: i < 1050)  # the first batch written has empty lists only in one column
    assert count_unpaired(tokenized(rows).dataset) == (1050, 50)


def test_text_rows_get_one_end_of_sequence():
    rows = [{"prompt": "what is one ", "completion": end, "label": True} for end in ("two", "two <|end|>")]
    encoded = tokenized(rows).dataset
    assert [row["chosen_ids"].count(3) for row in encoded] == [1, 1]
    assert [row["chosen_ids"][-1] for row in encoded] == [3, 3]


def test_rows_too_long_are_dropped_and_counted():
    sizes = [len(r["prompt_ids"] + r["chosen_ids"] + r["rejected_ids"]) for r in tokenized(make_rows(30)).dataset]
    limit = sorted(sizes)[14]
    encoded = tokenized(make_rows(30), max_length=limit)
    assert encoded.dropped == {"too_long": sum(size > limit for size in sizes)}
    assert len(encoded.dataset) == sum(size <= limit for size in sizes)


@pytest.mark.parametrize("class_", [True, False], ids=["desirable", "undesirable"])
def test_one_class_alone_trains_and_is_reported(tmp_path, class_):
    rows = make_rows(40, label=lambda _: class_)
    encoded = tokenized(rows)
    assert encoded.notes[0].startswith(f"train: every row is {'desirable' if class_ else 'undesirable'}")
    run = trainer(tmp_path, encoded.dataset, objective="apo_zero_unpaired", max_steps=6)
    losses = trained(run)[0]
    assert losses[-1] < losses[0] == pytest.approx(0.5)


def test_imbalance_is_reported_with_the_weights_that_would_even_it_out():
    rows = make_rows(24, label=lambda i: i >= 6)  # 18 desirable, 6 not
    (note,) = tokenized(rows).notes
    assert "18 desirable and 6 undesirable rows pull 3 to 1; desirable_weight 0.33 or undesirable_weight 3" in note
    assert tokenized(rows, objective={"kto": {"undesirable_weight": 3}}).notes == []
    (note,) = tokenized(rows, objective={"kto": {"desirable_weight": 0.1}}).notes
    assert "pull 0.3 to 1; desirable_weight 0.33 or undesirable_weight 0.3 " in note
    assert tokenized(make_rows(21)).notes != []
    assert tokenized(make_rows(21, label=lambda i: i % 7 < 4)).notes == []  # 12 to 9


@pytest.mark.parametrize("label", [1, 0, -1, "yes", None, 0.5], ids=str)
def test_a_label_is_true_or_false(label):
    rows = [{"prompt": "what is one ", "completion": "two", "label": label} for _ in range(3)]
    with pytest.raises(
        UserError, match=r"^label of row 0 of the train dataset is .*; true \(desirable\) or false needed$"
    ):
        tokenized(rows)


def test_a_missing_label_is_reported():
    with pytest.raises(
        UserError, match=r"no column 'label'; found: prompt, completion; needed: prompt, completion, label"
    ):
        tokenized([{"prompt": "a", "completion": "b"}])


@pytest.mark.parametrize("name", [*OBJECTIVES, "mixed"])
def test_an_objective_that_needs_pairs_is_refused_by_name(tmp_path, name):
    spec, refused = ({"kto": 1.0, "apo_zero": 0.1}, "apo_zero") if name == "mixed" else (name, name)
    if name in ("kto", "apo_zero_unpaired"):
        assert len(tokenized(make_rows(), objective=spec).dataset) == 24
        return
    why = "sft alone would read no label" if name == "sft" else f"{refused} needs pairs"
    for rows in (make_rows(), tokenized(make_rows()).dataset):
        with pytest.raises(UserError, match=f"{why}, and the train dataset has unpaired rows"):
            trainer(tmp_path, rows, objective=spec)


def test_pairs_and_unpaired_rows_in_one_dataset_are_refused(tmp_path):
    ids = {"prompt_ids": [1, 5], "chosen_ids": [6, 3], "rejected_ids": [7, 3]}
    for strange in ({**ids, "chosen_ids": []}, {**ids, "chosen_ids": [], "rejected_ids": []}):
        with pytest.raises(UserError, match=r"holds 1 pairs, [01] rows with one response and [01] with none"):
            trainer(tmp_path, [ids, strange], objective="kto")


@pytest.mark.parametrize("option", ["desirable_weight", "undesirable_weight"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_class_that_weighs_nothing_is_refused(option, value):
    with pytest.raises(UserError, match=f"objective kto: {option} is {value}; it must be above 0"):
        resolve_mixture({"kto": {option: value}})


# From a recipe


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path, model_dir):
    """A recipe on a `datasets` folder of 24 unpaired rows with 6 held out."""
    (tmp_path / "rows" / "data").mkdir(parents=True)
    for split, rows in (("train", make_rows(24)), ("test", make_rows(6, seed=5))):
        Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "data" / f"{split}-00000-of-00001.parquet")
    steps = {"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2}
    return {
        "model": str(model_dir), "dataset": str(tmp_path / "rows"), "objective": "apo_zero_unpaired", "trainer": steps,
        "out": str(tmp_path / "run"),
    }  # fmt: skip


@pytest.mark.parametrize("objective", ["apo_zero_unpaired", {"kto": {"undesirable_weight": 2.0}, "sft": 0.1}], ids=str)
def test_a_run_on_unpaired_rows_leaves_a_model_its_numbers_and_a_picture(recipe, objective):
    messages = []
    record = train(TrainConfig(**{**recipe, "objective": objective}), log=messages.append)
    assert record["data"]["train"] == {"rows": 24, "desirable": 16, "dropped": {}}
    assert record["data"]["eval"] == {"rows": 6, "desirable": 4, "dropped": {}}
    assert sum("pull 2 to 1" in note for note in messages) == (objective == "apo_zero_unpaired")
    out = Path(recipe["out"])
    assert (out / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert "24 unpaired rows (16 desirable)" in (out / "README.md").read_text()


def test_text_and_conversations_of_several_sources_are_put_together(recipe, tmp_path):
    text = [{"prompt": "what is one", "completion": "two", "label": False, "source": "x"}] * 3
    talk = make_rows(4)
    files = [write(tmp_path / name, rows) for name, rows in (("text.jsonl", text), ("talk.jsonl", talk))]
    planned = plan(TrainConfig(**{**recipe, "dataset": [str(files[0]), {"path": str(files[1]), "weight": 2}]}))
    assert planned.counts()["train"] == {"rows": 11, "desirable": 6, "dropped": {}}
    tokens = make_tokenizer().decode(planned.train.dataset[0]["rejected_ids"]).split()
    assert tokens == ["two", "<|end|>"]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (make_rows(4), {"objective": "dpo"}, "dpo needs pairs, and the train dataset has unpaired rows"),
        ([{k: v for k, v in row.items() if k != "label"} for row in make_rows(4)], {}, "no column 'label'; found"),
        ([{**row, "label": 1} for row in make_rows(4)], {}, "label of row 0 of the train dataset is 1; true"),
        ([{**row, "completion": row["prompt"]} for row in make_rows(4)], {}, "'completion' begins with a user turn"),
        ([{**row, "completion": [{"content": "a"}]} for row in make_rows(4)], {}, "of 'completion' has no role"),
        (make_rows(1), {}, "has 1 row(s) to train on"),
        (make_rows(4), {"weights": "w"}, "has no column 'w'"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_trained_are_refused_before_any_work(recipe, tmp_path, rows, changes, message):
    changes = {"dataset": str(write(tmp_path / "bad.jsonl", rows)), **changes}
    with pytest.raises(UserError) as error:
        train(TrainConfig(**{**recipe, **changes}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(recipe["out"]).exists()


def test_pairs_and_unpaired_rows_are_not_put_together(recipe, tmp_path):
    files = [str(write(tmp_path / "pairs.jsonl", make_pairs(4))), str(write(tmp_path / "rows.jsonl", make_rows(4)))]
    with pytest.raises(UserError, match=r"pairs.jsonl holds pairs and .*rows.jsonl unpaired rows; `clair export --as"):
        plan(TrainConfig(**{**recipe, "dataset": files}))


def test_a_dry_run_shows_rows_and_an_estimate_of_one_response_each(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "objective": "kto"}))
    assert call(monkeypatch, "train", tmp_path / "recipe.yaml", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "# train: 24 unpaired rows (16 desirable)" in output
    assert "# steps: 6 of 4 rows" in output
    planned = plan(TrainConfig(**{**recipe, "reference": "online"}))
    job = estimate(planned).here
    lengths = [len(r["prompt_ids"] + r["chosen_ids"] + r["rejected_ids"]) for r in planned.train.dataset]
    assert sum(row.tokens for row in job.rows) == sum(lengths)
    assert sum(lengths) < job.padded_tokens < 1.9 * sum(lengths)
    kto = estimate(plan(TrainConfig(**{**recipe, "objective": "kto"}))).here
    (total, reference), (total_kto, reference_kto) = run_flops(job), run_flops(kto)
    assert reference_kto == pytest.approx(2 * reference)  # of each row, and of its prompt with the next one's response
    assert total_kto - total == pytest.approx(2 * reference)  # and the same for the policy


@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_it_had_not_stopped(recipe, tmp_path):
    recipe["objective"] = {"kto": 1.0, "sft": 0.1}
    recipe["trainer"] |= {"save_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    record = train(TrainConfig(**recipe), log=lambda _: None)
    recipe["out"] = str(tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        crash_in(CRASHES["after the checkpoint is in place"], 4, patch)
        with pytest.raises(Crash):
            train(TrainConfig(**recipe), log=lambda _: None)
    resumed = train(TrainConfig(**recipe), log=lambda _: None)
    assert resumed["resumed_from"] == [4]
    for key, value in record["metrics"].items():
        if "second" not in key and "runtime" not in key and key != "mfu":
            assert resumed["metrics"][key] == pytest.approx(value, abs=1e-6)
