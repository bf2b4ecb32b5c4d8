"""Pairs and models at the edge: what trains as it should, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from apo.config import LoRA, TrainConfig
from apo.logps import plain_logps
from apo.prefix import shared_prefix_logps
from apo.train import train
from clair.recipe import UserError
from tests.apo.conftest import make_model, make_pairs, make_tokenizer
from tests.apo.test_trainer import apo_trainer, lora


def pair(chosen, rejected, number=0):
    turns = {"prompt": ("user", f"what is {('one', 'two', 'three', 'four')[number % 4]}")}
    turns |= {"chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    return {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}


ODD = {
    "nothing shared": [pair("one two three", "four five"), pair("a", "the of", 1)],
    "all but one token shared": [pair("one two three four five", "one two three four six"), pair("a the", "a of", 1)],
    "one the beginning of the other": [pair("one two", "one two three"), pair("a the of", "a", 1)],
    "an empty response": [pair("", "one two"), pair("three", "", 1)],
}


@pytest.mark.parametrize("which", ODD)
def test_odd_pairs_train_packed_as_plain(which, tmp_path, tokenizer):
    pairs = Dataset.from_list(ODD[which] * 4)
    trainer = apo_trainer(tmp_path, tokenizer, pairs, max_steps=3)
    rows = [trainer.train_dataset[row] for row in range(2)]
    if which == "an empty response":
        assert rows[0]["chosen_ids"] == rows[1]["rejected_ids"] == [3]  # the end token alone is a response
    assert trainer.packs
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    plain, packed = plain_logps(make_model(), batch), shared_prefix_logps(trainer.model, batch)
    torch.testing.assert_close(packed.chosen, plain.chosen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.rejected, plain.rejected, rtol=1e-4, atol=1e-4)
    trainer.train()
    lines = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert lines[-1]["loss"] < lines[0]["loss"]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(tmp_path, model, **more):
    trainer = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    data = write(tmp_path / "pairs.jsonl", make_pairs(8))
    return TrainConfig(model=str(model), dataset=data, out=str(tmp_path / "run"), trainer=trainer, **more)


def test_an_adapter_of_a_model_of_another_shape_is_refused(tmp_path, model_dir):
    wide = make_model(hidden_size=64)
    get_peft_model(wide, lora()).save_pretrained(tmp_path / "adapter")
    about = tmp_path / "adapter" / "adapter_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "base_model_name_or_path": str(model_dir)}))
    with pytest.raises(UserError, match=r"adapter .* does not fit .*size mismatch"):
        train(recipe(tmp_path, tmp_path / "adapter"), tell=lambda _: None)
    assert not (tmp_path / "run").exists()


def test_an_adapter_whose_tokenizer_has_more_words_than_its_base_is_refused(tmp_path):
    small = make_model(vocab_size=20)
    small.save_pretrained(tmp_path / "base")
    get_peft_model(small, lora()).save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    about = tmp_path / "adapter" / "adapter_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(UserError, match=r"has 20 embeddings but its tokenizer has ids up to"):
        train(recipe(tmp_path, tmp_path / "adapter"), tell=lambda _: None)


def test_a_checkpoint_of_another_objective_is_not_gone_on_from(tmp_path, model_dir):
    train(recipe(tmp_path, model_dir, lora=LoRA(r=2)), tell=lambda _: None)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(
        UserError, match=r"holds the run of another recipe \(changed: objective\); choose another folder"
    ):
        train(recipe(tmp_path, model_dir, lora=LoRA(r=2), objective="dpo"), tell=lambda _: None)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
