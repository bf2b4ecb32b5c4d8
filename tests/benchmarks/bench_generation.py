"""How near answers of unequal length come to transformers' own batches of equal length, in tokens per second.

    python tests/benchmarks/run.py generation

Both on the real model (CLAIR_REAL_MODEL), side by side in one process, sampled at temperature 1, no early end of turn.

    equal      `generate` of transformers: a batch of 16, each row with 264 tokens, the mean of the other
    unequal    64 requests to a local model, `batch_size` 16, 16 to 512 tokens each; a row that ends is replaced
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
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
BATCH = 16
REQUESTS = int(os.environ.get("REQUESTS", "64"))
ROUNDS = int(os.environ.get("ROUNDS", "3"))
EOS = 2


def measure() -> dict[str, Any] | None:
    """Tokens per second of both in each round, and the ratios."""
    sys.path.insert(0, str(ROOT))
    default = Path.home() / ".cache" / "clair-apo" / "smollm2-135m"
    model = Path(os.environ.get("CLAIR_REAL_MODEL") or default)
    if not (model / "model.safetensors").is_file():
        return None
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_rounds(_endless(model, Path(folder))))


def _endless(model: Path, folder: Path) -> Path:
    """A copy of the model folder whose answers end at `max_tokens` only."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model / "generation_config.json").read_text("utf-8"))
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(config | {"suppress_tokens": [EOS]}), "utf-8")
    return folder


async def _rounds(folder: Path) -> dict[str, Any]:
    from clair.inference.local import LocalModel

    random = Random(0)
    lengths = [16 + round(n * 496 / (REQUESTS - 1)) for n in range(REQUESTS)]
    random.shuffle(lengths)
    prompts = [f"Write {n + 2} sentences about the number {n}." for n in range(REQUESTS)]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    model = LocalModel(folder, batch_size=BATCH)
    await model.check()
    equal, unequal = [], []
    for sample in range(ROUNDS):
        tokens, seconds = _equal(model, messages[:BATCH], round(statistics.mean(lengths)))
        equal.append(tokens / seconds)
        began = time.perf_counter()
        requests = [
            {"messages": row, "max_tokens": length, "temperature": 1.0}
            for row, length in zip(messages, lengths, strict=True)
        ]
        replies = await asyncio.gather(*(model.complete(request, sample) for request in requests))
        seconds = time.perf_counter() - began
        counts = [json.loads(reply)["usage"]["completion_tokens"] for reply in replies]
        assert counts == lengths
        unequal.append(sum(counts) / seconds)
    await model.close()
    ratios = [b / a for a, b in zip(equal, unequal, strict=True)]
    return {
        "equal": [round(value, 1) for value in equal],
        "unequal": [round(value, 1) for value in unequal],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "load_average": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
    }


def _equal(model: Any, messages: list[list[dict[str, str]]], tokens: int) -> tuple[int, float]:
    """The tokens that transformers generates for a full batch, and the seconds."""
    import torch

    tokenizer, transformer = model._load()
    texts = [tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False) for row in messages]
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    began = time.perf_counter()
    with torch.inference_mode():
        out = transformer.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0)
    return (out.shape[1] - inputs["input_ids"].shape[1]) * len(texts), time.perf_counter() - began
