"""Estimates before a run: counted independently, and measured."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from apo.cost import fitting
from apo.cost import memory as fit
from apo.cost import sizes as shapes
from apo.cost.deepspeed_memory import ZeroConfig, parse_zero_config, zero_memory
from apo.cost.sizes import Device, PassCost, pass_costs
from apo.heap import TUNABLES
from apo.packing import attention, packed_model
from apo.packing.layout import pack_pairs
from apo.packing.packed_model import enable_packing, packed_logps
from apo.training.config import TrainConfig
from apo.training.plan import estimate, limit_passes, plan
from apo.training.train import train
from clair.core.errors import UserError
from clair.inference.generation import onednn as matmul
from tests.apo.command import call
from tests.apo.conftest import make_model
from tests.apo.cost.jobs import LLAMA_3_8B, job, llama, lora


def examples(n=3, prompt=9, seed=0):
    rng = random.Random(seed)

    def ids(count):
        return [rng.randrange(10, 40) for _ in range(count)]

    return [
        {"prompt_ids": ids(prompt), "chosen_ids": [5, *ids(7 + i), 3], "rejected_ids": [5, 6, *ids(4), 3]}
        for i in range(n)
    ]


def test_llama_3_8b_has_the_parameters_that_its_card_says():
    sizes = shapes.count_sizes(llama(**LLAMA_3_8B))
    assert sizes.parameters == 8_030_261_248
    # by hand, a layer: q and o 4096^2, k and v 4096 x 1024, three of 4096 x 14336
    assert sizes.linear == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert (sizes.heads, sizes.tied, sizes.trained) == (4096, False, 8_030_261_248)


def test_an_adapters_parameters_by_hand():
    sizes = shapes.count_sizes(llama(**LLAMA_3_8B), lora(r=16))
    per_layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert sizes.adapter == sizes.trained == 32 * 16 * per_layer
    assert sizes.parameters == 8_030_261_248


def test_a_row_by_hand():
    # 4 of prompt, 2 shared, then 3 and 1: chosen is 5 long, rejected 3.
    assert shapes.pair_cost(4, 2, 5, 3) == PassCost(tokens=10, labels=6, products=9 * 9 + 1 * 7, keys=7, masked=7)
    pair = {"prompt_ids": [1, 2], "chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]}
    assert pass_costs([pair], 1, None, True, 0) == [shapes.pair_cost(2, 1, 3, 2)]
    assert pass_costs([pair], 1, None, False, 0) == [PassCost(10, 10, 50, masked=50)]
    assert len(pass_costs([pair] * 6, 3, None, True, 0)) == 2
    assert [row.tokens for row in pass_costs([pair] * 6, 3, 12, True, 0)] == [12, 6, 12, 6]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_flops_are_those_that_torch_counts(adapter, monkeypatch):
    monkeypatch.setattr(attention, "has_flash_branches", lambda *_: False)
    monkeypatch.setattr(packed_model, "use_fused", lambda _: None)  # its sums over rows are products to the counter
    pairs, model = examples(), make_model()
    sizes = shapes.count_sizes(make_model(), lora() if adapter else None)
    if adapter:
        model = get_peft_model(model, lora())
    enable_packing(model)
    layout = pack_pairs(pairs)
    (row,) = pass_costs(pairs, len(pairs), None, True, 0)
    assert row.tokens == layout.input_ids.numel()
    assert row.labels == len(layout.labels)
    # The counter knows the plain kernel of attention on a CPU, which keeps its scores; the fused one makes them anew.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logps = packed_logps(model, layout)
    assert forward.get_total_flops() == fit.forward_flops(sizes, row)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        logps.chosen.sum().backward()
    anew = 0.5 * 4 * sizes.layers * sizes.heads * row.products
    ours = fit.step_flops(job(sizes, [row]), row) - fit.forward_flops(sizes, row) - anew
    # The first layer's input needs no gradient where only an adapter is trained, which the formula leaves in: q, k and
    # v (32 x 32, twice 32 x 16) and the A of their adapters (4 x 32).
    first = 2 * row.tokens * (32 * 32 + 2 * 32 * 16 + 3 * 4 * 32) if adapter else 0
    assert backward.get_total_flops() == ours - first


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("dtype", "mixed"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_the_activations_counted_are_those_that_autograd_saves(dtype, mixed, adapter):
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=64)
    counted = shapes.count_sizes(LlamaForCausalLM(config), lora() if adapter else None)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    if adapter:
        model = get_peft_model(model, lora())
    enable_packing(model)
    pairs, stored = examples(4, prompt=60), {}
    (row,) = pass_costs(pairs, 4, None, True, 0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = []

    def pack(tensor):
        saved.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        cast = mixed and tensor.dim() == 2 and row.tokens not in tensor.shape  # a weight's, which is counted elsewhere
        if storage.data_ptr() not in weights and not cast:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        packed_logps(model, pack_pairs(pairs))
    weight = 4 if dtype == "float32" else 2
    expected = fit.activation_bytes(
        job(counted, [row], weight=weight, compute=2 if mixed else weight, mixed=mixed), row
    )
    assert sum(stored.values()) == pytest.approx(expected, rel=0.08)


def test_memory_by_hand_and_what_lowers_it():
    sizes = shapes.count_sizes(llama(**LLAMA_3_8B))
    row = shapes.pair_cost(500, 0, 500, 500)
    full = job(sizes, [row] * 2, weight=2, compute=2, on_gpu=True)
    memory = fit.peak_memory(full)
    assert memory["weights"] == 2 * sizes.parameters
    assert memory["optimizer"] == 2 * 2 * sizes.parameters
    total = sum(memory.values())
    assert fit.peak_memory(replace(full, copies=True))["weights"] == 2 * memory["weights"]
    assert sum(fit.peak_memory(replace(full, states=0)).values()) == total - memory["optimizer"]
    checkpointed = replace(full, checkpointing=True)
    assert fit.activation_bytes(checkpointed, row) < fit.activation_bytes(full, row) / 10
    adapter = replace(checkpointed, sizes=replace(sizes, adapter=42_000_000))
    gpu = shapes.GPUS[0]
    assert fitting.required_memory(adapter, gpu) < gpu.memory < fitting.required_memory(replace(full, weight=4), gpu)


def test_only_bfloat16_is_copied_in_float32_on_a_processor_without_it(monkeypatch):
    narrow = llama(**LLAMA_3_8B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1})
    sizes, row = shapes.count_sizes(narrow), shapes.pair_cost(500, 0, 500, 500)

    def activations(native):
        monkeypatch.setattr(fit, "has_bfloat16", lambda: native)
        return [fit.peak_memory(job(sizes, [row], weight=c, compute=c))["activations"] for c in (2, 4, 8)]

    with_it, without = activations(True), activations(False)
    assert without[0] > with_it[0]
    assert without[1:] == with_it[1:]


def test_an_unpaired_row_is_one_branch():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [5, 6, 7], "rejected_ids": []}]
    rows.append({"prompt_ids": [1, 2], "chosen_ids": [], "rejected_ids": [5, 6, 7]})
    assert pass_costs(rows, 1, None, True, 0) == [PassCost(tokens=5, labels=3, products=25)] * 2
    assert pass_costs(rows, 2, None, False, 0) == [PassCost(10, 10, 50, masked=50)]


def test_the_reference_is_counted_once_or_at_every_step():
    sizes = shapes.count_sizes(make_model())
    row = shapes.pair_cost(9, 0, 5, 5)
    forward = fit.forward_flops(sizes, row)
    run = job(sizes, [row] * 4, pairs=4, pairs_trained=12)
    bare = fit.run_flops(run)[0]
    assert bare == pytest.approx(12 * fit.step_flops(run, row))
    assert fit.run_flops(replace(run, reference="cached")) == pytest.approx((bare + 4 * forward, 4 * forward))
    assert fit.run_flops(replace(run, reference="online"))[1] == pytest.approx(12 * forward)


def test_a_run_that_cannot_fit_is_refused_with_what_would_help(recipe, monkeypatch, tmp_path, capsys):
    planned = plan(TrainConfig(**recipe))
    costs = estimate(planned)
    assert costs.here.sizes.parameters == make_model().num_parameters()
    fitting.check_fits(costs.here, costs.machine)
    small = Device("this machine: CPU", 1000, 1e9, is_gpu=False, reserved=0)
    monkeypatch.setattr(shapes, "this_machine", lambda: small)
    with pytest.raises(UserError, match=r"the run needs about .* GiB and this machine: CPU has .*; set .*pack_tokens"):
        train(TrainConfig(**recipe), log=print)
    deep = replace(costs.here, sizes=replace(costs.here.sizes, layers=24))  # of two layers, checkpointing saves nothing
    with pytest.raises(UserError, match=r"the run needs about .* GiB and this machine: CPU has .*; set .*checkpoint"):
        fitting.check_fits(deep, small)
    assert not list(tmp_path.glob("run/*"))
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert call(monkeypatch, "train", path, "--dry-run") == 2
    assert "does NOT fit" in capsys.readouterr().out


def test_the_parts_of_the_memory_add_up_to_its_total():
    sizes = shapes.count_sizes(llama(**LLAMA_3_8B), lora(16))
    for tokens in (100, 333, 500, 1777):
        run = job(sizes, [shapes.pair_cost(tokens, 0, tokens, tokens)] * 2, weight=2, compute=2, on_gpu=True)
        (line,) = fitting.table({shapes.GPUS[0]: run})
        total, terms = re.fullmatch(r"A100 80GB: ([\d.]+) of .* \((.*)\)", line).groups()
        assert "libraries 1.00" in terms
        assert float(total) == round(sum(float(term.split()[-1]) for term in terms.split(", ")), 1)


def test_a_processor_that_others_use_too_is_as_fast_as_ever(monkeypatch):
    clock = {"perf_counter": 0.0, "process_time": 0.0}

    def passed(which: str, seconds: float) -> float:
        clock[which] += seconds
        return clock[which]

    def product(a, b):
        passed("perf_counter", 5.0)  # of which it had the processor for one second a thread
        passed("process_time", 1.0 * torch.get_num_threads())

    timer = SimpleNamespace(**{name: partial(passed, name, 1e-6) for name in clock})
    monkeypatch.setattr(matmul, "time", timer)
    monkeypatch.setattr(matmul, "_onednn", product)
    assert matmul.speeds.__wrapped__()[1] == pytest.approx(2 * 1024**3, rel=1e-3)


def test_llama_3_8b_lora_has_no_checkpointing_on_80_gb_and_each_gpu_the_longest_passes_that_fit():
    sizes = shapes.count_sizes(llama(**LLAMA_3_8B), lora(16))
    rng = random.Random(0)
    lengths = [[rng.randrange(50, 150), rng.randrange(200, 600), rng.randrange(200, 600)] for _ in range(64)]
    pairs = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(range, each), strict=True)) for each in lengths]
    args = SimpleNamespace(
        per_device_train_batch_size=32, gradient_accumulation_steps=1, shared_prefix=True, seed=0, optim="adamw_torch"
    )

    def build(checkpointing, pack_tokens):
        return fit.build_job(
            sizes, pairs, args, 2, reference="cached", dtype="bfloat16", mixed=True, on_gpu=True,
            checkpointing=checkpointing, pack_tokens=pack_tokens,
        )  # fmt: skip

    def chosen(device, checkpointing=None, limits=fitting.PASS_TOKENS):
        return fitting.choose_passes(build, device, checkpointing, limits)

    a100, h100, h200, rtx4090 = shapes.GPUS
    for device in shapes.GPUS:
        job, free = chosen(device), (1 - fitting.SPARE) * device.memory
        assert job.checkpointing == (device is rtx4090)
        assert fitting.required_memory(job, device) <= free
        if job.pack_tokens < max(fitting.PASS_TOKENS):
            assert fitting.required_memory(build(job.checkpointing, job.pack_tokens + 2048), device) > free
    shortest = build(False, min(fitting.PASS_TOKENS))
    assert fitting.required_memory(shortest, rtx4090) > (1 - fitting.SPARE) * rtx4090.memory
    assert chosen(a100) == chosen(h100)
    assert chosen(a100).pack_tokens < chosen(h200).pack_tokens
    assert chosen(a100, True).pack_tokens == max(fitting.PASS_TOKENS)
    assert chosen(a100, limits=(1024,)).pack_tokens == 1024
    nothing = Device("small", shapes.GIB, 1e9)
    assert fitting.describe_passes(chosen(nothing)) == "pack_tokens 2,048, activation checkpointing"
    assert fitting.describe_passes(chosen(nothing, False)) == "pack_tokens 2,048, no activation checkpointing"


def test_on_a_gpu_a_run_takes_what_the_recipe_leaves_open_from_the_estimate(recipe, monkeypatch):
    monkeypatch.setattr(shapes, "this_machine", lambda: Device("this machine: GPU", 2 * shapes.GIB, 1e12))

    def limited(**options):
        planned = plan(TrainConfig(**{**recipe, "trainer": {**recipe["trainer"], "gradient_checkpointing": True}}))
        planned.args.use_cpu, planned.args.pack_tokens = False, options.get("pack_tokens")
        planned.args.shared_prefix = options.get("shared_prefix", True)
        before = [*planned.train.notes]
        limit_passes(replace(planned, config=TrainConfig(**{**recipe, "trainer": {**recipe["trainer"], **options}})))
        args = planned.args
        assert args.activation_checkpointing == args.gradient_checkpointing
        return args.pack_tokens, args.activation_checkpointing, planned.train.notes[len(before) :]

    pack_tokens, checkpointing, (note,) = limited()
    assert (pack_tokens, checkpointing) == (16_384, False)
    assert note == (
        "by the estimate of memory (1.0 of 2.0 GiB): pack_tokens 16,384, no activation checkpointing; a recipe that "
        "sets trainer.pack_tokens or trainer.gradient_checkpointing decides itself"
    )
    assert limited(pack_tokens=64, gradient_checkpointing=True) == (64, True, [])
    assert limited(shared_prefix=False)[:2] == (None, False)
    assert limited(gradient_checkpointing=True)[:2] == (16_384, True)


def test_one_change_that_is_enough_is_named_alone():
    sizes = shapes.count_sizes(llama(**LLAMA_3_8B), lora(16))
    run = job(sizes, [shapes.pair_cost(500, 0, 500, 500)] * 2, weight=2, compute=2, on_gpu=True)
    between = Device(
        "D",
        (fitting.required_memory(run, shapes.GPUS[0]) + sum(fit.peak_memory(replace(run, checkpointing=True)).values()))
        / 2,
        1,
    )
    with pytest.raises(UserError, match=r"set trainer.gradient_checkpointing: true$"):
        fitting.check_fits(run, between)


def test_memory_of_one_of_eight_processes_by_hand():
    sizes = shapes.count_sizes(llama(**LLAMA_3_8B))
    row = shapes.pair_cost(500, 0, 500, 500)
    alone = job(sizes, [row], compute=2, on_gpu=True, checkpointing=True, accumulates=True)
    sharded = fit.peak_memory(replace(alone, processes=8, sharded=True))
    layer, outside = sizes.linear / 32, sizes.parameters - sizes.linear
    assert sharded["optimizer"] == 2 * 4 * sizes.parameters / 8
    assert sharded["gradients"] == 4 * sizes.parameters / 8
    assert sharded["weights"] == 4 * sizes.parameters / 8 + 2 * 2 * (outside + 2 * layer)
    assert sharded["activations"] == fit.peak_memory(alone)["activations"]
    # for the reference's pass the model is whole once, in float32 and with the copies of autocast
    assert sum(sharded.values()) == 4 * sizes.parameters + 2 * sizes.linear
    copies = fit.peak_memory(replace(alone, processes=8))
    assert copies == fit.peak_memory(alone) | {"buckets": 4 * sizes.parameters}
    adapter = replace(alone, sizes=replace(sizes, adapter=42_000_000), processes=8, sharded=True)
    assert fit.peak_memory(adapter)["weights"] == pytest.approx(
        4 * (sizes.parameters + 42_000_000) / 8 + 2 * (outside + 2 * layer)
    )
    run = replace(alone, reference="cached", pairs=8, pairs_trained=8)
    assert fit.run_flops(run)[1] == 8 * fit.run_flops(replace(run, processes=8))[1]


def test_a_deepspeed_config_is_read():
    assert parse_zero_config({}, 8) is None
    assert parse_zero_config({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, 8) is None
    assert parse_zero_config({"zero_optimization": {"stage": 2}}, 8) == ZeroConfig(
        2, 500_000_000, 1, 1_000_000_000, 50_000_000
    )
    config = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}}
    zero = parse_zero_config({"zero_optimization": config, "bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}, 8)
    assert zero == ZeroConfig(2, bucket=64, buckets=2, half=True, offload=True)
    config = {
        "stage": 3,
        "overlap_comm": True,
        "stage3_max_live_parameters": 5e7,
        "stage3_prefetch_bucket_size": "auto",
        "offload_param": {"device": "none"},
    }
    assert parse_zero_config({"zero_optimization": config, "fp16": {"enabled": True}}, 8) == ZeroConfig(
        3, live=50_000_000, prefetch=57, half=True
    )


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("offload_optimizer", {"device": "nvme"}, "offload_optimizer to nvme"),
        ("offload_param", {"device": "cpu"}, "offload_param"),
        ("offload_optimizer", {"device": "cpu", "ratio": 0.5}, "offload_optimizer.ratio"),
        ("zero_quantized_weights", True, "zero_quantized_weights"),
        ("zero_hpz_partition_size", 8, "zero_hpz_partition_size"),
    ],
)
def test_models_that_the_formulas_do_not_describe_are_refused_by_name(key, value, named):
    with pytest.raises(ValueError, match=f"do not describe DeepSpeed's {named}$"):
        parse_zero_config({"zero_optimization": {"stage": 3, key: value}}, 8)


def test_memory_under_zero_by_hand():
    sizes = shapes.count_sizes(llama(**LLAMA_3_8B))
    p, on = sizes.parameters, {"processes": 8, "on_gpu": True, "accumulates": False}
    bucket = 2 * 500_000_000
    stage1, stage2, stage3 = (zero_memory(sizes, ZeroConfig(stage, half=True), 2, **on) for stage in (1, 2, 3))
    # bfloat16 weights and gradients; the copy in float32 and AdamW's two states are shared out by all stages
    assert {each.optimizer for each in (stage1, stage2, stage3)} == {(4 + 8) * p / 8}
    assert stage1.weights == stage2.weights == 2 * p
    assert stage3.weights == 2 * p / 8 + 2 * 1_000_000_000
    assert (stage1.begin, stage1.end) == (bucket, 2 * p + 2 * bucket)
    assert (stage2.begin, stage2.end) == (bucket, 2 * p / 8 + 2 * bucket)
    assert (stage3.begin, stage3.end) == (2 * p / 8 + bucket + 2 * 50_000_000, (2 + 4) * p / 8 + 2 * bucket)
    adds_up = {**on, "accumulates": True}
    assert zero_memory(sizes, ZeroConfig(2, half=True), 2, **adds_up).begin == 2 * p / 8 + bucket
    assert zero_memory(sizes, ZeroConfig(1, half=True), 2, **adds_up).begin == 2 * p + bucket
    away = zero_memory(sizes, ZeroConfig(2, half=True, offload=True), 2, **on)
    assert (away.optimizer, away.weights, away.end) == (0, 2 * p, 2 * bucket)
    assert zero_memory(sizes, ZeroConfig(2), 2, **on).optimizer == (4 + 8) * p / 8, (
        "stage 2 copies weights in float32 too"
    )
    assert zero_memory(sizes, ZeroConfig(3), 2, **on).optimizer == 8 * p / 8
    small = zero_memory(sizes, ZeroConfig(2, bucket=1000, half=True), 2, **on | {"on_gpu": False})
    assert (small.begin, small.end) == (0, 2 * p / 8 + 2 * 2000)


def test_a_job_under_zero_is_that_of_its_config():
    sizes = shapes.count_sizes(llama(**LLAMA_3_8B), lora(r=16))
    row = shapes.pair_cost(50, 0, 50, 50)
    alone = job(sizes, [row], weight=2, compute=2, on_gpu=True, processes=8)
    memory = fit.peak_memory(replace(alone, zero=ZeroConfig(3, half=True)))
    assert memory["weights"] == 2 * (sizes.parameters + sizes.adapter) / 8 + 2e9
    assert memory["optimizer"] == 12 * sizes.adapter / 8
    assert "buckets" not in memory
    # for the reference's pass the model is whole once
    assert sum(memory.values()) == pytest.approx(2 * (sizes.parameters + sizes.adapter))
    # DeepSpeed rounds the adapter as well, so its inputs are in the type of the weights
    assert fit.activation_bytes(replace(alone, zero=ZeroConfig(2, half=True)), row) < fit.activation_bytes(alone, row)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_dry_run_shows_the_costs_under_the_launchers_zero(stage, recipe, monkeypatch):
    planned = plan(TrainConfig(**recipe), processes=2)
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    planned.args.deepspeed_plugin = SimpleNamespace(deepspeed_config=config, zero_stage=stage)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    costs = estimate(planned)
    assert {job.zero for job in costs.jobs.values()} == {ZeroConfig(stage, half=True)}
    assert {(job.weight, job.compute, job.mixed) for job in costs.jobs.values()} == {(2, 2, False)}
    config["zero_optimization"]["offload_param"] = {"device": "nvme"}
    assert estimate(planned) == "the formulas do not describe DeepSpeed's offload_param"


def test_sharding_is_named_where_it_is_what_helps():
    run = job(
        shapes.count_sizes(llama(**LLAMA_3_8B)), [shapes.pair_cost(50, 0, 50, 50)], compute=2, on_gpu=True, processes=8
    )
    with pytest.raises(UserError, match=r"set trainer\.fsdp: true or lora"):
        fitting.check_fits(run, shapes.GPUS[0])


def test_a_dry_run_shows_costs(recipe, monkeypatch, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert call(monkeypatch, "train", path, "--dry-run") == 0
    output = capsys.readouterr().out
    for text in (
        "# tokens: ",
        "of TRL's padded batch",
        "# work: ",
        "FLOPs",
        "this machine: ",
        "H200",
        "RTX 4090",
        "assume",
    ):
        assert text in output


def test_a_mixture_of_experts_has_no_estimate():
    model = make_model()
    model.config.num_local_experts = 8
    with pytest.raises(ValueError, match="mixture of experts"):
        shapes.count_sizes(model)


MEASURE = """
import json, os, random, sys, datasets, torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from apo.cost import memory as fit
from apo.cost import sizes as shapes
from apo.models import load as models
from apo.training.trainer_config import APOConfig
from apo.training.trainer import APOTrainer
from tests.apo.conftest import make_tokenizer

case = json.loads(sys.argv[1])
out = sys.argv[2]
torch.set_num_threads(1)
rng = random.Random(0)
ids = lambda n: [rng.randrange(10, 60) for _ in range(n)] + [3] if n else []
lora = lambda: LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if case["lora"] else None
options = {"dtype": case["dtype"]}
if case["quantize"]:
    options["quantization_config"] = models.nf4_config(case["dtype"])

def run(folder, lengths):
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(ids, lengths))) for _ in range(8)]
    rows = datasets.Dataset.from_list(rows)
    args = APOConfig(output_dir=out, report_to="none", max_steps=3, save_strategy="no", disable_tqdm=True,
                     max_length=None, precompute_ref_log_probs=True, **case["args"])
    name = models.find_model(folder)
    APOTrainer(models.load_model(name, **options), args=args, train_dataset=rows, processing_class=make_tokenizer(),
               peft_config=lora()).train()
    return fit.build_job(shapes.model_sizes(name, lora()), [*rows], args, 3, reference="cached", dtype=case["dtype"],
                         pack_tokens=args.pack_tokens, checkpointing=bool(args.gradient_checkpointing),
                         quantized=case["quantize"])

run(case["first"], [9, 9, 5])
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark begins anew
base = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
job = run(case["model"], case["lengths"])
(peak,) = (int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([sum(fit.peak_memory(job).values()), peak - base]))
"""
MIDDLE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8,
          "vocab_size": 8000}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 64}
DEEP = MIDDLE | {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 24, "num_attention_heads": 4}
FULL_BLOCKS = MIDDLE | {"intermediate_size": 1408, "vocab_size": 32000}
CASES = {
    "full": (MIDDLE, [200, 300, 300], {}),
    "lora": (MIDDLE, [200, 300, 300], {"lora": True}),
    "lora on bfloat16": (MIDDLE, [200, 300, 300], {"lora": True, "dtype": "bfloat16"}),
    "lora on 4 bits": (FULL_BLOCKS, [150, 250, 250], {"lora": True, "quantize": True}),
    "deep": (DEEP, [200, 300, 300], {}),
    "deep lora": (DEEP, [200, 300, 300], {"lora": True}),
    "deep checkpointing": (DEEP, [200, 300, 300], {"args": {"gradient_checkpointing": True}}),
    "accumulation": (MIDDLE, [200, 300, 300], {"args": {"gradient_accumulation_steps": 2}}),
    "checkpointing": (MIDDLE, [300, 500, 500], {"args": {"gradient_checkpointing": True}}),
    "unpaired": (
        MIDDLE,
        [200, 0, 300],
        {"args": {"objective": "apo_zero_unpaired", "per_device_train_batch_size": 3}},
    ),
    "padded": (MIDDLE, [200, 300, 180], {"args": {"shared_prefix": False}}),
    "large vocabulary": (MIDDLE | {"num_hidden_layers": 4, "vocab_size": 32000}, [100, 300, 300], {}),
}


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read where Linux tells it")
@pytest.mark.parametrize("tunables", ["", TUNABLES], ids=["plain", "reused"])
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(name, tunables, tmp_path):
    sizes, lengths, special = CASES[name]
    case = {"lora": False, "quantize": False, "dtype": "float32", "lengths": lengths, **special}
    case["args"] = {"per_device_train_batch_size": 2, **special.get("args", {})}
    for key, which in (("first", SMALL), ("model", sizes)):
        case[key] = str(tmp_path / key)
        config = LlamaConfig(**which, pad_token_id=0, bos_token_id=1, eos_token_id=3)
        LlamaForCausalLM(config).save_pretrained(case[key])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": tunables}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, json.dumps(case), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    estimated, measured = json.loads(result.stdout.splitlines()[-1])
    print(f"{name}: estimate / measured peak = {estimated / measured:.3f} of {measured / 2**20:.0f} MiB")
    assert estimated == pytest.approx(measured, rel=0.2)


def test_a_dry_run_plans_for_other_machines_and_refuses_this_one_in_a_line(recipe, monkeypatch, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe | {"trainer": recipe["trainer"] | {"fsdp": True}}))
    assert call(monkeypatch, "train", path, "--dry-run") == 2
    assert "FSDP was asked for, and on one process" in capsys.readouterr().err
    assert call(monkeypatch, "train", path, "--processes", "8") == 2
    assert "--processes 8 plans a run and needs --dry-run; torchrun --nproc_per_node 8" in capsys.readouterr().err
    monkeypatch.setattr(
        shapes, "this_machine", lambda: Device("this machine: CPU", 1000, 1e9, is_gpu=False, reserved=0)
    )
    assert call(monkeypatch, "train", path, "--dry-run", "--processes", "8") == 2
    output, refused = capsys.readouterr()
    for text in (
        " on 8 processes",
        "FLOPs, in each of 8 processes",
        "this machine: CPU",
        "does NOT fit",
        "H100 80GB: ",
    ):
        assert text in output
    assert refused.startswith("error: the run needs about ")
    assert refused.count("\n") == 1
    assert not (tmp_path / "run").exists()
