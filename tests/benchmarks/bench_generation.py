"""A local model against transformers' `generate` and llama.cpp: greedy answers to IFEval's prompts.

    python tests/benchmarks/run.py generation

PROMPTS (64) of IFEval's prompts, spread over all of them (CLAIR_SHARED), at most TOKENS (512) tokens each, ROUNDS (3)
rounds, SmolLM2-135M-Instruct (CLAIR_REAL_MODEL). Each side runs in a process of its own, one after another; times and
peak memory (all of the process, weights included) leave the loading out.

    ours          a local model, 16 rows at once; a waiting prompt takes the place of an answer that has ended
    transformers  `generate`, batches of 16 prompts in their order, each as long as its longest answer
    llama.cpp     its server on the GGUF file that CLAIR_GGUF names, 16 slots, by the interpreter CLAIR_LLAMA_PYTHON
                  (this one if absent), which needs xllamacpp, a wheel of llama.cpp; its weights may be narrower

All sides hold the same number of rows. Tokens of ours and transformers are compared row by row: another order of
summation changes a token where two are equally likely, and all that follow it.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BATCH = 16
PROMPTS, TOKENS, ROUNDS = (int(os.environ.get(name, value)) for name, value in
                           (("PROMPTS", "64"), ("TOKENS", "512"), ("ROUNDS", "3")))  # fmt: skip
END = 2
SIDES = ("transformers", "ours", "llama.cpp")


def measure() -> dict[str, Any] | None:
    """Seconds of each side in each round, their ratios, peak memory, and how many rows have equal tokens."""
    default = Path.home() / ".cache" / "clair-apo" / "smollm2-135m"
    model = Path(os.environ.get("CLAIR_REAL_MODEL") or default)
    shared = Path(os.environ.get("CLAIR_SHARED") or ROOT.parent / "shared")
    prompts = shared / "data" / "ifeval" / "input_data.jsonl"
    if not (model / "model.safetensors").is_file() or not prompts.is_file():
        return None
    job = {"model": str(model.resolve()), "tokens": TOKENS, **_inputs(model, prompts)}
    sides, left_out = list(SIDES), {}
    gguf = os.environ.get("CLAIR_GGUF")
    if gguf is None or not Path(gguf).is_file():
        sides.remove("llama.cpp")
        left_out = {"llama.cpp": "CLAIR_GGUF names no file"}
    job["gguf"] = gguf
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(ROUNDS):
        for side in sides:
            rounds[side].append(_run(side, job))
            shown = {key: value for key, value in rounds[side][-1].items() if key != "rows"}
            print(f"round {number + 1}: {side} {json.dumps(shown)}", file=sys.stderr, flush=True)
    ours, theirs = rounds["ours"][0]["rows"], rounds["transformers"][0]["rows"]
    differing = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
        for pair in zip(ours, theirs, strict=True)
        if pair[0] != pair[1]
    ]
    return {
        "prompts": len(ours),
        "tokens": {side: sum(map(len, measured[0]["rows"])) for side, measured in rounds.items()},
        "equal_rows": len(ours) - len(differing),
        "first_differences": differing,
        "left_out": left_out,
        **{name: {side: [m[name] for m in measured] for side, measured in rounds.items()}
           for name in ("seconds", "cpu_seconds", "peak_mb")},
        **{f"{other}_over_ours": _ratios(rounds[other], rounds["ours"]) for other in sides if other != "ours"},
        "batch": BATCH,
        "max_tokens": TOKENS,
        "load_average": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
    }  # fmt: skip


def _ratios(other: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Our tokens a second over those of the other side, by the clock and by processor time, in each round."""
    ratios: dict[str, Any] = {}
    for name in ("seconds", "cpu_seconds"):
        speeds = [[sum(map(len, m["rows"])) / m[name] for m in side] for side in (ours, other)]
        values = [mine / theirs for mine, theirs in zip(*speeds, strict=True)]
        ratios[name] = {"median": round(statistics.median(values), 3), "all": [round(value, 3) for value in values]}
    return ratios


def _inputs(model: Path, prompts: Path) -> dict[str, Any]:
    """The messages of the prompts and, for the sides that take tokens, their ids."""
    from transformers import AutoTokenizer

    rows = [json.loads(line)["prompt"] for line in prompts.read_text("utf-8").splitlines()]
    chosen = [rows[index * len(rows) // PROMPTS] for index in range(PROMPTS)]
    messages = [[{"role": "user", "content": prompt}] for prompt in chosen]
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False) for row in messages]
    return {"messages": messages, "ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}


def _run(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """One side in a process of its own: seconds, processor seconds, peak memory, and the tokens of each row."""
    python = os.environ.get("CLAIR_LLAMA_PYTHON", sys.executable) if side == "llama.cpp" else sys.executable
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, __file__, side], input=json.dumps(job), capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{side} ended with code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- in the process of a side


def _measured(generate: Callable[[], list[list[int]]]) -> dict[str, Any]:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    wall, cpu = time.perf_counter(), time.process_time()
    rows = generate()
    seconds = {"seconds": round(time.perf_counter() - wall, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return {**seconds, "peak_mb": int(status["VmHWM"].split()[0]) // 1024, "rows": rows}


def _transformers(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"]).eval()

    def generate() -> list[list[int]]:
        rows: list[list[int]] = []
        for start in range(0, len(job["ids"]), BATCH):
            batch = job["ids"][start : start + BATCH]
            longest = max(map(len, batch))
            ids = torch.tensor([[END] * (longest - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=mask, max_new_tokens=job["tokens"], do_sample=False)
            rows += out[:, longest:].tolist()
        return [row[: row.index(END) + 1] if END in row else row for row in rows]

    return _measured(generate)


def _ours(job: dict[str, Any]) -> dict[str, Any]:
    from clair.inference.local import LocalModel

    class Recording(LocalModel):
        tokens: dict[tuple[int, ...], list[int]]

        def _reply(self, row: Any) -> str:
            self.tokens[tuple(row.prompt)] = row.tokens
            return super()._reply(row)

    model = Recording(job["model"], batch_size=BATCH)
    model.keep_loaded, model.tokens = True, {}
    asyncio.run(model.check())

    async def answer() -> None:
        limits = {"temperature": 0, "max_tokens": job["tokens"]}
        await asyncio.gather(*(model.complete({"messages": row, **limits}) for row in job["messages"]))

    def generate() -> list[list[int]]:
        asyncio.run(answer())
        return [model.tokens[tuple(ids)] for ids in job["ids"]]

    return _measured(generate)


def _llama_cpp(job: dict[str, Any]) -> dict[str, Any]:
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel = job["gguf"], BATCH
    params.n_ctx = BATCH * (max(map(len, job["ids"])) + job["tokens"])
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = xllamacpp.Server(params)

    def answer(messages: list[dict[str, str]]) -> list[int]:
        request = {"messages": messages, "temperature": 0, "max_tokens": job["tokens"]}
        return [0] * server.handle_chat_completions(request)["usage"]["completion_tokens"]  # their number is compared

    with ThreadPoolExecutor(BATCH) as pool:
        return _measured(lambda: list(pool.map(answer, job["messages"])))


if __name__ == "__main__":
    runs = dict(zip(SIDES, (_transformers, _ours, _llama_cpp), strict=True))
    print(json.dumps(runs[sys.argv[1]](json.load(sys.stdin))))
