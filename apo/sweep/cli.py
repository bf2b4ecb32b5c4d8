"""The command `apo sweep`. Heavy imports stay inside the functions."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from apo.console import print_line, quieten
from clair.core.errors import EXIT_INTERRUPTED, EXIT_SOME_FAILED, UserError
from clair.core.progress import duration, printable, progress


def sweep(
    recipe: Annotated[Path, typer.Argument(help="A training recipe in YAML.")],
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", help="key=value,value: one run per value; repeatable, all combinations."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder of all runs, instead of the recipe's `out`.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value put into the recipe; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all; print the runs and their cost.")] = False,
) -> None:
    """Train a recipe with every combination of values, and compare the runs on the held-out pairs.

    Run it again to continue: a finished run is not trained again, and a stopped run resumes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("apo sweep starts one process per run; start it without torchrun")
    quieten()
    from apo.run_dir.files import redacted_override
    from apo.sweep.grid import check_runs, expand_grid, parse_grid

    runs = expand_grid(recipe, parse_grid(grid or []), set_ or [], out)
    with progress("checking the runs"):
        runs = check_runs(runs)
    overrides = [redacted_override(override) if dry_run else override for override in set_ or []]
    arguments = [str(recipe), *(argument for override in overrides for argument in ("--set", override))]
    if dry_run:
        _print_plan(runs, arguments)
        return
    _run(runs, arguments)


def _run(runs: Sequence[Any], arguments: Sequence[str]) -> None:
    from apo.monitoring.result_plots import draw_sweep
    from apo.sweep.grid import PICTURE, RESULT
    from apo.sweep.processes import log_file, train_runs, visible_devices
    from apo.sweep.results import notes, summarize, sweep_table
    from clair.core.console import show
    from clair.core.files import write_json
    from clair.pipeline.output_dir import lock_output

    out = runs[0].out.parent
    finished = sum(run.status == "finished" for run in runs)
    print_line(f"{len(runs)} runs, {finished} of them finished; messages of each in {out}/NAME.log")
    with lock_output(out):
        if not (out / RESULT).exists():
            write_json(out / RESULT, {"format": 1, "runs": []})
        try:
            with progress("runs", len(runs), initial=finished) as bar:
                failed = train_runs(runs, arguments, visible_devices(), bar)
        except KeyboardInterrupt as stop:
            print_line("interrupted; run the same command to continue: finished runs are kept, stopped runs resume")
            raise typer.Exit(EXIT_INTERRUPTED) from stop
        result = summarize([run for run in runs if run.name not in failed], failed)
        write_json(out / RESULT, result)
        if result["runs"]:
            draw_sweep(result, out / PICTURE)
    show(sweep_table(result))
    for note in notes(result):
        print(printable(note))
    print(f"numbers in {out / RESULT}, plot in {out / PICTURE}")
    if failed:
        print_line(f"{len(failed)} runs failed; see {log_file(runs[0]).with_name('NAME.log')}, then run it again")
        raise typer.Exit(EXIT_SOME_FAILED)


def _print_plan(runs: Sequence[Any], arguments: Sequence[str]) -> None:
    """Print each run with its status, steps and command, then the cost of all unfinished runs."""
    from apo.sweep.processes import train_command, visible_devices

    for run in runs:
        print(f"# {run.name}: {run.status}, {run.steps:,} steps")
        print(shlex.join(["apo", *train_command(run, arguments)]))
    open_runs = [run for run in runs if run.status != "finished"]
    references = {run.reference: run.reference_flops for run in open_runs}
    passes = sum(flops > 0 for flops in references.values())
    print(f"# {len(open_runs)} runs to train; reference log-probs: {passes} passes over the pairs, for all of them")
    if any(run.flops is None for run in open_runs):
        print("# no estimate: the sizes of the model are unknown")
    elif open_runs:
        flops = sum(run.flops for run in open_runs) + sum(references.values())
        devices = len(visible_devices())
        seconds = flops / open_runs[0].speed / devices
        print(f"# work: {flops:.3g} FLOPs, about {duration(seconds)} on {devices} device(s) of this machine")
