"""Training a model of Llama-3-8B's shape on one GPU: the three attention backends, and TRL's DPOTrainer beside them.

    python tests/benchmarks/run.py train_on_gpu                       # about twenty minutes on an H200; needs 130 GB
    TUNES=lora CASES="clair 8" REPEATS=1 python tests/benchmarks/run.py train_on_gpu

Random weights in bfloat16, made anew from one seed for each run; AdamW; LoRA of rank 16 on all linear layers, and full
fine-tuning. Time goes from the constructor to the end of training: tokenisation, reference and compilation included,
making the model not. `steady_*` leaves out the first two steps, and with them what is done once. MFU is the same
arithmetic for every run, the least that the pairs need (apo/monitoring/throughput.py), over the device's bf16 peak.
All runs of a repeat follow each other in one process. A run that does not fit is told as such. The loss curves must
agree as far as bfloat16 lets them.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import train_vs_trl as cpu

LLAMA3_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500_000.0, "max_position_embeddings": 8192,
}  # fmt: skip
CASES = {
    "clair 8": (lambda: cpu.clair_lengths(64), 8),
    "prompt 2048, responses 300": (lambda: [(2048, 300, 300)] * 32, 4),
}
"""Lengths of the pairs, and pairs a batch."""
OURS = ("split", "varlen", "flex", "flex, nothing computed anew")
MODES = (*OURS, "trl defaults", "trl best")
"""`nothing computed anew` and `trl best` are without activation checkpointing; the latter has its reference cached."""
AGREE = 0.02
"""The tolerance between losses of about 1 in bfloat16."""


def make_model(sizes: dict[str, Any], device: str, dtype: Any) -> Any:
    """The same random weights each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=3, pad_token_id=0)
    config.architectures = ["LlamaForCausalLM"]
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype)


def make_trainer(mode: str, tune: str, model: Any, lengths: list[tuple[int, int, int]], batch: int, out: str) -> Any:
    """A trainer on pairs of these lengths; ours with an empty cache."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from apo.packing import packed_model
    from apo.training.trainer import APOTrainer
    from apo.training.trainer_config import APOConfig

    on_gpu = model.device.type != "cpu"
    same = {
        "output_dir": f"{out}/run", "per_device_train_batch_size": batch, "learning_rate": 1e-5, "num_train_epochs": 1,
        "report_to": "none", "logging_steps": 1, "save_strategy": "no", "max_length": 8192, "disable_tqdm": True,
        "seed": 0, "bf16": on_gpu, "use_cpu": not on_gpu,
    }  # fmt: skip
    lora = (
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if tune == "lora" else None
    )
    data = {"train_dataset": cpu.make_pairs(lengths), "processing_class": cpu.make_tokenizer(), "peft_config": lora}
    if mode in OURS:
        backend, _, plain = mode.partition(", ")
        packed_model.fastest_backend = lambda *_: (backend, "")
        more = {"precompute_ref_log_probs": True, "reference_cache": tempfile.mkdtemp(dir=out)}
        more |= {"gradient_checkpointing": False} if plain or not on_gpu else {}
        return APOTrainer(model, args=APOConfig(objective="apo_zero", **same, **more), **data)
    best = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if mode == "trl best" else {}
    # Of full fine-tuning TRL would load the reference from the model's folder; this one has none.
    data["ref_model"] = None if lora else copy.deepcopy(model).eval().requires_grad_(False)
    return DPOTrainer(model, args=DPOConfig(loss_type=["apo_zero"], **same, **best), **data)


def run(mode: str, tune: str, model: Any, lengths: list[tuple[int, int, int]], batch: int) -> dict[str, Any]:
    """The cost of one training run, from the constructor to its end, and its losses."""
    import torch
    from transformers import TrainerCallback

    from apo.cost.sizes import pair_cost
    from apo.data.encoding import common_prefix
    from apo.monitoring.throughput import compute_scale
    from apo.packing.batch import PairBatch, unstack

    device, times, needed = model.device, [], {"flops": 0.0, "tokens": 0}

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait(device)
            times.append(time.perf_counter())

    _wait(device)
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        trainer = make_trainer(mode, tune, model, lengths, batch, out)
        trainer.add_callback(Clock())
        trainer.train()
        _wait(device)
        seconds = time.perf_counter() - started
        scale = compute_scale(trainer.model, device)
        for batch_ in trainer.get_train_dataloader():
            for pair in batch_.examples if isinstance(batch_, PairBatch) else unstack(batch_):
                prompt, chosen, rejected = (pair[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
                row = pair_cost(len(prompt), common_prefix(chosen, rejected), len(chosen), len(rejected))
                needed["tokens"] += 2 * len(prompt) + len(chosen) + len(rejected)
                needed["flops"] += 0 if isinstance(scale, str) else scale.flops(row.tokens, row.labels, row.products)
    pairs = len(lengths)
    steady = (pairs - 2 * batch) / (times[-1] - times[1]) if len(times) > 3 else None
    peak = None if isinstance(scale, str) else scale.peak
    return {
        "seconds": round(seconds, 2),
        "pairs_per_second": round(pairs / seconds, 3),
        "steady_pairs_per_second": steady and round(steady, 3),
        "steady_tokens_per_second": steady and round(steady * needed["tokens"] / pairs),
        "steady_mfu": steady and peak and round(steady * needed["flops"] / pairs / peak, 3),
        "peak_gb": None if device.type == "cpu" else round(torch.cuda.max_memory_allocated(device) / 2**30, 1),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "notes": getattr(trainer, "notes", []),
    }


def measure_on(
    device: str, sizes: dict[str, Any], dtype: Any, cases: dict[str, Any], tunes: list[str], repeats: int
) -> dict[str, Any]:
    """Per case and kind of tuning: what each run of each mode took, and by how much ours is faster than TRL's."""
    import torch

    from apo.monitoring.failures import is_out_of_memory
    from clair.core.errors import UserError

    measured = {}
    for tune in tunes:
        for name, (make_lengths, batch) in cases.items():
            runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
            for _ in range(repeats):
                for mode in MODES:
                    model = make_model(sizes, device, dtype)
                    try:
                        result = run(mode, tune, model, make_lengths(), batch)
                    except (RuntimeError, UserError) as error:
                        if not is_out_of_memory(error):
                            raise
                        result = {"cannot": "out of memory"}
                    del model
                    gc.collect()
                    if device != "cpu":
                        torch.cuda.empty_cache()
                    runs[mode].append(result)
                    summary = {key: value for key, value in result.items() if key != "losses"}
                    print(tune, name, mode, summary, file=sys.stderr, flush=True)
            measured[f"{tune}, {name}"] = {"runs": runs, "ratios": _ratios(runs), "apart": _apart(runs)}
    return {"device": _name(device), "repeats": repeats, "sizes": sizes, "cases": measured}


def _ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """How many times as many pairs a second, whole runs and steady: ours over TRL's, repeat by repeat."""
    ratios = {}
    for theirs in MODES[len(OURS) :]:
        for ours in OURS:
            for key in ("pairs_per_second", "steady_pairs_per_second"):
                both = [(a.get(key), b.get(key)) for a, b in zip(runs[ours], runs[theirs], strict=True)]
                quotients = [a / b for a, b in both if a and b]
                ratios[f"{ours} / {theirs}, {key}"] = (
                    [round(min(quotients), 2), round(max(quotients), 2)] if quotients else None
                )
    return ratios


def _apart(runs: dict[str, list[dict[str, Any]]]) -> float:
    """The largest difference of any run's losses from those of the first that ran."""
    curves = [run["losses"] for many in runs.values() for run in many if "losses" in run]
    apart = max(abs(a - b) for curve in curves for a, b in zip(curve, curves[0], strict=True))
    assert apart < AGREE, f"the losses differ by {apart}"
    return apart


def _wait(device: Any) -> None:
    import torch

    if device.type != "cpu":
        torch.cuda.synchronize(device)


def _name(device: str) -> str:
    import torch

    return device if device == "cpu" else torch.cuda.get_device_name(device)


def measure() -> dict[str, Any] | None:
    """As above for Llama-3-8B's shape on this machine's GPU; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    cpu._quiet()
    cpu.VOCABULARY = LLAMA3_8B["vocab_size"]
    selected = {name: case for name, case in CASES.items() if name in os.environ.get("CASES", ",".join(CASES))}
    tunes = os.environ.get("TUNES", "lora,full").split(",")
    return measure_on("cuda", LLAMA3_8B, torch.bfloat16, selected, tunes, int(os.environ.get("REPEATS", "2")))
