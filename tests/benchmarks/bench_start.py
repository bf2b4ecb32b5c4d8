"""How long until something happens: importing the packages, --help of the commands, the smallest build, and training.

Seconds, best of ten. The build has two rows, which its server answers after a second each, at once. Training is
`apo train` on the real model (CLAIR_REAL_MODEL) and the 24 pairs of train_vs_trl, in full: from the start of the
command to that of its first step, without and with the reference's log-probs in the cache.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TRIES, BUILDS, STARTS = 10, 5, 3


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
        "train_to_first_step": _training(),
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


def _training() -> dict[str, Any] | None:
    """The command until its first step: the first time, and then with the cache that it left. None without a model."""
    sys.path.insert(0, str(ROOT))
    from tests.benchmarks.train_vs_trl import REAL_BATCH, REAL_MODEL, real_data

    if not (REAL_MODEL / "model.safetensors").is_file():
        return None
    seconds: dict[str, list[float]] = {"first": [], "cached": []}
    for _ in range(STARTS):
        with tempfile.TemporaryDirectory() as name:
            real_data()["train_dataset"].to_json(f"{name}/pairs.jsonl")
            recipe = {"model": str(REAL_MODEL), "dataset": f"{name}/pairs.jsonl", "trainer": {"max_length": 8192}}
            recipe |= {"pairs_per_step": REAL_BATCH, "eval": False, "samples": 0, "probe": 0}
            for kind, values in seconds.items():
                file = Path(name) / f"{kind}.yaml"
                file.write_text(json.dumps({**recipe, "out": f"{name}/{kind}"}), "utf-8")
                values.append(_until_first_step([BIN / "apo", "train", file], REAL_BATCH, Path(name) / "cache"))
    return seconds


def _until_first_step(command: list[Any], pairs: int, cache: Path) -> float:
    """Seconds from the start of a command to that of its first step, by the step's line. Then it is killed."""
    start = time.perf_counter()
    environment = {**os.environ, "CLAIR_CACHE": str(cache)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if match := re.match(r"step 1/.* ([0-9.]+) pairs/s", line):
                seconds = time.perf_counter() - start - pairs / float(match[1])
                run.kill()
                return round(seconds, 2)
    raise RuntimeError(f"{command} ended before its first step")
