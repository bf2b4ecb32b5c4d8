"""How near answers of unequal length come to transformers' own batches of equal length, in tokens per second.

    python tests/benchmarks/run.py generation

All on the real model (CLAIR_REAL_MODEL), side by side in one process, five rounds, batches of 16, at temperature 1.
No answer ends by itself: the lengths are half of those that GPT-4's first 48 answers to IFEval have in this tokenizer.

    equal              `generate` of transformers: one batch, each answer with the mean of the lengths
    equal_same_product the same with the matrix product that a local model uses, so that only the batching differs
    unequal            48 requests to a local model at once, with the lengths in their order
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BATCH = 16
ROUNDS = 5
EOS = 2
LENGTHS = (
    *(386, 471, 416, 284, 9, 251, 241, 421, 226, 512, 512, 395, 323, 451, 394, 171, 6, 33, 261, 35, 364, 45, 164, 262),
    *(512, 451, 194, 47, 45, 147, 95, 512, 53, 70, 222, 27, 502, 512, 150, 491, 512, 442, 384, 287, 451, 13, 290, 433),
)
"""Tokens of answers, 512 at most."""


def measure() -> dict[str, Any] | None:
    """Tokens per second of each side in each round, and the ratios."""
    sys.path.insert(0, str(ROOT))
    default = Path.home() / ".cache" / "clair-apo" / "smollm2-135m"
    model = Path(os.environ.get("CLAIR_REAL_MODEL") or default)
    if not (model / "model.safetensors").is_file():
        return None
    with tempfile.TemporaryDirectory() as folder:
        return _rounds(_endless(model, Path(folder)))


def _endless(model: Path, folder: Path) -> Path:
    """A copy of the model folder whose answers end at `max_tokens` only."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model / "generation_config.json").read_text("utf-8"))
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(config | {"suppress_tokens": [EOS]}), "utf-8")
    return folder


def _rounds(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from clair.inference.generation.onednn import use_onednn
    from clair.inference.local import LocalModel

    lengths = [length // 2 for length in LENGTHS]
    prompts = [f"Write {number + 2} sentences about the number {number}." for number in range(len(lengths))]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    mean = round(statistics.mean(lengths))
    transformer, same_product = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    use_onednn(same_product)
    sides = {
        "equal": lambda _: _equal(folder, transformer, messages[:BATCH], mean),
        "equal_same_product": lambda _: _equal(folder, same_product, messages[:BATCH], mean),
        "unequal": lambda sample: asyncio.run(_unequal(model, messages, lengths, sample)),
    }
    model = LocalModel(folder, batch_size=BATCH)
    model.keep_loaded = True
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    _equal(folder, transformer, messages[:2], 2)
    asyncio.run(_unequal(model, messages[:2], [2, 2], 0))
    for sample in range(ROUNDS):
        for name, side in sides.items():
            began = time.perf_counter()
            tokens = side(sample)
            speeds[name].append(tokens / (time.perf_counter() - began))
            print(f"round {sample + 1}: {name} {speeds[name][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    ratios = [ours / best for ours, best in zip(speeds["unequal"], speeds["equal"], strict=True)]
    same = [ours / best for ours, best in zip(speeds["unequal"], speeds["equal_same_product"], strict=True)]
    return {
        **{name: [round(value, 1) for value in values] for name, values in speeds.items()},
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "ratios_same_product": [round(ratio, 3) for ratio in same],
        "ratio_same_product": round(statistics.median(same), 3),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
    }


async def _unequal(model: Any, messages: list[list[dict[str, str]]], lengths: list[int], sample: int) -> int:
    """Answer all requests; the tokens generated."""
    requests = [
        {"messages": row, "max_tokens": length, "temperature": 1.0}
        for row, length in zip(messages, lengths, strict=True)
    ]
    replies = await asyncio.gather(*(model.complete(request, sample) for request in requests))
    counts = [json.loads(reply)["usage"]["completion_tokens"] for reply in replies]
    assert counts == lengths
    return sum(counts)


def _equal(folder: Path, transformer: Any, messages: list[list[dict[str, str]]], tokens: int) -> int:
    """Answer with `tokens` each by transformers alone; the tokens generated."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts = [tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False) for row in messages]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        out = transformer.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0)
    assert out.shape[1] == inputs["input_ids"].shape[1] + tokens
    return tokens * len(texts)
