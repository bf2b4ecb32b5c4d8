"""How long until something happens: importing the packages, --help of the commands, and the smallest build.

Seconds, best of ten. The build has two rows, which its server answers after a second each, at once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TRIES, BUILDS = 10, 5


def measure() -> dict[str, Any]:
    """Seconds for each, best of TRIES, interpreter start included; of the build all, with their processor seconds."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import clair": [sys.executable, "-c", "import clair"],
        "import apo": [sys.executable, "-c", "import apo"],
        "clair --help": [BIN / "clair", "--help"],
        "apo --help": [BIN / "apo", "--help"],
    }
    return {
        "seconds": {name: round(min(_seconds(command) for _ in range(TRIES)), 3) for name, command in commands.items()},
        "build_of_two_rows": _builds(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _seconds(command: list[Any]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def _builds() -> dict[str, Any]:
    """The command on two rows of a second each, into a new folder each time."""
    sys.path.insert(0, str(ROOT))
    from tests.clair.building import scripted, write_prompts

    seconds, before = [], os.times()
    with tempfile.TemporaryDirectory() as name, scripted() as server:
        rows = [{"prompt": f"Task {n} [[wait:1]]", "answer": f"a bad answer to {n}"} for n in range(2)]
        prompts = write_prompts(Path(name) / "prompts.jsonl", rows)
        reviser = {"url": server.url, "model": "m"}
        recipe = {"pipeline": "revised", "prompts": {"path": str(prompts)}, "reviser": reviser}
        for build in range(BUILDS):
            file = Path(name) / f"{build}.yaml"
            file.write_text(json.dumps(recipe | {"out": f"{name}/{build}"}), "utf-8")
            seconds.append(_seconds([BIN / "clair", "build", file]))
        after = os.times()  # of processes that ended: the server is still there
    cpu = (after.children_user + after.children_system - before.children_user - before.children_system) / BUILDS
    spread = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "cpu": cpu}
    return {name: round(value, 2) for name, value in spread.items()}
