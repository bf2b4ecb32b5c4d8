"""The command `apo`. Heavy imports stay inside the commands, so that --help is fast."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from apo.cli_analysis import calibrate, certify, distinguish
from apo.cli_evaluation import app as evaluate
from apo.cli_recipe import EXTRA_ARGUMENTS
from apo.console import ending_training_on_interrupt, print_line, quieten
from apo.hub.cli import push
from apo.pilot.cli import advise
from apo.rewards.cli import app as reward
from apo.sweep.cli import sweep
from clair.core.exit_codes import run_application
from clair.core.progress import printable
from clair.storage.location import local

app = typer.Typer(
    name="apo",
    help="Preference pairs to a better model: anchored preference optimization.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(evaluate, name="eval")
app.add_typer(reward, name="reward")


@app.callback()
def _apo() -> None:
    """Preference pairs to a better model: anchored preference optimization."""
    # PEFT imports bitsandbytes if it is installed, which then logs advice on kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A training recipe in YAML.")],
    out: Annotated[str | None, typer.Option(help="The run's folder, instead of the recipe's `out`.")] = None,
    reference: Annotated[str | None, typer.Option(help="cached or online, instead of the recipe's.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value put into the recipe; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, print the plan, write nothing.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: plan a run on this number of processes, one a GPU.")
    ] = None,
) -> None:
    """Train a model on preference pairs; a stopped run continues from its last checkpoint."""
    # Idle OpenMP threads sleep, not spin: on a busy machine small models train up to 100 times faster. OpenMP reads
    # this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from apo.training.config import TrainConfig
    from clair.core.errors import UserError
    from clair.core.recipe import load_recipe, text_override

    if processes and not dry_run:
        raise UserError(
            f"--processes {processes} plans a run and needs --dry-run; torchrun --nproc_per_node {processes} starts one"
        )
    replaced = {"out": out, "reference": reference}
    overrides = [*(set_ or []), *(text_override(key, value) for key, value in replaced.items() if value)]
    config = load_recipe(TrainConfig, recipe, overrides)
    if dry_run:
        quieten()
        _print_plans(config, processes)
        return
    quieten("apo.training.trainer")
    from apo.distributed.launch import is_main
    from apo.training.train import train as run

    with ending_training_on_interrupt():
        result = run(config, log=print_line)
    if is_main():
        for folder, finished in (result if config.by else {config.out: result}).items():
            print_line(_closing(folder, finished))


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="The folder of a run: finished, stopped or running.")],
    out: Annotated[
        Path | None, typer.Option(callback=local, help="The image to write; default: RUN/diagnosis.png.")
    ] = None,
) -> None:
    """Plot the metrics of a run, and say what is wrong with it and what helps."""
    from apo.monitoring.diagnosis_report import diagnosis_lines

    print(printable("\n".join(diagnosis_lines(run, out))))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="The folder of a LoRA adapter, such as a run's `out`.")],
    out: Annotated[Path, typer.Option(callback=local, help="Where to write the merged model.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is not at the path that the adapter names.")
    ] = None,
) -> None:
    """Merge an adapter into its base model, for serving."""
    quieten()
    from apo.models.merge_adapter import merge as merge_adapter

    print_line(f"wrote {merge_adapter(adapter, out, base=base)}")


app.command()(sweep)
app.command()(push)
app.command(context_settings=EXTRA_ARGUMENTS)(advise)
app.command(context_settings=EXTRA_ARGUMENTS)(distinguish)
app.command(context_settings=EXTRA_ARGUMENTS)(calibrate)
app.command(context_settings=EXTRA_ARGUMENTS)(certify)


@app.command()
def compare(
    base: Annotated[
        Path, typer.Argument(help="The result folder of the base model, by `apo eval mixeval` or `apo eval ifeval`.")
    ],
    tuned: Annotated[list[Path], typer.Argument(help="The result folders of tuned models.")],
    out: Annotated[
        Path | None,
        typer.Option(
            callback=local, help="The folder for compare.json and compare.html; default: `compare` beside BASE."
        ),
    ] = None,
    difference: Annotated[
        float, typer.Option(min=0.01, max=100, help="The true difference, in points, whose power is computed.")
    ] = 2.0,
    data: Annotated[
        Path | None, typer.Option(help="A folder of MixEval's data, to predict the power of its other splits.")
    ] = None,
) -> None:
    """Compare tuned models with their base, with intervals, and show every answer that changed."""
    from apo.evaluation.compare.run import compare_folders
    from clair.core.console import show

    result = compare_folders(base, tuned, out=out, difference=difference / 100, data=data)
    show(result.table())
    for note in result.notes():
        print(printable(note))
    print(f"every changed answer: {result.page}")


def _print_plans(config: Any, processes: int | None) -> None:
    from apo.training.by_group import expand_runs

    for number, run_config in enumerate(expand_runs(config, lambda note: print(f"# {note}"))):
        if number:
            print("---")
        _print_plan(run_config, processes)


def _print_plan(config: Any, processes: int | None) -> None:
    import yaml

    from clair.core.progress import progress
    from clair.core.recipe import resolved

    with progress("checking recipe, model and pairs"):
        from apo.cost.sizes import GPUS
        from apo.models.load import quantization_problem
        from apo.run_dir.files import describe_counts, redacted_recipe, run_status
        from apo.training.plan import estimate, plan

        status = run_status(Path(config.out), resolved(config))
        planned = plan(config, processes)
        costs = estimate(planned, GPUS)
    print(yaml.safe_dump(redacted_recipe(resolved(config)), sort_keys=False, allow_unicode=True), end="")
    for split, count in planned.counts().items():
        print(f"# {split}: {describe_counts(count)}")
    print(f"# steps: {planned.steps_text}")
    print(f"# out: {config.out} ({status})")
    if planned.guard_set is not None:
        print(f"# guard: {planned.guard_set.summary(planned.steps)}")
    for note in planned.train.notes:
        print(f"# note: {note}")
    if config.quantize and (reason := quantization_problem()):
        print(f"# note: not here: {reason}")
    _print_estimate(planned, costs)


def _print_estimate(planned: Any, costs: Any) -> None:
    from apo.cost.fitting import check_fits, describe_tokens, table
    from apo.cost.memory import run_flops
    from apo.cost.sizes import CPU_SHARE, MFU
    from clair.inference.generation.onednn import REPEATS

    if isinstance(costs, str):
        print(f"# no estimate: {costs}")
        return
    sizes, (flops, reference) = costs.here.sizes, run_flops(costs.here)
    print(f"# tokens: {describe_tokens(costs.here)}")
    print(f"# parameters: {sizes.parameters:,}, trained {sizes.trained:,}")
    each = f", in each of {planned.processes} processes" if planned.processes > 1 else ""
    print(f"# work: {flops:.3g} FLOPs{each}, {reference / flops:.0%} of it the reference's")
    for line in table(costs.jobs):
        print(f"# {line}")
    print(
        f"# times assume {MFU:.0%} of a GPU's peak, {CPU_SHARE:.0%} of a CPU's matrix products (the best "
        f"of {REPEATS} just now); no step was measured"
    )
    check_fits(costs.here, costs.machine)


def _closing(out: str, run: dict[str, Any]) -> str:
    from apo.monitoring.callbacks import format_log
    from apo.run_dir.files import describe_size, describe_steps

    size, seconds = describe_size(run["data"]["train"]), f"{run['seconds']:.0f} s"
    summary = f"{size}, {describe_steps(run)}, {seconds}: {format_log(run['metrics'])}"
    return f"{summary}\nmodel and card in {out}/, the picture in {out}/dynamics.png"


def main() -> None:
    """The `apo` command."""
    application = partial(app, prog_name="apo")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        run_application(application)
        return
    from apo.distributed.launch import run_and_exit

    run_and_exit(lambda: run_application(application))


if __name__ == "__main__":
    from apo.heap import restart_with_tunables

    restart_with_tunables()
    main()
