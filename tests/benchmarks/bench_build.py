"""What `clair build` costs by itself: pairs a second against a reviser that answers at once, at concurrency 64.

The reviser is the embedded world's server, in a process of its own, on the same cores. Prompts carry ready answers, so
that a pair is one request, one reply on disk, one parse, the filters, the contrast and a row of Parquet.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, ROUNDS, CONCURRENCY = 1500, 3, 64


def measure() -> dict[str, Any]:
    """Pairs a second of each round, and a second run of the last that finds all replies in the ledger."""
    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig
    from recipes.world.running import running
    from recipes.world.tasks import distinct_tasks

    with tempfile.TemporaryDirectory() as folder, running() as server:
        prompts = Path(folder) / "prompts.jsonl"
        tasks = distinct_tasks("train", ROWS, 0)
        prompts.write_text("".join(json.dumps({"prompt": t.prompt, "answer": t.wrong}) + "\n" for t in tasks), "utf-8")

        def pairs_per_second(round: int) -> float:
            config = BuildConfig.model_validate(
                {
                    "pipeline": "revised",
                    "prompts": {"path": str(prompts)},
                    "reviser": {"url": server.url, "model": "world-reviser"},
                    "concurrency": CONCURRENCY,
                    "out": f"{folder}/{round}",
                }
            )
            start = time.perf_counter()
            built = build(config)
            took = time.perf_counter() - start
            assert built.manifest["counts"]["pairs"] == ROWS, built.manifest["drop_reasons"]
            return round_(ROWS / took)

        rounds = [pairs_per_second(round) for round in range(ROUNDS)]
        again = pairs_per_second(ROUNDS - 1)
    return {
        "rows": ROWS,
        "concurrency": CONCURRENCY,
        "pairs_per_second": rounds,
        "pairs_per_second_from_ledger": again,
        "python": sys.version.split()[0],
    }


def round_(value: float) -> float:
    """One decimal is what repeats."""
    return round(value, 1)
