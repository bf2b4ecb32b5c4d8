"""Pairs at the edge, which train as they should."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from datasets import Dataset

from apo.packing.logps import plain_logps
from tests.apo.command import call
from tests.apo.conftest import make_model
from tests.apo.training.trainers import apo_trainer


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
    assert trainer.is_packed
    batch = trainer.data_collator(rows)
    plain, packed = plain_logps(make_model(), batch.stacked), trainer.logps(trainer.model, batch)
    torch.testing.assert_close(packed.chosen, plain.chosen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.rejected, plain.rejected, rtol=1e-4, atol=1e-4)
    trainer.train()
    lines = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_odd_pairs_train_from_the_command_line(tmp_path, model_dir, monkeypatch, capsys):
    rows = [row for rows in ODD.values() for row in rows]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model": str(model_dir), "dataset": str(tmp_path / "odd.jsonl"), "out": str(tmp_path / "run")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**keys, "trainer": {"max_steps": 2}}))
    assert call(monkeypatch, "train", tmp_path / "r.yaml") == 0
    stderr = capsys.readouterr().err.splitlines()
    assert stderr[:2] == ["train: 8 pairs", "steps: 2 of 8 pairs"]
    notes = [line for line in stderr if line.startswith(("note", "error", "warning"))]
    empty = "note: train: an answer has no text in 2 of 8 rows (first: row 6); the end of turn alone is trained"
    assert notes == [empty]
