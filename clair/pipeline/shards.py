"""One shard of a build: the rows whose id hashes to it, in a folder of its own, until `clair merge` joins them all."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import content_hash
from clair.inference.config import ModelConfig
from clair.pipeline.config import BuildConfig
from clair.storage.location import Location
from clair.storage.object_store import Store


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` (from 1) of `count`."""

    index: int
    count: int

    @property
    def name(self) -> str:
        """The name of the shard's folder inside the folder of shards."""
        return f"{self.index}-of-{self.count}"

    def contains(self, id: str) -> bool:
        """True if the row of this id belongs to the shard. The hash decides, so shards need not know of each other."""
        return int(content_hash(["shard", id])[:13], 16) % self.count == self.index - 1


def parse_shard(text: str) -> Shard:
    """Parse `2/4` or the folder name `2-of-4`. Raises UserError."""
    match = re.fullmatch(r"(\d{1,6})(?:/|-of-)(\d{1,6})", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return Shard(int(match[1]), int(match[2]))
    raise UserError(f"--shard {text}: give the shard and their number, from --shard 1/4 to --shard 4/4")


def shards_location(out: Location) -> Location:
    """The folder or URL of a build's shards."""
    return Location(f"{out.rstrip('/')}-shards" if out.is_url else f"{Path(out)}-shards")


def list_shards(folder: Location) -> tuple[set[Shard], set[Shard]]:
    """All shards in a folder or at a URL, and the finished ones among them."""
    local_paths = (path for pattern in ("*-of-*/", "*-of-*/manifest.json") for path in Path(folder).glob(pattern))
    local_files = (path.relative_to(folder) for path in local_paths)
    files = [Path(name).parts for name in (Store(folder).names() if folder.is_url else local_files)]
    shards = {parse_shard(folder_name) for folder_name, *_ in files if "-of-" in folder_name}
    finished = {folder_name for folder_name, *below in files if below == ["manifest.json"]}
    return shards, {shard for shard in shards if shard.name in finished}


def shard_count(folder: Location, shards: Collection[Shard]) -> int | None:
    """The number of shards that a build has by those in its folder; None without any. Raises UserError for several."""
    counts = sorted({shard.count for shard in shards})
    if len(counts) > 1:
        several = ", ".join(map(str, counts))
        raise UserError(
            f"{folder.public} holds shards of several numbers ({several}); move those away that do not belong"
        )
    return counts[0] if counts else None


def shard_config(config: BuildConfig, shard: Shard, *, shared: bool = False) -> BuildConfig:
    """The recipe of one shard: its own folder, and its share of the budget and of the rates.

    With `shared`, the shards of the job share the rates, and the budget if they can (`can_share_budget`).
    Raises UserError for `accept`, which counts pairs in the order of all prompts; no shard sees that order.
    """
    if config.accept:
        raise UserError(
            f"accept: {config.accept} takes the first pairs in the order of all prompts, which no shard sees; remove "
            f"it, or build without shards"
        )
    changes: dict[str, Any] = {"out": shards_location(config.out) / shard.name}
    if config.budget and not (shared and can_share_budget(config)):
        changes["budget"] = config.budget.share(shard.count)

    def with_rate_shares(model: ModelConfig) -> ModelConfig:
        rates = {key: getattr(model, key) for key in ("requests_per_minute", "tokens_per_minute")}
        return model.model_copy(update={key: max(1, rate // shard.count) for key, rate in rates.items() if rate})

    return (config if shared else config.with_models(with_rate_shares)).model_copy(update=changes)


def can_share_budget(config: BuildConfig) -> bool:
    """True if concurrent shards can share the budget: not with batches, which reserve money for days."""
    return not any(model.batching for model in config.models.values())


@dataclass(frozen=True, slots=True)
class CrashPolicy:
    """How to build a shard whose process was killed repeatedly: the rows to skip, and whether to log each row first."""

    poison_rows: frozenset[str] = frozenset()
    """Ids of rows that are skipped and counted as failed."""
    log_rows: bool = False
    """Build one row at a time, and write its id to the file `CURRENT_ROW` before it starts."""
