"""The command `apo advise`. Heavy imports stay inside the function."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from apo.cli_evaluation import budget_of, price_of
from clair.core.errors import UserError
from clair.core.progress import printable
from clair.storage.object_store import local


def advise(
    dataset: Annotated[str, typer.Argument(help="Pairs: a dataset folder, a file or a hub name.")],
    model: Annotated[Path, typer.Option(help="The folder of the model or adapter that will be trained.")],
    judge_base_url: Annotated[
        list[str] | None, typer.Option(help="A judge's URL; repeat it where several serve it.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name.")] = None,
    out: Annotated[
        Path | None, typer.Option(callback=local, help="The result folder; absent: runs/advice/DATASET-MODEL.")
    ] = None,
    difference: Annotated[
        float,
        typer.Option(min=0.01, max=0.49, help="The difference from one half to detect; it sets the sample size."),
    ] = 0.1,
    temperature: Annotated[
        float,
        typer.Option(help="Of the model's own answers; at 1 a small model finds them less likely than clean text."),
    ] = 0.3,
    max_tokens: Annotated[int, typer.Option(help="The longest own answer, in tokens.")] = 1024,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a batch of the model, answers included; absent: by the device.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample and of the answers.")] = 0,
    judge_template: Annotated[Path | None, typer.Option(help="A Jinja template of your own for the judge.")] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="Environment variable with the judge's key.")] = None,
    judge_id: Annotated[str | None, typer.Option(help="What judgements are filed under, whatever the URL.")] = None,
    judge_price: Annotated[str | None, typer.Option(help="For a million tokens in,out: `0.5,1.5`; `table`.")] = None,
    budget: Annotated[str | None, typer.Option(help="The most that may be spent; needs prices.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="The same in tokens, of both roles.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="A ledger to share; absent: OUT/ledger.sqlite.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 100,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all and print the plan; write nothing.")] = False,
) -> None:
    """Which objective these pairs and this model ask for, with the evidence; run again, it pays for nothing twice."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep; read when torch is loaded
    from apo.advice.config import AdviseConfig, load_inputs
    from apo.advice.run import run
    from apo.console import end_early, quieten, tell
    from apo.evaluation.mixeval.answers import default_batch_tokens
    from clair.core.console import show
    from clair.core.progress import progress
    from clair.core.recipe import resolve

    of_judge: dict[str, Any] = {"api_key_env": judge_key_env, "id": judge_id, "price": price_of(judge_price)}
    of_judge["template"] = str(judge_template) if judge_template else None
    asks = {"path": str(model), "temperature": temperature, "max_tokens": max_tokens}
    values = {
        "dataset": dataset,
        "model": {**asks, "batch_tokens": batch_tokens or default_batch_tokens()},
        "judge": _judge(judge_base_url, judge_model, of_judge),
        "out": str(out or Path("runs/advice") / f"{Path(dataset).stem}-{model.name}"),
        "ledger": str(ledger) if ledger else None,
        "budget": budget_of(budget, budget_tokens),
        **{"difference": difference, "seed": seed, "concurrency": concurrency},
    }
    quieten()
    config = resolve(AdviseConfig, values, "options")
    with progress("checking the pairs"):
        inputs = load_inputs(config)
    if dry_run:
        _print_plan(config, inputs)
        return
    outcome = run(config, inputs=inputs, log=tell)
    failed = (
        f"{outcome.failed} requests got no reply ({outcome.first_failure}); "
        "the rest is kept, run the same command again"
    )
    end_early(outcome.stopped, failed if outcome.result is None else None)
    show(outcome.table())
    for line in outcome.lines():
        print(printable(line))
    tell(f"wrote {outcome.out}/advice.json")


def _judge(urls: list[str] | None, name: str | None, options: dict[str, Any]) -> dict[str, Any] | None:
    if urls and name:
        return {"url": tuple(urls) if len(urls) > 1 else urls[0], "model": name, **options}
    if urls or name or any(options.values()):
        raise UserError("a judge needs --judge-base-url and --judge-model; leave out all of its options to go without")
    return None


def _print_plan(config: Any, inputs: Any) -> None:
    import yaml

    from apo.advice.judge_evidence import MAX_PLANTS
    from apo.evaluation.config import redacted

    print(yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True), end="")
    rows, plants = len(inputs.rows), min(MAX_PLANTS, len(inputs.rows))
    print(f"# {rows:,} of {inputs.prompts:,} prompts, {inputs.pairs:,} pairs; as many answers of the model")
    if config.judge:
        print(f"# judge: at most {2 * (plants + 2 * rows):,} verdicts, {2 * plants} of them a test")
    for mismatch, count in inputs.strange.items():
        print(f"# note: {count} prompts are not in the model's template: {mismatch}")
