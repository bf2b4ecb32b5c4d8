"""One shard of a build: the rows whose id hashes to it, in a folder of their own, until `clair merge` joins them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import content_hash
from clair.pipeline.config import BuildConfig
from clair.storage.object_store import Store, is_url, joined


@dataclass(frozen=True, slots=True)
class Shard:
    """The `index`-th (from 1) of `of` shards."""

    index: int
    of: int

    @property
    def name(self) -> str:
        """The folder of the shard inside the folder of shards."""
        return f"{self.index}-of-{self.of}"

    def holds(self, id: str) -> bool:
        """Whether the row of this id belongs to the shard: by hash, so that no shard needs to know of another."""
        return int(content_hash(["shard", id])[:13], 16) % self.of == self.index - 1


def read_shard(text: str) -> Shard:
    """The shard that `2/4` or the folder name `2-of-4` names. Raises UserError."""
    found = re.fullmatch(r"(\d{1,6})(?:/|-of-)(\d{1,6})", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return Shard(int(found[1]), int(found[2]))
    raise UserError(f"--shard {text}: give the shard and their number, from --shard 1/4 to --shard 4/4")


def shards_out(out: str | Path) -> str:
    """Where the shards of a build go: a folder or a URL."""
    return f"{str(out).rstrip('/')}-shards" if is_url(str(out)) else f"{Path(out)}-shards"


def list_shards(folder: str) -> tuple[set[Shard], set[Shard]]:
    """The shards that are in a folder or at a URL, and those of them that are finished."""
    if is_url(folder):
        names = [name.split("/") for name in Store(folder).names()]
        there = {parts[0] for parts in names if len(parts) > 1}
        finished = {parts[0] for parts in names if parts[1:] == ["manifest.json"]}
    else:
        entries = [entry for entry in Path(folder).iterdir() if entry.is_dir()] if Path(folder).is_dir() else []
        there = {entry.name for entry in entries}
        finished = {entry.name for entry in entries if (entry / "manifest.json").is_file()}
    shards = {read_shard(name) for name in there if "-of-" in name}
    return shards, {shard for shard in shards if shard.name in finished}


def sharded(config: BuildConfig, shard: Shard, *, shared: bool = False) -> BuildConfig:
    """The recipe of one shard: a folder of its own, and its part of the budget and of the rates.

    `shared`: no part, since the shards of the job share them; of the budget only where they can (`shares_money`).
    Raises UserError for `accept`, which counts pairs in the order of all prompts: no shard sees that order.
    """
    if config.accept:
        raise UserError(
            f"accept: {config.accept} takes the first pairs in the order of all prompts, which no shard sees; remove "
            f"it, or build without shards"
        )
    changes: dict[str, Any] = {"out": joined(shards_out(config.out), shard.name)}
    if config.budget and not (shared and shares_money(config)):
        money, tokens = config.budget.money, config.budget.tokens
        part = {"money": money and money / shard.of, "tokens": tokens and tokens // shard.of}
        changes["budget"] = config.budget.model_copy(update=part)
    for role, model in () if shared else config.models.items():
        rates = {key: getattr(model, key) for key in ("requests_per_minute", "tokens_per_minute")}
        parts = {key: max(1, rate // shard.of) for key, rate in rates.items() if rate}
        changes[role] = model.model_copy(update=parts)
    return config.model_copy(update=changes)


def shares_money(config: BuildConfig) -> bool:
    """Whether shards that run together can share the budget: not with batches, which set money aside for days."""
    return not any(model.batching for model in config.models.values())


@dataclass(frozen=True, slots=True)
class CrashPolicy:
    """How to build a shard that keeps killing its process: which rows it dies of, and where to note each before it."""

    poison_rows: frozenset[str] = frozenset()
    """Ids of rows that are left out, and counted as failed."""
    note: bool = False
    """Build row by row, and write the id of each where it builds (`DYING`) before it is begun."""
