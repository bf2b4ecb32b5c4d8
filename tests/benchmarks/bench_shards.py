"""A build in shards against the same build in one process, at several sizes: rows a second, memory, ledger, merge.

    python tests/benchmarks/run.py shards

The reviser answers by a script in each process, so that all is the build's own work. ROWS=10000,100000,1000000 and
SHARDS=2 choose. One shard of 10,000 rows is built of plans of more and more rows too, since each shard reads them all.
What 10^8 rows would take is told from a line through the two largest sizes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SIZES = [int(rows) for rows in os.environ.get("ROWS", "10000,100000,1000000").split(",")]
SHARDS = int(os.environ.get("SHARDS", "2"))
PLANS, ROWS_OF_A_SHARD, PLANNED = (10**4, 10**5, 10**6), 10_000, 10**8


def measure() -> dict[str, Any]:
    """For each size: seconds, CPU seconds and rows a second of one process, of all shards at once, and of the merge;
    the largest peak of a process in MB, bytes of the ledgers a row, and the load of the machine before."""
    plans = [_plan(rows) for rows in PLANS]
    sizes = [_size(rows) for rows in SIZES]
    planned = {f"a_shard_{key}": _line(plans, key) for key in ("peak_mb", "cpu_seconds")}
    if len(sizes) > 1:
        merges = [{"rows": size["rows"], **size["merge"]} for size in sizes]
        planned |= {f"merge_{key}": _line(merges, key) for key in ("peak_mb", "cpu_seconds")}
    ledger = {"ledger_gb": round(sizes[-1]["ledger_bytes_per_row"] * PLANNED / 1e9, 1)}
    return {"shards": SHARDS, "sizes": sizes, "plans": plans, "planned": {"rows": PLANNED, **planned, **ledger}}


def _plan(rows: int) -> dict[str, Any]:
    """One shard of a plan: MB at its peak, CPU seconds."""
    with tempfile.TemporaryDirectory() as name:
        _write(Path(name), rows)
        shard = f"1/{rows // ROWS_OF_A_SHARD}"
        return {"rows": rows, "shard": shard, **_timed(ROWS_OF_A_SHARD, Path(name), [["build", "all", shard]])}


def _write(folder: Path, rows: int) -> None:
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps({"prompt": f"question {i} " * 8, "answer": f"a bad answer to {i} " * 10}) + "\n")


def _size(rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, rows)
        load = os.getloadavg()[0]
        single = _timed(rows, folder, [["build", "one"]])
        sharded = _timed(rows, folder, [["build", "all", f"{index}/{SHARDS}"] for index in range(1, SHARDS + 1)])
        merged = _timed(rows, folder, [["merge", "all"]])
        same = all((folder / "one" / file).read_bytes() == (folder / "all" / file).read_bytes() for file in _FILES)
        ledger = sum(file.stat().st_size for file in folder.glob("all-shards/*/ledger.sqlite"))
    return {
        "rows": rows,
        "load": round(load, 1),
        "one": single,
        "shards": sharded,
        "faster": round(single["seconds"] / sharded["seconds"], 2),
        "merge": merged,
        "ledger_bytes_per_row": round(ledger / rows),
        "same_bytes": same,
    }


def _line(measured: list[dict[str, Any]], key: str) -> dict[str, float]:
    """A line through the two largest sizes: what a million rows more take, and what the planned number takes."""
    small, large = sorted(measured, key=lambda size: size["rows"])[-2:]
    slope = (large[key] - small[key]) / (large["rows"] - small["rows"])
    planned = large[key] + slope * (PLANNED - large["rows"])
    return {"a_million_rows": round(slope * 1e6, 2), "planned": round(planned, 1)}


_FILES = ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "dropped.jsonl", "README.md")


def _timed(rows: int, folder: Path, commands: list[list[str]]) -> dict[str, Any]:
    """All commands at once, from start to the end of the last, the largest of their peaks, and the CPU's part."""
    started = time.perf_counter()
    running = [
        subprocess.Popen([sys.executable, __file__, str(folder), *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for command in commands
    ]
    usages = [[float(number) for number in process.communicate()[0].split()] for process in running]
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(cpu for _, cpu in usages), 1),
        "rows_per_second": round(rows / seconds),
        "peak_mb": round(max(peak for peak, _ in usages), 1),
    }


def _main(folder: Path, verb: str, name: str, shard: str | None = None) -> None:
    sys.path.insert(0, str(ROOT))
    import clair.inference.open
    from clair.cluster.merge import merge
    from clair.core.recipe import resolve
    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig
    from clair.pipeline.shards import parse_shard
    from tests.clair.scripted import Scripted, endpoint, revision

    class Silent(Scripted):
        """Drop every request, so that only the build's memory is measured."""

        async def complete(self, request: Any, sample: int = 0) -> str:
            answer = await super().complete(request, sample)
            self.requests.clear()
            return answer

    if verb == "merge":
        merge(folder / f"{name}-shards")
    else:
        reviser = Silent("scripted", revision)
        clair.inference.open.open_model = lambda role, config: reviser  # type: ignore[assignment]
        values = {"pipeline": "revised", "prompts": {"path": str(folder / "prompts.jsonl")}, "reviser": endpoint()}
        config = resolve(BuildConfig, values | {"out": str(folder / name)})
        built = build(config, shard=parse_shard(shard) if shard else None)
        assert built.stopped is None
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_maxrss / 1024, used.ru_utime + used.ru_stime)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *sys.argv[2:])
