"""Failures in the middle of a run, as the user of the command sees them."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

from apo.run_dir import checkpoints
from tests.apo.command import call


@pytest.fixture
def apo(recipe, tmp_path, monkeypatch, capsys):
    """Runs `apo train` on the recipe with changes. Gives its exit code and the lines on stderr."""

    def run(out="run", **trainer):
        keys = {**recipe, "out": str(tmp_path / out), "trainer": {**recipe["trainer"], **trainer}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys))
        code = call(monkeypatch, "train", tmp_path / "r.yaml")
        return code, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.slow
def test_a_lost_loss_ends_the_command_with_the_pairs_ids_and_the_last_good_checkpoint(apo, tmp_path, monkeypatch):
    from apo.training import logprobs as module

    plain, calls = module.packed_logps, []

    def lose_loss(model, batch, **options):
        logps = plain(model, batch, **options)
        calls.append(model.training)
        lost = torch.tensor([1.0, torch.nan, 1.0, 1.0]) if sum(calls) == 4 and calls[-1] else 1.0
        return logps._replace(chosen=logps.chosen * lost)

    monkeypatch.setattr(module, "packed_logps", lose_loss)
    code, output = apo(save_steps=1)
    assert code == 5
    assert re.fullmatch(
        r"error: step 4: the loss is not finite for 1 of 4 pairs of its batch \('p\d+'; the others: 'p\d+', 'p\d+', "
        r"'p\d+'\); look at these pairs and take them out, or lower .*; the last good checkpoint is .*/checkpoint-3",
        output[-1],
    )
    assert checkpoints.resume_problem(tmp_path / "run" / "checkpoint-3") is None
    assert [line for line in output if line.startswith("error")] == output[-1:]
    code, output = apo(save_steps=1)  # the cause is gone
    assert (code, "going on from step 3 of 6" in output) == (0, True)


@pytest.mark.slow
def test_a_damaged_cache_and_one_that_cannot_be_written_are_each_reported_once(apo, tmp_path):
    _, output = apo("first")
    assert "reference log-probs: 30 computed" in output
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 2  # of train and of eval
    for file in files:
        file.write_bytes(file.read_bytes()[:-8])
    code, output = apo("second")
    assert code == 0
    assert (
        len([line for line in output if re.match(r"note: .* damaged and computed again: .*\.safetensors", line)]) == 2
    )
    assert "reference log-probs: 30 computed" in output
    _, output = apo("third")
    assert "reference log-probs: 0 computed, 30 kept from an earlier run" in output
    (tmp_path / "cache").rename(tmp_path / "kept")
    (tmp_path / "cache").write_text("no folder")
    code, output = apo("fourth")
    assert code == 0
    assert [line for line in output if "cannot be written" in line] == [
        f"note: reference log-probs: {tmp_path / 'cache'} cannot be written (Not a directory); "
        "continuing without the cache"
    ]


@pytest.mark.slow
def test_a_model_whose_attention_cannot_be_exchanged_trains_and_reports_it_once(apo, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    plain = LlamaAttention.forward

    def forgetful(self, *args, shared_prefix=None, **options):
        return plain(self, *args, **options)

    monkeypatch.setattr(LlamaAttention, "forward", forgetful)
    code, output = apo()
    assert code == 0
    assert [line for line in output if line.startswith("note: ")] == [
        "note: prompts are run twice and batches padded, as in TRL: the model cannot share, the model does not hand "
        "its options on to its attention"
    ]


def test_a_run_that_is_interrupted_before_any_step_promises_no_checkpoint(apo, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("apo.training.train.train", interrupted)
    assert apo() == (130, ["interrupted; the same command goes on from the last checkpoint, if there is one"])
