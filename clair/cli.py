"""clair build | estimate | report | keep | ... Errors of the user are one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from clair.core.errors import EXIT_BUDGET, EXIT_INTERRUPTED, EXIT_SOME_FAILED, UserError
from clair.core.exit_codes import run
from clair.core.recipe import text_override
from clair.storage.object_store import local

app = typer.Typer(
    help="Build contrastive preference pairs: a model answers, a stronger one minimally revises.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The `clair` command."""
    run(app)


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(help="The data recipe, a YAML file.")],
    out: Annotated[str | None, typer.Option(help="The dataset folder or URL, instead of the recipe's out.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value put into the recipe; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print; ask nothing, write nothing.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Rebuild a folder with a changed recipe.")] = False,
    shard: Annotated[
        str | None, typer.Option(help="Only one part of the rows, such as 2/4; clair merge joins them.")
    ] = None,
    runner: Annotated[
        str | None, typer.Option(help="ray: in shards on a Ray cluster, or on this machine, and merged.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="The cluster's head, such as node-1:6379, or auto; for --runner ray.")
    ] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="How many shards; for --runner ray.")] = None,
) -> None:
    """Turn prompts into a dataset folder of preference pairs. Run it again to go on where it stopped."""
    from clair.core.console import show as print_
    from clair.core.progress import duration, progress, tell
    from clair.core.recipe import load_recipe
    from clair.data.dataset import quality_warnings
    from clair.pipeline.build import build as build_dataset
    from clair.pipeline.build import check_recipe
    from clair.pipeline.config import BuildConfig, redacted
    from clair.pipeline.estimate import expected_replies
    from clair.pipeline.runner import template_warnings
    from clair.pipeline.shards import parse_shard, shard_config, shards_location
    from clair.storage.object_store import is_url, public_path
    from clair.terminal import build_progress, shards_progress, summary

    overrides = [*(set_ or []), *([text_override("out", out)] if out else []), *([f"limit={limit}"] if limit else [])]
    config = load_recipe(BuildConfig, recipe, overrides)
    part = parse_shard(shard) if shard else None
    _check_runner(runner, shard=shard, address=address, shards=shards)
    with progress("building", details=lambda: ["checking recipe and prompts"]):
        found = check_recipe(shard_config(config, part) if part else config, part)
    for note in template_warnings(config):
        tell(f"note: {note}")
    if dry_run:
        import yaml

        print(yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True), end="")
        print(f"# {found.rows} rows, {found.unique} different prompts, {found.answered} of them with an answer")
        return
    if runner:
        from clair.cluster.driver import build_on_ray

        with shards_progress(found.rows) as tell_all:
            built = build_on_ray(config, found, address=address, shards=shards, update=update, tell=tell_all)
    else:
        with build_progress(found.held, expected_replies(config, found)) as on_progress:
            built = build_dataset(config, prompt_scan=found, update=update, on_progress=on_progress, shard=part)
    if built.stopped:
        print(f"{built.stopped}: every reply so far is kept; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED if built.stopped == "interrupted" else EXIT_BUDGET)
    print_(summary([built.out]))
    rows, seconds = built.manifest["counts"]["prompts"], built.manifest["seconds"]
    print_(f"{rows:,} rows in {duration(seconds)}, {seconds / max(1, rows):.2g} s a row")
    for doubt in quality_warnings(built.manifest):
        tell(f"note: {doubt}")
    if part:
        print_(f"shard {part.index} of {part.count}; when all are built: clair merge {shards_location(config.out)}")
    place = shard_config(config, part).out if part else config.out
    if is_url(place):
        print_(f"it is at {public_path(place)}; {built.out} is a copy, which may be deleted")
    print_(f"{built.out}/README.md tells what it holds; look at the pairs with: clair report {public_path(place)}")
    for role, tokens in built.manifest["tokens"].items():
        if unknown := tokens.get("without_finish_reason"):
            print_(f"{role}: {unknown} replies came without a finish_reason; none of them is known to be whole")
    if built.failed:
        print(f"{built.failed} rows failed (see dropped.jsonl); run it again to try them again", file=sys.stderr)
        raise typer.Exit(EXIT_SOME_FAILED)


def _check_runner(runner: str | None, **others: object) -> None:
    """Raises UserError for a runner that is none, and for options that nothing would read."""
    given = [f"--{name}" for name, value in others.items() if value is not None]
    if runner is None and set(given) - {"--shard"}:
        raise UserError(f"{(set(given) - {'--shard'}).pop()} is for --runner ray; add it, or leave that out")
    if runner not in (None, "ray"):
        raise UserError(f"unknown runner {runner!r}; allowed: ray, or none for this process")
    if runner and "--shard" in given:
        raise UserError("--shard is one part and --runner ray builds all; choose one, or give --shards N")


@app.command()
def merge(
    folder: Annotated[str, typer.Argument(help="The folder or URL of shards that clair build --shard made.")],
    out: Annotated[str | None, typer.Option(help="The dataset folder or URL, instead of the recipe's out.")] = None,
) -> None:
    """Join the shards of a build: the same dataset, byte for byte, as one run makes."""
    from clair.cluster.merge import merge as merge_shards
    from clair.core.console import show as print_
    from clair.core.progress import tell
    from clair.data.dataset import quality_warnings
    from clair.storage.object_store import folder_of
    from clair.terminal import summary

    manifest = merge_shards(folder, out)
    print_(summary([folder_of(manifest["recipe"]["out"])]))
    for doubt in quality_warnings(manifest):
        tell(f"note: {doubt}")
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
    """What a build will cost: calls, and with --probe tokens and money with a 95 % interval, and time."""
    from clair.core.console import show as print_
    from clair.core.recipe import load_recipe
    from clair.pipeline.config import BuildConfig
    from clair.pipeline.estimate import MIN_PROBE, total_time
    from clair.pipeline.estimate import estimate as estimate_build
    from clair.terminal import client_progress, cost_table

    config = load_recipe(BuildConfig, recipe, [*(set_ or []), *([text_override("out", out)] if out else [])])
    rows = max(MIN_PROBE, probe)
    with client_progress("probing" if probe else "counting", rows, dict.fromkeys(config.models, rows)) as on_progress:
        roles = estimate_build(config, probe, on_progress)
    print_(cost_table(roles))
    if not probe:
        print_("tokens, cost and time need a look at real replies: add --probe 5 (they are paid for once and kept)")
    elif total_time(roles):
        print_(
            f"time: the shorter where the servers take {config.concurrency} requests at once as fast as those of the "
            f"probe, the longer at the pace of the probe, such as of a server that answers one at a time"
        )


@app.command()
def stats(folders: Annotated[list[str], typer.Argument(help="Dataset folders or URLs.")]) -> None:
    """Counts, drop reasons, contrast and tokens of dataset folders, side by side."""
    from clair.core.console import show as print_
    from clair.terminal import summary

    print_(summary(folders))


@app.command()
def show(
    folder: Annotated[str, typer.Argument(help="A dataset folder or URL.")],
    n: Annotated[int, typer.Option("-n", min=1, help="How many pairs.")] = 5,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
) -> None:
    """Pairs as word-level diffs: what the winner left out of the loser, and what it put in."""
    from itertools import islice

    from clair.core.console import show as print_
    from clair.core.errors import near_miss
    from clair.data.dataset import SPLITS, read_manifest, read_rows
    from clair.terminal import pair_panel

    read_manifest(folder)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}{near_miss(split, SPLITS)}; allowed: {', '.join(SPLITS)}")
    for row in islice(read_rows(folder, [split]), n):
        print_(pair_panel(row))


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="A dataset folder or URL.")],
    out: Annotated[
        Path | None, typer.Option(callback=local, help="Where the page goes, instead of DIR/report.html.")
    ] = None,
    filter_: Annotated[
        list[str] | None, typer.Option("--filter", help="Whose full text it holds: 'kept<0.5', split=test; repeatable.")
    ] = None,
) -> None:
    """One HTML page to look at a dataset: funnel, contrast, lengths, and the pairs to search, sort and mark."""
    from clair.core.console import show as print_
    from clair.reporting.dataset_report import report as write_report
    from clair.storage.object_store import is_url, local_copy

    with local_copy(folder) as here:
        page = write_report(here, out or (Path(f"{here.name}-report.html") if is_url(folder) else None), filter_ or [])
    print_(f"{page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser, mark pairs and save the decisions;")
    print_(f"apply them with: clair keep {folder} decisions.json")


@app.command()
def keep(
    folder: Annotated[str, typer.Argument(help="The dataset folder or URL whose report you marked.")],
    decisions: Annotated[Path, typer.Argument(help="The decisions file that the page saved.")],
    out: Annotated[str | None, typer.Option(help="A new dataset folder, instead of changing this one.")] = None,
) -> None:
    """Drop the pairs that were marked drop in the page of `clair report`; they move to dropped.jsonl."""
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
    from clair.core.errors import near_miss
    from clair.data.dataset import SPLITS
    from clair.pipeline.export import FORMS
    from clair.pipeline.export import export as write

    for name, value, allowed in (("form", as_, FORMS), ("split", split, SPLITS)):
        if value not in allowed:
            raise UserError(f"unknown {name} {value!r}{near_miss(value, allowed)}; allowed: {', '.join(allowed)}")
    print_(f"{write(as_, folder, split, out)} rows in {out}")  # type: ignore[arg-type]


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="A dataset folder or URL.")],
    name: Annotated[str, typer.Argument(help="org/name on the hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Really send it.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a private dataset.")] = False,
) -> None:
    """Send a dataset to the hub with its card. Without --yes it only shows what would be sent."""
    from clair.core.console import show as print_
    from clair.pipeline.export import files_to_push
    from clair.pipeline.export import push as send
    from clair.storage.object_store import local_copy

    with local_copy(folder) as here:
        files = files_to_push(here)
        if yes:
            print_(send(here, name, private=private))
            return
        for file in files:
            print_(f"{file.relative_to(here)}  {file.stat().st_size:,} bytes")
        print_((here / "README.md").read_text("utf-8"))
    print_(f"nothing was sent; add --yes to send these {len(files)} files to {name}")


@app.command()
def salvage(
    ledger: Annotated[Path, typer.Argument(help="The ledger file that an error called damaged.")],
) -> None:
    """Put what can be read of a damaged ledger into a fresh one in its place. The damaged file is kept."""
    from clair.core.console import show as print_
    from clair.ledger.recovery import salvage as save

    saved = save(ledger)
    print_(f"{saved.replies} paid replies and {saved.others} calls without one are in {ledger}, ready for use;")
    print_(f"the damaged file is kept as {saved.backup}. Replies that could not be read will be asked for again,")
    print_("and what they cost is no longer counted by a budget.")


@app.command("check-endpoint")
def check_endpoint(
    urls: Annotated[list[str], typer.Argument(help="Base URLs, ending in /v1.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The served model's folder, to compare with.")] = None,
    model: Annotated[str | None, typer.Option(help="The name it is served under, where there are several.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="The environment variable that holds the key.")] = None,
) -> None:
    """See that endpoints serve what you think: template, end of turn, truncation, logprobs, speed."""
    from clair.core.console import show as print_
    from clair.core.progress import progress
    from clair.inference.endpoint_check import check_endpoints
    from clair.terminal import checks_table

    step: list[str] = []

    def on_step(words: str) -> None:
        step[:] = [words]

    with progress("checking", details=lambda: step):
        checks = check_endpoints(urls, tokenizer, model=model, key_env=api_key_env, on_step=on_step)
    print_(checks_table(checks))
    wrong = [
        f"{url}: {check.name} ({check.told})" for url, found in checks.items() for check in found if check.ok is False
    ]
    if wrong:
        raise UserError(f"{wrong[0]}; pairs built with it would not be what you think")


@app.command("next")
def next_(
    folder: Annotated[str, typer.Argument(help="The dataset folder or URL of the round before.")],
    model: Annotated[str, typer.Option(help="The tuned model's folder: the new target.")],
    out: Annotated[Path, typer.Option(callback=local, help="The dataset folder of the new round.")],
) -> None:
    """Prepare a further round: the tuned model answers what it got wrong before, and what was not seen yet."""
    from clair.core.console import show as print_
    from clair.pipeline.export import next_round
    from clair.storage.object_store import local_copy

    with local_copy(folder) as here:
        recipe, again, fresh = next_round(here, model, out)
    print_(f"{again} prompts that gave a pair and {fresh} not seen yet; build them with: clair build {recipe}")
