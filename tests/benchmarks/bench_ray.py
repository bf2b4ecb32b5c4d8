"""Two nodes on this machine, one killed at a random moment of the build: the bytes of one process, what is paid twice.

    python tests/benchmarks/run.py ray

REPEATS=10 and ROWS=150 choose. The moment is when so many requests have come, drawn evenly from those that an
undisturbed build on two nodes sends: before the first one there is nothing to lose.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPEATS = int(os.environ.get("REPEATS", "10"))
ROWS = int(os.environ.get("ROWS", "150"))


def measure() -> dict[str, Any]:
    """Of each repeat: when the node died, seconds in all, whether the bytes are the same, and what was paid twice."""
    from tests.clair.building import final_bytes, finished, scripted, start_clair
    from tests.clair.ray_nodes import CONCURRENCY, cluster, paid_twice, wait_until, write_all_fates

    draw = random.Random(7)
    with tempfile.TemporaryDirectory() as name, scripted() as server, cluster() as nodes:
        folder = Path(name)
        recipe = write_all_fates(folder, server.url, ROWS)
        assert finished(start_clair("build", recipe, "--out", folder / "one")).code == 3
        expected = final_bytes(folder / "one")

        def run(kill_at: int | None) -> dict[str, Any]:
            for left in ("all", "all-shards"):
                shutil.rmtree(folder / left, ignore_errors=True)
            server.forget()
            dying, living = nodes.add(), nodes.add()
            started = time.monotonic()
            arguments = ["--out", folder / "all", "--runner", "ray", "--address", nodes.address, "--shards", "4"]
            build = start_clair("build", recipe, *arguments)
            if kill_at is not None:
                wait_until(lambda: len(server.seen()) >= kill_at, 400)
                asked = len(server.seen())
                nodes.kill(dying)
            code = finished(build, 400).code
            told: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "code": code}
            told |= {"same_bytes": final_bytes(folder / "all") == expected, "paid_twice": paid_twice(server)}
            told |= {"requests": len(server.seen())}
            if kill_at is None:
                nodes.kill(dying)
            else:
                told |= {"asked_before": asked}
            nodes.kill(living)
            return told

        undisturbed = run(None)
        killed = [run(draw.randint(1, undisturbed["requests"])) for _ in range(REPEATS)]
    return {"rows": ROWS, "in_flight_at_most": CONCURRENCY, "undisturbed": undisturbed, "killed": killed}


if __name__ == "__main__":
    sys.exit("run it by tests/benchmarks/run.py")
