"""How near an evaluation comes to the ideal on a judge that takes its time, and how long a local model answers.

    python tests/benchmarks/run.py eval

Seconds are those of the whole call of `evaluate`, the imports done before; the judge is a process of its own on the
same cores. Questions are MixEval-Hard's where the shared reference data is at hand (CLAIR_SHARED), else made up.

    judgements    1000 different ones, 0.5 s each, concurrency 100            ideal 5 s; the same again: no request
    answers       1000 items by the embedded world's model, greedy: equal questions are answered once
    drawn         1000 items by the same model at temperature 1: each is answered by itself
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
ROWS = 500
LATENCY = 0.5
CONCURRENCY = 100
ROUNDS = 3
LOCAL = os.environ.get("LOCAL", "1") != "0"  # LOCAL=0 leaves the minutes of generation out


def measure() -> dict[str, Any]:
    """All three; judgements in several rounds: the median, the least and the most."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as folder:
        invented = _invented(Path(folder) / "made-up")
        measured = {"judgements": _judgements(Path(folder), invented)}
        if LOCAL:
            measured |= _local(Path(folder), invented)
    return measured | {"load_average": round(os.getloadavg()[0], 1), "python": sys.version.split()[0]}


def _invented(folder: Path) -> Path:
    """A data folder with a full invented benchmark and judge messages, with their hashes as the published ones."""
    import hashlib

    from apo.evaluation.mixeval import benchmark as mixeval
    from tests.apo.evaluation.questions import JUDGE

    random = Random(0)
    target = folder / "2024-06-01" / "mixeval"
    target.mkdir(parents=True)
    vocabulary = ["the", "river", "has", "a", "number", "between", "known", "houses"]
    for split in mixeval.SPLITS:
        rows = {}
        for n in range(ROWS):
            context = " ".join(random.choices(vocabulary, k=int(random.expovariate(1 / 120))))
            choices = {"options": ["ice", "fire", "sun", "sea"], "target": [1]} if split == "multiple-choice" else {}
            common = {
                "context": context,
                "prompt": f"Which is number {n}?",
                "target": [str(n)],
                "benchmark_name": "DROP",
            }
            rows[str(n)] = common | choices
        (target / f"{split}.json").write_text(json.dumps(rows))
    (folder / "judge_prompts.json").write_text(json.dumps(JUDGE))
    texts = {split: JUDGE[split.replace("-", "_")]["user"] for split in mixeval.SPLITS}
    mixeval.JUDGE_SHA256 = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in texts.items()}
    return folder


def _judgements(folder: Path, data: Path) -> dict[str, Any]:
    from apo.evaluation.mixeval import benchmark as mixeval
    from tests.apo.evaluation.evaluating import evaluated, judging

    benchmark = mixeval.load(data, "2024-06-01", "full")
    responses = folder / "responses"
    responses.mkdir()
    for split in mixeval.SPLITS:
        rows = [row.as_upstream(str(row.row)) | {"response": f"It is {row.row}."} for row in benchmark.rows[split]]
        (responses / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ideal = 2 * ROWS * LATENCY / CONCURRENCY
    taken, again = [], []
    with judging(LATENCY) as server:
        options = {"split": "full", "responses": str(responses), "judge": {"url": server.url, "model": "j"}}
        options |= {"concurrency": CONCURRENCY}
        evaluated(data, folder / "warm", **options, limit=5)
        for n in range(ROUNDS):
            server.forget()
            start = time.perf_counter()
            evaluated(data, folder / f"out{n}", **options)
            taken.append(time.perf_counter() - start)
            paid = server.paid()
            start = time.perf_counter()
            evaluated(data, folder / f"out{n}", **options)
            again.append(time.perf_counter() - start)
            assert (paid, server.paid()) == (2 * ROWS, 2 * ROWS), (paid, server.paid())
    ratios = [seconds / ideal for seconds in taken]
    return {"ideal": ideal, "seconds": _spread(taken), "ratio": _spread(ratios), "second_run_seconds": _spread(again)}


def _local(folder: Path, invented: Path) -> dict[str, Any]:
    from apo.evaluation.config import default_batch_tokens
    from tests.apo.evaluation.evaluating import evaluated

    named = os.environ.get("CLAIR_SHARED")
    shared = (Path(named) if named else ROOT.parent / "shared") / "data" / "mixeval"
    data, split = (shared, "hard") if shared.is_dir() else (invented, "full")
    model = shutil.copytree(ROOT / "recipes" / "world" / "model", folder / "model")
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["max_position_embeddings"] = 16_384  # its own 512 are fewer than most questions have
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    measured: dict[str, Any] = {"questions": "MixEval-Hard" if split == "hard" else "made up"}
    for name, temperature in (("answers", None), ("drawn", 1.0)):
        start, cpu = time.perf_counter(), time.process_time()
        options = {"path": str(model), "batch_tokens": default_batch_tokens(), "temperature": temperature}
        score = evaluated(data, folder / name, split=split, model=options).score
        measured[name] = {
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "items": score.intervals["overall"].n,
            "asked": score.usage["model"].calls,
            "new_tokens": score.usage["model"].completion,
        }
    return measured


def _spread(values: list[float]) -> dict[str, float]:
    low, high = round(min(values), 3), round(max(values), 3)
    return {"median": round(statistics.median(values), 3), "least": low, "most": high}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
