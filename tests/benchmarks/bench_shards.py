"""A build in shards against the same build in one process: rows a second, memory of each part, and the merge.

    python tests/benchmarks/run.py shards

The reviser answers by a script in each process, so that all is the build's own work. ROWS=200000 and SHARDS=2 choose.
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
ROWS = int(os.environ.get("ROWS", "200000"))
SHARDS = int(os.environ.get("SHARDS", "2"))


def measure() -> dict[str, Any]:
    """Seconds and rows a second of one process and of all shards at once, their peak MB, and the merge."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
            for i in range(ROWS):
                file.write(json.dumps({"prompt": f"question {i} " * 8, "answer": f"a bad answer to {i} " * 10}) + "\n")
        one = _timed(folder, [["build", "one"]])
        parts = _timed(folder, [["build", "all", f"{index}/{SHARDS}"] for index in range(1, SHARDS + 1)])
        merged = _timed(folder, [["merge", "all"]])
        same = all((folder / "one" / file).read_bytes() == (folder / "all" / file).read_bytes() for file in _FILES)
    faster = one["seconds"] / parts["seconds"]
    return {"rows": ROWS, "one": one, "shards": parts, "faster": round(faster, 2), "merge": merged, "same_bytes": same}


_FILES = ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "dropped.jsonl", "README.md")


def _timed(folder: Path, commands: list[list[str]]) -> dict[str, Any]:
    """All commands at once, from start to the end of the last, and the largest of their peaks."""
    started = time.perf_counter()
    running = [
        subprocess.Popen([sys.executable, __file__, str(folder), *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for command in commands
    ]
    peaks = [float(process.communicate()[0].splitlines()[-1]) for process in running]
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "rows_per_second": round(ROWS / seconds), "peak_mb": round(max(peaks), 1)}


def _main(folder: Path, verb: str, name: str, part: str | None = None) -> None:
    sys.path.insert(0, str(ROOT))
    from clair import session
    from clair.build import build
    from clair.config import BuildConfig
    from clair.merge import merge
    from clair.recipe import resolve
    from clair.shards import read_shard
    from tests.clair.scripted import Scripted, endpoint, revision

    class Silent(Scripted):
        """Keeps nothing of what it was asked, so that only the build's memory is measured."""

        async def complete(self, request: Any, sample: int = 0) -> str:
            answer = await super().complete(request, sample)
            self.asked.clear()
            return answer

    if verb == "merge":
        merge(folder / f"{name}-shards")
    else:
        reviser = Silent("scripted", revision)
        session.open_model = lambda role, config: reviser  # type: ignore[assignment]
        values = {"pipeline": "revised", "prompts": {"path": str(folder / "prompts.jsonl")}, "reviser": endpoint()}
        config = resolve(BuildConfig, values | {"out": str(folder / name)})
        built = build(config, shard=read_shard(part) if part else None)
        assert built.stopped is None
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *sys.argv[2:])
