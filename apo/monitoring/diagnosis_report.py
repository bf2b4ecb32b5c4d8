"""What `apo diagnose` prints and draws: state of a run, its numbers then and now, and its verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apo.losses.mixture import objective_title
from apo.monitoring.diagnosis import FEWEST, Verdict, verdicts
from apo.monitoring.metrics import series
from apo.monitoring.plots import draw_diagnosis
from apo.run_dir import files as runs
from apo.run_dir.files import read_metrics
from clair.core.errors import UserError

PICTURE = "diagnosis.png"
NUMBERS = (
    "loss", "eval_loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "eval_rewards/accuracies",
    "chosen_falls", "saturation", "probe/kl", "probe/edited_chosen", "probe/shared_chosen", "guard/text_loss",
    "guard/accuracy", "grad_norm", "pairs_per_second", "mfu",
)  # fmt: skip
"""In the table of numbers, where the log has them."""


def diagnosis(run: Path, picture: Path | None = None) -> list[str]:
    """Draw a run and give the lines to print. Raises UserError where there is nothing to look at."""
    about, rows = runs.read_run(run), read_metrics(run / runs.METRICS)
    if not series(rows, "loss")[0]:
        raise UserError(f"{run} has logged nothing yet; wait for the first log line ({runs.METRICS})")
    recipe = about["recipe"]
    title = f"{objective_title(recipe['objective'])}, beta {recipe['beta']}, {recipe['model']}"
    target = picture or run / PICTURE
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_diagnosis(rows, target, title)
    found = verdicts(rows, recipe["objective"])
    lines = [title, _state(about, rows), "", *_numbers(rows), "", *_told(found, len(series(rows, "loss")[0]))]
    lines += [f"stopped at step {stop['step']}: {stop['why']}" for stop in about.get("stopped", [])]
    return [*lines, "", f"drawn in {target}"]


def _state(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    step, steps = rows[-1]["step"], about.get("steps", "?")
    if about.get("finished"):
        return f"finished: {steps:,} steps in {about['seconds']:,.0f} s"
    return f"step {step:,} of {steps:,}; not finished: under way, or stopped"


def _numbers(rows: list[dict[str, Any]]) -> list[str]:
    """Each number at its first log, half way and at its last."""
    lines = [f"{'':26}{'first':>12}{'half way':>12}{'last':>12}"]
    for key in NUMBERS:
        _, values = series(rows, key)
        if values:
            told = "".join(f"{values[place]:>12.4g}" for place in (0, len(values) // 2, -1))
            lines.append(f"{key:26}{told}")
    return lines


def _told(found: list[Verdict], count: int) -> list[str]:
    if count < FEWEST:
        return [f"too early to judge: the log has {count} of the {FEWEST} lines that are needed"]
    if not found:
        return ["nothing wrong was found"]
    lines = []
    for verdict in found:
        when = f"since step {verdict.step:,}" if verdict.holds else f"at step {verdict.step:,}, no longer"
        lines += [f"{'!' if verdict.holds else '-'} {when}: {verdict.words}", f"    what helps: {verdict.advice}"]
    return lines
