"""The report of `apo diagnose`: a run's state, its metrics over time, its problems, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apo.losses.mixture import objective_title
from apo.monitoring.diagnosis import MIN_LINES, Problem, diagnose
from apo.monitoring.metrics import series
from apo.monitoring.plots import draw_diagnosis
from apo.run_dir.files import METRICS, read_metrics, read_run
from clair.core.errors import UserError

PICTURE = "diagnosis.png"
TABLE_METRICS = (
    "loss",
    "eval_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "eval_rewards/accuracies",
    "chosen_falls",
    "saturation",
    "probe/kl",
    "probe/edited_chosen",
    "probe/shared_chosen",
    "guard/text_loss",
    "guard/accuracy",
    "grad_norm",
    "pairs_per_second",
    "mfu",
)
"""The metrics in the table, if the log has them."""


def diagnosis_lines(run: Path, picture: Path | None = None) -> list[str]:
    """Draw a run's metrics and return the report's lines. Raises UserError if nothing is logged yet."""
    about, rows = read_run(run), read_metrics(run / METRICS)
    if not series(rows, "loss")[0]:
        raise UserError(f"{run} has logged nothing yet; wait for the first log line ({METRICS})")
    recipe = about["recipe"]
    title = f"{objective_title(recipe['objective'])}, beta {recipe['beta']}, {recipe['model']}"
    target = picture or run / PICTURE
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_diagnosis(rows, target, title)
    problems = diagnose(rows, recipe["objective"])
    lines = [title, _state(about, rows), "", *_metrics_table(rows), ""]
    lines += _problem_lines(problems, len(series(rows, "loss")[0]))
    lines += [f"stopped at step {stop['step']}: {stop['why']}" for stop in about.get("stopped", [])]
    return [*lines, "", f"drawn in {target}"]


def _state(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    step, steps = rows[-1]["step"], about.get("steps", "?")
    if about.get("finished"):
        return f"finished: {steps:,} steps in {about['seconds']:,.0f} s"
    return f"step {step:,} of {steps:,}; not finished: under way, or stopped"


def _metrics_table(rows: list[dict[str, Any]]) -> list[str]:
    """Each metric at its first log, in the middle and at its last."""
    lines = [f"{'':26}{'first':>12}{'half way':>12}{'last':>12}"]
    for key in TABLE_METRICS:
        _, values = series(rows, key)
        if values:
            cells = "".join(f"{values[index]:>12.4g}" for index in (0, len(values) // 2, -1))
            lines.append(f"{key:26}{cells}")
    return lines


def _problem_lines(problems: list[Problem], count: int) -> list[str]:
    if count < MIN_LINES:
        return [f"too early to judge: the log has {count} of the {MIN_LINES} lines that are needed"]
    if not problems:
        return ["nothing wrong was found"]
    lines = []
    for problem in problems:
        when = f"since step {problem.step:,}" if problem.holds else f"at step {problem.step:,}, no longer"
        lines += [f"{'!' if problem.holds else '-'} {when}: {problem.message}", f"    what helps: {problem.advice}"]
    return lines
