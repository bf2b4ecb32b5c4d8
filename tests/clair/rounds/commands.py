"""Commands in place of `clair` and `apo` for tests of the rounds: they write the files that the real ones write.

    python -m tests.clair.rounds.commands COMMAND ... --out FOLDER

appends `start` and `end` with the folder's name to the file named by COMMAND_LOG; between them it works for
COMMAND_SECONDS. Training ends with exit code 5 in the round that GUARD_ROUND names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

GAINS = {1: [0.6, [0.55, 0.65]], 2: [0.52, [0.46, 0.58]], 3: [0.7, [0.6, 0.8]]}


def log(text: str) -> None:
    with open(os.environ["COMMAND_LOG"], "a", encoding="utf-8") as file:
        file.write(text + "\n")


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def build(out: Path, recipe: dict[str, object]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompt = [{"role": "user", "content": "one"}]
    row = {"id": "a", "prompt": prompt, "chosen": prompt, "rejected": prompt}
    (out / "data").mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", [row]), ("test", [])):
        table = pa.Table.from_pylist(rows, schema=pa.Table.from_pylist([row]).schema)
        pq.write_table(table, out / "data" / f"{split}-00000-of-00001.parquet")
    (out / "dropped.jsonl").write_text("", "utf-8")
    counts = {"prompts": 1, "pairs": 1, "train": 1, "test": 0, "dropped": 0}
    manifest = {
        "format": 1,
        "counts": counts,
        "failed": 0,
        "seconds": 2.0,
        "cost": {"reviser": "0.5"},
        "recipe": recipe,
    }
    write(out / "manifest.json", manifest)


def main() -> None:
    arguments = sys.argv[1:]
    if "--dry-run" in arguments:
        print("# 7 steps")
        return
    out = Path(arguments[arguments.index("--out") + 1])
    number, name = int(out.parent.name.removeprefix("round-")), out.name
    log(f"start {number} {name}")
    if name == "model":
        write(out / "run.json", {"steps": 7})
    time.sleep(float(os.environ["COMMAND_SECONDS"]))
    if name == "pairs":
        build(out, json.loads(os.environ["BUILD_RECIPE"]))
    elif name == "model" and os.environ.get("GUARD_ROUND") == str(number):
        write(out / "run.json", {"steps": 7, "stopped": [{"step": 3, "why": "step 3: held-out text got worse"}]})
        sys.exit(5)
    elif name == "model":
        write(out / "run.json", {"steps": 7, "seconds": 3.0, "finished": "now"})
    elif name == "winrate":
        mean, interval = GAINS[number]
        write(out / "winrate.json", {"win_rate": {"mean": mean, "ci95": interval}, "seconds": 1.0})
    elif name == "ifeval":
        write(out / "score.json", {"seconds": 1.0})
    elif name == "compare":
        tuned = {"delta": 0.1 * number, "delta_ci95": [0.05, 0.2], "score": 0.5 + 0.1 * number, "ci95": [0.4, 0.8]}
        write(out / "compare.json", {"parts": [{"tuned": [tuned]}]})
    log(f"end {number} {name}")


if __name__ == "__main__":
    main()
