"""The first minutes on a GPU: are the kernels right, does a default run start, how fast is the shape of Llama-3-8B.

On a machine with a GPU, in the root of the repository, with any python 3.11 or newer that has torch and transformers:

    PYTHONPATH=. python tests/benchmarks/train_on_gpu.py --out DIR            # at most 9.5 minutes
    PYTHONPATH=. python tests/benchmarks/train_on_gpu.py --out DIR            # again: only what is missing
    PYTHONPATH=. python tests/benchmarks/train_on_gpu.py --out DIR --table    # markdown, from the result files
    PYTHONPATH=. python tests/benchmarks/train_on_gpu.py --out DIR --small    # tiny shapes, on a CPU

The parts run in the order of `PARTS`, each in a process of its own with a time limit. DIR/PART.json holds a part's rows
as they end, DIR/log.txt what all parts printed; a part that was killed continues with the rows it lacks. A part or a
row that needs a package that is not installed is left out and says so: TRL, datasets, PEFT and accelerate for trainers
and tests, pydantic for `apo train`. The rows of `full` need torch and transformers only, those of `lora` also PEFT.

Weights are random, in bfloat16, made on the device. A step of `lora` and `full` is what a training run does, without a
trainer around it: rows of at most `PACK_TOKENS` tokens are packed, run forward and backward under autocast, and AdamW
steps; the reference is cached. `trl lora` and `trl full` are whole trainers, ours and TRL's DPOTrainer, on the same
pairs; their first two steps are not timed. MFU is the same arithmetic for every run, the least that the pairs need
(apo/monitoring/throughput.py), over the device's bf16 peak. Lengths are those of 20 real CLAIR pairs, and lengths drawn
about UltraFeedback's published medians.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

MINUTES = 9.5
"""Of one call: below the ten that many machines allow a command."""
SHORTEST = 20
"""Seconds that must be left for a part to be started."""
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TRAINER = ("trl", "datasets", "peft", "accelerate")
AGREE = 0.02
"""The tolerance between losses of about 1 in bfloat16."""
BARS = {"times TRL": 2.0, "pairs a second": 8.0, "MFU": 0.4, "memory": 0.2, "kernels": 1e-2}
PACK_TOKENS = 8192


def ultrafeedback_lengths(pairs: int) -> list[tuple[int, int, int]]:
    """Token lengths of prompt, chosen and rejected, drawn log-normally about UltraFeedback's medians.

    Prompt and answer together have a median of 409 tokens, the prompt 0.42 of the answer (README of
    github.com/frankxwang/dpo-prefix-sharing). The spread of both is assumed.
    """
    draw, answer = random.Random(0), 409 / 1.42

    def length(median: float, spread: float) -> int:
        return max(8, min(1024, round(median * draw.lognormvariate(0, spread))))

    return [(length(0.42 * answer, 0.9), length(answer, 0.7), length(answer, 0.7)) for _ in range(pairs)]


def clair_lengths(pairs: int) -> list[tuple[int, int, int]]:
    """Token lengths of 20 real CLAIR pairs, repeated."""
    from recipes.experiments.model_plans.plan import LENGTHS

    return [LENGTHS[index % len(LENGTHS)] for index in range(pairs)]


def short_lengths(pairs: int) -> list[tuple[int, int, int]]:
    """Token lengths for a CPU."""
    return [(8 + index % 5, 9 + index % 7, 14) for index in range(pairs)]


@dataclass(frozen=True)
class Scale:
    """What is measured on a device: model shapes, lengths by name, pairs of a step, timed steps, backends.

    The learning rate is that of the runs whose losses are compared, which have to change.
    """

    device: str
    one_billion: dict[str, Any]
    llama3_8b: dict[str, Any]
    lengths: dict[str, Callable[[int], list[tuple[int, int, int]]]]
    batch: int
    steps: int
    backends: tuple[str, ...]
    learning_rate: float

    @property
    def on_gpu(self) -> bool:
        """True for a GPU: bfloat16 weights and autocast; on a CPU float32."""
        return self.device != "cpu"

    @property
    def dtype(self) -> Any:
        """The type of the weights."""
        import torch

        return torch.bfloat16 if self.on_gpu else torch.float32


HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "rope_theta": 500_000.0}
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 128,
}  # fmt: skip
GPU = Scale(
    device="cuda",
    one_billion={
        **HEADS, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    llama3_8b={
        **HEADS, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "max_position_embeddings": 8192,
    },
    lengths={"UltraFeedback": ultrafeedback_lengths, "CLAIR": clair_lengths},
    batch=16, steps=3, backends=("varlen", "flex", "split"), learning_rate=1e-4,
)  # fmt: skip
SMALL = Scale(
    device="cpu", one_billion=TINY, llama3_8b=TINY, lengths={"UltraFeedback": short_lengths}, batch=4, steps=2,
    backends=("split",), learning_rate=1e-2,
)  # fmt: skip


# ---- the parts: each gives its rows, in order of worth, as functions that measure them

Row = Callable[[], dict[str, Any]]


def kernel_rows(scale: Scale, _: Path) -> dict[str, Row]:
    """The kernels against `split` in float32 on a CPU, and the tests of a GPU where pytest is installed."""
    from tests.apo.packing.kernels import KERNELS, largest_difference

    def measure(kernel: tuple[Any, ...]) -> dict[str, Any]:
        return {"largest_difference": largest_difference(*kernel, scale.device)}

    rows = {name: functools.partial(measure, kernel) for name, kernel in KERNELS.items() if kernel[0] in scale.backends}
    return {**rows, "tests/apo/packing/test_gpu.py": run_tests}


def run_tests() -> dict[str, Any]:
    """The counts of outcomes of tests/apo/packing/test_gpu.py, and the names of those that failed."""
    require("pytest", "hypothesis", *TRAINER)
    import pytest

    outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    class Recorder:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome].append(report.nodeid.rpartition("::")[2])

    file = str(ROOT / "tests/apo/packing/test_gpu.py")
    options = [
        "-q",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
    ]  # others' warnings are no failure
    exit_code = int(pytest.main([*options, file], plugins=[Recorder()]))
    counts = {name: len(tests) for name, tests in outcomes.items()}
    return {**counts, "failures": outcomes["failed"], "exit_code": exit_code}


def default_rows(scale: Scale, scratch: Path) -> dict[str, Row]:
    """`apo train` with its defaults on a model of a billion parameters, LoRA and full, and TRL on the same pairs."""
    options = {
        "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": scale.learning_rate,
        "save_strategy": "no",
    }  # fmt: skip

    @functools.cache
    def folder() -> Path:
        write_model(scale.one_billion, scale, scratch / "model")
        write_pairs(next(iter(scale.lengths.values()))(24), scratch / "pairs.jsonl", scale)
        return scratch / "model"

    def ours(tune: str) -> dict[str, Any]:
        require("pydantic")
        import apo
        from apo.run_dir.files import METRICS, read_log

        recipe = {"model": str(folder()), "dataset": str(scratch / "pairs.jsonl"), "trainer": options, "eval": False}
        recipe |= {"lora": {"r": 16, "alpha": 32}} if tune == "lora" else {}
        started = time.perf_counter()
        apo.train(recipe | {"out": str(scratch / f"run-{tune}")})
        seconds = time.perf_counter() - started
        losses = [row["loss"] for row in read_log(scratch / f"run-{tune}" / METRICS) if "loss" in row]
        return {"seconds": round(seconds, 1), "losses": losses}

    def trls(tune: str) -> dict[str, Any]:
        from datasets import load_dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        model = AutoModelForCausalLM.from_pretrained(folder(), dtype="float32")
        args = DPOConfig(
            f"{scratch}/trl", loss_type=["apo_zero"], **options, report_to="none", seed=0, max_length=None,
            bf16=scale.on_gpu, use_cpu=not scale.on_gpu, disable_tqdm=True,
        )  # fmt: skip
        data = load_dataset("json", data_files=str(scratch / "pairs.jsonl"), split="train", cache_dir=str(scratch))
        lora = LoraConfig(**LORA) if tune == "lora" else None
        trainer = DPOTrainer(
            model, args=args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder()),
            peft_config=lora,
        )  # fmt: skip
        started = time.perf_counter()
        trainer.train()
        return {"seconds": round(time.perf_counter() - started, 1), "losses": losses_of(trainer)}

    return {f"{name}, {tune}": functools.partial(measure, tune)
            for tune in ("lora", "full") for name, measure in (("apo train", ours), ("TRL", trls))}  # fmt: skip


def step_rows(scale: Scale, _: Path, tune: str) -> dict[str, Row]:
    """Steps on packed rows for each backend, with and without activation checkpointing."""

    @functools.cache
    def model() -> Any:
        made = make_model(scale.llama3_8b, scale)
        if tune == "full":
            return made
        from peft import LoraConfig, get_peft_model

        return get_peft_model(made, LoraConfig(**LORA))

    def measure(case: str, backend: str, checkpointing: bool) -> dict[str, Any]:
        require(*(("peft",) if tune == "lora" else ()))
        free(scale)
        return measure_steps(model(), scale.lengths[case](scale.batch), backend, checkpointing, scale, tune)

    first, *others = scale.lengths
    fast, *slower = scale.backends
    order = [(first, backend, False) for backend in scale.backends] + [(first, fast, True)]
    order += [(case, backend, False) for case in others for backend in scale.backends]
    order += [(first, backend, True) for backend in slower]
    order += [(case, backend, True) for case in others for backend in scale.backends]
    return {
        f"{case}, {backend}, {'checkpointing' if checkpointing else 'no checkpointing'}":
            functools.partial(measure, case, backend, checkpointing)
        for case, backend, checkpointing in order
    }  # fmt: skip


def measure_steps(
    model: Any, lengths: list[tuple[int, int, int]], backend: str, checkpointing: bool, scale: Scale, tune: str
) -> dict[str, Any]:
    """Speed, peak memory and its estimate of optimizer steps on pairs of these lengths, after one untimed step."""
    import torch

    from apo.cost.memory import peak_memory
    from apo.losses.mixture import resolve_mixture
    from apo.packing.layout import pack_bins, pack_pairs, packed_length
    from apo.packing.packed_model import disable_packing, enable_packing, packed_logps
    from clair.inference.generation.onednn import rows_multiple

    objective, examples = resolve_mixture("apo_zero"), make_examples(lengths, scale)
    bins = pack_bins([packed_length(example) for example in examples], PACK_TOKENS)
    disable_packing(model)
    enable_packing(model, backend)
    set_checkpointing(model, checkpointing)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=scale.on_gpu)
    device = torch.device(scale.device)

    def logps(indices: list[int]) -> Any:
        row = pack_pairs([examples[index] for index in indices], device, rows_multiple(device))
        with torch.autocast("cuda", torch.bfloat16) if scale.on_gpu else nullcontext():
            return packed_logps(model, row)

    with torch.no_grad():
        references = [logps(indices)[:2] for indices in bins]

    def step() -> float:
        total = 0.0
        for indices, reference in zip(bins, references, strict=True):
            loss = objective.losses(logps(indices), reference, beta=0.1).sum() / len(examples)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    losses = [step()]
    synchronize(scale)
    if scale.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    losses += [step() for _ in range(scale.steps)]
    synchronize(scale)
    seconds = (time.perf_counter() - started) / scale.steps
    peak = torch.cuda.max_memory_allocated() if scale.on_gpu else None
    estimate = sum(peak_memory(estimated_job(examples, checkpointing, scale, tune)).values())
    return {
        **rates(len(examples) / seconds, lengths, model), "tune": tune, "backend": backend,
        "checkpointing": checkpointing, "passes": len(bins), "peak_gib": peak and round(peak / 2**30, 2),
        "estimate_gib": round(estimate / 2**30, 2), "estimate_over_peak": peak and round(estimate / peak, 3),
        "losses": [round(float(loss), 4) for loss in losses],
    }  # fmt: skip


def estimated_job(examples: list[dict[str, Any]], checkpointing: bool, scale: Scale, tune: str) -> Any:
    """The job that a dry run would estimate, from a model without weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from apo.cost.memory import build_job
    from apo.cost.sizes import count_sizes

    lora = None
    if tune == "lora":
        from peft import LoraConfig

        lora = LoraConfig(**LORA)
    with torch.device("meta"):
        sizes = count_sizes(LlamaForCausalLM(LlamaConfig(**scale.llama3_8b)), lora)
    args = SimpleNamespace(
        per_device_train_batch_size=scale.batch, gradient_accumulation_steps=1, shared_prefix=True, seed=0,
        optim="adamw_torch",
    )  # fmt: skip
    return build_job(
        sizes, examples, args, scale.steps, reference="cached", dtype=str(scale.dtype), mixed=scale.on_gpu,
        checkpointing=checkpointing, pack_tokens=PACK_TOKENS, on_gpu=scale.on_gpu,
    )  # fmt: skip


TRAINERS = {
    "APOTrainer": {"precompute_ref_log_probs": True, "gradient_checkpointing": False, "pack_tokens": PACK_TOKENS},
    "TRL, fastest": {
        "precompute_ref_log_probs": True, "gradient_checkpointing": False, "gradient_accumulation_steps": 4,
    },
    "TRL, defaults": {},
    "APOTrainer, checkpointing": {
        "precompute_ref_log_probs": True, "gradient_checkpointing": True, "pack_tokens": PACK_TOKENS,
    },
}  # fmt: skip
"""Options of each trainer, in order of worth. TRL's fastest settings run a quarter of the pairs at a time: without
checkpointing, their padded batch would need more memory than any GPU has."""


def trainer_rows(scale: Scale, scratch: Path, tune: str) -> dict[str, Row]:
    """Whole trainers, ours and TRL's, on the same pairs."""

    def measure(name: str) -> dict[str, Any]:
        free(scale)
        return run_trainer(name, tune, scale, scratch)

    return {name: functools.partial(measure, name) for name in TRAINERS}


def run_trainer(name: str, tune: str, scale: Scale, scratch: Path) -> dict[str, Any]:
    """Speed after the first two steps, peak memory and losses of a trainer on `steps + 2` steps of pairs."""
    import torch
    import train_vs_trl as cpu
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from apo.training.trainer import APOTrainer
    from apo.training.trainer_config import APOConfig

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(scale)
            times.append(time.perf_counter())

    cpu._quiet()
    cpu.VOCABULARY = scale.llama3_8b["vocab_size"]
    lengths = next(iter(scale.lengths.values()))(scale.batch * (scale.steps + 2))
    model = make_model(scale.llama3_8b, scale)
    accumulation = TRAINERS[name].get("gradient_accumulation_steps", 1)
    options = {
        "output_dir": str(scratch / "run"), "per_device_train_batch_size": scale.batch // accumulation,
        "learning_rate": 1e-5, "num_train_epochs": 1, "report_to": "none", "logging_steps": 1, "save_strategy": "no",
        "max_length": None, "disable_tqdm": True, "seed": 0, "bf16": scale.on_gpu, "use_cpu": not scale.on_gpu,
        **TRAINERS[name],
    }  # fmt: skip
    lora = LoraConfig(**LORA) if tune == "lora" else None
    data = {
        "train_dataset": cpu.make_pairs(lengths),
        "processing_class": cpu.make_tokenizer(),
        "peft_config": lora,
        "callbacks": [Clock()],
    }
    if scale.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    if name.startswith("APOTrainer"):
        trainer: Any = APOTrainer(model, args=APOConfig(objective="apo_zero", **options), **data)
    else:
        # Of full fine-tuning TRL would load the reference from the model's folder; this one has none.
        data["ref_model"] = None if lora else copy.deepcopy(model).eval().requires_grad_(False)
        trainer = DPOTrainer(model, args=DPOConfig(loss_type=["apo_zero"], **options), **data)
    trainer.train()
    speed = scale.batch * scale.steps / (times[-1] - times[1])
    return {
        **rates(speed, lengths, trainer.model), "tune": tune, "losses": losses_of(trainer),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if scale.on_gpu else None,
        "notes": getattr(trainer, "notes", []),
    }  # fmt: skip


# ---- models, pairs and arithmetic


class Missing(Exception):
    """A package that a row needs is not installed."""


def require(*packages: str) -> None:
    """Raises Missing for the first package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"{package} is not installed")


def make_model(sizes: dict[str, Any], scale: Scale) -> Any:
    """A Llama of these sizes with the same random weights each time, made on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=3, pad_token_id=0)
    config.architectures = ["LlamaForCausalLM"]
    torch.manual_seed(0)
    with torch.device(scale.device):
        return LlamaForCausalLM._from_config(config, dtype=scale.dtype)


def write_model(sizes: dict[str, Any], scale: Scale, folder: Path) -> None:
    """A model folder with a tokenizer of as many words as there are embeddings."""
    import train_vs_trl as cpu

    cpu.VOCABULARY = sizes["vocab_size"]
    make_model(sizes, scale).save_pretrained(folder)
    cpu.make_tokenizer().save_pretrained(folder)


def write_pairs(lengths: list[tuple[int, int, int]], file: Path, scale: Scale) -> None:
    """Pairs of random words of these lengths, as JSON lines."""
    draw, words = random.Random(0), scale.one_billion["vocab_size"] - 5

    def turn(role: str, count: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(f"w{draw.randrange(words)}" for _ in range(count))}]

    rows = [
        {"prompt": turn("user", p), "chosen": turn("assistant", c), "rejected": turn("assistant", r)}
        for p, c, r in lengths
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def make_examples(lengths: list[tuple[int, int, int]], scale: Scale) -> list[dict[str, Any]]:
    """Pairs of random token ids of these lengths, whose answers differ from their first token on."""
    draw, vocabulary = random.Random(0), scale.llama3_8b["vocab_size"]

    def ids(count: int, first: int) -> list[int]:
        return [first, *(draw.randrange(8, vocabulary) for _ in range(count - 1))]

    return [{"prompt_ids": ids(p, 1), "chosen_ids": ids(c, 5), "rejected_ids": ids(r, 6)} for p, c, r in lengths]


def set_checkpointing(model: Any, on: bool) -> None:
    """Switch activation checkpointing, under the name that this version of transformers gives it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not on:
        getattr(model, f"{name}_checkpointing_disable")()
        return
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})


def rates(pairs_per_second: float, lengths: list[tuple[int, int, int]], model: Any) -> dict[str, Any]:
    """Pairs and tokens (of both sequences, prompts included) a second, and the MFU if the device's peak is known."""
    import torch

    from apo.cost.sizes import PassCost, pair_cost
    from apo.monitoring.throughput import compute_scale

    cost = sum((pair_cost(p, 0, c, r) for p, c, r in lengths), PassCost(0, 0, 0))
    tokens = sum(2 * p + c + r for p, c, r in lengths)
    per_pair = pairs_per_second / len(lengths)
    compute = compute_scale(model, torch.device(next(model.parameters()).device))
    mfu = None
    if not isinstance(compute, str):
        mfu = round(per_pair * compute.flops(cost.tokens, cost.labels, cost.products) / compute.peak, 4)
    return {
        "pairs_per_second": round(pairs_per_second, 3),
        "tokens_per_second": round(per_pair * tokens),
        "mfu": mfu,
    }


def losses_of(trainer: Any) -> list[float]:
    """The logged losses of a run."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def synchronize(scale: Scale) -> None:
    """Wait for the device."""
    import torch

    if scale.on_gpu:
        torch.cuda.synchronize()


def free(scale: Scale) -> None:
    """Return the memory of objects that are gone to the device."""
    import torch

    gc.collect()
    if scale.on_gpu:
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Part:
    """A part of the script: its time limit in seconds, its rows, and the packages that all of them need."""

    limit: int
    rows: Callable[[Scale, Path], dict[str, Row]]
    packages: tuple[str, ...] = ()


PARTS = {
    "kernels": Part(120, kernel_rows),
    "default": Part(130, default_rows, TRAINER),
    "lora": Part(130, functools.partial(step_rows, tune="lora")),
    "trl_lora": Part(150, functools.partial(trainer_rows, tune="lora"), TRAINER),
    "full": Part(110, functools.partial(step_rows, tune="full")),
    "trl_full": Part(150, functools.partial(trainer_rows, tune="full"), TRAINER),
}
"""In order of worth."""


# ---- running them


def run_part(name: str, out: Path, scratch: Path, scale: Scale) -> int:
    """Measure the rows that DIR/NAME.json lacks, and write it after each. Returns the number of failed rows."""
    from apo.monitoring.failures import is_out_of_memory
    from clair.core.errors import UserError

    file, result = out / f"{name}.json", read(out, name)
    rows = result.setdefault("rows", {})
    measures = PARTS[name].rows(scale, scratch)
    missing = [row for row in measures if rows.get(row, {}).get("state") != "done"]
    missing.sort(key=lambda row: rows.get(row, {}).get("state") == "started")  # what a limit cut off comes last
    failed = 0
    for row in missing:
        rows[row] = {"state": "started"}
        write(file, result)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows[row] = {"state": "done", **measures[row]()}
        except Missing as reason:
            rows[row] = {"state": "left out", "reason": str(reason)}
        except Exception as error:
            traceback.print_exc()
            if isinstance(error, RuntimeError | UserError) and is_out_of_memory(error):
                rows[row] = {"state": "done", "out_of_memory": True}
            else:
                rows[row], failed = {"state": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}, 1
        print(name, row, {k: v for k, v in rows[row].items() if k not in ("losses", "notes")}, flush=True)
        result["versions"] = versions(scale)
        write(file, result)
    return failed


def run_parts(out: Path, names: list[str], *, minutes: float, limit: float, small: bool) -> None:
    """Run the parts that are not complete, each in a process of its own, until the minutes are over."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    for name in names:
        result = read(out, name)
        if result.get("state") == "done":
            print(f"{name}: complete", flush=True)
            continue
        try:
            require(*PARTS[name].packages)
        except Missing as reason:
            write(out / f"{name}.json", {**result, "state": f"left out: {reason}"})
            print(f"{name}: left out: {reason}", flush=True)
            continue
        seconds = min(limit, PARTS[name].limit * (10 if small else 1), end - time.monotonic())  # a CPU takes longer
        if seconds < min(limit, SHORTEST):
            print(f"{name}: no time is left; run the same command again", flush=True)
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="train-on-gpu-") as scratch, (out / "log.txt").open("ab") as log:
            command = [sys.executable, __file__, "--out", str(out), "--part", name, "--scratch", scratch]
            process = subprocess.Popen(
                [*command, *(["--small"] if small else [])], stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                     "CLAIR_CACHE": scratch, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
            try:
                state = "done" if process.wait(seconds) == 0 else f"ended with exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the compiler's workers
                process.wait()
                state = f"killed after {seconds:.0f} s"
        result = read(out, name)
        if state == "done" and any(row["state"] == "left out" for row in result["rows"].values()):
            state = "left out in part"
        spent = round(result.get("seconds", 0) + time.monotonic() - started, 1)
        write(out / f"{name}.json", {**result, "state": state, "seconds": spent})
        print(f"{name}: {state}, {spent} s", flush=True)


def versions(scale: Scale) -> dict[str, Any]:
    """The device and the packages of a part."""
    import torch

    packages = {}
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "triton"):
        try:
            packages[package] = importlib.metadata.version(package) if importlib.util.find_spec(package) else None
        except importlib.metadata.PackageNotFoundError:
            packages[package] = None
    device = torch.cuda.get_device_name() if scale.on_gpu else "CPU"
    return {"device": device, "python": platform.python_version(), **packages}


def read(out: Path, name: str) -> dict[str, Any]:
    """The result file of a part, {} if there is none."""
    file = out / f"{name}.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a result file whole, or not at all."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    new.replace(file)


# ---- the table


def bars(results: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each bar: met, missed, or not measured, with its numbers."""
    rows = {name: result.get("rows", {}) for name, result in results.items()}
    lines = []

    def add(text: str, values: list[Any], *, met: Callable[[Any], bool], shown: str) -> None:
        known = [value for value in values if value is not None]
        verdict = "not measured" if not known else "met" if met(max(known)) else "missed"
        lines.append(f"- {verdict}: {text}" + (f" ({shown.format(max(known))})" if known else ""))

    differences = [row.get("largest_difference") for row in rows["kernels"].values()]
    add("each kernel equals `split` in float32 to 1 %", differences, met=lambda v: v < BARS["kernels"], shown="{:.4f}")
    tests = [row["exit_code"] for row in rows["kernels"].values() if row.get("passed") or row.get("failed")]
    add("the tests of a GPU pass", tests, met=lambda v: v == 0, shown="exit code {}")
    for tune in ("lora", "full"):
        curves = [rows["default"].get(f"{name}, {tune}", {}).get("losses") for name in ("apo train", "TRL")]
        apart = [max(abs(a - b) for a, b in zip(*curves, strict=True))] if all(curves) else []
        changed = f", they change by {max(curves[0]) - min(curves[0]):.3f}" if all(curves) else ""
        text = f"default `apo train`, {tune}: losses equal TRL's to {AGREE}{changed}"
        add(text, apart, met=lambda v: v <= AGREE, shown="{:.5f}")
        speeds = {name: row.get("pairs_per_second") for name, row in rows[f"trl_{tune}"].items()}
        ours = max((v for n, v in speeds.items() if v and n.startswith("APO")), default=None)
        theirs = max((v for n, v in speeds.items() if v and n.startswith("TRL")), default=None)
        ratio = [ours / theirs] if ours and theirs else []
        add(
            f"{tune}: at least twice as fast as TRL's fastest",
            ratio,
            met=lambda v: v >= BARS["times TRL"],
            shown="{:.2f}x",
        )
        measured = [row for name, row in rows[tune].items() if name.startswith("UltraFeedback")]
        speed = [row.get("pairs_per_second") for row in measured]
        add(
            f"{tune}, UltraFeedback: 8 pairs a second", speed, met=lambda v: v >= BARS["pairs a second"], shown="{:.2f}"
        )
        mfu = [row.get("mfu") for row in measured]
        add(f"{tune}, UltraFeedback: MFU of 40 %", mfu, met=lambda v: v >= BARS["MFU"], shown="{:.1%}")
        away = [abs(v - 1) for row in rows[tune].values() if (v := row.get("estimate_over_peak"))]
        add(f"{tune}: peak memory within 20 % of the estimate", away, met=lambda v: v <= BARS["memory"], shown="{:.1%}")
    return lines


def table(out: Path) -> str:
    """Device, bars and all rows as markdown."""
    results = {name: read(out, name) for name in PARTS}
    known = next((result["versions"] for result in results.values() if result.get("versions")), {})
    head = ", ".join(f"{key} {value}" if key != "device" else str(value) for key, value in known.items() if value)
    columns = {
        "pairs/s": "pairs_per_second", "tokens/s": "tokens_per_second", "MFU": "mfu", "peak, GiB": "peak_gib",
        "estimate, GiB": "estimate_gib", "estimate / peak": "estimate_over_peak",
    }  # fmt: skip
    lines = [head, "", *bars(results), "", f"| part | row | {' | '.join(columns)} |", "|" + "---|" * (2 + len(columns))]
    for name in PARTS:
        for row, values in results[name].get("rows", {}).items():
            cells = ["–" if values.get(key) is None else format_cell(key, values[key]) for key in columns.values()]
            if values["state"] != "done" or values.get("out_of_memory"):
                cells[0] = "out of memory" if values.get("out_of_memory") else values.get("reason", values["state"])
            lines.append(f"| {name} | {row} | {' | '.join(cells)} |")
    states = [f"{name}: {results[name].get('state', 'not run')}" for name in PARTS]
    return "\n".join([*lines, "", "; ".join(states)])


def format_cell(key: str, value: float) -> str:
    """A number of the table."""
    return f"{value:.1%}" if key == "mfu" else f"{value:,}"


def measure() -> dict[str, Any] | None:
    """All parts, into results/train_on_gpu; None where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    out = Path(__file__).parent / "results" / "train_on_gpu"
    run_parts(out, list(PARTS), minutes=MINUTES, limit=1e9, small=False)
    return {"parts": {name: read(out, name) for name in PARTS}}


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of result files")
    parser.add_argument("--table", action="store_true", help="print the table of the result files, and run nothing")
    parser.add_argument("--parts", default=",".join(PARTS), help="those to run, separated by commas")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time of this call")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds of a part at most")
    parser.add_argument("--small", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return
    if args.part:
        sys.exit(run_part(args.part, args.out, args.scratch, SMALL if args.small else GPU))
    names = args.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: no such part; there are {', '.join(PARTS)}")
    if not args.small:
        import torch

        if not torch.cuda.is_available():
            parser.error("no GPU here; --small runs tiny shapes on a CPU")
    run_parts(args.out.resolve(), names, minutes=args.minutes, limit=args.limit, small=args.small)
    print(table(args.out))


if __name__ == "__main__":
    main()
