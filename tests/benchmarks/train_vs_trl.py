"""Training by `APOTrainer` against TRL's `DPOTrainer(loss_type="apo_zero")`, on the same model, pairs, seed, optimizer.

    python tests/benchmarks/run.py train_vs_trl
    EPOCHS=3 REPEATS=1 CASES="clair 4" SWEEP=0 python tests/benchmarks/run.py train_vs_trl
    CLOCK=cpu OMP_NUM_THREADS=1 python tests/benchmarks/run.py train_vs_trl     # on a busy machine: CPU seconds

Llama (hidden 512, 6 layers, vocabulary 32,000) from random weights, float32 on a CPU. Whole runs: time goes from the
constructor to the end of training, tokenisation and the reference included on both sides; the model is made before.
Ours starts with an empty cache each time. "defaults" are TRL's own (reference at every step, checkpointing on); "best"
are its fastest settings (reference precomputed, checkpointing off). All runs of a repeat follow each other in one
process, and the ratios are of one repeat; peak memory is each run's in a process of its own. The loss curves must be
equal. The sweep times single training steps, TRL's best settings, in turn, over 12 shapes of
64 to 20,480 tokens a batch.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("CLAIR_SHARED", "../shared"))
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


def make_trainer(mode: str, lengths: list[tuple[int, int, int]], batch: int, out: str, base: str) -> Any:
    """A trainer on pairs of these lengths; ours with an empty cache."""
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from apo.training.trainer import APOTrainer
    from apo.training.trainer_config import APOConfig

    same = {
        "output_dir": f"{out}/run", "per_device_train_batch_size": batch, "learning_rate": 1e-4, "use_cpu": True,
        "num_train_epochs": EPOCHS, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "max_length": 8192,
        "disable_tqdm": True, "seed": 0, "bf16": False,
    }  # fmt: skip
    data = {"train_dataset": make_pairs(lengths), "processing_class": make_tokenizer()}
    model = AutoModelForCausalLM.from_pretrained(base)
    if mode == "ours":
        keeping = {"precompute_ref_log_probs": True, "reference_cache": tempfile.mkdtemp(dir=out)}
        return APOTrainer(model, args=APOConfig(objective="apo_zero", **same, **keeping), **data)
    best = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if mode == "trl best" else {}
    return DPOTrainer(model, args=DPOConfig(loss_type=["apo_zero"], **same, **best), **data)


def run(mode: str, lengths: list[tuple[int, int, int]], batch: int, out: str, base: str) -> tuple[float, list[float]]:
    """Seconds of one training run, and its losses."""
    started = CLOCK()
    trainer = make_trainer(mode, lengths, batch, out, base)
    trainer.train()
    seconds = CLOCK() - started
    return seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def peak_memory(mode: str, name: str) -> float:
    """MB at the peak of one run, above what the process takes with libraries and model loaded."""
    command = [sys.executable, __file__, mode, name]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout.strip().splitlines()[-1])


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
                trainer = make_trainer(mode, lengths, pairs, out, f"{out}/base")
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
    results = {}
    selected = os.environ.get("CASES")
    for name in [selected] if selected else CASES:
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
    make_lengths, batch = CASES[name]
    _quiet()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    with tempfile.TemporaryDirectory() as out:
        make_model().save_pretrained(f"{out}/base")
        start = _high_water()
        run(mode, make_lengths()[:batch], batch, out, f"{out}/base")
    print(_high_water() - start)


def _high_water() -> float:
    """Peak MB of this process alone: getrusage's peak is inherited from the parent, which trained before."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    _main()
