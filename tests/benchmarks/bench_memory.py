"""Memory and speed of a build over many prompts, with a reviser that answers by a script in the same process.

    python tests/benchmarks/run.py memory

Ledger, parser, filters, contrast and Parquet are all there; only the network is not. Peak memory is of each build in a
process of its own, so that the difference between the sizes is what the rows cost. ROWS=10000,1000000 chooses sizes.
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
SIZES = tuple(int(size) for size in os.environ.get("ROWS", "10000,100000").split(","))


def measure() -> dict[str, Any]:
    """Rows a second and peak MB by number of rows, and how many MB the largest takes above the smallest."""
    measured = {}
    for rows in SIZES:
        result = subprocess.run(
            [sys.executable, __file__, str(rows)], check=True, capture_output=True, text=True, cwd=ROOT
        )
        measured[rows] = json.loads(result.stdout.strip().splitlines()[-1])
    more = measured[max(SIZES)]["peak_mb"] - measured[min(SIZES)]["peak_mb"]
    return {"rows": measured, "mb_more": round(more, 1)}


def _main(rows: int) -> None:
    sys.path.insert(0, str(ROOT))
    import clair.inference.open
    from clair.pipeline.build import build
    from tests.clair.scripted import Scripted, endpoint, recipe, revision

    class Silent(Scripted):
        """Drop every request, so that only the build's memory is measured."""

        async def complete(self, request: Any, sample: int = 0) -> str:
            answer = await super().complete(request, sample)
            self.requests.clear()
            return answer

    reviser = Silent("scripted", revision)
    clair.inference.open.open_model = lambda role, config: reviser  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        config = recipe(out, [], pipeline="revised", reviser=endpoint())
        with open(config.prompts.path, "w", encoding="utf-8") as file:
            for i in range(rows):
                file.write(json.dumps({"prompt": f"question {i} " * 8, "answer": f"a bad answer to {i} " * 10}) + "\n")
        started, used = time.perf_counter(), time.process_time()
        built = build(config)
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        assert built.manifest["counts"]["pairs"] == rows
        size = config.ledger_path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "seconds": round(seconds, 1),
                "rows_per_second": round(rows / seconds),
                "cpu_ms_per_row": round(1000 * cpu / rows, 3),
                "peak_mb": round(peak, 1),
                "ledger_bytes_per_row": round(size / rows),
            }
        )
    )


if __name__ == "__main__":
    _main(int(sys.argv[1]))
