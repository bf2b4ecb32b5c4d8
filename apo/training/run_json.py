"""run.json of a run: written when it begins or resumes, and finished with the files of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.models.load import ADAPTER_CONFIG, hash_model_files
from apo.run_dir.files import (
    CARD,
    METRICS,
    PICTURE,
    PREDICTION,
    RUN,
    Status,
    move_files,
    now,
    read_log,
    read_run,
    redacted_recipe,
    truncate_logs,
    write_card,
    write_new_run,
)
from clair.core.errors import UserError
from clair.core.files import write_json
from clair.core.recipe import resolved

if TYPE_CHECKING:
    from apo.training.plan import Plan

FINAL = ".final"
"""The folder in which the trained model is saved, before its files are moved into that of the run."""


def run_facts(planned: Plan, status: Status) -> dict[str, Any]:
    """The entries of run.json on pairs, steps and model. Raises UserError if they differ from those of the old run."""
    out = Path(planned.config.out)
    facts = {
        "data": {**planned.counts(), "sha256": planned.pairs_hash},
        "model_sha256": hash_model_files(planned.name),
        "steps": planned.steps,
        "pairs_per_step": planned.pairs_per_step,
        "processes": planned.processes,
        "day": planned.day,
    }
    if planned.prediction and planned.prediction.get("model_sha256") != facts["model_sha256"]:
        raise UserError(
            f"prediction: it is of {planned.prediction.get('model')}, whose files differ from those of "
            f"{planned.config.model}; run `apo distinguish` on the model that is trained"
        )
    if status == "new":
        return facts
    run = read_run(out)
    _check_same_steps(run, planned, out)
    if run["data"]["sha256"] != facts["data"]["sha256"]:
        raise UserError(f"out: {out} holds a run on other pairs: the dataset has changed since; choose another folder")
    if run.get("model_sha256", facts["model_sha256"]) != facts["model_sha256"]:
        raise UserError(
            f"out: {out} holds a run on another model: the files of {planned.config.model} have changed since; bring "
            "the old ones back, or choose another folder"
        )
    return facts


def begin_or_resume(planned: Plan, facts: dict[str, Any], status: Status, log: Callable[[str], None]) -> Path | None:
    """Write the run.json of a new run, or return the checkpoint to resume from and update run.json and metrics."""
    from apo.run_dir.checkpoints import checkpoint_step, find_newest_checkpoint

    out = Path(planned.config.out)
    if status == "new":
        if planned.prediction:
            write_json(out / PREDICTION, planned.prediction)
        write_new_run(out, resolved(planned.config), **facts, resumed_from=[])
        return None
    run = read_run(out)
    search = find_newest_checkpoint(out)
    for note in search.notes:
        log(note)
    step = checkpoint_step(search.newest) or 0 if search.newest else 0
    log(f"going on from step {step} of {planned.steps}" if step else "starting over: there is no complete checkpoint")
    truncate_logs(out, step if step else -1)
    now = {
        "recipe": redacted_recipe(resolved(planned.config)),
        **facts,
        "resumed_from": [*run["resumed_from"], step],
    }
    write_json(out / RUN, {**run, **now})
    return search.newest


def _check_same_steps(run: dict[str, Any], planned: Plan, out: Path) -> None:
    """Raises UserError if other processes or micro-batches would change the optimizer steps of the run."""
    pairs, processes = run.get("pairs_per_step", planned.pairs_per_step), run.get("processes", planned.processes)
    if pairs != planned.pairs_per_step:
        raise UserError(
            f"out: {out} holds a run of {pairs} pairs a step ({processes} process(es)), and this one would take "
            f"{planned.pairs_per_step} ({planned.processes}); set pairs_per_step: {pairs} and leave "
            "trainer.gradient_accumulation_steps out, or choose another folder"
        )
    if run["steps"] != planned.steps:
        raise UserError(
            f"out: {out} holds a run of {run['steps']} steps and this one would take {planned.steps}: "
            f"trainer.dataloader_drop_last leaves out other pairs on other processes; go on with {processes}"
        )
    random = (planned.config.lora and planned.config.lora.dropout) or not planned.args.disable_dropout
    if processes != planned.processes and random:
        raise UserError(
            f"out: {out} holds a run of {processes} process(es), whose dropout draws other numbers on "
            f"{planned.processes}; go on with {processes}, or begin anew in another folder"
        )


def finish_run(out: Path, seconds: float, best: int | None = None, *, is_best: bool = True) -> dict[str, Any]:
    """Move model, plot, card and the finished run.json into place, in this order: only the last ends the run.

    `best` is the step of the best checkpoint, if its weights are the model, and None for those of the last step.
    `is_best` is False if an evaluation between two checkpoints was better.
    """
    from apo.losses.mixture import objective_title
    from apo.monitoring.plots import draw_dynamics

    final = out / FINAL
    (final / CARD).unlink(missing_ok=True)  # written by PEFT, replaced below
    adapter = (final / ADAPTER_CONFIG).exists()
    move_files(final, out)
    rows = read_log(out / METRICS)
    run = read_run(out)
    recipe = run["recipe"]
    draw_dynamics(
        rows, out / PICTURE, f"{objective_title(recipe['objective'])}, beta {recipe['beta']}, {recipe['model']}"
    )
    if best is not None:
        run["best"] = {"step": best, "evaluations": sum("eval_loss" in row for row in rows) if is_best else None}
        rows = [row for row in rows if row["step"] <= best]
    run |= {"metrics": last_metrics(rows), "seconds": round(seconds, 2), "finished": now()}
    write_card(out, run, adapter=adapter)
    write_json(out / RUN, run)
    return run


def last_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last training line and the last held-out line, merged."""
    lines = {prefix: [row for row in rows if f"{prefix}loss" in row] for prefix in ("", "eval_")}
    metrics = {key: value for line in lines.values() if line for key, value in line[-1].items()}
    return {key: value for key, value in metrics.items() if key not in ("step", "epoch")}
