"""The command `apo eval`. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from apo.cli_recipe import EXTRA_ARGUMENTS, DryRun, Out, Overrides, RecipeFile, read_recipe
from apo.console import end_without_result, print_line
from clair.core.errors import EXIT_SOME_FAILED, UserError
from clair.storage.location import local

app = typer.Typer(
    help="Measure a model, with intervals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="The model's folder or URL, instead of the recipe's. Several folders: repeat it."),
]


@app.callback()
def _eval() -> None:
    """Measure a model, with intervals."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded


@app.command(context_settings=EXTRA_ARGUMENTS)
def mixeval(
    context: typer.Context,
    recipe: RecipeFile = None,
    model: Models = None,
    out: Out = None,
    set_: Overrides = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print the expected cost; send no request.")] = False,
    probe: Annotated[
        int, typer.Option(help="With --estimate: items to run and pay for first; their replies are reused.")
    ] = 0,
    runner: Annotated[str | None, typer.Option(help="ray: the models answer on a Ray cluster.")] = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster's head, such as node-1:6379, or auto; for --runner ray.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Score models on MixEval-Hard. Run it again to continue a stopped run; no reply is paid for twice."""
    from apo.evaluation.mixeval.cli import print_plan, run_several, run_single
    from apo.evaluation.mixeval.config import MixEvalConfig, load_inputs

    models = model or []
    config = read_recipe(context, MixEvalConfig, recipe, set_, out, **_first_model(models))
    if runner not in (None, "ray"):
        raise UserError(f"unknown runner {runner!r}; allowed: ray, or none for this process")
    if address and not runner:
        raise UserError("--address is for --runner ray; add it, or leave that out")
    if runner or len(models) > 1:
        if estimate or probe:
            raise UserError("--estimate is for one model in this process; leave out --runner and all --model but one")
        run_several(config, models, runner, address, dry_run=dry_run)
        return
    inputs = load_inputs(config)
    for note in inputs.benchmark.notes:
        print_line(f"note: {note}")
    if dry_run:
        print_plan(config, inputs)
    elif estimate or probe:
        from apo.evaluation.mixeval.estimate import MIN_PROBE
        from apo.evaluation.mixeval.estimate import estimate as estimated
        from clair.core.console import show as print_
        from clair.terminal import client_progress, cost_table

        rows = max(MIN_PROBE, probe)
        with client_progress("evaluating", rows, dict.fromkeys(config.models, rows), shown=probe > 0) as on_progress:
            roles = estimated(config, probe, inputs, on_progress)
        print_(cost_table(roles))
    else:
        run_single(config, inputs)


def _first_model(models: Sequence[str]) -> dict[str, str]:
    """The recipe's key that the first `--model` replaces, with its value."""
    if not models:
        return {}
    return {"model.url" if models[0].startswith(("http://", "https://")) else "model.path": models[0]}


@app.command(context_settings=EXTRA_ARGUMENTS)
def ifeval(
    context: typer.Context,
    recipe: RecipeFile = None,
    model: Models = None,
    out: Out = None,
    set_: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Score models on IFEval: which instructions their answers follow. Run it again to continue a stopped run."""
    from apo.evaluation.ifeval.cli import evaluate_models
    from apo.evaluation.ifeval.config import IFEvalConfig

    models = model or []
    config = read_recipe(context, IFEvalConfig, recipe, set_, out, **_first_model(models))
    evaluate_models(config, models, dry_run=dry_run)


@app.command()
def fetch_mixeval(
    out: Annotated[Path, typer.Argument(callback=local, help="The data folder to write.")],
    version: Annotated[list[str] | None, typer.Option(help="A release of the questions; repeatable.")] = None,
    full: Annotated[bool, typer.Option("--full", help="The full benchmark too, not only Hard.")] = False,
    from_: Annotated[
        str | None, typer.Option("--from", help="A copy of upstream's repository: a URL or file:///PATH.")
    ] = None,
) -> None:
    """Download MixEval's questions and judge prompts from upstream, at one pinned commit, checked by SHA-256."""
    from apo.evaluation.mixeval.benchmark import VERSIONS
    from apo.evaluation.mixeval.fetch import BASE, fetch

    written = fetch(out, version or VERSIONS, ("hard", "full") if full else ("hard",), from_ or BASE)
    print_line(f"wrote {len(written)} files into {out}: {', '.join(written)}")


@app.command(context_settings=EXTRA_ARGUMENTS)
def winrate(
    context: typer.Context,
    recipe: RecipeFile = None,
    out: Out = None,
    set_: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Measure which of two models a judge prefers, in both orders; raw and at equal lengths, with intervals."""
    from apo.evaluation.config import print_settings
    from apo.evaluation.tables import winrate_table
    from apo.evaluation.winrate.run import WinrateConfig, load_inputs, measure_win_rate
    from clair.core.console import show as print_
    from clair.terminal import client_progress

    config = read_recipe(context, WinrateConfig, recipe, set_, out)
    inputs = load_inputs(config)
    total = len(inputs.prompts) * config.samples
    if dry_run:
        print_settings(config)
        print(f"# {len(inputs.prompts):,} prompts, {total:,} pairs of answers, at most {2 * total:,} verdicts")
        return
    calls = {role: total * (2 if role == "judge" else 1) for role in config.models}
    with client_progress("evaluating", total, calls, closing=True) as on_progress:
        outcome = measure_win_rate(config, inputs=inputs, on_progress=on_progress)
    end_without_result(outcome, outcome.result, "pairs", "win rate")
    assert outcome.result is not None, "an outcome without a result ends the command"
    print_(winrate_table(outcome.result))
    if outcome.result["distrust"]:
        print_(outcome.result["distrust"])
    if outcome.refused:
        print_line(
            f"{outcome.result['unanswered']} comparisons were refused ({outcome.refused}), so there is no win rate, "
            "only its bracket: all of them lost, all won; run the same command again to ask for them again"
        )
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command(context_settings=EXTRA_ARGUMENTS)
def judge_stability(
    context: typer.Context,
    recipe: RecipeFile = None,
    out: Out = None,
    set_: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Measure how often a judge of MixEval changes its verdict, and what that does to a difference of two models."""
    from apo.evaluation.config import print_settings
    from apo.evaluation.stability.config import StabilityConfig, load_inputs
    from apo.evaluation.stability.run import measure_stability, work_items
    from apo.evaluation.tables import stability_notes, stability_table
    from clair.core.console import show as print_
    from clair.terminal import client_progress

    config = read_recipe(context, StabilityConfig, recipe, set_, out)
    inputs = load_inputs(config)
    total = len(work_items(config, inputs))
    if dry_run:
        print_settings(config)
        print(f"# {len(inputs.answers['base']):,} rows, {total:,} judgements; equal requests share one")
        return
    calls = dict.fromkeys(config.models, total // len(config.models))
    with client_progress("judging", total, calls, closing=True) as on_progress:
        outcome = measure_stability(config, inputs=inputs, on_progress=on_progress)
    end_without_result(outcome, outcome.result, "judgements", "result")
    assert outcome.result is not None, "an outcome without a result ends the command"
    print_(stability_table(outcome.result))
    for note in stability_notes(outcome.result):
        print_(note)
    if outcome.refused:
        print_line(f"{outcome.result['refused']} rows were refused ({outcome.refused}) and are left out of all numbers")
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command(context_settings=EXTRA_ARGUMENTS)
def pairs(
    context: typer.Context,
    recipe: RecipeFile = None,
    model: Annotated[str | None, typer.Option(help="The model or adapter, instead of the recipe's.")] = None,
    out: Out = None,
    set_: Overrides = None,
) -> None:
    """Measure held-out pairs: reward accuracy, margin, displacement, length, KL to the reference, with intervals."""
    from apo.console import quieten
    from apo.evaluation.pairs import PairsConfig, evaluate_pairs
    from apo.evaluation.tables import pairs_table
    from clair.core.console import show as print_

    config = read_recipe(context, PairsConfig, recipe, set_, out, model=model)
    quieten()
    print_(pairs_table(evaluate_pairs(config, log=print_line)))


@app.command()
def show(
    results: Annotated[list[Path], typer.Argument(help="Result folders of `apo eval mixeval` and `apo eval ifeval`.")],
) -> None:
    """Print the scores of result folders, with intervals and what is unresolved."""
    from apo.evaluation.results import read_results
    from apo.evaluation.tables import score_table
    from clair.core.console import show as print_

    for folder in results:
        print_(score_table(read_results(folder)))
