"""Every kind of LoRA that peft has: what is written is what was trained, on the model it began from."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apo.evaluation.pairs import PairsConfig, evaluate_pairs
from apo.models.load import find_model, load_model
from apo.models.merge_adapter import merge
from apo.training.config import TrainConfig, lora_config
from apo.training.plan import estimate, plan
from apo.training.train import build_trainer, train
from clair.core.errors import UserError
from clair.inference.local import LocalModel
from tests.apo.conftest import make_model, make_tokenizer
from tests.apo.training.crashes import CRASHES, Crash, crash_in

ALL = {
    "DoRA": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "ranks by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "rows of the embeddings": {"trainable_token_indices": [5, 6]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "fast PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA with all others": {
        "init_lora_weights": "pissa", "use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"],
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5},
    },
}  # fmt: skip


def lora_recipe(recipe, **lora):
    trainer = {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    return TrainConfig(**{**recipe, "trainer": trainer, "eval": False, "lora": {"r": 4, "alpha": 8, **lora}})


def logps(model, rows):
    """The log-prob of each chosen answer, by the plain forward pass."""
    sums = []
    for row in rows:
        ids, first = torch.tensor([row["prompt_ids"] + row["chosen_ids"]]), len(row["prompt_ids"])
        with torch.no_grad():
            scores = model.eval()(input_ids=ids).logits[0, first - 1 : -1].log_softmax(-1)
        sums.append(scores.gather(-1, ids[0, first:, None]).sum())
    return torch.stack(sums).double()


@pytest.mark.parametrize("kind", ALL)
def test_what_is_written_says_what_was_trained_and_leaves_its_base_when_switched_off(kind, recipe, model_dir, tmp_path):
    planned = plan(lora_recipe(recipe, **ALL[kind]))
    trainer = build_trainer(planned, log=lambda _: None)
    rows = [dict(row) for row in planned.train.dataset.select(range(4))]
    base = logps(load_model(find_model(str(model_dir))), rows)
    assert trainer.is_packed
    trained_weights = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert estimate(planned).here.sizes.adapter == trained_weights
    trainer.train()
    trained = torch.tensor(trainer.response_logps([{**row, "rejected_ids": []} for row in rows])).double()
    assert (trained - base).abs().max() > 1e-4
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", Path(recipe["out"]) / "checkpoint-2"):
        model = load_model(find_model(str(folder)))
        torch.testing.assert_close(logps(model, rows), trained, rtol=0, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(logps(model, rows), base, rtol=0, atol=1e-4)
    merged = load_model(find_model(str(merge(tmp_path / "saved", tmp_path / "merged"))))
    torch.testing.assert_close(logps(merged, rows), trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["PiSSA", "fast PiSSA", "OLoRA", "DoRA"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(kind, recipe, tmp_path):
    def config(out):
        config = lora_recipe(recipe, **ALL[kind])
        trainer = {**config.trainer, "max_steps": 4, "save_steps": 2}
        return config.model_copy(update={"out": str(tmp_path / out), "trainer": trainer})

    train(config("whole"), log=lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        crash_in(CRASHES["after the checkpoint is in place"], 2, patch)
        with pytest.raises(Crash):
            train(config("stopped"), log=lambda _: None)
    assert train(config("stopped"), log=lambda _: None)["resumed_from"] == [2]
    whole, stopped = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "stopped"))
    for name, tensor in whole.items():
        torch.testing.assert_close(stopped[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_the_best_checkpoint_of_a_pissa_run_is_what_it_leaves(recipe, tmp_path):
    best = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1,
            "load_best_model_at_end": True}  # fmt: skip
    config = lora_recipe(recipe, init_lora_weights="pissa")
    # A rate that makes the second step worse than the first.
    trainer = {**config.trainer, **best, "learning_rate": 3.0}
    train(config.model_copy(update={"eval": True, "trainer": trainer}), log=lambda _: None)
    left = load_file(Path(recipe["out"]) / "adapter_model.safetensors")
    steps = [load_file(Path(recipe["out"]) / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2)]
    equal = [all(torch.equal(left[name], tensor) for name, tensor in step.items()) for step in steps]
    assert sorted(equal) == [False, True]


def test_a_pissa_run_can_be_trained_on_and_measured_against_its_base(recipe, folder, tmp_path):
    train(lora_recipe(recipe, init_lora_weights="pissa"), log=lambda _: None)
    again = lora_recipe(recipe).model_copy(
        update={"model": recipe["out"], "lora": None, "out": str(tmp_path / "again")}
    )
    train(again, log=lambda _: None)
    assert load_file(tmp_path / "again" / "adapter_model.safetensors")


def test_an_adapter_of_peft_on_a_part_of_the_weights_is_no_reference_when_switched_off(recipe, model_dir, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(load_model(find_model(str(model_dir))), lora).save_pretrained(tmp_path / "peft")
    make_tokenizer().save_pretrained(tmp_path / "peft")
    config = PairsConfig(
        model=str(tmp_path / "peft"), dataset=recipe["dataset"], reference=str(model_dir), out=str(tmp_path / "pairs")
    )
    assert abs(evaluate_pairs(config)["margin"]["mean"]) < 1e-5  # it is the base still
    with pytest.raises(UserError, match="an adapter on a part of its base's weights; merge it"):
        plan(TrainConfig(**{**recipe, "model": str(tmp_path / "peft")}))


REFUSED = {
    "unknown": ({"use_dra": True}, "lora.use_dra: no such option (did you mean 'use_dora'?)"),
    "peft's name of alpha": ({"lora_alpha": 8}, "lora.lora_alpha is called 'alpha' here; write lora.alpha"),
    "wrong type": ({"modules_to_save": "lm_head"}, "lora.modules_to_save: Input should be a valid list, got 'lm_head'"),
    "wrong beside another": (
        {"layers_to_transform": [0]},
        "lora: `layers_to_transform` cannot be used when `target_modules` is a str.",
    ),
    "unknown start": ({"init_lora_weights": "pisa"}, "lora: Unknown initialization init_lora_weights='pisa'; linear"),
    "odd rank": ({"r": 3, "init_lora_weights": "orthogonal"}, "lora: Orthogonal initialization requires"),
    "no effect": ({"loftq_config": {"loftq_bits": 4}}, "lora: `loftq_config` specified but will be ignored when"),
    "a start from data": ({"init_lora_weights": "eva"}, "eva needs a pass over data before training"),
    "biases": ({"bias": "all"}, "lora.bias: 'all' is not supported: switched off, the adapter would not leave"),
    "some tokens": ({"alora_invocation_tokens": [5]}, "it acts on some tokens of a row only; leave it out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_option_is_refused_in_pefts_words_before_the_model_is_loaded(case, recipe, monkeypatch):
    lora, message = REFUSED[case]
    monkeypatch.setattr("apo.training.train.load_model", lambda *_, **__: pytest.fail("the model is loaded"))
    with pytest.raises(UserError) as error:
        train(lora_recipe(recipe, **lora), log=lambda _: None)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_pissa_is_refused_on_4_bit_weights(recipe):
    config = lora_recipe(recipe, init_lora_weights="pissa").model_copy(update={"quantize": "nf4"})
    with pytest.raises(UserError, match="pissa takes its start out of the weights below"):
        lora_config(config)


def test_rows_of_embeddings_that_are_the_head_too_are_refused(recipe, tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    with pytest.raises(UserError, match="trainable_token_indices: the LM head has the same weights"):
        plan(lora_recipe({**recipe, "model": str(tmp_path / "tied")}, trainable_token_indices=[5]))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_an_adapter_that_cannot_be_merged_is_reported(recipe, tmp_path):
    train(lora_recipe(recipe, lora_bias=True), log=lambda _: None)
    with pytest.raises(UserError, match="cannot be merged: Impossible to merge LoRA with `lora_bias=True`"):
        merge(recipe["out"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    model = LocalModel(recipe["out"], dtype="float32")
    asyncio.run(model.check())  # answers nevertheless, beside its base
