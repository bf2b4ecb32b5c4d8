"""One recipe in, one trained model out: files, refusals and messages."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from apo import cli
from apo.data.sources import Source, hash_pairs, load_eval, load_train
from apo.models.load import find_model, load_model
from apo.packing.layout import packed_length
from apo.run_dir import files as runs
from apo.training.config import LoRA, TrainConfig
from apo.training.plan import plan
from apo.training.run_json import run_facts
from apo.training.train import train
from apo.training.trainer import APOTrainer
from clair.core.errors import UserError
from clair.core.recipe import load_recipe, resolved
from tests.apo.conftest import TRAINER, make_model, make_pairs, make_tokenizer, write_jsonl
from tests.apo.training.crashes import CRASHES, Crash, crash_in


def run(recipe, **changes):
    messages: list[str] = []
    return train(TrainConfig(**{**recipe, **changes}), log=messages.append), messages


def test_a_run_leaves_a_model_its_numbers_and_a_picture(recipe):
    record, _ = run(recipe)
    out = Path(recipe["out"])
    assert record == json.loads((out / "run.json").read_text())
    assert record["recipe"]["objective"] == "apo_zero"
    assert record["data"]["train"] == {"pairs": 24, "dropped": {}}
    assert record["data"]["eval"] == {"pairs": 6, "dropped": {}}
    assert record["steps"] == 6
    assert {"loss", "eval_loss", "rewards/margins", "eval_rewards/accuracies", "chosen_falls"} <= set(record["metrics"])
    assert record["metrics"]["eval_rewards/margins"] > 0
    assert record["provenance"]["versions"]["trl"].startswith("1.16")
    assert record["seconds"] > 0
    assert (out / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 4, 6]
    assert not list(out.rglob("training_args.bin"))
    assert not list(out.rglob("*.bin"))
    assert not [f for f in out.iterdir() if f.name.startswith(".")]


def test_the_model_left_is_the_trained_one_and_generates_with_its_tokenizer(recipe, model_dir):
    run(recipe)
    out = recipe["out"]
    tuned, base = AutoModelForCausalLM.from_pretrained(out), AutoModelForCausalLM.from_pretrained(model_dir)
    assert not torch.equal(tuned.lm_head.weight, base.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is one"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert tuned.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert tuned.generation_config.eos_token_id == 3
    assert tuned.config.use_cache


def test_the_card_says_what_was_done(recipe):
    run(recipe, objective="apo_down", beta=0.2)
    card = (Path(recipe["out"]) / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == recipe["model"]
    assert "apo_down" in head["tags"]
    assert "trained with apo_down (beta 0.2) on 24 pairs for 6 steps" in card
    assert "![Chosen and rejected over training](dynamics.png)" in card


BEST = {
    "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 3,
    "load_best_model_at_end": True, "metric_for_best_model": "rewards/margins", "greater_is_better": False,
}  # fmt: skip
"""The smallest margin is the best, so that the first evaluation is."""


@pytest.mark.parametrize("stopped", [False, True])
def test_the_metrics_are_those_of_the_best_checkpoint_if_it_is_the_model(recipe, stopped):
    recipe["trainer"] |= BEST
    if stopped:
        with pytest.MonkeyPatch.context() as patch:
            crash_in(CRASHES["after the checkpoint is in place"], 4, patch)
            with pytest.raises(Crash):
                run(recipe)
    record, _ = run(recipe)
    assert record["resumed_from"] == ([4] if stopped else [])
    out = Path(recipe["out"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    margins = {row["step"]: row["eval_rewards/margins"] for row in rows if "eval_loss" in row}
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(margins) == [2, 4, 6]
    assert margins[2] == min(margins.values()) < margins[6]
    assert (record["metrics"]["eval_rewards/margins"], record["metrics"]["loss"]) == (margins[2], losses[2])
    assert record["best"] == {"step": 2, "evaluations": 3}
    saved = load_file(out / "model.safetensors"), load_file(out / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(saved[0][name], weight) for name, weight in saved[1].items())
    assert "\nAt step 2, the best of 3 evaluations:\n" in (out / "README.md").read_text()
    closing = cli._closing(recipe["out"], record)
    assert "24 pairs, 6 steps (model of step 2, the best of 3 evaluations), " in closing
    assert f" s: held-out loss {record['metrics']['eval_loss']:.4f}" in closing


def test_a_better_evaluation_between_two_checkpoints_is_not_hidden(recipe, monkeypatch):
    recipe["trainer"] |= BEST | {"greater_is_better": True, "save_steps": 4, "max_steps": 7}
    original, margins = APOTrainer.evaluate, {2: 1.0, 4: 2.0, 6: 3.0, 7: 0.0}

    def evaluate(trainer, *args, **kwargs):
        return original(trainer, *args, **kwargs) | {"eval_rewards/margins": margins[trainer.state.global_step]}

    monkeypatch.setattr(APOTrainer, "evaluate", evaluate)
    record, _ = run(recipe)
    assert record["best"] == {"step": 4, "evaluations": None}
    assert "\nAt step 4, the best checkpoint:\n" in (Path(recipe["out"]) / "README.md").read_text()


def test_lora_leaves_an_adapter_that_can_be_trained_on(recipe, tmp_path):
    run(recipe, lora=LoRA(r=4, alpha=8))
    out = Path(recipe["out"])
    assert (out / "adapter_model.safetensors").exists()
    assert not (out / "model.safetensors").exists()
    assert "AutoPeftModelForCausalLM" in (out / "README.md").read_text()
    second, _ = run(recipe, model=str(out), out=str(tmp_path / "second"))
    first_line = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    assert first_line["rewards/chosen"] == 0  # its own start is its reference
    assert second["metrics"]["loss"] < 1


def test_lora_dropout_is_not_lost(recipe):
    from apo.training.train import build_trainer

    trainer = build_trainer(plan(TrainConfig(**recipe, lora={"dropout": 0.25})))
    rates = {m.p for name, m in trainer.model.named_modules() if "lora_dropout.default" in name}
    assert rates == {0.25}


def test_a_finished_run_is_not_done_again(recipe):
    first, _ = run(recipe)
    again, messages = run(recipe)
    assert again == first
    assert messages == [f"{recipe['out']} is finished; nothing to do"]


@pytest.mark.parametrize("changed", ["pairs", "model"])
def test_a_finished_run_on_other_pairs_or_another_model_is_refused(recipe, tmp_path, model_dir, changed):
    moved = shutil.copytree(model_dir, tmp_path / "model")
    recipe |= {"dataset": str(write_jsonl(tmp_path / "pairs.jsonl", make_pairs(12))), "model": str(moved)}
    recipe["trainer"]["max_steps"] = 1
    run(recipe)
    files = {"pairs": tmp_path / "pairs.jsonl", "model": moved / "config.json"}
    content = files[changed].read_text()
    if changed == "pairs":
        write_jsonl(files["pairs"], make_pairs(12, seed=1))
    else:
        files["model"].write_text(content + "\n")
    name = {"pairs": "other pairs: the dataset has changed", "model": "another model: the files of .* have changed"}
    with pytest.raises(UserError, match=f"holds a run on {name[changed]}"):
        run(recipe)
    files[changed].write_text(content)
    assert run(recipe)[1] == [f"{recipe['out']} is finished; nothing to do"]


def test_a_run_that_two_processes_finished_is_not_done_again_by_one(recipe):
    config = TrainConfig(**recipe)
    facts = run_facts(plan(config, 2), "new")
    assert (facts["processes"], facts["pairs_per_step"]) == (2, 8)
    runs.write_new_run(Path(recipe["out"]), resolved(config), **facts, finished="2026-01-01")
    assert run(recipe)[1] == [f"{recipe['out']} is finished; nothing to do"]


def test_a_users_function_trains_from_python(recipe):
    def hinge(chosen, rejected, *, beta):
        return (1 - beta * (chosen - rejected)).relu()

    record, _ = run(recipe, objective=hinge)
    assert record["recipe"]["objective"] == "hinge"


def test_pairs_too_long_are_counted_in_the_outputs(recipe):
    record, messages = run(recipe, trainer={**TRAINER, "max_length": 22})
    dropped = record["data"]["train"]["dropped"]["too_long"]
    assert 0 < dropped < 24
    assert record["data"]["train"]["pairs"] == 24 - dropped
    assert f"{dropped} too long" in (Path(recipe["out"]) / "README.md").read_text()
    assert messages[0] == f"train: {24 - dropped} pairs, {dropped} left out (too long)"
    assert "note: too long is more than 22 tokens, trainer.max_length" in messages


@pytest.mark.slow
def test_a_run_says_what_it_trains_on_and_what_it_need_not_compute_again(recipe, tmp_path):
    """Another rate, beta or objective: nothing of the reference is computed."""
    _, messages = run(recipe)
    first = ["train: 24 pairs", "eval: 6 pairs", "steps: 6 of 4 pairs", "reference log-probs: 30 computed"]
    assert messages == first
    changed = {"trainer": {**TRAINER, "learning_rate": 1e-3}}, {"beta": 0.5}, {"objective": "dpo"}
    for number, changes in enumerate(changed):
        _, messages = run(recipe, out=str(tmp_path / str(number)), **changes)
        assert messages == [*first[:3], "reference log-probs: 0 computed, 30 kept from an earlier run"]


def test_pairs_that_no_packed_row_holds_are_counted_with_the_longest(recipe):
    planned = plan(TrainConfig(**{**recipe, "trainer": {**TRAINER, "pack_tokens": 25}}))
    sizes = [packed_length(pair) for pair in planned.train.dataset]
    over = [size for size in sizes if size > 25]
    assert 0 < len(over) < 24
    note = (
        f"{len(over)} rows are longer than trainer.pack_tokens 25, up to {max(over)} tokens: each is a pass of its own"
    )
    assert planned.train.notes == [note]
    assert plan(TrainConfig(**{**recipe, "trainer": {**TRAINER, "pack_tokens": max(sizes)}})).train.notes == []


@pytest.mark.slow
def test_pairs_longer_than_the_model_takes_are_left_out(recipe, tmp_path):
    """GPT-2 has no embedding for a later position, and others were never trained there."""
    config = GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=24, bos_token_id=1, eos_token_id=3, pad_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    record, messages = run(recipe, model=str(tmp_path / "m"))
    dropped = record["data"]["train"]["dropped"]["too_long"]
    assert 0 < dropped < 24
    assert messages[0] == f"train: {24 - dropped} pairs, {dropped} left out (too long)"
    assert "note: too long is more than 24 tokens, the model's context" in messages
    long = write_jsonl(tmp_path / "long.jsonl", [{**pair, "prompt": "one " * 30} for pair in make_pairs(4)])
    with pytest.raises(UserError, match=r"4 are longer than 24 tokens, the model's context$"):
        plan(TrainConfig(**{**recipe, "model": str(tmp_path / "m"), "dataset": str(long)}))


def test_a_dry_run_shows_the_plan_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    files = sorted(tmp_path.rglob("*"))
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("sys.argv", ["apo", "train", str(path), "--dry-run", "--set", "trainer.max_steps=-1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    output = capsys.readouterr().out
    assert stop.value.code == 0
    assert yaml.safe_load(output)["beta"] == 0.1
    assert "# train: 24 pairs" in output
    assert "# steps: 18 of 4 pairs" in output
    assert sorted(tmp_path.rglob("*")) == [*files, path]


@pytest.mark.parametrize(
    ("pairs", "trainer", "steps"),
    [
        (24, {}, 9), (24, {"num_train_epochs": 1}, 3), (25, {"num_train_epochs": 2}, 8),
        (25, {"dataloader_drop_last": True}, 9), (26, {"gradient_accumulation_steps": 3}, 6), (24, {"max_steps": 5}, 5),
        (24, {"num_train_epochs": 1.5}, 5),
    ],
)  # fmt: skip
def test_the_planned_steps_are_those_trained(recipe, tmp_path, pairs, trainer, steps):
    data = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(pairs))
    config = TrainConfig(**{**recipe, "dataset": str(data), "trainer": {"per_device_train_batch_size": 8, **trainer}})
    assert plan(config).steps == steps
    record = train(config, log=lambda _: None)
    rows = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == record["steps"] == steps


# Sources of pairs


def test_weights_say_how_often_each_pair_is_seen(tmp_path):
    first = write_jsonl(tmp_path / "one.jsonl", make_pairs(10))
    second = write_jsonl(tmp_path / "two.jsonl", [{**row, "id": "q" + row["id"]} for row in make_pairs(8, seed=3)])
    sources = [Source(path=str(first), weight=2), Source(path=str(second), weight=0.5)]
    ids = load_train(sources, seed=0)["id"][:]
    assert sorted(ids[:20]) == sorted([f"p{i}" for i in range(10)] * 2)
    assert len(ids) == 24
    assert len(set(ids[20:])) == 4
    assert ids == load_train(sources, seed=0)["id"][:]
    assert ids != load_train(sources, seed=1)["id"][:]


def test_held_out_pairs_are_the_test_split_another_or_none(folder, tmp_path):
    source = Source(path=str(folder))
    assert len(load_eval([source], True)) == 6
    assert len(load_eval([source], "train")) == 24
    assert load_eval([source], False) is None
    lone = Source(path=str(write_jsonl(tmp_path / "lone.jsonl", make_pairs(3))))
    assert load_eval([lone], True) is None
    assert len(load_eval([lone, source], True)) == 6
    with pytest.raises(UserError, match="no dataset has a split 'dev'; found: train, test"):
        load_eval([source], "dev")


def test_an_empty_test_split_is_no_test_split(tmp_path):
    (tmp_path / "data").mkdir()
    rows = Dataset.from_list(make_pairs(4))
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    rows.select([]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert load_eval([Source(path=str(tmp_path))], True) is None


def test_the_published_clair_format_is_read(tmp_path, recipe):
    rows = []
    for row in make_pairs(8):
        prompt = row["prompt"][0]["content"]
        turns = {name: [{"role": "user", "content": prompt}, *row[name]] for name in ("chosen", "rejected")}
        rows.append({"prompt": prompt, **turns, "rational": "because"})
    data = write_jsonl(tmp_path / "published.jsonl", rows)
    published = plan(TrainConfig(**{**recipe, "dataset": str(data)}))
    plain = plan(TrainConfig(**{**recipe, "dataset": str(write_jsonl(tmp_path / "plain.jsonl", make_pairs(8)))}))
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert published.train.dataset[column][:] == plain.train.dataset[column][:]


@pytest.mark.parametrize("key", ["eval", "save", "logging"])
def test_a_strategy_may_be_no_in_a_file_and_in_set(recipe, tmp_path, key):
    path = tmp_path / "recipe.yaml"
    lines = [f"{name}: {recipe[name]}" for name in ("model", "dataset", "out")]
    path.write_text("\n".join([*lines, f"trainer: {{max_steps: 2, {key}_strategy: no}}"]))
    in_set = load_recipe(TrainConfig, path, [f"trainer.{key}_strategy=no"])
    assert load_recipe(TrainConfig, path) == in_set
    assert getattr(plan(in_set).args, f"{key}_strategy") == "no"


@pytest.mark.parametrize("key", ["eval", "save", "logging"])
def test_a_number_of_steps_needs_no_strategy(recipe, key):
    def settings(**trainer):
        args = plan(TrainConfig(**{**recipe, "trainer": {"max_steps": 6, **trainer}})).args
        return getattr(args, f"{key}_strategy"), getattr(args, f"{key}_steps")

    assert settings(**{f"{key}_steps": 2}) == ("steps", 2)
    assert settings(**{f"{key}_steps": 2, f"{key}_strategy": "epoch"}) == ("epoch", 2)
    assert settings()[0] == ("epoch" if key == "eval" else "steps")


# Bad input: one line, before any work, nothing harmed


def broken_model(tmp_path, name, tokenizer=None, model=True):
    folder = tmp_path / name
    if model:
        make_model().save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def no_template(tmp_path, recipe):
    recipe["model"] = broken_model(tmp_path, "m", make_tokenizer(template=None))


def no_end_of_turn(tmp_path, recipe):
    recipe["model"] = broken_model(tmp_path, "m", make_tokenizer(eos=None))


def no_tokenizer(tmp_path, recipe):
    recipe["model"] = broken_model(tmp_path, "m")


def no_config(tmp_path, recipe):
    recipe["model"] = broken_model(tmp_path, "m", make_tokenizer(), model=False)


def pickled_weights(tmp_path, recipe):
    recipe["model"] = broken_model(tmp_path, "m", make_tokenizer())
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(make_model().state_dict(), tmp_path / "m" / "pytorch_model.bin")


def vocabulary_too_large(tmp_path, recipe):
    make_model(vocab_size=20).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    recipe["model"] = str(tmp_path / "m")


def damaged_weights(tmp_path, recipe):
    recipe["model"] = broken_model(tmp_path, "m", make_tokenizer())
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


def pickled_adapter(tmp_path, recipe):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": recipe["model"]}))
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"pickle")
    recipe["model"] = str(tmp_path / "a")


def adapter_on(base, tmp_path, model):
    """An adapter that was trained on `model` and says that its base is the folder `base`."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(tmp_path / "a")
    about = tmp_path / "a" / "adapter_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "base_model_name_or_path": str(base)}))
    return str(tmp_path / "a")


def adapter_of_another_shape(tmp_path, recipe):
    recipe["model"] = adapter_on(recipe["model"], tmp_path, make_model(hidden_size=64))


def adapter_with_added_tokens(tmp_path, recipe):
    make_model(vocab_size=20).save_pretrained(tmp_path / "m")
    recipe["model"] = adapter_on(tmp_path / "m", tmp_path, make_model(vocab_size=20))
    make_tokenizer().save_pretrained(tmp_path / "a")


def adapter_of_itself(tmp_path, recipe):
    recipe["model"] = adapter_on(tmp_path / "a", tmp_path, make_model())


def adapter_of_an_adapter(tmp_path, recipe):
    lower = adapter_on(recipe["model"], tmp_path, make_model())
    (tmp_path / "upper").mkdir()
    recipe["model"] = adapter_on(lower, tmp_path / "upper", make_model())


def rows_are(change):
    def apply(tmp_path, recipe):
        recipe["dataset"] = str(write_jsonl(tmp_path / "pairs.jsonl", change(make_pairs(4))))

    return apply


def keys_are(**changes):
    def apply(tmp_path, recipe):
        recipe.update(changes)

    return apply


def another_run(tmp_path, recipe):
    train(TrainConfig(**recipe), log=lambda _: None)
    recipe["beta"] = 0.3


def another_objectives_run(tmp_path, recipe):
    train(TrainConfig(**recipe), log=lambda _: None)
    recipe["objective"] = "dpo"


def stranger(tmp_path, recipe):
    Path(recipe["out"]).mkdir()
    (Path(recipe["out"]) / "thesis.tex").write_text("years of work")


def without(column):
    return lambda rows: [{key: value for key, value in row.items() if key != column} for row in rows]


def equal_in_each_row(rows):
    return [{**row, "chosen": row["rejected"]} for row in rows]


def equal_in_all_but_one(rows):
    return [*equal_in_each_row(rows[1:]), rows[0]]


def number_as_prompt(rows):
    return [{**row, "prompt": 7} for row in rows]


BAD_INPUT = {
    "misspelt key": (keys_are(objectve="dpo"), "unknown key 'objectve' (did you mean 'objective'?)"),
    "misspelt trainer key": (keys_are(trainer={"learning_rat": 1}), "did you mean 'learning_rate'?"),
    "trainer value of a wrong kind": (keys_are(trainer={"warmup_steps": "few"}), "trainer.warmup_steps: Input should"),
    "text for a boolean": (keys_are(trainer={"bf16": "no"}), "trainer.bf16: found 'no'; allowed: true, false"),
    "text for a boolean among options": (
        keys_are(trainer={"gradient_checkpointing_kwargs": {"use_reentrant": "off"}}),
        "trainer.gradient_checkpointing_kwargs: 'off' is text; allowed for a boolean: true, false",
    ),
    "text for a switch of the template": (
        keys_are(dataset={"path": "PAIRS", "chat_template_kwargs": {"enable_thinking": "No"}}),
        "chat_template_kwargs.enable_thinking: 'No' is text; allowed for a boolean: true, false, found 'No'",
    ),
    "text for held-out pairs": (keys_are(eval="no"), "no dataset has a split 'no'; found: train, test; no file is"),
    "trainer value TRL refuses": (keys_are(trainer={"logging_steps": 0}), "trainer: logging strategy"),
    "no pairs a batch": (keys_are(trainer={"per_device_train_batch_size": 0}), "batch_size is 0; it must be above 0"),
    "no accumulation": (keys_are(trainer={"gradient_accumulation_steps": 0}), "steps is 0; it must be above 0"),
    "no epochs": (keys_are(trainer={"num_train_epochs": 0}), "trainer.num_train_epochs is 0; it must be above 0"),
    "no steps": (keys_are(trainer={"max_steps": 0}), "trainer.max_steps is 0; give 1 or more, or leave it out"),
    "epochs without end": (
        keys_are(trainer={"num_train_epochs": math.inf}),
        "num_train_epochs is inf; it must be above 0, and finite",
    ),
    "an infinite rate": (keys_are(trainer={"learning_rate": math.inf}), "learning_rate is inf; it must be 0 or above"),
    "workers below 0": (
        keys_are(trainer={"dataloader_num_workers": -1}),
        "dataloader_num_workers is -1; it must be 0 or above",
    ),
    "parallelism": (keys_are(trainer={"parallelism_config": {"tp_size": 2}}), "parallelism_config is not offered"),
    "offloading on a CPU": (
        keys_are(trainer={"activation_offloading": True, "use_cpu": True}),
        "activation_offloading moves activations from a GPU, and this run is on a CPU; leave it out",
    ),
    "a rate below 0": (keys_are(trainer={"learning_rate": -1e-5}), "learning_rate is -1e-05; it must be 0 or above"),
    "a tracker that is not installed": (keys_are(trainer={"report_to": "neptune"}), "neptune is not installed"),
    "a tracker that nobody knows": (keys_are(trainer={"report_to": ["wandbb"]}), "(did you mean 'wandb'?)"),
    "key of the top under trainer": (keys_are(trainer={"beta": 1}), "trainer.beta: it is a key of the recipe itself"),
    "output_dir": (keys_are(trainer={"output_dir": "x"}), "it is a key of the recipe itself, 'out'"),
    "push_to_hub": (keys_are(trainer={"push_to_hub": True}), "trainer.push_to_hub is not offered"),
    "loss_type beside objective": (
        keys_are(trainer={"loss_type": "sigmoid"}),
        "trainer.loss_type 'sigmoid' is an objective here: set objective: dpo",
    ),
    "label_smoothing": (
        keys_are(trainer={"label_smoothing": 0.0}),
        "trainer.label_smoothing is an option of the objective: set",
    ),
    "unknown objective": (keys_are(objective="apo_zer"), "unknown objective 'apo_zer' (did you mean 'apo_zero'?)"),
    "beta 0": (keys_are(beta=0), "beta: Input should be greater than 0"),
    "beta below 0": (keys_are(beta=-0.1), "beta: Input should be greater than 0"),
    "lora rank 0": (keys_are(lora={"r": 0}), "lora.r: Input should be greater than 0"),
    "lora on nothing": (keys_are(lora={"target_modules": ["nope"]}), "lora: Target modules {'nope'} not found in the"),
    "lora on a pattern of nothing": (
        keys_are(lora={"target_modules": "q_prj"}),
        "layers of the model: down_proj, gate",
    ),
    "lora on the head": (keys_are(lora={"target_modules": ["lm_head"]}), "an adapter to the LM head is not supported"),
    "misspelt option of the optimizer": (
        keys_are(trainer={"optim": "sgd", "optim_args": "momentun=0.9"}),
        "trainer.optim_args: sgd has no option 'momentun' (did you mean 'momentum'?); options: dampening, momentum, ",
    ),
    "option of another optimizer": (
        keys_are(trainer={"optim": "adamw_torch", "optim_args": "momentum=0.9"}),
        "trainer.optim_args: adamw_torch has no option 'momentum'; options: none",
    ),
    "option of the optimizer without a value": (
        keys_are(trainer={"optim": "sgd", "optim_args": "nesterov"}),
        "trainer.optim_args is 'nesterov'; write name=value, ...",
    ),
    "option of the optimizer that is no number": (
        keys_are(trainer={"optim": "sgd", "optim_args": "momentum=much"}),
        "trainer.optim sgd cannot be set up: could not convert string to float: 'much'",
    ),
    "beta of the optimizer out of range": (keys_are(trainer={"adam_beta1": 1.5}), "Invalid beta parameter at index 0"),
    "optimizer that is not installed": (
        keys_are(trainer={"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}),
        "trainer.optim galore_adamw cannot be set up: You need to install",
    ),
    "misspelt option of the schedule": (
        keys_are(trainer={"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}}),
        "trainer.lr_scheduler_type cosine cannot be set up: ",
    ),
    "eval without held-out pairs": (keys_are(eval=False, trainer={"eval_strategy": "epoch"}), "no held-out pairs"),
    "eval of no split": (keys_are(eval="dev"), "no dataset has a split 'dev'; found: train, test"),
    "model not there": (keys_are(model="./nowhere"), "model folder ./nowhere does not exist"),
    "model without config": (no_config, "has no config.json"),
    "model without tokenizer": (no_tokenizer, "no tokenizer can be loaded"),
    "model without chat template": (no_template, "has no chat template"),
    "tokenizer without end of turn": (no_end_of_turn, "has no eos_token"),
    "pickled weights": (pickled_weights, "cannot be loaded"),
    "damaged weights": (damaged_weights, "cannot be loaded"),
    "pickled adapter": (pickled_adapter, "only safetensors are read"),
    "vocabulary too large": (vocabulary_too_large, "has 20 embeddings but its tokenizer has ids up to"),
    "images": (
        rows_are(lambda rows: [{**row, "images": ["a.png"]} for row in rows]),
        "the column 'images' holds images",
    ),
    "adapter of itself": (adapter_of_itself, "names itself as its base; write the model's folder into adapter_config"),
    "adapter of an adapter": (adapter_of_an_adapter, "or fold the lower adapter into its base first (apo merge)"),
    "adapter of another shape": (adapter_of_another_shape, "size mismatch"),
    "adapter of more words than its base": (
        adapter_with_added_tokens,
        "has 20 embeddings but its tokenizer has ids up to",
    ),
    "dataset not there": (keys_are(dataset="./nowhere.jsonl"), "dataset ./nowhere.jsonl does not exist"),
    "hub dataset without network": (keys_are(dataset="nobody/nothing"), "dataset 'nobody/nothing'"),
    "no such split": (keys_are(dataset={"path": "PAIRS", "split": "dev"}), "split 'dev'"),
    "empty file": (rows_are(lambda rows: []), "pairs.jsonl"),
    "one row": (rows_are(lambda rows: rows[:1]), "has 1 row(s) to train on; at least 2 are needed"),
    "missing column": (rows_are(without("chosen")), "has no column 'chosen'; found: "),
    "prompt that is not text": (rows_are(number_as_prompt), "pairs.jsonl"),
    "chosen equal to rejected": (rows_are(equal_in_each_row), "chosen is equal to rejected in 4 of 4 pairs"),
    "one pair left": (
        rows_are(equal_in_all_but_one),
        "1 row(s) are left to train on: train: chosen is equal to rejected in 3 of 4",
    ),
    "everything too long": (keys_are(trainer={"max_length": 5}), "0 row(s) are left to train on: 24 are longer than"),
    "weight 0": (keys_are(dataset=[{"path": "PAIRS", "weight": 0}]), "weight: Input should be greater than 0"),
    "infinite weight": (keys_are(dataset=[{"path": "PAIRS", "weight": math.inf}]), "weight: Input should be a finite"),
    "another recipe's run": (another_run, "holds the run of another recipe (it differs in beta)"),
    "another objective's run": (
        another_objectives_run,
        "run of another recipe (it differs in objective); choose another",
    ),
    "a folder of something else": (stranger, "is not a run of `apo train` and not empty (it holds thesis.tex)"),
}


REFUSED_BY_A_DRY_RUN = [
    case for case in BAD_INPUT if case.startswith(("lora on", "misspelt option", "option", "optimizer"))
]


@pytest.mark.parametrize("case", REFUSED_BY_A_DRY_RUN)
def test_a_dry_run_refuses_modules_and_options_that_do_not_exist(case, tmp_path, recipe):
    spoil, message = BAD_INPUT[case]
    spoil(tmp_path, recipe)
    with pytest.raises(UserError) as error:
        plan(TrainConfig(**recipe))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_among_others_that_no_module_has_is_noted(recipe):
    planned = plan(TrainConfig(**recipe, lora={"target_modules": ["q_proj", "qkv_proj"]}))
    assert any("lora.target_modules: no module is called qkv_proj; linear" in note for note in planned.train.notes)


@pytest.mark.parametrize(
    "trainer",
    [{"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"}, {"optim": "adafactor"}, {"optim": "adagrad"},
     {"optim": "rmsprop", "optim_args": "alpha=0.9"}, {"lr_scheduler_type": "constant"}, {"learning_rate": 0.0},
     {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7}, "warmup_steps": 2}],
)  # fmt: skip
def test_options_of_optimizers_and_schedules_that_are_there_pass(trainer, recipe):
    assert plan(TrainConfig(**{**recipe, "trainer": TRAINER | trainer})).steps


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2_before_any_work(case, tmp_path, recipe, folder, capsys, monkeypatch):
    spoil, message = BAD_INPUT[case]
    spoil(tmp_path, recipe)
    capsys.readouterr()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe).replace("PAIRS", str(folder)))
    files = snapshot(Path(recipe["out"]))
    monkeypatch.setattr("sys.argv", ["apo", "train", str(path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    *plan_of_it, error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert error.startswith("error: ")
    # Errors of loading the model come after the description of the data; nothing else does.
    assert all(line.startswith(("train: ", "eval: ", "steps: ")) for line in plan_of_it)
    assert message in error
    assert snapshot(Path(recipe["out"])) == files


def snapshot(out: Path):
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in out.rglob("*") if file.is_file()}


def test_too_little_memory_to_load_a_model_is_reported(recipe, monkeypatch):
    def full(*_, **__):
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(UserError, match=r"^model .* cannot be loaded: Cannot allocate memory"):
        run(recipe)
    assert not Path(recipe["out"]).exists()


def test_the_anchor_is_checked_before_anything_is_written(recipe, monkeypatch):
    from apo.training.trainer import APOTrainer

    right = APOTrainer.reference_logps
    wrong = lambda *args: tuple(logps - 0.5 for logps in right(*args))  # noqa: E731
    monkeypatch.setattr(APOTrainer, "reference_logps", wrong)
    with pytest.raises(UserError, match="reward is not 0 before the first step"):
        run(recipe)
    assert not snapshot(Path(recipe["out"]))


def test_a_process_that_was_launched_without_its_others_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2 but RANK is not set"):
        run(recipe)


def test_a_recipe_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(TrainConfig, tmp_path / "none.yaml")


def test_pairs_that_changed_under_a_stopped_run_are_reported(recipe, tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(12))
    recipe["dataset"] = str(data)
    record, _ = run(recipe)
    out = Path(recipe["out"])
    (out / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "finished"}))
    write_jsonl(data, make_pairs(12, seed=8))
    with pytest.raises(UserError, match="the dataset has changed since"):
        run(recipe)


def test_several_splits_by_hand_written_folder(tmp_path, recipe):
    saved = DatasetDict({"train": Dataset.from_list(make_pairs(6)), "test": Dataset.from_list(make_pairs(2, seed=4))})
    for split, rows in saved.items():
        rows.to_json(tmp_path / f"{split}.jsonl")
    folder = tmp_path / "mine"
    folder.mkdir()
    for split in saved:
        shutil.move(tmp_path / f"{split}.jsonl", folder / f"{split}.jsonl")
    planned = plan(TrainConfig(**{**recipe, "dataset": str(folder)}))
    assert planned.counts() == {"train": {"pairs": 6, "dropped": {}}, "eval": {"pairs": 2, "dropped": {}}}


def weighted_jsonl(path: Path, weights) -> Path:
    return write_jsonl(path, [{**pair, "trust": w} for pair, w in zip(make_pairs(len(weights)), weights, strict=True)])


def test_a_recipe_names_a_mixture_and_a_column_of_weights(recipe, tmp_path):
    recipe["dataset"] = str(weighted_jsonl(tmp_path / "pairs.jsonl", [1.0, 0.5] * 6))
    mixed = {"apo_zero": {"length_normalised": True}, "sft": 0.1}
    record, _ = run(recipe, objective=mixed, weights="trust", beta=5)
    assert record["recipe"]["objective"] == mixed
    assert record["recipe"]["weights"] == "trust"
    card = (Path(recipe["out"]) / "README.md").read_text()
    assert "trained with apo_zero(length_normalised=True) + 0.1 sft (beta 5.0)" in card
    assert run(recipe, objective=mixed, weights="trust", beta=5)[1] == [f"{recipe['out']} is finished; nothing to do"]
    with pytest.raises(UserError, match=r"another recipe \(it differs in objective.sft\)"):
        run(recipe, objective={**mixed, "sft": 0.2}, weights="trust", beta=5)


def test_an_impossible_weight_is_refused_before_anything_is_written(recipe, tmp_path):
    recipe["dataset"] = str(weighted_jsonl(tmp_path / "pairs.jsonl", [1.0, -0.5, 1.0]))
    for column, message in (("trust", "'trust' of row 1 of the train dataset is -0.5"), ("trusty", "did you mean")):
        with pytest.raises(UserError, match=message):
            run(recipe, weights=column)
    assert not Path(recipe["out"]).exists()


def test_other_weights_are_other_pairs_for_a_run_that_resumes():
    ids = {name: [[1, 2]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    first, second = (Dataset.from_dict({**ids, "w": [value]}) for value in (1.0, 2.0))
    assert hash_pairs(first) == hash_pairs(second)
    assert hash_pairs(first, "w") != hash_pairs(second, "w")


# ---- the pairs of a step


def checkpoint_step(recipe, processes=1, **changes):
    planned = plan(TrainConfig(**{**recipe, **changes}), processes)
    args = planned.args
    return args.per_device_train_batch_size, args.gradient_accumulation_steps, planned.pairs_per_step, planned.steps


def test_pairs_per_step_is_kept_on_any_number_of_processes(recipe):
    recipe["trainer"] = {"learning_rate": 1e-2, "num_train_epochs": 2}
    # 24 pairs of 12 a step, twice
    assert checkpoint_step(recipe, pairs_per_step=12) == (6, 2, 12, 4)
    assert checkpoint_step(recipe, 2, pairs_per_step=12) == (6, 1, 12, 4)
    assert checkpoint_step(recipe, 3, pairs_per_step=12) == (4, 1, 12, 4)
    recipe["trainer"]["per_device_train_batch_size"] = 2
    assert checkpoint_step(recipe, 2, pairs_per_step=12) == (2, 3, 12, 4)
    assert checkpoint_step(recipe, 3) == (2, 1, 6, 8)


def test_pairs_per_step_that_cannot_be_shared_out_is_refused(recipe):
    recipe["trainer"] = {"per_device_train_batch_size": 4}
    with pytest.raises(UserError, match="12 cannot be divided equally among 5 processes"):
        checkpoint_step(recipe, 5, pairs_per_step=12)
    with pytest.raises(UserError, match=r"12 on 2 process\(es\) is 6 each, no multiple of .*batch_size 4"):
        checkpoint_step(recipe, 2, pairs_per_step=12)
    recipe["trainer"] = {"gradient_accumulation_steps": 4}
    with pytest.raises(UserError, match="gradient_accumulation_steps follows from pairs_per_step"):
        checkpoint_step(recipe, pairs_per_step=12)


@pytest.mark.parametrize(
    ("begun", "now", "match"),
    [
        (
            {"processes": 2, "pairs_per_step": 8},
            {},
            r"holds a run of 8 pairs a step .* would take 4 .*pairs_per_step: 8",
        ),
        ({"processes": 2, "steps": 5}, {}, "holds a run of 5 steps and this one would take 6"),
        ({"processes": 2}, {"lora": {"dropout": 0.1}}, r"of 2 process\(es\), whose dropout draws other numbers on 1"),
    ],
)
def test_a_run_that_would_go_on_as_another_is_refused(recipe, begun, now, match):
    recipe |= now
    planned = plan(TrainConfig(**recipe))
    data = {**planned.counts(), "sha256": hash_pairs(planned.train.dataset)}
    facts = {"steps": 6, "pairs_per_step": 4, "processes": 1, **begun}
    runs.write_new_run(Path(recipe["out"]), resolved(planned.config), data=data, resumed_from=[], **facts)
    with pytest.raises(UserError, match=match):
        run(recipe)


def test_a_token_among_the_trainers_options_is_not_written_down(recipe):
    out = Path(recipe["out"])
    resolved_recipe = resolved(TrainConfig(**{**recipe, "trainer": {**recipe["trainer"], "hub_token": "hf_planted"}}))
    runs.write_new_run(out, resolved_recipe, data={}, steps=6, pairs_per_step=4, resumed_from=[])
    assert not [file for file in out.rglob("*") if file.is_file() and b"planted" in file.read_bytes()]
    assert runs.read_run(out)["recipe"]["trainer"]["hub_token"] == "[secret]"
    assert runs.run_status(out, resolved_recipe) == "unfinished"


def test_micro_batches_may_change_within_a_run_and_nothing_else(recipe):
    out = Path(recipe["out"])
    runs.write_new_run(out, resolved(TrainConfig(**recipe)), data={}, steps=6, pairs_per_step=4, resumed_from=[])
    changed = {**recipe["trainer"], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert runs.run_status(out, resolved(TrainConfig(**{**recipe, "trainer": changed}))) == "unfinished"
    with pytest.raises(UserError, match=r"it differs in trainer\.learning_rate"):
        runs.run_status(out, resolved(TrainConfig(**{**recipe, "trainer": {**changed, "learning_rate": 1.0}})))


def test_fsdp_is_requested_with_true(recipe):
    recipe["trainer"]["fsdp"] = True
    with pytest.raises(UserError, match="FSDP was asked for, and on one process accelerate would train without it"):
        run(recipe)


def adapter_of_a_resized_base(base, out, rows, modules_to_save):
    """An adapter trained on `base` with another number of embeddings, which it brings along."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=modules_to_save)
    lora.task_type = "CAUSAL_LM"
    adapted = get_peft_model(model, lora)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        adapted.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    return adapted.eval()


@pytest.mark.parametrize(
    ("rows", "modules_to_save"), [(42, ["embed_tokens", "lm_head"]), (42, None), (35, None)],
    ids=["grown, saved as modules", "grown, saved beside", "cut off"],
)  # fmt: skip
def test_an_adapter_trained_with_tokens_added_or_cut_off_is_put_on_a_resized_base(
    rows, modules_to_save, recipe, model_dir, tmp_path
):
    """It computes what it computed when it was made, trains from its own start, and can be trained on again."""
    adapter = adapter_of_a_resized_base(model_dir, tmp_path / "a", rows, modules_to_save)
    ids = torch.tensor([[1, 5, 9, 30, 3]])
    loaded = load_model(find_model(str(tmp_path / "a"))).eval()
    torch.testing.assert_close(loaded(ids).logits, adapter(ids).logits)
    for out in ("one", "two"):
        recipe["trainer"]["max_steps"] = 2
        record, _ = run(recipe, model=str(tmp_path / "a"), out=str(tmp_path / out))
        assert record["metrics"]["loss"] != 1
        first = json.loads((tmp_path / out / "metrics.jsonl").read_text().splitlines()[0])
        assert (first["rewards/chosen"], first["rewards/rejected"]) == (0, 0)
    left, right = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("one", "two"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    run(recipe, model=str(tmp_path / "one"), out=str(tmp_path / "three"))
