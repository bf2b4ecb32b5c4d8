"""Merge the shards of a build into one dataset, with the same bytes as a build without shards.

Each shard has written its rows in the order of the prompts, with the index of each among all prompts. So the shards are
merged as sorted streams (k-way), and only a few rows of each shard are in memory at a time.
"""

from __future__ import annotations

import heapq
import resource
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import read_json, write_atomically, write_json
from clair.core.out_folder import ANOTHER_RUN, check_unchanged
from clair.core.recipe import resolve
from clair.data.dataset import SPLITS, DatasetWriter, read_dropped, read_manifest, read_order, split_file
from clair.data.dataset_card import card
from clair.data.row_files import parquet_rows
from clair.ledger.join import join_ledgers
from clair.pipeline.balance import LengthBalance
from clair.pipeline.config import BuildConfig, changed_content_keys, without_file_hashes
from clair.pipeline.output_dir import Output, check_output, lock_output
from clair.pipeline.scores import scores_summary
from clair.pipeline.shards import Shard, list_shards, shard_count
from clair.pipeline.steps import position_bias
from clair.storage.location import Location

_ROWS_PER_READ = 100
_FILES_PER_SHARD, _EXTRA_FILES = 5, 100  # a lock, two splits, the order, what was dropped; ours and the libraries'
Row = tuple[int, str, dict[str, Any]]


def merge(folder: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Merge the shards in `folder` into the dataset folder `out` (default: the recipe's); return its manifest.

    Raises UserError for a shard that is missing, unfinished, in use, or of another recipe or other prompts.
    """
    with ExitStack() as stack:
        locations = _locations(Location(folder))
        _allow_files(_FILES_PER_SHARD * len(locations) + _EXTRA_FILES)
        outputs = [stack.enter_context(lock_output(shard)) for shard in locations]
        shards = [output.folder for output in outputs]
        manifests = [read_manifest(shard) for shard in shards]
        _check_same_recipe(shards, manifests)
        for output, manifest in zip(outputs, manifests, strict=True):
            output.fetch(manifest["files"])
        target_location = Location(out or manifests[0]["recipe"]["out"])
        recipe = {**manifests[0]["recipe"], "out": target_location.public}
        check_output(target_location)
        target = stack.enter_context(lock_output(target_location))
        if (file := target.folder / "recipe.json").is_file():
            check_unchanged(target_location.public, ANOTHER_RUN, changed_content_keys(read_json(file), recipe))
        return _merge(shards, manifests, target, recipe)


def _allow_files(count: int) -> None:
    """Raise the limit on open files of this process to `count`. Raises UserError if the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
        except (ValueError, OSError) as error:
            raise UserError(
                f"the shards have {count} files to open at once, and this system allows {hard}; raise it (ulimit -Hn)"
            ) from error


def _locations(folder: Location) -> list[Location]:
    """The folders or URLs of all shards, in order. Raises UserError naming those that are missing."""
    shards, finished = list_shards(folder)
    of = shard_count(folder, shards)
    if of is None:
        raise UserError(f"{folder.public} holds no shards (folders such as 1-of-4); give the folder that --shard made")
    missing = [f"{index}/{of}" for index in range(1, of + 1) if Shard(index, of) not in finished]
    if missing:
        raise UserError(
            f"{folder.public} lacks shard {', '.join(missing[:10])}; run clair build --shard {missing[0]} first"
        )
    return [folder / Shard(index, of).name for index in range(1, of + 1)]


def _check_same_recipe(shards: Sequence[Path], manifests: Sequence[Mapping[str, Any]]) -> None:
    first = manifests[0]
    for shard, manifest in zip(shards, manifests, strict=True):
        changed = changed_content_keys(first["recipe"], manifest["recipe"])
        changed += [key for key in ("models", "prompts_sha256", "format") if first[key] != manifest[key]]
        if changed:
            raise UserError(
                f"{shard} was not built as {shards[0]} was (it differs in {', '.join(changed)}); build it again with "
                f"the same recipe, prompts and models"
            )


def _merge(
    shards: Sequence[Path], manifests: Sequence[dict[str, Any]], output: Output, recipe: dict[str, Any]
) -> dict[str, Any]:
    import pyarrow.parquet as pq

    target = output.folder
    config = resolve(BuildConfig, without_file_hashes(manifests[0]["recipe"]), source=f"{shards[0]}/manifest.json")
    tools = "tools" in pq.read_schema(shards[0] / split_file(SPLITS[0])).names
    writer = DatasetWriter(
        target,
        seed=recipe["seed"],
        test_fraction=recipe["test_fraction"],
        tools=tools,
        template_options=config.template_options,
    )
    balance = LengthBalance.of(config)
    finished = False
    try:
        for expected, (index, kind, row) in enumerate(heapq.merge(*map(_rows, shards), key=lambda row: row[0])):
            if index != expected:
                raise UserError(f"the shards in {shards[0].parent} lack row {expected + 1}; build them again")
            if kind == "dropped":
                writer.drop(row)
            else:
                writer.add(row)
                if balance:
                    balance.add(row)
        if balance:
            writer.remove(balance.surplus())
        finished = True
    finally:
        hashes = writer.close(keep=finished)
    write_json(target / "recipe.json", recipe)
    if recipe["ledger"] is None:
        ledgers, ledger = [shard / "ledger.sqlite" for shard in shards], target / "ledger.sqlite"
        join_ledgers(ledgers, ledger, Location(recipe["out"]).account)
        output.ledger(ledger, send_all=True).close()
    manifest = _manifest(manifests, recipe, writer, hashes)
    if balance:
        manifest["balance"] = balance.summary()
    write_json(target / "manifest.json", manifest)
    write_atomically(target / "README.md", card(manifest))
    output.publish()
    return manifest


def _rows(shard: Path) -> Iterator[Row]:
    """Yield (index among all prompts, kind, row) of a shard, in order."""
    streams = {split: parquet_rows(shard / split_file(split), _ROWS_PER_READ) for split in SPLITS}
    streams["dropped"] = read_dropped(shard)
    for index, kind in read_order(shard):
        row = next(streams[kind], None)
        if row is None:
            raise UserError(f"{shard} is damaged ({kind} ends early); build it again")
        yield index, kind, row


def _manifest(
    manifests: Sequence[dict[str, Any]], recipe: dict[str, Any], writer: DatasetWriter, hashes: Mapping[str, str]
) -> dict[str, Any]:
    """The manifest that one run would write; `seconds` is the sum over all shards."""
    verdicts: Counter[int] = Counter()
    cost: dict[str, Decimal] = {}
    tokens: dict[str, Counter[str]] = {role: Counter() for role in manifests[0]["tokens"]}
    for manifest in manifests:
        for role, counted in manifest["tokens"].items():
            tokens[role].update(counted)
        for choice, name in enumerate(("ties", "first", "second")):
            verdicts[choice] += manifest.get("position", {}).get(name, 0)
        for role, money in manifest.get("cost", {}).items():
            cost[role] = cost.get(role, Decimal(0)) + Decimal(money)
    if "scores" in manifests[0]:
        manifests[0]["scores"] = scores_summary([manifest["scores"] for manifest in manifests])
    position = {"position": position_bias(verdicts)} if sum(verdicts.values()) else {}
    first = sum((Counter(manifest["first_replies"]) for manifest in manifests), Counter())
    merged = {
        **{key: value for key, value in manifests[0].items() if key != "shard"},
        "counts": writer.all_counts(),
        "drop_reasons": dict(sorted(writer.reasons.items())),
        "failed": writer.failed,
        "contrast": writer.contrast_means(),
        **position,
        "first_replies": dict(sorted(first.items())),
        "tokens": {role: dict(counted) for role, counted in tokens.items()},
        "files": dict(hashes),
        "recipe": recipe,
        "seconds": round(sum(manifest["seconds"] for manifest in manifests), 1),
    }
    return merged | ({"cost": {role: f"{Decimal(m).normalize():f}" for role, m in cost.items()}} if cost else {})
