"""Training by `APOTrainer` against TRL's `DPOTrainer(loss_type="apo_zero")`, on the same model, pairs, seed, optimizer.

    python tests/benchmarks/run.py train_vs_trl
    EPOCHS=3 REPEATS=1 CASES="clair 4" SWEEP=0 python tests/benchmarks/run.py train_vs_trl
    CLOCK=cpu OMP_NUM_THREADS=1 python tests/benchmarks/run.py train_vs_trl     # on a busy machine: CPU seconds
    CASES="real model" PAIRS=8 LAYERS=6 SWEEP=0 python tests/benchmarks/run.py train_vs_trl     # the real model, cut

The first row is a real model: SmolLM2-135M-Instruct (CLAIR_REAL_MODEL), trained in full on prompts of IFEval with two
of GPT-4's recorded answers of 60 to 260 words (CLAIR_SHARED), 8 pairs a step. `PAIRS` is their number, `LAYERS` how
many of the model's layers are used. Each of its runs is a process of its own, which is killed, and recorded so, at more
than `MEMORY_LIMIT_GB`; its peak memory is that of the process. Ours has the heap that `apo` gives itself (apo/heap.py).
Measured are the seconds from the start of a run to its first step, those of each step, and the share of peak: useful
FLOPs (ComputeScale: packed tokens without padding, labels, attention as whole rectangles) a second over the best square
float32 product of 1,024 to 4,096 in the same process.

The other rows: Llama (hidden 512, 6 layers, vocabulary 32,000) from random weights, float32 on a CPU. Whole runs: time
goes from the constructor to the end of training, loading, tokenisation and the reference included on both sides. Ours
starts with an empty cache each time. "defaults" are TRL's own (reference at every step, checkpointing on); "best" are
its fastest settings (reference precomputed, checkpointing off). All runs of a repeat follow each other in one process,
and the ratios are of one repeat; peak memory is each run's in a process of its own. The loss curves must be equal. The
sweep times single training steps, TRL's best settings, in turn, over 12 shapes of 64 to 20,480 tokens a batch.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("CLAIR_SHARED", "../shared"))
REAL_MODEL = Path(os.environ.get("CLAIR_REAL_MODEL") or Path.home() / ".cache" / "clair-apo" / "smollm2-135m")
REAL, REAL_BATCH = "real model", 8
PAIRS, LAYERS = int(os.environ.get("PAIRS", "24")), int(os.environ.get("LAYERS", "0"))
MEMORY_LIMIT_GB = float(os.environ.get("MEMORY_LIMIT_GB", "24"))
VOCABULARY = 32_000
EPOCHS, REPEATS = int(os.environ.get("EPOCHS", "1")), int(os.environ.get("REPEATS", "3"))
CLOCK = time.process_time if os.environ.get("CLOCK") == "cpu" else time.perf_counter
MODES = ("ours", "trl defaults", "trl best")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def clair_lengths(pairs: int) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) token lengths of real CLAIR pairs, repeated."""
    lengths = json.loads((SHARED / "data/clair_gpt4/lengths.json").read_text())["lengths"]
    return [tuple(lengths[i % len(lengths)]) for i in range(pairs)]


def make_tokenizer() -> Any:
    """A tokenizer of as many words as the model has embeddings."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<bos>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 5))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_pairs(lengths: list[tuple[int, int, int]]) -> Any:
    """Random words of these lengths as conversations."""
    import random

    from datasets import Dataset

    draw = random.Random(0)

    def turn(role: str, n: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(f"w{draw.randrange(VOCABULARY - 5)}" for _ in range(n))}]

    return Dataset.from_list(
        [
            {"prompt": turn("user", p), "chosen": turn("assistant", c), "rejected": turn("assistant", r)}
            for p, c, r in lengths
        ]
    )


def make_model() -> Any:
    """The same random weights each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    return LlamaForCausalLM(config)


def random_data(lengths: list[tuple[int, int, int]]) -> dict[str, Any]:
    """The data of a trainer: random pairs of these lengths and their tokenizer."""
    return {"train_dataset": make_pairs(lengths), "processing_class": make_tokenizer()}


def make_trainer(mode: str, data: dict[str, Any], batch: int, out: str, base: str) -> Any:
    """A trainer on this data; ours with an empty cache."""
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from apo.training.trainer import APOTrainer
    from apo.training.trainer_config import APOConfig

    same = {
        "output_dir": f"{out}/run", "per_device_train_batch_size": batch, "learning_rate": 1e-4, "use_cpu": True,
        "num_train_epochs": EPOCHS, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "max_length": 8192,
        "disable_tqdm": True, "seed": 0, "bf16": False,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base)
    if mode == "ours":
        keeping = {"precompute_ref_log_probs": True, "reference_cache": tempfile.mkdtemp(dir=out)}
        return APOTrainer(model, args=APOConfig(objective="apo_zero", **same, **keeping), **data)
    best = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if mode == "trl best" else {}
    return DPOTrainer(model, args=DPOConfig(loss_type=["apo_zero"], **same, **best), **data)


def run(mode: str, lengths: list[tuple[int, int, int]], batch: int, out: str, base: str) -> tuple[float, list[float]]:
    """Seconds of one training run, and its losses."""
    started = CLOCK()
    trainer = make_trainer(mode, random_data(lengths), batch, out, base)
    trainer.train()
    seconds = CLOCK() - started
    return seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def peak_memory(mode: str, name: str) -> float:
    """MB at the peak of one run, above what the process takes with libraries and model loaded."""
    command = [sys.executable, __file__, mode, name]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout.strip().splitlines()[-1])


def real_data() -> dict[str, Any]:
    """Prompts of IFEval, each with its own answer by GPT-4 as chosen and the next one's as rejected."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    lines = (SHARED / "data/ifeval/gpt4_responses.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if 60 <= len(row["response"].split()) <= 260]
    pairs = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["response"]}],
            "rejected": [{"role": "assistant", "content": other["response"]}],
        }
        for row, other in zip(rows[::2], rows[1::2], strict=False)
    ]
    tokenizer = AutoTokenizer.from_pretrained(REAL_MODEL)
    # The template's line break after the last turn: TRL trains it and ours does not, as no model writes it.
    broken, unbroken = (
        "'<|im_end|>' + '\n'}}",
        "'<|im_end|>'}}{% if not loop.last or add_generation_prompt %}{{'\n'}}{% endif %}",
    )
    assert broken in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(broken, unbroken)
    return {"train_dataset": Dataset.from_list(pairs[:PAIRS]), "processing_class": tokenizer}


def best_product() -> float:
    """FLOPs a second of the best square float32 product of 1,024 to 4,096, by either of torch's libraries."""
    import torch

    best = 0.0
    for size in (1024, 2048, 4096):
        factor = torch.ones(size, size)
        for multiply in (torch.mm, lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")):
            for _ in range(2 if size == 4096 else 4):
                started = CLOCK()
                multiply(factor, factor)
                threads = _threads() if CLOCK is time.process_time else 1
                best = max(best, 2 * size**3 / (CLOCK() - started) * threads)
    return best


def _real_run(mode: str) -> None:
    """Train the real model in this process, and print what is measured as JSON, a line for each step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

    from apo.monitoring.throughput import compute_scale
    from apo.packing.layout import pack_pairs

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = CLOCK()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = CLOCK() - self.began

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                emit(step_seconds=round(self.seconds, 2), losses=logs["loss"])

    def emit(**values: Any) -> None:
        print(json.dumps(values), flush=True)

    peak = best_product()
    with tempfile.TemporaryDirectory() as out:
        base = str(REAL_MODEL)
        if LAYERS:
            config = AutoConfig.from_pretrained(REAL_MODEL)
            config.num_hidden_layers, base = LAYERS, f"{out}/base"
            AutoModelForCausalLM.from_pretrained(REAL_MODEL, config=config).save_pretrained(base)
        started = CLOCK()
        trainer = make_trainer(mode, real_data(), REAL_BATCH, out, base)
        scale = compute_scale(trainer.model, torch.device("cpu"))
        work = torch.tensor(pack_pairs([dict(row) for row in trainer.train_dataset]).counts).sum(0).tolist()
        emit(peak_gflops=round(peak / 1e9, 1), step_flops=scale.flops(*work[2:]) * REAL_BATCH / PAIRS)
        emit(seconds_before_training=round(CLOCK() - started, 2))
        steps = Steps()
        trainer.add_callback(steps)
        trainer.train()
        emit(seconds=round(CLOCK() - started, 2), peak_mb=round(_high_water()))


def _real_measurement(mode: str) -> dict[str, Any]:
    """Run the real model in a process of its own: the values that it printed, steps in lists, and if it was killed."""
    command = [sys.executable, __file__, mode, REAL]
    result: dict[str, Any] = {"step_seconds": [], "losses": []}
    from apo.heap import TUNABLES

    heap = {"GLIBC_TUNABLES": TUNABLES} if mode == "ours" else {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | heap) as process:
        watch = threading.Thread(target=_kill_above_limit, args=(process, result))
        watch.start()
        for line in process.stdout or ():
            if line.startswith('{"'):  # not the trainer's own log
                print(REAL, mode, line, end="", file=sys.stderr, flush=True)
                for key, value in json.loads(line).items():
                    result[key] = [*result[key], value] if key in ("step_seconds", "losses") else value
        watch.join()
    if process.returncode and "killed" not in result:
        raise RuntimeError(f"{mode} ended with exit code {process.returncode}")
    return result


def _kill_above_limit(process: subprocess.Popen[str], result: dict[str, Any]) -> None:
    while process.poll() is None:
        used = _status_mb("VmRSS", process.pid) / 1024
        if used > MEMORY_LIMIT_GB:
            result["killed"] = f"{used:.1f} GB are above the limit of {MEMORY_LIMIT_GB:g}"
            process.kill()
        time.sleep(0.1)


def measure_real(repeats: int) -> dict[str, Any] | None:
    """Run the real model, None where it is absent."""
    if not (REAL_MODEL / "model.safetensors").is_file():
        return None
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for _ in range(repeats):
        for mode in os.environ.get("MODES", ",".join(MODES)).split(","):
            runs[mode].append(_real_measurement(mode))
    return real_row(runs)


def real_row(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The row of the real model: every run of each mode, and ratios of TRL to ours with their spread."""
    ours, measured = runs["ours"], [mode for mode in MODES if runs[mode]]
    whole = [mode for mode in measured if all("seconds" in run for run in runs[mode])]
    others = [mode for mode in measured[1:] if mode in whole]
    stepped = [mode for mode in measured if all(run["step_seconds"] for run in runs[mode])]
    step = {mode: [statistics.mean(run["step_seconds"]) for run in runs[mode]] for mode in stepped}

    def same_steps(theirs: list[dict[str, Any]]) -> list[float]:  # a killed run has fewer
        counts = [len(run["step_seconds"]) for run in theirs]
        return [statistics.mean(run["step_seconds"][:count]) for run, count in zip(ours, counts, strict=True)]

    differences = [
        abs(a - b)
        for mode in stepped[1:]
        for run, own in zip(runs[mode], ours, strict=True)
        for a, b in zip(run["losses"], own["losses"], strict=False)
    ]
    assert max(differences, default=0.0) < 1e-4, f"the losses differ by {max(differences)}"
    memory = {mode: max(run["peak_mb"] for run in runs[mode]) for mode in whole}
    return {
        "pairs": PAIRS,
        "pairs_a_step": REAL_BATCH,
        "layers": LAYERS or json.loads((REAL_MODEL / "config.json").read_text("utf-8"))["num_hidden_layers"],
        "seconds": {mode: [run["seconds"] for run in runs[mode]] for mode in whole},
        "ratio": {mode: _spread(*([run["seconds"] for run in runs[m]] for m in (mode, "ours"))) for mode in others},
        "step_seconds": {mode: [run["step_seconds"] for run in runs[mode]] for mode in stepped},
        "step_ratio": {mode: _spread(step[mode], same_steps(runs[mode])) for mode in stepped[1:]},
        "seconds_before_training": {mode: [run["seconds_before_training"] for run in runs[mode]] for mode in stepped},
        "share_of_peak": {
            mode: [
                round(run["step_flops"] / seconds / run["peak_gflops"] / 1e9, 3)
                for run, seconds in zip(runs[mode], step[mode], strict=True)
            ]
            for mode in stepped
        },
        "peak_gflops": {mode: [run["peak_gflops"] for run in runs[mode]] for mode in stepped},
        "peak_mb": memory,
        "peak_ratio": {mode: round(memory["ours"] / memory[mode], 3) for mode in others},
        "losses": {mode: [run["losses"] for run in runs[mode]] for mode in stepped},
        "largest_loss_difference": max(differences, default=None),
        "killed": {mode: [run["killed"] for run in runs[mode] if "killed" in run] for mode in measured},
        "memory_limit_gb": MEMORY_LIMIT_GB,
    }  # fmt: skip


CASES = {
    "clair 4": (lambda: clair_lengths(20), 4),
    "clair 8": (lambda: clair_lengths(24), 8),
    "prompt 1200, responses 300": (lambda: [(1200, 300, 300)] * 8, 4),
}
"""Lengths of the pairs, and pairs a batch."""
SWEEP = (
    (16, 16, 1), (16, 16, 16), (16, 256, 1), (16, 1024, 4), (128, 128, 8), (256, 64, 16),
    (512, 16, 8), (512, 512, 4), (1024, 128, 4), (1024, 1024, 2), (4096, 16, 1), (4096, 1024, 1),
)  # fmt: skip
"""Prompt, response, pairs a batch; the two responses are alike in length, which is where padding costs TRL nothing."""


def sweep(repeats: int = 3) -> dict[str, Any]:
    """Per shape: stacked tokens, and the ratio of TRL's step (forward and backward) to ours with its spread."""
    import torch

    results = {}
    with tempfile.TemporaryDirectory() as out:
        make_model().save_pretrained(f"{out}/base")
        for prompt, response, pairs in SWEEP:
            lengths = [(prompt, response, response)] * max(2, pairs)
            seconds: dict[str, list[float]] = {"ours": [], "trl best": []}
            steps = {}
            for mode in seconds:
                trainer = make_trainer(mode, random_data(lengths), pairs, out, f"{out}/base")
                trainer.current_gradient_accumulation_steps = 1
                batch = next(iter(trainer.get_train_dataloader()))
                steps[mode] = functools.partial(
                    trainer.training_step, trainer.model.train(), batch, torch.tensor(pairs)
                )
                steps[mode]()  # buffers are made
            for _ in range(repeats):
                for mode, step in steps.items():
                    started = CLOCK()
                    step()
                    seconds[mode].append(CLOCK() - started)
            name = f"prompt {prompt}, responses {response}, {pairs} pairs"
            tokens = 2 * pairs * (prompt + response)
            results[name] = {"stacked_tokens": tokens, "ratio": _spread(seconds["trl best"], seconds["ours"])}
            print(name, results[name], file=sys.stderr, flush=True)
    return results


def measure(repeats: int = REPEATS) -> dict[str, Any]:
    """Per case: seconds of every run, ratios of TRL to ours with their spread, peak memory and its ratio."""
    _quiet()
    results: dict[str, Any] = {}
    selected = os.environ.get("CASES")
    if selected in (None, REAL) and (row := measure_real(repeats)):
        results[REAL] = row
    for name in [*CASES] if selected is None else {selected} - {REAL}:
        make_lengths, batch = CASES[name]
        lengths = make_lengths()
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        losses: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as out:
            base = f"{out}/base"
            make_model().save_pretrained(base)
            for _ in range(repeats):
                for mode in MODES:
                    took, losses[mode] = run(mode, lengths, batch, out, base)
                    seconds[mode].append(round(took, 2))
                    print(name, mode, round(took, 2), file=sys.stderr, flush=True)
        difference = max(abs(a - b) for mode in MODES[1:] for a, b in zip(losses["ours"], losses[mode], strict=True))
        assert difference < 1e-4, f"the losses differ by {difference}"
        memory = {mode: peak_memory(mode, name) for mode in MODES}
        results[name] = {
            "pairs": len(lengths),
            "seconds": seconds,
            "ratio": {mode: _spread(seconds[mode], seconds["ours"]) for mode in MODES[1:]},
            "peak_mb": memory,
            "peak_ratio": {mode: round(memory["ours"] / memory[mode], 3) for mode in MODES[1:]},
            "largest_loss_difference": difference,
        }
    swept = {} if os.environ.get("SWEEP") == "0" else sweep()
    clock = "CPU seconds" if CLOCK is time.process_time else "seconds"
    return {
        "clock": clock,
        "threads": _threads(),
        "epochs": EPOCHS,
        "repeats": repeats,
        "cases": results,
        "sweep": swept,
    }


def _spread(theirs: list[float], ours: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"min": round(min(ratios), 2), "median": round(statistics.median(ratios), 2), "max": round(max(ratios), 2)}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _quiet() -> None:
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _main() -> None:
    mode, name = sys.argv[1:]
    _quiet()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    if name == REAL:
        _real_run(mode)
        return
    make_lengths, batch = CASES[name]
    with tempfile.TemporaryDirectory() as out:
        make_model().save_pretrained(f"{out}/base")
        start = _high_water()
        run(mode, make_lengths()[:batch], batch, out, f"{out}/base")
    print(_high_water() - start)


def _high_water() -> float:
    """Peak MB of this process alone: getrusage's peak is inherited from the parent, which trained before."""
    return _status_mb("VmHWM")


def _status_mb(key: str, process: int | str = "self") -> float:
    """A size of a process in MB; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), 0.0)


if __name__ == "__main__":
    _main()
