"""The first calls of a user of TRL: a model by its name, streamed rows, evaluation sets of every form."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from apo.training.preflight import check_before_training
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError
from tests.apo.conftest import make_pairs


def config(tmp_path, **more):
    return APOConfig(
        output_dir=str(tmp_path / "run"), learning_rate=1e-2, logging_steps=1, save_strategy="no", max_steps=3,
        per_device_train_batch_size=4, report_to="none", disable_tqdm=True, **more,
    )  # fmt: skip


def trained(trainer):
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def assert_equal(actual, expected):
    assert actual[0] == expected[0]
    for name, weight in actual[1].items():
        assert torch.equal(weight, expected[1][name]), name


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def test_a_model_is_loaded_by_its_folder_and_trains_as_one_loaded_before(tmp_path, model_dir, tokenizer, pairs):
    by_name = APOTrainer(str(model_dir), args=config(tmp_path), train_dataset=pairs)
    assert by_name.processing_class.get_vocab() == tokenizer.get_vocab()
    assert check_before_training(by_name) == {"chosen": 0.0, "rejected": 0.0}
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    by_object = APOTrainer(loaded, args=config(tmp_path), train_dataset=pairs, processing_class=tokenizer)
    assert_equal(trained(by_name), trained(by_object))


def test_a_model_by_its_name_takes_the_options_of_loading_and_says_nothing_untrue(tmp_path, model_dir, pairs, caplog):
    args = config(tmp_path, model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"})
    trainer = APOTrainer(str(model_dir), args=args, train_dataset=pairs)
    assert (trainer.model.dtype, trainer.ref_model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert args.model_init_kwargs == {"dtype": "bfloat16", "attn_implementation": "eager"}
    assert "ignored" not in caplog.text


def test_an_option_of_loading_that_a_model_does_not_take_is_reported_in_one_line(tmp_path, model_dir, pairs):
    args = config(tmp_path, model_init_kwargs={"layers": 2})
    with pytest.raises(UserError, match=r"cannot be loaded: .*unexpected keyword argument 'layers'"):
        APOTrainer(str(model_dir), args=args, train_dataset=pairs)


def test_an_adapter_by_its_folder_is_trained_on(tmp_path, model_dir, pairs):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    first = APOTrainer(str(model_dir), args=config(tmp_path), train_dataset=pairs, peft_config=lora)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    second = APOTrainer(str(tmp_path / "adapter"), args=config(tmp_path), train_dataset=pairs)
    assert check_before_training(second) == {"chosen": 0.0, "rejected": 0.0}
    assert second.model.peft_config.keys() == {"default", "ref"}


@pytest.mark.parametrize(
    ("name", "match"),
    [("./nowhere", "does not exist"), ("nobody/nothing", "nobody/nothing cannot be loaded")],
)
def test_a_model_that_is_not_there_is_reported_in_one_line(tmp_path, pairs, name, match):
    with pytest.raises(UserError, match=match) as error:
        APOTrainer(name, args=config(tmp_path), train_dataset=pairs)
    assert "\n" not in str(error.value)


def test_a_run_without_arguments_writes_to_a_folder_named_after_the_model(tmp_path, monkeypatch, model_dir, pairs):
    monkeypatch.chdir(tmp_path)
    assert APOTrainer(str(model_dir), train_dataset=pairs).args.output_dir == f"{model_dir.name}-APO"


@pytest.mark.parametrize(("objective", "tag"), [("apo_zero", "dpo"), ("kto", "kto")])
def test_a_model_is_tagged_with_what_trained_it(tmp_path, model_dir, pairs, objective, tag):
    trainer = APOTrainer(str(model_dir), args=config(tmp_path, objective=objective), train_dataset=pairs)
    assert set(trainer.model.model_tags) == {"trl", tag, "apo"}


# Rows as they come


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_stream_trains_as_the_same_rows_in_a_dataset(tmp_path, model_dir, packed):
    rows = make_pairs(12)
    options = {"shared_prefix": packed, "weights": "w", "train_sampling_strategy": "sequential"}
    rows = [row | {"w": 1.0 + index % 3} for index, row in enumerate(rows)]
    runs = [
        APOTrainer(str(model_dir), args=config(tmp_path, **options), train_dataset=dataset)
        for dataset in (stream(rows), Dataset.from_list(rows))
    ]
    assert check_before_training(runs[0]) == {"chosen": 0.0, "rejected": 0.0}
    assert runs[0].is_packed == packed
    assert_equal(*map(trained, runs))


def test_a_stream_of_unpaired_rows_trains(tmp_path, model_dir):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": index % 2 == 0}
            for index, row in enumerate(make_pairs(12))]  # fmt: skip
    trainer = APOTrainer(str(model_dir), args=config(tmp_path, objective="kto"), train_dataset=stream(rows))
    losses, _ = trained(trainer)
    assert len(losses) == 3
    assert losses[0] == pytest.approx(0.5)


def test_rows_of_a_stream_that_are_left_out_are_counted_once(tmp_path, model_dir):
    rows = make_pairs(12)
    rows[1] = rows[1] | {"chosen": [{"role": "assistant", "content": "one " * 300}]}
    rows[2] = rows[2] | {"rejected": rows[2]["chosen"]}
    trainer = APOTrainer(str(model_dir), args=config(tmp_path, max_length=200), train_dataset=stream(rows))
    trainer.train()
    list(trainer.train_dataset)
    assert trainer.dropped["train"] == {"too_long": 1, "equal": 1}


def test_a_fault_in_a_stream_names_its_row(tmp_path, model_dir):
    rows = make_pairs(72)
    rows[70] = rows[70] | {"rejected": None}
    trainer = APOTrainer(str(model_dir), args=config(tmp_path), train_dataset=stream(rows))
    with pytest.raises(UserError, match="train dataset, row 70: 'rejected' is empty"):
        list(trainer.train_dataset)
    for row_index in (0, 1):
        with pytest.raises(UserError, match=f"train dataset, row {row_index}: 'rejected' is empty"):
            APOTrainer(str(model_dir), args=config(tmp_path), train_dataset=stream(rows[70 - row_index :]))
    for none in (stream([]), Dataset.from_list([])):
        with pytest.raises(UserError, match="the train dataset has no rows"):
            APOTrainer(str(model_dir), args=config(tmp_path), train_dataset=none)


def test_a_stream_has_no_cached_reference(tmp_path, model_dir, pairs):
    with pytest.raises(UserError, match="not supported with IterableDataset"):
        APOTrainer(
            str(model_dir), args=config(tmp_path, precompute_ref_log_probs=True), train_dataset=stream(make_pairs(12))
        )
    trainer = APOTrainer(str(model_dir), args=config(tmp_path, precompute_ref_log_probs=True), train_dataset=pairs)
    with pytest.raises(UserError, match="not supported with IterableDataset"):
        trainer.evaluate(stream(make_pairs(4)))


EXPLICIT = {
    "text": [{"prompt": f"what is {word}", "chosen": " the answer", "rejected": " a question"}
             for word in ("one", "two", "three", "four")],
    "messages": make_pairs(4),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPLICIT)
@pytest.mark.parametrize("make", [stream, Dataset.from_list], ids=["stream", "dataset"])
def test_prompts_that_are_implied_by_both_answers_are_read(tmp_path, model_dir, kind, make):
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in EXPLICIT[kind]]
    read, explicit = (
        list(APOTrainer(str(model_dir), args=config(tmp_path), train_dataset=make(rows)).train_dataset)
        for rows in (implicit, EXPLICIT[kind])
    )
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert [row[column] for row in read] == [row[column] for row in explicit]


# Evaluation sets

SETS = {
    "dataset": Dataset.from_list,
    "stream": stream,
    "dict": lambda rows: {"a": Dataset.from_list(rows), "b": Dataset.from_list(rows[:3])},
    "dict of streams": lambda rows: {"a": stream(rows), "b": stream(rows[:3])},
    "DatasetDict": lambda rows: DatasetDict({"a": Dataset.from_list(rows), "b": Dataset.from_list(rows[:3])}),
    "IterableDatasetDict": lambda rows: IterableDatasetDict({"a": stream(rows), "b": stream(rows[:3])}),
}


@pytest.mark.parametrize("form", SETS)
def test_a_set_to_evaluate_on_has_every_form_that_trl_takes(tmp_path, model_dir, pairs, form):
    rows = make_pairs(6, seed=5)
    held_out = SETS[form](rows)
    trainer = APOTrainer(str(model_dir), args=config(tmp_path), train_dataset=pairs, eval_dataset=held_out)
    initial = trainer.evaluate()
    several = isinstance(held_out, dict)
    names = ["eval_a_loss", "eval_b_loss"] if several else ["eval_loss"]
    assert [initial[name] for name in names] == pytest.approx([1.0] * len(names), abs=1e-6)
    trainer.train()
    final, passed = trainer.evaluate(), trainer.evaluate(SETS[form](rows))
    assert [final[name] for name in names] == [passed[name] for name in names]
    assert all(final[name] != initial[name] for name in names)
    assert passed[f"{names[0].removesuffix('loss')}samples_per_second"] > 0


def test_kto_trains_with_a_cached_reference_as_with_an_online_one(tmp_path, model_dir, pairs):
    runs = [
        APOTrainer(
            str(model_dir), args=config(tmp_path, objective="kto", precompute_ref_log_probs=cached), train_dataset=pairs
        )
        for cached in (False, True)
    ]
    assert "ref_chosen_logps" in runs[1].train_dataset.column_names
    online, cached = map(trained, runs)
    assert cached[0] == pytest.approx(online[0], abs=1e-6)
    for name, weight in online[1].items():
        torch.testing.assert_close(cached[1][name], weight, rtol=0, atol=1e-5, msg=name)


def test_tokens_that_were_trained_on_are_counted_also_over_a_resumption(tmp_path, model_dir):
    rows = Dataset.from_list(make_pairs(8))

    def run(**more):
        args = config(tmp_path, train_sampling_strategy="sequential")
        args.save_strategy, args.save_steps = "steps", 1
        trainer = APOTrainer(str(model_dir), args=args, train_dataset=rows)
        trainer.train(**more)
        return trainer, [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]

    trainer, counted = run()
    sizes = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
             for row in trainer.train_dataset]  # fmt: skip
    assert counted == [sum(sizes[:4]), sum(sizes), sum(sizes) + sum(sizes[:4])]
    assert run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))[1] == counted


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_mixture_of_experts_logs_its_auxiliary_loss(tmp_path, tokenizer, pairs, accumulated):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    moe = MixtralForCausalLM(
        MixtralConfig(**sizes, vocab_size=40, num_key_value_heads=1, num_local_experts=4, router_aux_loss_coef=0.5)
    )
    args = config(tmp_path, gradient_accumulation_steps=accumulated)
    args.logging_steps = 2
    trainer = APOTrainer(moe, args=args, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer)
    aux_losses, pair_logps = [], trainer.logps.pair_logps

    def watched(model, batch, **options):
        logps = pair_logps(model, batch, **options)
        aux_losses.extend([logps.aux_loss.item()] if logps.aux_loss is not None else [])
        return logps

    trainer.logps.pair_logps = watched
    trainer.train()
    logged = [row["aux_loss"] for row in trainer.state.log_history if "aux_loss" in row]
    cuts = [0, accumulated, 2 * accumulated, 3 * accumulated]  # the first step, the second, and the run's last line
    means = [sum(aux_losses[start:end]) / accumulated for start, end in itertools.pairwise(cuts)]
    assert logged == pytest.approx(means, rel=1e-5)
    aux_losses.clear()
    assert trainer.evaluate()["eval_aux_loss"] == pytest.approx(sum(aux_losses) / len(aux_losses), rel=1e-5)
    assert 0.1 < logged[0] < 10
