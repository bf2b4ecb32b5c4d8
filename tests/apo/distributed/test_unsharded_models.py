"""Weights under ZeRO, simulated without DeepSpeed; test_deepspeed.py runs DeepSpeed itself if it is installed."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import deepspeed as theirs

from apo.distributed import deepspeed as zero
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError
from tests.apo.conftest import make_model


class Stage3:
    def is_zero3(self):
        return True


def plugin(stage=3, save=True, **config):
    return SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(zero_stage=stage, zero3_save_16bit_model=save, deepspeed_config=config)
    )


def test_a_model_loaded_inside_whole_is_not_shared_out():
    config = Stage3()  # transformers holds it by a weak reference
    theirs.set_hf_deepspeed_config(config)
    try:
        with contextlib.suppress(KeyError), zero.unsharded_loading():
            assert not theirs.is_deepspeed_zero3_enabled()
            raise KeyError
        assert theirs.is_deepspeed_zero3_enabled(), "training needs to know"
    finally:
        theirs.unset_hf_deepspeed_config()
    with zero.unsharded_loading():
        pass
    assert not theirs.is_deepspeed_zero3_enabled()


def test_zero_3_that_saves_no_weights_is_refused():
    with pytest.raises(UserError, match="set zero3_save_16bit_model: true"):
        zero.check_zero3_saves(plugin(save=False))
    zero.check_zero3_saves(plugin())
    zero.check_zero3_saves(plugin(stage=2, save=False))
    zero.check_zero3_saves(SimpleNamespace(deepspeed_plugin=None))


def test_weights_that_are_already_shared_out_are_refused(tmp_path, pairs, tokenizer):
    model = make_model()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(
        UserError, match=r"ZeRO-3 sharded the weights when .* apo\.distributed\.deepspeed\.unsharded_loading\(\)"
    ):
        APOTrainer(model, args=APOConfig(output_dir=str(tmp_path)), train_dataset=pairs, processing_class=tokenizer)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_come_into_the_type_that_deepspeed_trains_and_buffers_do_not(name, dtype):
    model = make_model()
    zero.cast_for_deepspeed(model, plugin(bf16={"enabled": False}))
    assert model.dtype == torch.float32
    zero.cast_for_deepspeed(model, plugin(**{name: {"enabled": True}}))
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "positions need its digits"


def test_log_probs_in_a_batch_keep_their_type_under_deepspeed(tmp_path, pairs, tokenizer):
    args = APOConfig(output_dir=str(tmp_path))
    trainer = APOTrainer(make_model(), args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.is_deepspeed_enabled = True  # transformers then asks DeepSpeed's config for a type
    row = {**trainer.train_dataset[0], "ref_chosen_logps": -1234.5678, "ref_rejected_logps": -1.0}
    prepared = trainer._prepare_inputs(trainer.data_collator([row]))
    assert prepared.reference[0].dtype == torch.float32
    assert prepared.reference[0].item() == pytest.approx(-1234.5678, rel=1e-7)
    assert prepared["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("last", [False, True], ids=["more to come", "the step's last"])
def test_the_passes_of_a_micro_batch_are_one_to_deepspeed(last, tmp_path, pairs, tokenizer, monkeypatch):
    """accelerate makes DeepSpeed step after a backward pass with synchronised gradients."""
    args = APOConfig(output_dir=str(tmp_path), use_cpu=True, pack_tokens=1)
    trainer = APOTrainer(make_model(), args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.is_deepspeed_enabled, trainer.accelerator.sync_gradients = True, last
    syncs = []
    monkeypatch.setattr(trainer.accelerator, "backward", lambda _: syncs.append(trainer.accelerator.sync_gradients))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    trainer.training_step(trainer.model, batch, torch.tensor(3))
    assert syncs == [False, False, last]
    assert trainer.accelerator.sync_gradients == last


def test_the_local_shard_of_a_weight_is_checked():
    weight = torch.nn.Parameter(torch.ones(2))
    assert zero.local_shard(weight).tolist() == [1, 1]
    weight.ds_tensor = torch.tensor([float("nan")])
    assert zero.local_shard(weight).isnan().all()
