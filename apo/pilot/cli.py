"""The command `apo advise`, with and without pilots. Heavy imports stay inside the functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from apo.cli_recipe import DryRun, Out, Overrides, RecipeFile, read_recipe
from clair.core.errors import EXIT_INTERRUPTED, UserError
from clair.core.progress import printable

if TYPE_CHECKING:
    from apo.advice.config import AdviceInputs, AdviseConfig
    from apo.advice.run import AdviceOutcome
    from apo.pilot.plan import PilotPlan
    from apo.pilot.run import PilotOutcome


def advise(
    context: typer.Context,
    recipe: RecipeFile = None,
    out: Out = None,
    set_: Overrides = None,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Choose by short training runs and your own metric, as `pilot` says.")
    ] = False,
    then_train: Annotated[
        bool, typer.Option("--then-train", help="With --pilot: train what is recommended, on all pairs.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Recommend an objective for pairs and a model, with the evidence. No reply is paid for twice."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded
    if then_train and not pilot:
        raise UserError("--then-train is for --pilot; add it, or train by `apo train`")
    if pilot and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("apo advise --pilot starts a process for each pilot; start it without torchrun")
    from apo.advice.config import AdviseConfig, load_inputs
    from apo.console import end_early, print_line, quieten
    from clair.core.console import show
    from clair.core.progress import progress

    quieten()
    config = read_recipe(context, AdviseConfig, recipe, set_, out)
    with progress("checking the pairs"):
        inputs = load_inputs(config)
        planned = _plan(config, then_train) if pilot else None
    if dry_run:
        _print_plan(config, inputs)
        if planned:
            _print_pilots(planned)
        return
    try:
        outcome = _run(config, inputs, planned, print_line)
    except KeyboardInterrupt as stop:
        print_line("interrupted; the same command goes on: replies, rates and pilots so far are kept")
        raise typer.Exit(EXIT_INTERRUPTED) from stop
    failed = (
        f"{outcome.failed} requests got no reply ({outcome.first_failure}); all other replies are kept, run the same "
        "command again"
    )
    end_early(outcome.stopped, failed if outcome.failed else None)
    if (table := outcome.table()) is not None:
        show(table)
    for line in outcome.lines():
        print(printable(line))
    if planned is None or outcome.result is None:
        print_line(f"wrote {outcome.out}/advice.json")
        return
    print_line(f"wrote {outcome.out}/pilot.json and {outcome.out}/pilot.png")
    if then_train:
        _train(planned, outcome.result["recommended"])


def _plan(config: AdviseConfig, then_train: bool) -> PilotPlan:
    from apo.pilot.plan import plan_pilots

    return plan_pilots(config, then_train=then_train)


def _run(
    config: AdviseConfig, inputs: AdviceInputs, planned: PilotPlan | None, log: Callable[[str], None]
) -> AdviceOutcome | PilotOutcome:
    if planned is None:
        from apo.advice.run import run as run_advice

        return run_advice(config, inputs=inputs, log=log)
    from apo.pilot.run import run

    return run(planned, inputs=inputs, log=log)


def _train(planned: PilotPlan, recommended: list[str] | None) -> None:
    """Train what is recommended, as `apo train` does, on all pairs and with the recipe's own `out`."""
    from apo.console import ending_training_on_interrupt, print_line
    from apo.training.config import TrainConfig
    from apo.training.train import train
    from clair.core.recipe import load_recipe

    if recommended is None:
        print_line("nothing is recommended, so nothing is trained")
        return
    config = load_recipe(TrainConfig, planned.pilot.recipe, recommended)
    with ending_training_on_interrupt():
        result = train(config, log=print_line)
    print_line(f"trained {result['steps']:,} steps; the model is in {config.out}")


def _print_plan(config: AdviseConfig, inputs: AdviceInputs) -> None:
    from apo.advice.judge_evidence import MAX_PLANTS
    from apo.evaluation.config import print_settings

    print_settings(config)
    rows, plants = len(inputs.rows), min(MAX_PLANTS, len(inputs.rows))
    print(f"# {rows:,} of {inputs.prompts:,} prompts, {inputs.pairs:,} pairs; {rows:,} answers of the model")
    if config.judge:
        print(f"# judge: at most {2 * (plants + 2 * rows):,} verdicts, {2 * plants} of them to test it")
    for mismatch, count in inputs.strange.items():
        print(f"# note: {count} prompts do not fit the model's template: {mismatch}")


def _print_pilots(planned: PilotPlan) -> None:
    """Print the pilots and what they cost at most, in the share of a full run."""
    from apo.pilot.matching import MAX_STEPS
    from apo.pilot.metric import METRICS, metric_name

    pilot, metric = planned.pilot, metric_name(planned.config)
    objectives, count = len(pilot.objectives), pilot.count
    names, rates = ", ".join(pilot.objectives), len(pilot.displacements)
    print(f"# pilots: {names}, each at {rates} rates, on 1 in {pilot.one_in} pairs")
    print(f"# at most {MAX_STEPS * objectives:,} steps to match rates, and {count} runs of {planned.steps:,} steps")
    print(f"# that is at most {planned.max_share:.2g} of a full run's {planned.full_steps:,} steps")
    print(f"# chosen by: {METRICS[metric]}")
    if metric == "checker":
        print(f"# a gain that matters: {planned.config.difference:g} of the checker's score (difference)")
    if planned.prompts:
        verdicts = f"; judge: at most {2 * count * len(planned.prompts):,} verdicts" if metric == "judge" else ""
        print(f"# {len(planned.prompts):,} prompts, {(count + 1) * len(planned.prompts):,} answers{verdicts}")
