"""The command `clair`: build, estimate, report, keep, ... A user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from clair.core.errors import EXIT_BUDGET, EXIT_INTERRUPTED, EXIT_SOME_FAILED, UserError
from clair.core.exit_codes import run_application
from clair.core.recipe import text_override
from clair.storage.location import Location, local

app = typer.Typer(
    help="Build contrastive preference pairs: a model answers, a stronger one minimally revises.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The `clair` command."""
    run_application(lambda: app(prog_name="clair"))


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(help="The data recipe, a YAML file.")],
    out: Annotated[str | None, typer.Option(help="The dataset folder or URL, instead of the recipe's out.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value put into the recipe; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print; send and write nothing.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Rebuild a folder with a changed recipe.")] = False,
    shard: Annotated[
        str | None, typer.Option(help="Build one shard of the rows, such as 2/4; clair merge joins them.")
    ] = None,
    runner: Annotated[
        str | None, typer.Option(help="ray: build shards on a Ray cluster, or on this machine, and merge them.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster's head, such as node-1:6379, or auto; for --runner ray.")
    ] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="The number of shards; for --runner ray.")] = None,
) -> None:
    """Turn prompts into a dataset folder of preference pairs. Run it again to resume it."""
    from clair.core.console import show as print_
    from clair.core.progress import duration, print_line, progress
    from clair.core.recipe import load_recipe
    from clair.data.dataset_card import quality_warnings
    from clair.pipeline.build import build as build_dataset
    from clair.pipeline.build import check_recipe
    from clair.pipeline.config import BuildConfig, redacted
    from clair.pipeline.estimate import expected_replies
    from clair.pipeline.runner import template_warnings
    from clair.pipeline.shards import parse_shard, shard_config, shards_location
    from clair.terminal import build_progress, shards_progress, summary

    overrides = [*(set_ or []), *([text_override("out", out)] if out else []), *([f"limit={limit}"] if limit else [])]
    config = load_recipe(BuildConfig, recipe, overrides)
    shard_id = parse_shard(shard) if shard else None
    _check_runner(runner, shard=shard, address=address, shards=shards)
    with progress("building", details=lambda: ["checking recipe and prompts"]):
        prompt_scan = check_recipe(shard_config(config, shard_id) if shard_id else config, shard_id)
    for warning in template_warnings(config):
        print_line(f"note: {warning}")
    if count := prompt_scan.json_messages:
        print_line(f"note: {count:,} of {prompt_scan.rows:,} prompts are messages as JSON text; read as messages")
    if dry_run:
        import yaml

        print(yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True), end="")
        counts = f"{prompt_scan.rows} rows, {prompt_scan.unique} different prompts, {prompt_scan.answered} of them"
        print(f"# {counts} with an answer")
        return
    if runner:
        from clair.cluster.driver import build_on_ray

        with shards_progress(prompt_scan.rows) as on_shard_progress:
            result = build_on_ray(
                config, prompt_scan, address=address, shards=shards, update=update, on_progress=on_shard_progress
            )
    else:
        with build_progress(prompt_scan.held, expected_replies(config, prompt_scan)) as on_progress:
            result = build_dataset(
                config, prompt_scan=prompt_scan, update=update, on_progress=on_progress, shard=shard_id
            )
    if result.stopped:
        print(f"{result.stopped}: every reply so far is kept; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED if result.stopped == "interrupted" else EXIT_BUDGET)
    print_(summary([result.out]))
    rows, seconds = result.manifest["counts"]["prompts"], result.manifest["seconds"]
    print_(f"{rows:,} rows in {duration(seconds)}, {seconds / max(1, rows):.2g} s a row")
    for warning in quality_warnings(result.manifest):
        print_line(f"note: {warning}")
    if shard_id:
        print_(
            f"shard {shard_id.index} of {shard_id.count}; when all are built: clair merge {shards_location(config.out)}"
        )
    location = shard_config(config, shard_id).out if shard_id else config.out
    if location.is_url:
        print_(f"it is at {location.public}; {result.out} is a copy, which may be deleted")
    print_(f"{result.out}/README.md describes it; look at the pairs with: clair report {location.public}")
    for role, tokens in result.manifest["tokens"].items():
        if unknown := tokens.get("without_finish_reason"):
            print_(f"{role}: {unknown} replies have no finish_reason; some of them may be incomplete")
    if result.failed:
        print(f"{result.failed} rows failed (see dropped.jsonl); run it again to try them again", file=sys.stderr)
        raise typer.Exit(EXIT_SOME_FAILED)


def _check_runner(runner: str | None, **options: object) -> None:
    """Check --runner and the options that depend on it. Raises UserError."""
    present = [f"--{name}" for name, value in options.items() if value is not None]
    if runner is None and (for_ray := [option for option in present if option != "--shard"]):
        raise UserError(f"{for_ray[0]} is for --runner ray; add it, or leave that out")
    if runner not in (None, "ray"):
        raise UserError(f"unknown runner {runner!r}; allowed: ray, or none for this process")
    if runner and "--shard" in present:
        raise UserError("--shard builds one shard and --runner ray builds all; choose one, or give --shards N")


@app.command()
def merge(
    folder: Annotated[str, typer.Argument(help="The folder or URL of shards that clair build --shard made.")],
    out: Annotated[str | None, typer.Option(help="The dataset folder or URL, instead of the recipe's out.")] = None,
) -> None:
    """Join the shards of a build into the dataset that one run makes, byte for byte."""
    from clair.cluster.merge import merge as merge_shards
    from clair.core.console import show as print_
    from clair.core.progress import print_line
    from clair.data.dataset_card import quality_warnings
    from clair.terminal import summary

    manifest = merge_shards(folder, out)
    print_(summary([Location(manifest["recipe"]["out"]).folder]))
    for warning in quality_warnings(manifest):
        print_line(f"note: {warning}")
    if manifest["failed"]:
        print(f"{manifest['failed']} rows failed (see dropped.jsonl); build their shards again", file=sys.stderr)
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
def estimate(
    recipe: Annotated[Path, typer.Argument(help="The data recipe, a YAML file.")],
    probe: Annotated[int, typer.Option(min=0, help="Rows to run and pay for first; their replies are kept.")] = 0,
    out: Annotated[str | None, typer.Option(help="The dataset folder or URL, instead of the recipe's out.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value put into the recipe; repeatable.")] = None,
) -> None:
    """Estimate the cost of a build: calls, and with --probe tokens and money with a 95 % interval, and time."""
    from clair.api import estimate as estimate_build
    from clair.core.console import show as print_
    from clair.core.recipe import load_recipe
    from clair.pipeline.config import BuildConfig
    from clair.pipeline.estimate import total_time
    from clair.terminal import cost_table

    config = load_recipe(BuildConfig, recipe, [*(set_ or []), *([text_override("out", out)] if out else [])])
    roles = estimate_build(config, probe=probe)
    print_(cost_table(roles))
    if not probe:
        print_("tokens, cost and time need some real replies: add --probe 5 (they are paid for once and kept)")
    elif total_time(roles):
        print_(
            f"time: the shorter if the servers answer {config.concurrency} concurrent requests as fast as those of the "
            f"probe, the longer at the pace of the probe, as with a server that answers one at a time"
        )


@app.command()
def stats(folders: Annotated[list[str], typer.Argument(help="Dataset folders or URLs.")]) -> None:
    """Show counts, drop reasons, contrast and tokens of dataset folders, side by side."""
    from clair.core.console import show as print_
    from clair.terminal import summary

    print_(summary(folders))


@app.command()
def show(
    folder: Annotated[str, typer.Argument(help="A dataset folder or URL.")],
    n: Annotated[int, typer.Option("-n", min=1, help="The number of pairs.")] = 5,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
) -> None:
    """Show pairs as word diffs: what the chosen answer removes from the rejected one, and what it adds."""
    from itertools import islice

    from clair.core.console import show as print_
    from clair.core.errors import check_name
    from clair.data.dataset import SPLITS, read_manifest, read_rows
    from clair.terminal import pair_panel

    read_manifest(folder)
    check_name("unknown split", split, SPLITS)
    for row in islice(read_rows(folder, [split]), n):
        print_(pair_panel(row))


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="A dataset folder or URL.")],
    out: Annotated[
        Path | None, typer.Option(callback=local, help="The file of the page, instead of DIR/report.html.")
    ] = None,
    filter_: Annotated[
        list[str] | None,
        typer.Option("--filter", help="Pairs with full text: 'kept<0.5', split=test; repeatable."),
    ] = None,
) -> None:
    """Write an HTML page of a dataset: funnel, contrast, lengths, and the pairs to search, sort and mark."""
    from clair.api import report as write_report
    from clair.core.console import show as print_

    page = write_report(folder, out=out, filters=filter_ or [])
    print_(f"{page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser, mark pairs and save the decisions;")
    print_(f"apply them with: clair keep {folder} decisions.json")


@app.command()
def keep(
    folder: Annotated[str, typer.Argument(help="The dataset folder or URL whose report you marked.")],
    decisions: Annotated[Path, typer.Argument(help="The decisions file that the page saved.")],
    out: Annotated[str | None, typer.Option(help="A new dataset folder, instead of changing this one.")] = None,
) -> None:
    """Drop the pairs that were marked drop in the page of `clair report`: they move to dropped.jsonl."""
    from clair.core.console import show as print_
    from clair.reporting.review import apply_decisions_locked, read_decisions
    from clair.terminal import summary

    apply_decisions_locked(folder, read_decisions(decisions), out)
    print_(summary([out or folder]))


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="A dataset folder or URL.")],
    out: Annotated[Path, typer.Argument(callback=local, help="The JSONL file to write.")],
    as_: Annotated[str, typer.Option("--as", help="preference, unpaired or text.")] = "preference",
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
) -> None:
    """Write the pairs as JSONL rows: preference (TRL), unpaired (KTO), or plain text."""
    from clair.core.console import show as print_
    from clair.core.errors import check_name
    from clair.data.dataset import SPLITS
    from clair.pipeline.export import FORMS
    from clair.pipeline.export import export as write

    check_name("unknown form", as_, FORMS)
    check_name("unknown split", split, SPLITS)
    print_(f"{write(as_, folder, split, out)} rows in {out}")


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="A dataset folder or URL.")],
    name: Annotated[str, typer.Argument(help="org/name on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make a public dataset; without it, it is private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Really send it.")] = False,
) -> None:
    """Send a dataset to the hub with its card. Without --yes, only show what would be sent."""
    from clair.core.console import show as print_
    from clair.pipeline.export import files_to_push
    from clair.pipeline.export import push as send
    from clair.storage.hub import sending_nothing

    with Location(folder).local_copy() as local_folder:
        files = files_to_push(local_folder)
        if yes:
            print_(send(local_folder, name, private=not public))
            return
        for file in files:
            print_(f"{file.relative_to(local_folder)}  {file.stat().st_size:,} bytes")
        print_((local_folder / "README.md").read_text("utf-8"))
    print_(sending_nothing(len(files), name, private=not public))


@app.command()
def salvage(
    ledger: Annotated[Path, typer.Argument(help="The ledger file that an error called damaged.")],
) -> None:
    """Replace a damaged ledger by one with all replies that can be read. The damaged file is kept."""
    from clair.core.console import show as print_
    from clair.ledger.recovery import salvage as salvage_ledger

    salvaged = salvage_ledger(ledger)
    print_(f"{salvaged.replies} paid replies and {salvaged.others} calls without one are in {ledger}, ready for use;")
    print_(f"the damaged file is kept as {salvaged.backup}. Replies that could not be read will be requested again,")
    print_("and their cost is no longer counted by a budget.")


@app.command("check-endpoint")
def check_endpoint(
    urls: Annotated[list[str], typer.Argument(help="Base URLs, ending in /v1.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The served model's folder, to compare with.")] = None,
    model: Annotated[str | None, typer.Option(help="The name of the served model, if there are several.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="The environment variable that holds the key.")] = None,
) -> None:
    """Check that endpoints serve the model you expect: template, end of turn, truncation, logprobs, speed."""
    from clair.core.console import show as print_
    from clair.core.progress import progress
    from clair.inference.endpoint_check import check_endpoints
    from clair.terminal import checks_table

    steps: list[str] = []

    def on_step(step: str) -> None:
        steps[:] = [step]

    with progress("checking", details=lambda: steps):
        checks = check_endpoints(urls, tokenizer, model=model, key_env=api_key_env, on_step=on_step)
    print_(checks_table(checks))
    for url, url_checks in checks.items():
        for check in url_checks:
            if check.ok is False:
                raise UserError(
                    f"{url}: {check.name} ({check.message}); pairs built with it would not be what you expect"
                )


@app.command("next")
def next_(
    folder: Annotated[str, typer.Argument(help="The dataset folder or URL of the previous round.")],
    model: Annotated[str, typer.Option(help="The tuned model's folder: the new target.")],
    out: Annotated[Path, typer.Option(callback=local, help="The dataset folder of the new round.")],
) -> None:
    """Prepare a further round: the tuned model answers the prompts that gave a pair, and those not seen yet."""
    from clair.core.console import show as print_
    from clair.pipeline.export import next_round

    with Location(folder).local_copy() as local_folder:
        recipe, repeated, unseen = next_round(local_folder, model, out)
    print_(f"{repeated} prompts that gave a pair and {unseen} not seen yet; build them with: clair build {recipe}")


@app.command()
def iterate(
    recipe: Annotated[Path, typer.Argument(help="The recipe of the rounds, a YAML file.")],
    out: Annotated[
        Path | None, typer.Option(callback=local, help="The folder of the rounds, instead of the recipe's out.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value put into the recipe; repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, print commands and maximum calls.")] = False,
) -> None:
    """Run rounds of build, train and evaluate, each on the model of the previous round. Run it again to resume it."""
    from clair.core.console import show as print_
    from clair.core.recipe import load_recipe
    from clair.rounds.config import IterateConfig
    from clair.rounds.results import PICTURE, rounds_table
    from clair.rounds.run import RESULT, open_rounds, plan_lines
    from clair.rounds.run import iterate as run_rounds

    overrides = [*(set_ or []), *([text_override("out", out)] if out else [])]
    rounds = open_rounds(load_recipe(IterateConfig, recipe, overrides))
    if dry_run:
        print("\n".join(plan_lines(rounds)))
        return
    result = run_rounds(rounds)
    if result.rounds:
        print_(rounds_table(result.rounds))
        print_(f"{rounds.config.out}/{RESULT} and {rounds.config.out}/{PICTURE} hold the rounds")
    print_(f"{result.reason}; the best model is {result.best}")
    if result.exit_code:
        raise typer.Exit(result.exit_code)


if __name__ == "__main__":
    main()
