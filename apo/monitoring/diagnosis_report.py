"""The report of `apo diagnose`: a run's state, its metrics over time, its problems, and a plot."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from apo.losses.mixture import objective_title
from apo.monitoring.diagnosis import MIN_LINES, Problem, diagnose
from apo.monitoring.metrics import series
from apo.monitoring.plots import draw_diagnosis, draw_order
from apo.monitoring.prediction import check_lines, check_order, read_prediction
from apo.run_dir.files import METRICS, PREDICTION, SAMPLES, read_log, read_run
from clair.core.errors import UserError, one_line
from clair.data.contrast import contrast_of, word_diff

PICTURE, ORDER_PICTURE = "diagnosis.png", "order.png"
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
    "guard/kl",
    "guard/winners",
    "guard/winners_fall",
    "grad_norm",
    "pairs_per_second",
    "mfu",
)
"""The metrics of the table. Those that the log lacks are left out."""


def diagnosis_lines(run: Path, picture: Path | None = None) -> list[str]:
    """Draw a run's metrics and return the report's lines. Raises UserError if nothing is logged yet."""
    about, rows = read_run(run), read_log(run / METRICS)
    if not series(rows, "loss")[0]:
        raise UserError(f"{run} has logged nothing yet; wait for the first log line ({METRICS})")
    recipe = about["recipe"]
    title = f"{objective_title(recipe['objective'])}, beta {recipe['beta']}, {recipe['model']}"
    target = picture or run / PICTURE
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_diagnosis(rows, target, title)
    problems = diagnose(rows, recipe["objective"])
    lines = [title, _state(about, rows), "", *_metrics_table(rows), "", *sample_lines(read_log(run / SAMPLES))]
    lines += _problem_lines(problems, len(series(rows, "loss")[0]))
    if (run / PREDICTION).is_file():
        report = read_prediction(str(run / PREDICTION))
        check = check_order(report, rows)
        lines += ["", *check_lines(report, check)]
        if check is not None:
            draw_order(check, target.with_name(ORDER_PICTURE), title)
            lines.append(f"drawn in {target.with_name(ORDER_PICTURE)}")
    lines += [f"stopped at step {stop['step']}: {stop['why']}" for stop in about.get("stopped", [])]
    return [*lines, "", f"drawn in {target}"]


def _state(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    step, steps = rows[-1]["step"], about.get("steps", "?")
    if about.get("finished"):
        return f"finished: {steps:,} steps in {about['seconds']:,.0f} s"
    return f"step {step:,} of {steps:,}; not finished: running, or stopped"


def _metrics_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return each metric at its first log, halfway, and at its last log."""
    lines = [f"{'':26}{'first':>12}{'half way':>12}{'last':>12}"]
    for key in TABLE_METRICS:
        _, values = series(rows, key)
        if values:
            cells = "".join(f"{values[index]:>12.4g}" for index in (0, len(values) // 2, -1))
            lines.append(f"{key:26}{cells}")
    return lines


def sample_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return, for each sample prompt, the share of the first answer's words that are lost at each step, and a diff.

    The diff compares the answer at step 0 with the last one.
    """
    answers: dict[int, dict[int, dict[str, Any]]] = {}
    for row in rows:
        answers.setdefault(row["prompt"], {})[row["step"]] = row
    steps = sorted({row["step"] for row in rows})[1:]
    if not steps:
        return []
    lines = [f"{'words of the first answer that are lost':40}" + "".join(f"{step:>7,}" for step in steps)]
    diffs = []
    complete = {number: by_step for number, by_step in answers.items() if 0 in by_step}
    titles = questions([by_step[0]["text"] for by_step in complete.values()])
    for title, (number, by_step) in zip(titles, complete.items(), strict=True):
        first, last = by_step[0]["answer"], by_step[max(by_step)]
        lost = {step: 1 - contrast_of(row["answer"], first).kept for step, row in by_step.items()}
        cells = "".join(f"{lost[step]:>7.0%}" if step in lost else f"{'':7}" for step in steps)
        lines.append(f"{number + 1:>2}. {title[:34]:36}{cells}")
        diff = _marked(first, last["answer"]) + ("" if last["ended"] else " ...")
        diffs += ["", f"{number + 1:>2}. {title[:100]}", diff]
    return [*lines, "", f"answers at step {steps[-1]:,}, [-removed-] and {{+added+}} words since step 0:", *diffs, ""]


def questions(texts: list[str]) -> list[str]:
    """Return the prompts without the lines that all begin and end with: the system message and the template's lines."""
    prompts = [text.strip().splitlines() for text in texts]
    if len(prompts) < 2:
        return [one_line(text) for text in texts]
    start = _common_lines(prompts)
    end = _common_lines([lines[start:][::-1] for lines in prompts])
    return [one_line("\n".join(lines[start : len(lines) - end])) for lines in prompts]


def _common_lines(prompts: list[list[str]]) -> int:
    """Count the first lines that all prompts share."""
    return sum(1 for _ in takewhile(lambda lines: len(set(lines)) == 1, zip(*prompts, strict=False)))


def _marked(first: str, last: str) -> str:
    """Return the word diff as text."""
    marks = {"same": ("", ""), "gone": ("[-", "-]"), "new": ("{+", "+}")}
    return "".join(f"{marks[kind][0]}{text}{marks[kind][1]}" for kind, text in word_diff(first, last)).strip()


def _problem_lines(problems: list[Problem], count: int) -> list[str]:
    if count < MIN_LINES:
        return [f"too early to judge: the log has {count} of the {MIN_LINES} lines that are needed"]
    if not problems:
        return ["no problem was found"]
    lines = []
    for problem in problems:
        when = f"since step {problem.step:,}" if problem.holds else f"at step {problem.step:,}, no longer"
        lines += [f"{'!' if problem.holds else '-'} {when}: {problem.message}", f"    what helps: {problem.advice}"]
    return lines
