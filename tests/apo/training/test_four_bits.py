"""LoRA on 4-bit weights, computed by bitsandbytes on a CPU. No GPU has run this."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import set_seed

from apo.models import load as models
from apo.models.merge_adapter import merge
from apo.run_dir import checkpoints
from apo.training.config import TrainConfig
from apo.training.plan import plan
from apo.training.train import build_trainer, train
from clair.core.errors import UserError
from tests.apo.conftest import apart, make_model, make_tokenizer
from tests.apo.training.crashes import Crash, crash_in

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 64, "intermediate_size": 128}
QLORA = {"lora": {"r": 4, "alpha": 8}, "quantize": "nf4", "eval": False}
STEPS = 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model with rows of full blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("wide")
    make_model(**SIZES).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def trained(recipe, steps=STEPS, **changes):
    """A trainer after its run, and its log, a row a step."""
    options = {**recipe["trainer"], "max_steps": steps, "logging_steps": 1, **changes.pop("trainer", {})}
    config = TrainConfig(**{**recipe, **QLORA, "trainer": options, **changes})
    Path(config.out).mkdir(exist_ok=True)
    trainer = build_trainer(plan(config))
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "grad_norm" in row]


def adapter_of(model):
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def test_a_4_bit_layer_multiplies_by_its_rounded_weights_also_after_a_pass_without_gradients(model_dir):
    model = models.load_model(models.find_model(str(model_dir)), quantization_config=models.nf4_config("float32"))
    layers = linears(model)
    assert len(layers) == 14, "seven in each of two layers"
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    for name, layer in layers.items():
        assert (layer.weight.dtype, layer.weight.quant_state.nested) == (torch.uint8, True)
        rounded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        exact = plain.get_submodule(name).weight
        assert 0 < (rounded - exact).norm() < 0.12 * exact.norm()
        x, seed = torch.randn(3, layer.in_features), torch.randn(3, layer.out_features)
        with torch.no_grad():
            assert torch.allclose(layer.eval()(x), x @ rounded.T, rtol=1e-5, atol=1e-6), "as the reference is asked"
        x.requires_grad_()
        out = layer.train()(x)
        assert torch.allclose(out, x @ rounded.T, rtol=1e-5, atol=1e-6)
        assert torch.allclose(torch.autograd.grad(out, x, seed)[0], seed @ rounded, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is read where Linux tells it")
def test_the_file_of_the_weights_is_not_kept_in_memory(tmp_path):
    make_model(**SIZES).save_pretrained(tmp_path)
    model = models.load_model(models.find_model(str(tmp_path)), quantization_config=models.nf4_config("float32"))
    assert len(linears(model)) == 14
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_packed_rows_train_as_trls_batch_does_on_the_same_4_bit_weights(recipe, tmp_path):
    packed, rows = trained(recipe)
    assert packed.is_packed, packed.notes
    for layer in linears(packed.model).values():
        assert type(layer).forward is bnb.nn.Linear4bit.forward
        assert "forward" not in vars(layer), "its products are its own, not those of matmul.py"
    stacked, others = trained(recipe, trainer={"shared_prefix": False}, out=str(tmp_path / "stacked"))
    assert not stacked.is_packed
    for key in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
        distance = sum((a[key] - b[key]) ** 2 for a, b in zip(rows, others, strict=True)) ** 0.5
        assert distance <= 1e-5 * sum(row[key] ** 2 for row in rows) ** 0.5, key
    assert apart(adapter_of(packed.model), adapter_of(stacked.model)) <= 1e-5


def test_it_learns_as_an_adapter_on_weights_that_are_not_rounded(recipe, tmp_path):
    rounded, rows = trained(recipe)
    original = {name: layer.weight.data.clone() for name, layer in linears(rounded.model).items()}
    assert len(original) == 14
    assert {weight.dtype for weight in adapter_of(rounded.model).values()} == {torch.float32}
    plain, others = trained(recipe, quantize=None, out=str(tmp_path / "plain"))
    assert not linears(plain.model)
    assert rows[0]["loss"] == pytest.approx(others[0]["loss"], abs=1e-6), "of 0.5 and 0.5: each is its own reference"
    fallen = [log[0]["loss"] - log[-1]["loss"] for log in (rows, others)]
    assert fallen[1] > 0.1
    assert fallen[0] == pytest.approx(fallen[1], rel=0.1)


def test_small_steps_are_not_rounded_away(recipe, tmp_path):
    trainer, _ = trained(recipe, steps=4, trainer={"learning_rate": 1e-5, "lr_scheduler_type": "constant"})
    start = build_trainer(plan(TrainConfig(**{**recipe, **QLORA, "out": str(tmp_path / "start")})))
    initial, final = adapter_of(start.model), adapter_of(trainer.model)
    moved = {name: (final[name] != initial[name]).float().mean() for name in initial if "lora_A" in name}
    assert len(moved) == 14
    assert min(moved.values()) > 0.9, "in bfloat16 nine in ten would stay where they are"


def test_rows_that_bitsandbytes_reads_back_wrongly_are_refused(tmp_path):
    make_model(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"mlp.down_proj has rows of 96 weights.* no multiple of 64; start it on a GPU"):
        models.load_model(models.find_model(str(tmp_path)), quantization_config=models.nf4_config("float32"))


def test_a_stopped_run_resumes_as_if_it_had_not_been(recipe, tmp_path, monkeypatch):
    options = {**recipe["trainer"], "max_steps": 8, "save_steps": 3, "logging_steps": 1}
    runs = [{**recipe, **QLORA, "trainer": options, "out": str(tmp_path / name)} for name in ("whole", "stopped")]
    train(TrainConfig(**runs[0]), log=lambda _: None)
    crash_in((checkpoints, "complete_checkpoint", True), 3, monkeypatch)
    with pytest.raises(Crash):
        train(TrainConfig(**runs[1]), log=lambda _: None)
    monkeypatch.undo()
    set_seed(1234)
    messages = []
    train(TrainConfig(**runs[1]), log=messages.append)
    assert any("going on from step 3 of 8" in line for line in messages)
    weights = [load(tmp_path / name) for name in ("whole", "stopped")]
    assert set(weights[0]) == set(weights[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def load(out):
    from safetensors.torch import load_file

    return load_file(out / "adapter_model.safetensors")


def test_the_trained_adapter_fits_the_base_rounded_or_not_and_merges_into_the_latter(
    recipe,
    model_dir,
    tmp_path,
):
    out = tmp_path / "run"
    options = {**recipe["trainer"], "max_steps": 4}
    run = train(TrainConfig(**{**recipe, **QLORA, "trainer": options, "out": str(out)}), log=lambda _: None)
    assert run["recipe"]["quantize"] == "nf4"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model_dir)
    name = models.find_model(str(out))
    model = models.load_model(name, quantization_config=models.nf4_config("float32"))
    assert len(linears(model)) == 14
    assert apart(adapter_of(model), {**adapter_of(models.load_model(name))}) == 0
    merged = AutoModelForCausalLM.from_pretrained(merge(out, tmp_path / "merged"))
    base, weights = AutoModelForCausalLM.from_pretrained(model_dir), load(out)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        a, b = (weights[f"base_model.model.{module}.lora_{which}.weight"].float() for which in "AB")
        expected = base.get_submodule(module).weight + 8 / 4 * b @ a
        assert torch.allclose(merged.get_submodule(module).weight, expected, atol=1e-6)
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
