"""How near `clair build` comes to the ideal on endpoints that take their time, and what a row costs of CPU time.

    python tests/benchmarks/run.py asking

Endpoints are processes of their own on the same cores. Seconds are those of the whole call of `build`, the imports
done before; CPU time is that of the building process alone, ledger, parsing and files included.

    constant      500 rows, 1 s each, concurrency 50                          ideal 10 s
    exponential   500 rows, 0.5 s + an exponential tail of mean 0.5 s, 50     ideal: the greedy schedule of the delays
    capped        600 rows, 0.5 s, at most 30 in flight, 100 wanted           ideal 10 s; and how often it was refused
    two_roles     3000 rows without latency, target and reviser, 64           rows and pairs a second
    thousand      4000 rows, 4 s, 1000 open connections                       CPU milliseconds a row
"""

from __future__ import annotations

import heapq
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

ROUNDS = 3


def measure() -> dict[str, Any]:
    """All five, each in several rounds: the median, the least and the most."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    _scripted([0.0] * 20, 20)  # imports
    random = Random(0)
    tails = [0.5 + random.expovariate(2.0) for _ in range(500)]
    return {
        "constant": _against(10.0, lambda: _scripted([1.0] * 500, 50)["seconds"]),
        "exponential": _against(greedy(tails, 50), lambda: _scripted(tails, 50)["seconds"]),
        "capped": _capped(),
        "two_roles": _two_roles(),
        "thousand": _thousand(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
    }


def greedy(delays: Sequence[float], slots: int) -> float:
    """Seconds until all are done when each place takes the next in order as soon as it is free."""
    free = [0.0] * slots
    for delay in delays:
        heapq.heappush(free, heapq.heappop(free) + delay)
    return max(free)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def _against(ideal: float, seconds: Any) -> dict[str, Any]:
    taken = [seconds() for _ in range(ROUNDS)]
    return {"ideal": round(ideal, 3), "seconds": _spread(taken), "ratio": _spread([t / ideal for t in taken])}


def _build(folder: str, rows: list[dict[str, Any]], concurrency: int, **roles: Any) -> dict[str, Any]:
    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig

    prompts = Path(folder) / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    config = BuildConfig.model_validate(
        {"pipeline": "revised", "prompts": {"path": str(prompts)}, "concurrency": concurrency, "out": f"{folder}/out"}
        | roles
    )
    cpu, start = time.process_time(), time.perf_counter()
    built = build(config)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert built.failed == 0, built.manifest["drop_reasons"]
    return {"seconds": seconds, "cpu_ms_per_row": 1000 * cpu / len(rows), "pairs": built.manifest["counts"]["pairs"]}


def _scripted(delays: Sequence[float], concurrency: int) -> dict[str, Any]:
    """One row for each delay of the endpoint."""
    from tests.clair.building import scripted

    rows = [
        {"id": n, "prompt": f"Task {n} [[wait:{delay:.4f}]]", "answer": f"a bad answer to task {n}"}
        for n, delay in enumerate(delays)
    ]
    with tempfile.TemporaryDirectory() as folder, scripted() as server:
        measured = _build(folder, rows, concurrency, reviser={"url": server.url, "model": "m"})
    assert measured["pairs"] == len(delays)
    return measured


def _thousand() -> dict[str, Any]:
    measured = [_scripted([4.0] * 4000, 1000) for _ in range(ROUNDS)]
    return {
        "cpu_ms_per_row": _spread([f["cpu_ms_per_row"] for f in measured]),
        "seconds": _spread([f["seconds"] for f in measured]),
        "ideal": 16.0,
    }


def _capped() -> dict[str, Any]:
    from recipes.world.running import running
    from recipes.world.server import ServerOptions
    from recipes.world.tasks import distinct_tasks

    rows = [{"id": t.id, "prompt": t.prompt, "answer": t.wrong} for t in distinct_tasks("train", 600, 0)]
    taken, refused = [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder, running(ServerOptions(latency=0.5, cap=30)) as server:
            taken.append(_build(folder, rows, 100, reviser={"url": server.url, "model": "world-reviser"})["seconds"])
            refused.append(server.stats()["statuses"].get("429", 0))
    return {"ideal": 10.0, "seconds": _spread(taken), "ratio": _spread([t / 10 for t in taken]), "refusals": refused}


def _two_roles() -> dict[str, Any]:
    from recipes.world.running import running
    from recipes.world.tasks import distinct_tasks

    rows = [{"id": t.id, "prompt": t.prompt} for t in distinct_tasks("train", 3000, 0)]
    measured = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder, running() as server:
            target = {"url": server.url, "model": "world-target"}
            reviser = {"url": server.url, "model": "world-reviser"}
            measured.append(_build(folder, rows, 64, target=target, reviser=reviser))
    return {
        "rows_per_second": _spread([len(rows) / f["seconds"] for f in measured]),
        "pairs_per_second": _spread([f["pairs"] / f["seconds"] for f in measured]),
        "cpu_ms_per_row": _spread([f["cpu_ms_per_row"] for f in measured]),
    }


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
