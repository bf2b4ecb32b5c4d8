"""Rewriting against edit mode on the embedded world: what the reviser writes, how far apart pairs are, what they teach.

    python tests/benchmarks/run.py edits

The same 1,200 prompts and the same answers of the target (one shared ledger) go to the same reviser in both modes; both
datasets train the same recipe, and both models answer the same 600 held-out tasks. The server misbehaves in neither.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def measure() -> dict[str, Any]:
    """By mode: pairs, output tokens a call, contrast, held-out accuracy; and the paired difference of accuracy."""
    sys.path.insert(0, str(ROOT))
    from clair.core.statistics import clustered_mean
    from recipes.world.evaluate import greedy_answers, scores
    from recipes.world.reviser import Misbehaviour
    from recipes.world.running import running
    from recipes.world.server import ServerOptions
    from recipes.world.tasks import distinct_tasks, write_prompts

    nothing = Misbehaviour(**dict.fromkeys(Misbehaviour.__dataclass_fields__, 0.0))
    tasks = distinct_tasks("heldout", 600, seed=0)
    measured: dict[str, Any] = {}
    right: dict[str, list[float]] = {"base": scores(tasks, greedy_answers(ROOT / "recipes/world/model", tasks))}
    with tempfile.TemporaryDirectory() as folder, running(ServerOptions(misbehaviour=nothing)) as server:
        prompts = Path(folder) / "prompts.jsonl"
        write_prompts(prompts, distinct_tasks("train", 1200, seed=0))
        for mode in ("rewrite", "edits"):
            out, tuned = f"{folder}/{mode}", Path(folder) / f"{mode}-model"
            _command("clair", "build", "recipes/quickstart/clair.yaml", "--out", out, f"prompts.path={prompts}",
                     f"ledger={folder}/ledger.sqlite", f"reviser.url={server.url}", f"reviser.mode={mode}")  # fmt: skip
            _command("apo", "train", "recipes/quickstart/apo_zero.yaml", "--out", str(tuned), f"dataset={out}")
            manifest = json.loads((Path(out) / "manifest.json").read_text("utf-8"))
            right[mode] = scores(tasks, greedy_answers(tuned, tasks))
            measured[mode] = {
                "pairs": manifest["counts"]["pairs"],
                "drop_reasons": manifest["drop_reasons"],
                "reviser_calls": manifest["tokens"]["reviser"]["calls"],
                "output_tokens_per_call": _per_call(manifest),
                "contrast": {name: round(value, 3) for name, value in manifest["contrast"].items()},
                "accuracy": sum(right[mode]) / len(tasks),
            }
    gain = [edits - rewrite for edits, rewrite in zip(right["edits"], right["rewrite"], strict=True)]
    estimate = clustered_mean(gain, [task.template for task in tasks])
    return {
        "base_accuracy": sum(right["base"]) / len(tasks),
        **measured,
        "edits_minus_rewrite": {"delta": estimate.mean, "ci95": [estimate.lo, estimate.hi], "n": estimate.n},
    }


def _per_call(manifest: dict[str, Any]) -> float:
    tokens = manifest["tokens"]["reviser"]
    return round(tokens["completion"] / (tokens["calls"] + tokens["reused"]), 1)


def _command(*arguments: str) -> None:
    """One of the two commands; words with an equals sign are put into the recipe."""
    program = str(Path(sys.executable).with_name(arguments[0]))
    overrides = [piece for word in arguments[1:] if "=" in word for piece in ("--set", word)]
    subprocess.run([program, *(word for word in arguments[1:] if "=" not in word), *overrides], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)  # fmt: skip
