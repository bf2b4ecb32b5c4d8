"""Two nodes on this machine, one killed at a random moment of the build: the bytes of one process, what is paid twice.

    python tests/benchmarks/run.py ray ray_url

REPEATS=10 and ROWS=150 choose. The moment is when so many requests have come, drawn evenly from those that an
undisturbed build on two nodes sends: before the first one there is nothing to lose. `ray_url` does the same with all of
it in an object store, each node and the driver with a disk of its own, and the dead node's disk lost with it.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REPEATS = int(os.environ.get("REPEATS", "10"))
ROWS = int(os.environ.get("ROWS", "150"))


def measure(*, on_store: bool = False) -> dict[str, Any]:
    """Of each repeat: when the node died, seconds in all, whether the bytes are the same, and what was paid twice."""
    from tests.clair.building import final_bytes, finished, scripted, start_clair
    from tests.clair.ray_nodes import CONCURRENCY, cluster, paid_twice, wait_until, write_all_fates
    from tests.clair.s3_server import SHORT, fetched, machines_at, s3_server

    draw = random.Random(7)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        server, nodes = stack.enter_context(scripted()), stack.enter_context(cluster())
        folder = Path(name)
        recipe = write_all_fates(folder, server.url, ROWS)
        assert finished(start_clair("build", recipe, "--out", folder / "one")).code == 3
        expected = final_bytes(folder / "one")
        store = stack.enter_context(s3_server())[0] if on_store else ""
        if on_store:
            (folder / "sitecustomize.py").write_text(SHORT)
            os.environ |= machines_at(store, folder)

        def node(machine: str) -> Any:
            os.environ["CLAIR_CACHE"] = str(folder / machine)
            return nodes.add()

        def run(number: int, kill_after: int | None) -> dict[str, Any]:
            for left in ("all", "all-shards", "first", "second", "third"):
                shutil.rmtree(folder / left, ignore_errors=True)
            server.forget()
            dying, living = node("first"), node("second")
            os.environ["CLAIR_CACHE"] = str(folder / "third")
            started = time.monotonic()
            out = f"s3://pairs/{number}" if on_store else str(folder / "all")
            build = start_clair(
                "build", recipe, "--out", out, "--runner", "ray", "--address", nodes.address, "--shards", "4"
            )
            if kill_after is not None:
                wait_until(lambda: len(server.requests()) >= kill_after, 400)
                request_count = len(server.requests())
                nodes.kill(dying)
                shutil.rmtree(folder / "first", ignore_errors=True)
            code = finished(build, 400).code
            row: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "code": code}
            built = fetched(store, out) if on_store else final_bytes(folder / "all")
            row |= {"same_bytes": {name: built[name] for name in expected} == expected}
            row |= {"paid_twice": paid_twice(server), "requests": len(server.requests())}
            if kill_after is None:
                nodes.kill(dying)
            else:
                row |= {"asked_before": request_count}
            nodes.kill(living)
            return row

        undisturbed = run(0, None)
        killed = [run(number, draw.randint(1, undisturbed["requests"])) for number in range(1, REPEATS + 1)]
    return {"rows": ROWS, "in_flight_at_most": CONCURRENCY, "undisturbed": undisturbed, "killed": killed}


if __name__ == "__main__":
    sys.exit("run it by tests/benchmarks/run.py")
