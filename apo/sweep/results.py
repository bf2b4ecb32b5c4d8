"""Compare the runs of a sweep on the held-out pairs, and correct the best run for its selection."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from apo.evaluation.intervals import mean_with_interval
from apo.evaluation.pairs import mean_difference
from apo.evaluation.tables import percent_range, point_range, wide_table
from apo.run_dir.files import HELD_OUT, read_run
from apo.sweep.grid import SweepRun
from clair.core.errors import UserError
from clair.core.provenance import provenance
from clair.core.statistics import Best, best_of, clustered_mean, clustered_score

FORMAT = 1
_CEILING = 0.98
"""A share of right pairs from which it hardly distinguishes two runs."""


def summarize(runs: Sequence[SweepRun], failed: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of sweep.json for the finished `runs`; `failed` holds the errors of the other runs, by name.

    `right` is the share of held-out pairs whose chosen answer has the larger reward; a tie counts one half. `chosen`,
    `rejected` and `margin` are log-ratios in nats. `behind` is the best run's share minus this run's. Raises UserError
    if the held-out rows of a run are missing, or of other pairs.
    """
    rows = {run.name: _held_out(run) for run in runs}
    prompts = [row["prompt"] for row in next(iter(rows.values()), [])]
    for name, values in rows.items():
        if [row["prompt"] for row in values] != prompts:
            raise UserError(f"{name}/{HELD_OUT} is not of the same pairs as the others; delete that run's folder")
    right = {name: [row["right"] for row in values] for name, values in rows.items()}
    best = best_of(list(right.values()), prompts) if len(runs) > 1 and len(set(prompts)) > 1 else None
    best_name = best and runs[best.candidate].name
    entries = []
    for run in runs:
        sides = {side: [row[side] for row in rows[run.name]] for side in ("chosen", "rejected")}
        margins = [chosen - rejected for chosen, rejected in zip(*sides.values(), strict=True)]
        entries.append(
            {
                "name": run.name,
                "values": dict(run.values),
                "steps": run.steps,
                "seconds": read_run(run.out)["seconds"],
                "right": mean_with_interval(right[run.name], prompts, clustered_score),
                "margin": mean_with_interval(margins, prompts, clustered_mean),
                **{side: mean_with_interval(values, prompts, clustered_mean) for side, values in sides.items()},
                "behind": mean_difference(right[run.name], right[best_name], prompts)
                if best_name and run.name != best_name
                else None,
            }
        )
    return {
        "format": FORMAT,
        "held_out": {"pairs": len(prompts), "prompts": len(set(prompts))},
        "runs": entries,
        "failed": dict(failed),
        "best": best and _best(best, entries),
        **provenance(),
    }


def _best(best: Best, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    entry = entries[best.candidate]
    # If few pairs are wrong, the bootstrap's interval is too narrow: use at least the run's own, moved by the bias.
    low, high = (limit - best.bias for limit in entry["right"]["ci95"])
    interval = [max(0.0, min(best.lo, low)), min(1.0, max(best.hi, high))]
    numbers = {"right": best.observed, "selection_bias": best.bias, "corrected": best.corrected, "ci95": interval}
    return {"name": entry["name"], "of": len(entries), **numbers}


def _held_out(run: SweepRun) -> list[dict[str, Any]]:
    file = run.out / HELD_OUT
    if not file.is_file():
        raise UserError(f"{run.out} is finished without {HELD_OUT}; delete it, or train it with eval_rows: true")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def sweep_table(result: Mapping[str, Any]) -> Table:
    """Return each run's numbers on the held-out pairs, with 95 % intervals."""
    keys = [key.rpartition(".")[2] for run in result["runs"][:1] for key in run["values"]]
    heads = (*keys, "right, %", "95 % interval", "behind the best", "margin,\nnats", "chosen,\nnats", "s")
    held_out = result["held_out"]
    table = wide_table(f"{held_out['pairs']:,} held-out pairs of {held_out['prompts']:,} prompts", heads)
    for run in result["runs"]:
        behind = run["behind"]
        table.add_row(
            *(value if isinstance(value, str) else json.dumps(value) for value in run["values"].values()),
            f"{100 * run['right']['mean']:.1f}",
            percent_range(run["right"]["ci95"]),
            (point_range(behind["ci95"]) or f"{100 * behind['mean']:+.1f}") if behind else "",
            f"{run['margin']['mean']:.3g}",
            f"{run['chosen']['mean']:+.3g}",
            f"{run['seconds']:.0f}",
        )
    return table


def notes(result: Mapping[str, Any]) -> list[str]:
    """Return notes on the table: the best run and the bias of its selection, runs equal within chance, failures."""
    lines = []
    if best := result["best"]:
        right, bias, corrected = (f"{100 * best[key]:.1f}" for key in ("right", "selection_bias", "corrected"))
        lines.append(
            f"The best of {best['of']}, {best['name']}, has {right} % right, of which its selection accounts for about "
            f"{bias} points; corrected {corrected} %, 95 % interval {percent_range(best['ci95'])}."
        )
        behind = {run["name"]: run["behind"]["p"] for run in result["runs"] if run["behind"]}
        if equal := [name for name, p in behind.items() if p is None or p >= 0.05]:
            lines.append(f"These pairs do not distinguish it from {', '.join(equal)}.")
        if best["right"] >= _CEILING:
            lines.append("Nearly all pairs are right: choose by `chosen`, or by answers (apo eval, apo compare).")
    elif len(result["runs"]) > 1:
        lines.append("All held-out pairs have one prompt, so the best run cannot be determined.")
    return lines + [f"{name} failed: {error}" for name, error in result["failed"].items()]
