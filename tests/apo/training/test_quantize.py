"""LoRA on 4-bit weights: the refusals, and what is handed to transformers. test_four_bits.py runs bitsandbytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from apo.cost import memory as fit
from apo.cost import sizes as shapes
from apo.models import load as models
from apo.training.config import TrainConfig
from apo.training.plan import estimate, plan
from apo.training.train import build_trainer, train
from clair.core.errors import UserError
from clair.core.recipe import resolve
from tests.apo.conftest import make_model
from tests.apo.cost.jobs import LLAMA_3_8B, job, llama, lora

QLORA = {"lora": {"r": 4}, "quantize": "nf4"}


def test_four_bits_are_for_adapters_only(recipe):
    with pytest.raises(UserError, match=r"quantize.*nf4 weights cannot be trained, only an adapter on them: set `lora"):
        resolve(TrainConfig, {**recipe, "quantize": "nf4"}, "here")
    with pytest.raises(UserError, match="quantize"):
        resolve(TrainConfig, {**recipe, **QLORA, "quantize": "int3"}, "here")
    assert resolve(TrainConfig, {**recipe, **QLORA}, "here").quantize == "nf4"


def test_without_bitsandbytes_a_run_is_refused_before_any_work(recipe, tmp_path, monkeypatch):
    config = TrainConfig(**recipe, **QLORA)
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'clair-apo\[quantize\]'$"):
        train(config)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(models, "find_spec", lambda name: object())
    assert models.quantization_problem() is None


def test_contradicting_options_are_refused(recipe, monkeypatch):
    kwargs = {"model_init_kwargs": {"quantization_config": {"load_in_8bit": True}}}
    with pytest.raises(UserError, match=r"quantization_config: the recipe's `quantize` sets it"):
        plan(TrainConfig(**{**recipe, **QLORA, "trainer": recipe["trainer"] | kwargs}))
    with pytest.raises(UserError, match="4-bit weights are whole in every process; leave FSDP"):
        plan(TrainConfig(**{**recipe, **QLORA, "trainer": recipe["trainer"] | {"fsdp": True}}), processes=2)


def test_the_quantization_config_is_nf4_with_double_quantisation(recipe, monkeypatch):
    options_passed = {}

    def from_pretrained(path, **options):
        options_passed.update(options)
        return make_model()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    options = recipe["trainer"] | {"model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = build_trainer(plan(TrainConfig(**{**recipe, **QLORA, "trainer": options})))
    quantization = options_passed["quantization_config"]
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant) == (
        True,
        "nf4",
        True,
    )
    assert quantization.bnb_4bit_compute_dtype == options_passed["dtype"] == torch.bfloat16
    assert options_passed["use_safetensors"]
    assert "lora_A" in "".join(name for name, weight in trainer.model.named_parameters() if weight.requires_grad)
    options_passed.clear()
    build_trainer(plan(TrainConfig(**{**recipe, "lora": {"r": 4}})))
    assert "quantization_config" not in options_passed


def test_the_estimate_of_4_bit_weights_by_hand(recipe):
    sizes = shapes.count_sizes(llama(**LLAMA_3_8B), lora(16))
    plain = job(sizes, [shapes.pair_cost(50, 0, 50, 50)], weight=2, compute=2, on_gpu=True, checkpointing=True)
    memory = fit.peak_memory(replace(plain, quantized=True))
    outside = 2 * (sizes.parameters - sizes.linear)  # embeddings, head and norms in bfloat16
    constants = sizes.linear / 64 + 4 * sizes.linear / 64 / 256
    matrix = 2 * 4096 * 14336
    assert memory["weights"] == pytest.approx(sizes.linear / 2 + constants + outside + 4 * sizes.adapter + matrix)
    assert memory["optimizer"] == 2 * 4 * sizes.adapter
    costs = [estimate(plan(TrainConfig(**recipe, lora={"r": 4}, quantize=kind))) for kind in (None, "nf4")]
    assert [job.here.quantized for job in costs] == [False, True]
