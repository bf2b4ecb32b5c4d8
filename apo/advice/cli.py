"""The command `apo advise`. Heavy imports stay inside the function."""

from __future__ import annotations

import os
from typing import Any

import typer

from apo.cli_recipe import DryRun, Out, Overrides, RecipeFile, read_recipe
from clair.core.progress import printable


def advise(
    context: typer.Context,
    recipe: RecipeFile = None,
    out: Out = None,
    set_: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Recommend an objective for pairs and a model, with the evidence. No reply is paid for twice."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded
    from apo.advice.config import AdviseConfig, load_inputs
    from apo.advice.run import run
    from apo.console import end_early, print_line, quieten
    from clair.core.console import show
    from clair.core.progress import progress

    quieten()
    config = read_recipe(context, AdviseConfig, recipe, set_, out)
    with progress("checking the pairs"):
        inputs = load_inputs(config)
    if dry_run:
        _print_plan(config, inputs)
        return
    outcome = run(config, inputs=inputs, log=print_line)
    failed = (
        f"{outcome.failed} requests got no reply ({outcome.first_failure}); all other replies are kept, run the same "
        "command again"
    )
    end_early(outcome.stopped, failed if outcome.result is None else None)
    show(outcome.table())
    for line in outcome.lines():
        print(printable(line))
    print_line(f"wrote {outcome.out}/advice.json")


def _print_plan(config: Any, inputs: Any) -> None:
    from apo.advice.judge_evidence import MAX_PLANTS
    from apo.evaluation.config import print_settings

    print_settings(config)
    rows, plants = len(inputs.rows), min(MAX_PLANTS, len(inputs.rows))
    print(f"# {rows:,} of {inputs.prompts:,} prompts, {inputs.pairs:,} pairs; {rows:,} answers of the model")
    if config.judge:
        print(f"# judge: at most {2 * (plants + 2 * rows):,} verdicts, {2 * plants} of them to test it")
    for mismatch, count in inputs.strange.items():
        print(f"# note: {count} prompts do not fit the model's template: {mismatch}")
