"""The result of a sweep: each run on the held-out pairs with intervals, and the best, corrected for its selection."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from apo.evaluation.intervals import mean_with_interval
from apo.evaluation.pairs import mean_difference
from apo.run_dir.files import HELD_OUT, read_run
from apo.sweep.grid import SweepRun
from clair.core.errors import UserError
from clair.core.provenance import provenance
from clair.core.statistics import Best, best_of, clustered_mean, clustered_score

FORMAT = 1


def summarize(runs: Sequence[SweepRun], failed: Mapping[str, str]) -> dict[str, Any]:
    """The content of sweep.json for the finished `runs`; `failed` are the errors of the others, by name.

    `right` is the share of held-out pairs whose chosen answer has the larger reward, a tie counting one half; `chosen`,
    `rejected` and `margin` are log-ratios in nats. `behind` is the best run's share minus this run's. Raises UserError
    if a run lacks its held-out rows, or has others.
    """
    rows = {run.name: _held_out(run) for run in runs}
    prompts = [row["prompt"] for row in next(iter(rows.values()))] if rows else []
    for name, values in rows.items():
        if [row["prompt"] for row in values] != prompts:
            raise UserError(f"{name}/{HELD_OUT} is not of the same pairs as the others; delete that run's folder")
    right = {name: [row["right"] for row in values] for name, values in rows.items()}
    several = len(runs) > 1 and len(set(prompts)) > 1
    best = best_of(list(right.values()), prompts) if several else None
    best_name = runs[best.candidate].name if best else None
    entries = []
    for run in runs:
        values = rows[run.name]
        margins = [row["chosen"] - row["rejected"] for row in values]
        entries.append(
            {
                "name": run.name,
                "values": dict(run.values),
                "steps": run.steps,
                "seconds": read_run(run.out)["seconds"],
                "right": mean_with_interval(right[run.name], prompts, clustered_score),
                "margin": mean_with_interval(margins, prompts, clustered_mean),
                **{
                    side: mean_with_interval([row[side] for row in values], prompts, clustered_mean)
                    for side in ("chosen", "rejected")
                },
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
    # The bootstrap's interval is too narrow where few pairs are wrong: it is at least the run's own, moved by the bias.
    low, high = (end - best.bias for end in entry["right"]["ci95"])
    interval = [max(0.0, min(best.lo, low)), min(1.0, max(best.hi, high))]
    numbers = {"right": best.observed, "selection_bias": best.bias, "corrected": best.corrected, "ci95": interval}
    return {"name": entry["name"], "of": len(entries), **numbers}


def _held_out(run: SweepRun) -> list[dict[str, Any]]:
    file = run.out / HELD_OUT
    if not file.is_file():
        raise UserError(
            f"{run.out} is finished without {HELD_OUT}; delete the folder, or train it with eval_rows: true"
        )
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def sweep_table(result: Mapping[str, Any]) -> Table:
    """Each run's numbers on the held-out pairs, with 95 % intervals."""
    held_out = result["held_out"]
    title = f"{held_out['pairs']:,} held-out pairs of {held_out['prompts']:,} prompts"
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False)
    keys = [key.rpartition(".")[2] for key in result["runs"][0]["values"]] if result["runs"] else []
    for head in (*keys, "right, %", "95 % interval", "behind the best", "margin,\nnats", "chosen,\nnats", "s"):
        table.add_column(head, overflow="fold")
    for run in result["runs"]:
        behind = run["behind"]
        table.add_row(
            *(value if isinstance(value, str) else json.dumps(value) for value in run["values"].values()),
            f"{100 * run['right']['mean']:.1f}",
            _interval(run["right"], 100, "{:.1f}"),
            (_interval(behind, 100, "{:+.1f}") or f"{100 * behind['mean']:+.1f}") if behind else "",
            f"{run['margin']['mean']:.3g}",
            f"{run['chosen']['mean']:+.3g}",
            f"{run['seconds']:.0f}",
        )
    return table


def _interval(numbers: Mapping[str, Any], scale: float, template: str) -> str:
    return " to ".join(template.format(scale * end) for end in numbers["ci95"]) if numbers["ci95"] else ""


def notes(result: Mapping[str, Any]) -> list[str]:
    """Notes below the table: the best run, the bias of choosing it, runs as good within chance, and failures."""
    lines = []
    if best := result["best"]:
        right, bias, corrected = (f"{100 * best[key]:.1f}" for key in ("right", "selection_bias", "corrected"))
        lines.append(
            f"The best of {best['of']}, {best['name']}, has {right} % right, of which choosing the best accounts "
            f"for about {bias} points; corrected {corrected} %, 95 % interval {_interval(best, 100, '{:.1f}')}."
        )
        close = [run["name"] for run in result["runs"] if run["behind"] and not _is_behind(run["behind"])]
        if close:
            lines.append(f"These pairs do not tell it apart from {', '.join(close)}.")
        if best["right"] >= _CEILING:
            lines.append("Nearly all pairs are right: choose by `chosen`, or by answers (apo eval, apo compare).")
    elif len(result["runs"]) > 1:
        lines.append("All held-out pairs have one prompt, so nothing can be said about the best run.")
    return lines + [f"{name} failed: {error}" for name, error in result["failed"].items()]


_CEILING = 0.98
"""Share of right pairs from which it says little about the difference of two runs."""


def _is_behind(difference: Mapping[str, Any]) -> bool:
    return difference["p"] is not None and difference["p"] < 0.05
