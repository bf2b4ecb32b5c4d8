"""Build a dataset folder from a recipe: resumable, and the same bytes however often it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.files import content_hash, file_sha256, read_json, write_atomically, write_json
from clair.core.out_folder import ANOTHER_RUN, check_unchanged
from clair.core.provenance import provenance
from clair.core.urls import without_secrets
from clair.data.dataset import DatasetWriter, read_manifest
from clair.data.dataset_card import card
from clair.data.prompt_sources import Scan, each_prompt, read_prompts, scan
from clair.data.records import Pair
from clair.inference.batch_service import Pending
from clair.inference.budget import Tally, discounted_share, price_table_version, role_prices
from clair.inference.client import ModelClient
from clair.inference.open import Resources, check_models
from clair.ledger.ledger import Ledger, Tokens
from clair.pipeline.balance import LengthBalance
from clair.pipeline.config import BuildConfig, changed_content_keys, redacted
from clair.pipeline.output_dir import CURRENT_ROW, Output, check_output, lock_output
from clair.pipeline.runner import (
    KILLED_WORKER,
    PipelineRun,
    PromptRow,
    check_scorer,
    load_templates,
    open_run,
    scorer_sha256,
)
from clair.pipeline.shards import CrashPolicy, Shard, shard_config
from clair.pipeline.steps import position_bias
from clair.prompting.calls import check_tools


@dataclass(frozen=True, slots=True)
class BuildResult:
    """The outcome of a build. If it ended early, `stopped` is the reason and the folder holds what it held before."""

    out: Path
    """The dataset folder on this machine; the local copy if the recipe's `out` is a URL."""
    manifest: Mapping[str, Any]
    failed: int
    """Rows that failed and that the next run tries again."""
    stopped: str | None = None

    def __repr__(self) -> str:
        if self.stopped:
            return f"BuildResult({str(self.out)!r}, stopped={self.stopped!r})"
        counts = self.manifest["counts"]
        numbers = f"pairs={counts['pairs']}, dropped={counts['dropped']}, failed={self.failed}"
        return f"BuildResult({str(self.out)!r}, {numbers})"


OnProgress = Callable[[DatasetWriter, Mapping[str, ModelClient]], None]


def check_recipe(config: BuildConfig, shard: Shard | None = None) -> Scan:
    """Check everything that can be checked before the first request, and scan the prompts. Writes nothing.

    If `shard` is given, the result counts only the rows of this shard as `held`. Raises UserError.
    """
    check_output(config.out)
    load_templates(config)
    check_models(config.models, config.budget, config.seed)
    LengthBalance.of(config)
    if config.scores:
        check_scorer(config.scores)
    prompt_scan = scan(config.prompts, config.limit, shard.contains) if shard else scan(config.prompts, config.limit)
    prompts = prompt_scan.unique
    if config.reviser and config.reviser.tool_calls == "revise":
        for prompt in read_prompts(config.prompts, config.limit) if prompt_scan.tools else ():
            check_tools(prompt.tools, f"{config.prompts.path.public}, row with id {prompt.id}")
    provided = prompt_scan.compared if config.pipeline == "judged" else prompt_scan.answered
    if getattr(config, config.answerer) is None and provided < prompts:
        column = "answers column" if config.pipeline == "judged" else "answer column"
        raise UserError(
            f"{prompts - provided} of {prompts} prompts have no answer and the recipe has no {config.answerer}; "
            f"add {config.answerer}: or an {column}"
        )
    if config.pipeline in ("stronger", "delta") and config.stronger is None and prompt_scan.preferred < prompts:
        raise UserError(
            f"{prompts - prompt_scan.preferred} of {prompts} prompts have no stronger answer and the recipe has no "
            f"stronger model; add stronger:, or fill the column that prompts.columns.stronger names"
        )
    decides = config.judge or (config.scores and config.scores.has_source)
    if config.pipeline == "judged" and not decides and prompt_scan.scored < prompts:
        raise UserError(
            f"{prompts - prompt_scan.scored} of {prompts} prompts have no scores and the recipe has no judge; add "
            f"judge:, or scores: with a checker, a reward or judges, or a scores column"
        )
    return prompt_scan


def build(
    config: BuildConfig,
    *,
    prompt_scan: Scan | None = None,
    update: bool = False,
    on_progress: OnProgress | None = None,
    shard: Shard | None = None,
    resources: Resources | None = None,
    crash_policy: CrashPolicy | None = None,
    patience: float = 0.0,
) -> BuildResult:
    """Build the dataset folder `config.out`, or one shard of it. Replies that its ledger holds are reused.

    Args:
        prompt_scan: the result of `check_recipe`, if the caller has it.
        update: rebuild a folder that holds the run of another recipe.
        on_progress: called with the writer and the clients at every change.
        resources: the limits and the budget that all shards share. Without it a shard has a share of its own.
        crash_policy: the rows that killed the process before.
        patience: seconds to wait for a folder that another process is using.

    Raises UserError for the user's mistakes (docs/filters.md lists them) before any work, and for a refusing endpoint.
    """
    recipe = config
    if shard:
        config = shard_config(config, shard, shared=resources is not None)
    prompt_scan = prompt_scan or check_recipe(config)
    with lock_output(config.out, patience) as output:
        out = output.folder
        check_resumable(config, out, update=update)
        output.upload("recipe.json")
        with output.ledger(config.ledger_path) as ledger:
            options = (on_progress or (lambda *_: None), shard, resources, crash_policy or CrashPolicy())
            result = run_async(_build(config, prompt_scan, output, ledger, *options))
        if result.stopped:
            return result
        output.remove(CURRENT_ROW)
        manifest = {**result.manifest, "recipe": recorded_recipe(recipe)}
        if shard:
            manifest["shard"] = {"index": shard.index, "of": shard.count}
        write_json(out / "manifest.json", manifest)
        write_atomically(out / "README.md", card(manifest))
        output.publish()
        return BuildResult(out, manifest, result.failed)


async def _build(
    config: BuildConfig,
    prompt_scan: Scan,
    output: Output,
    ledger: Ledger,
    on_progress: OnProgress,
    shard: Shard | None,
    resources: Resources | None,
    crash_policy: CrashPolicy,
) -> BuildResult:
    started = time.monotonic()
    async with open_run(config, ledger, resources=resources) as run:
        while True:
            writer = DatasetWriter(
                output.folder,
                seed=config.seed,
                test_fraction=config.test_fraction,
                order=shard is not None,
                tools=prompt_scan.tools,
                template_options=config.template_options,
            )
            balance = None if shard else LengthBalance.of(config)  # a shard does not see the pairs of other shards
            finished = False
            try:
                finished = await _fill(run, prompt_scan, writer, balance, on_progress, shard, crash_policy, output)
                if finished and balance:
                    writer.remove(balance.surplus())
            finally:
                hashes = writer.close(keep=finished)
            if finished or not await run.wait(partial(on_progress, writer, run.clients)):
                break
    if not finished:
        if run.stop.error:
            raise run.stop.error
        return BuildResult(output.folder, {}, writer.failed, run.stop.reason)
    manifest = _manifest(config, prompt_scan, writer, run, balance, hashes, time.monotonic() - started)
    return BuildResult(output.folder, manifest, writer.failed)


async def _fill(
    run: PipelineRun,
    prompt_scan: Scan,
    writer: DatasetWriter,
    balance: LengthBalance | None,
    on_progress: OnProgress,
    shard: Shard | None,
    crash_policy: CrashPolicy,
    output: Output,
) -> bool:
    """Write the outcome of every prompt, in the order of the prompts. Returns True if all of them have one."""
    config, pending = run.config, 0

    def on_row_done(_: object) -> None:
        writer.waiting += 1
        on_progress(writer, run.clients)

    def rows() -> Iterator[PromptRow]:
        for index, (prompt, skip_reason) in enumerate(each_prompt(config.prompts, config.limit, prompt_scan)):
            if config.accept and writer.pairs + pending >= config.accept:  # each pending row may become a pair
                return
            if shard is None or shard.contains(prompt.id):
                if crash_policy.log_rows:
                    (output.folder / CURRENT_ROW).write_text(prompt.id, "utf-8")
                    output.upload(CURRENT_ROW)
                skip_reason = KILLED_WORKER if prompt.id in crash_policy.poison_rows else skip_reason
                yield PromptRow(index, prompt, skip_reason)

    on_progress(writer, run.clients)
    async with aclosing(run.outcomes(rows(), one_by_one=crash_policy.log_rows, on_row_done=on_row_done)) as outcomes:
        async for row, outcome in outcomes:
            writer.waiting -= 1
            if isinstance(outcome, Pending):
                pending += 1
            elif isinstance(outcome, Pair):
                pair = outcome.row()
                writer.add(pair, row.index)
                if balance:
                    balance.add(pair)
            else:
                writer.drop(outcome.row(row.prompt.id), row.index)
            on_progress(writer, run.clients)
            if writer.pairs == config.accept and not pending:
                return True
    finished = not pending and run.stop.reason is None
    if finished and shard is None:  # a shard does not see the refusals of other shards
        for client in run.clients.values():
            client.health.check_refusals()
    return finished


def _has_content(config: BuildConfig, out: Path) -> bool:
    """True if a run of this folder paid for a reply or finished. A wrong key or URL does not bind the folder."""
    if (out / "manifest.json").is_file():
        return True
    if not config.ledger_path.is_file():
        return False
    with Ledger(config.ledger_path) as ledger:
        return any(sum(tokens) for tokens in ledger.spent(config.out.account).values())


def recorded_recipe(config: BuildConfig) -> dict[str, Any]:
    """The recipe as outputs record it: without secrets, with hashes of the files that it names by path."""
    recipe, templates = redacted(config), load_templates(config)
    if config.reviser:
        texts = [templates[name] for name in ("reviser", "edits") if name in templates]
        recipe["reviser"]["template_sha256"] = content_hash(texts)
    if config.judge:
        recipe["judge"]["template_sha256"] = content_hash([templates["judge"]])
    if config.scores:
        recipe["scores"]["scorer_sha256"] = scorer_sha256(config.scores)
    if config.prompts.not_in:
        with config.prompts.not_in.local_copy() as file:
            recipe["prompts"]["not_in_sha256"] = file_sha256(file) if file.is_file() else None
    return recipe


def check_resumable(config: BuildConfig, out: Path, *, update: bool) -> None:
    """Check that the folder `out` belongs to this recipe, and write its recipe.json before the first request.

    Raises UserError if the folder holds the run of another recipe or was reviewed, unless `update`.
    """
    file, name = out / "recipe.json", config.out.public
    recipe = recorded_recipe(config)
    if file.is_file() and not update and _has_content(config, out):
        remedy = (
            ", or add --update to rebuild it with this one: replies that still fit are reused, and only the others are "
            "requested"
        )
        check_unchanged(name, ANOTHER_RUN, changed_content_keys(read_json(file), recipe), remedy)
        if (out / "manifest.json").is_file() and read_manifest(out).get("review"):
            raise UserError(
                f"{name} was reviewed (`clair keep`), and building it again would bring the dropped pairs back; choose "
                f"another --out, or add --update to do just that"
            )
    write_json(file, recipe)


def _manifest(
    config: BuildConfig,
    prompt_scan: Scan,
    writer: DatasetWriter,
    run: PipelineRun,
    balance: LengthBalance | None,
    hashes: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:
    models, clients = config.models, run.clients
    position = {"position": position_bias(run.judge.verdicts)} if run.judge and run.judge.verdicts else {}
    return {
        "format": 1,
        "pipeline": config.pipeline,
        "counts": writer.all_counts(),
        "drop_reasons": dict(sorted(writer.reasons.items())),
        "failed": writer.failed,
        "contrast": writer.contrast_means(),
        "models": {
            role: {"model": client.model.name, "identity": client.model.identity} for role, client in clients.items()
        },
        "sampling": {role: without_secrets(models[role].options(config.seed)) for role in clients},
        "first_replies": dict(sorted(run.reviser.first_replies.items())) if run.reviser else {},
        **position,
        **({"balance": balance.summary()} if balance else {}),
        **({"scores": run.scoring.summary()} if run.scoring else {}),
        **_cost(run),
        "tokens": {role: _token_counts(client.total) for role, client in clients.items()},
        "prompts_sha256": prompt_scan.sha256,
        "files": dict(hashes),
        "seed": config.seed,
        **provenance(),
        "seconds": round(seconds, 1),
    }


def _cost(run: PipelineRun) -> dict[str, Any]:
    """The cost of the dataset's replies by role, reused replies included; empty if no price is known."""
    prices, models = role_prices(run.config.models), run.config.models
    cost = {}
    for role, price in prices.items():
        tally, batching = run.clients[role].tally, models[role].batching
        cost[role] = price.cost(Tokens(tally.prompt_tokens, tally.completion_tokens))
        if batching:
            cost[role] -= (1 - discounted_share(batching.discount)) * price.cost(tally.batched)
    if not cost:
        return {}
    result = {"cost": {role: f"{money.normalize():f}" for role, money in cost.items()}}
    from_table = any(model.price == "table" for model in models.values())
    return result | ({"prices_from": price_table_version()} if from_table else {})


def _token_counts(tally: Tally) -> dict[str, int]:
    return {
        "prompt": tally.prompt_tokens,
        "completion": tally.completion_tokens,
        "calls": tally.calls,
        "reused": tally.reused,
        "retries": tally.retries,
    } | ({"without_finish_reason": tally.missing_finish_reason} if tally.missing_finish_reason else {})
