"""The command: quick to answer, one line for a mistake, and `apo merge`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import apo
from apo.models.merge_adapter import merge
from apo.training.config import TrainConfig
from apo.training.train import train
from clair.core.errors import UserError
from tests.apo.command import call
from tests.apo.conftest import make_model, make_pairs, make_tokenizer

APO = [sys.executable, "-m", "apo.cli"]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_public_names_are_sorted_and_there():
    assert apo.__all__ == sorted(apo.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    for name in apo.__all__:
        assert getattr(apo, name) is not None
    assert dir(apo) == sorted(apo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'apo_one'"):
        apo.apo_one  # noqa: B018


def test_a_wrong_option_is_exit_code_2(monkeypatch, capsys):
    assert call(monkeypatch, "train", "--recpe", "x") == 2
    assert call(monkeypatch, "tran") == 2
    assert "error" in capsys.readouterr().err.lower()


def test_out_and_set_go_over_the_recipe(monkeypatch, capsys, tmp_path, model_dir):
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "p.jsonl").write_text(jsonl(make_pairs(4)))
    recipe.write_text(f"model: {model_dir}\ndataset: {tmp_path / 'p.jsonl'}\nout: nowhere\n")
    arguments = ["--out", tmp_path / "7", "--reference", "online", "--set", "beta=0.3", "--set", "trainer.max_steps=1"]
    assert call(monkeypatch, "train", recipe, "--dry-run", *arguments) == 0
    output = capsys.readouterr().out
    assert f"out: {tmp_path / '7'}\n" in output
    assert "beta: 0.3\n" in output
    assert "reference: online\n" in output
    assert call(monkeypatch, "train", recipe, *arguments) == 0
    output = capsys.readouterr().err
    assert "4 pairs, 1 steps" in output
    assert f"model and card in {tmp_path / '7'}/" in output
    assert (tmp_path / "7" / "model.safetensors").exists()


# Merging


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A trained adapter on a bfloat16 base, and the base."""
    root = tmp_path_factory.mktemp("merge")
    make_model().to(torch.bfloat16).save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "base")
    (root / "p.jsonl").write_text(jsonl(make_pairs(8)))
    trainer = {"max_steps": 5, "learning_rate": 0.05, "per_device_train_batch_size": 4}
    keys = {"model": str(root / "base"), "dataset": str(root / "p.jsonl"), "out": str(root / "adapter")}
    train(TrainConfig(**keys, lora={"r": 4, "alpha": 8}, trainer=trainer), log=lambda _: None)
    return root


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 2, 5, 9, 12, 3, 20, 21]])).logits.float()


def test_the_merged_model_says_what_the_adapter_says(adapter, tmp_path):
    out = merge(adapter / "adapter", tmp_path / "merged")
    with_adapter = logits(AutoPeftModelForCausalLM.from_pretrained(adapter / "adapter", dtype=torch.float32))
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == torch.bfloat16
    base = logits(AutoModelForCausalLM.from_pretrained(adapter / "base", dtype=torch.float32))
    merged_logits = logits(merged.float())
    assert (merged_logits - with_adapter).abs().max() < 0.02 * (with_adapter - base).abs().max()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert merged.generation_config.eos_token_id == 3
    assert sorted(f.name for f in tmp_path.iterdir()) == ["merged"]


def test_in_float32_the_merged_model_is_the_adapter_to_rounding(adapter, tmp_path):
    AutoModelForCausalLM.from_pretrained(adapter / "base", dtype=torch.float32).save_pretrained(tmp_path / "base32")
    make_tokenizer().save_pretrained(tmp_path / "base32")
    out = merge(adapter / "adapter", tmp_path / "merged", base=str(tmp_path / "base32"))
    with_adapter = logits(AutoPeftModelForCausalLM.from_pretrained(adapter / "adapter", dtype=torch.float32))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), with_adapter, rtol=1e-5, atol=1e-5)


def test_merge_from_the_command_line(adapter, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "merge", adapter / "adapter", "--out", tmp_path / "merged") == 0
    assert f"wrote {tmp_path / 'merged'}" in capsys.readouterr().err
    assert call(monkeypatch, "merge", adapter / "adapter", "--out", tmp_path / "merged") == 2
    assert "is not empty; choose another folder" in capsys.readouterr().err
    assert call(monkeypatch, "merge", adapter / "base", "--out", tmp_path / "other") == 2
    assert "has no adapter_config.json" in capsys.readouterr().err


def test_an_adapter_is_merged_into_the_empty_folder_that_one_works_in(adapter, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge(adapter / "adapter", ".")
    assert Path("config.json").is_file()
    assert {file.name for file in tmp_path.iterdir()} == {"here"}
    merged = merge(adapter / "adapter", tmp_path / "merged")
    assert {file.name for file in Path.cwd().iterdir()} == {file.name for file in merged.iterdir()}


def test_an_adapter_whose_base_has_moved_is_reported(adapter, tmp_path):
    with pytest.raises(UserError, match=r"does not exist; give a folder with config.json, or a hub name"):
        merge(adapter / "adapter", tmp_path / "merged", base="./gone")
    assert not (tmp_path / "merged").exists()


def test_a_broken_environment_is_no_reason_to_hide_the_help():
    help_run = subprocess.run([*APO, "train", "--help"], capture_output=True, text=True, check=True, env={**os.environ})
    assert "--dry-run" in help_run.stdout
