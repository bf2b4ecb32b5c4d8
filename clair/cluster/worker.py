"""A process that builds shards for a job on a Ray cluster, one at a time. It imports no Ray of its own."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from socket import gethostname
from typing import Any

from clair.cluster.leased_limits import LeasedResources
from clair.cluster.shared_limits import Lease, Report
from clair.core.errors import EXIT_USER_ERROR, UserError
from clair.core.exit_codes import system_error_message
from clair.inference.budget import Budget
from clair.inference.config import ModelConfig
from clair.inference.local import LocalModel
from clair.inference.model import Model
from clair.inference.open import open_model
from clair.pipeline.build import build
from clair.pipeline.config import BuildConfig
from clair.pipeline.shards import CrashPolicy, Shard, can_share_budget
from clair.storage.object_store import StorageError

_PATIENCE = 120.0
"""Seconds for the process of an earlier attempt to end and let the folder go."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is to build, and where it stands: the driver's folder, its version, and the secrets it needs."""

    config: BuildConfig
    shard: Shard
    attempt: str
    update: bool
    care: CrashPolicy
    folder: str
    version: str
    environment: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Done:
    """How it ended: whole, stopped early with the reason, or with a mistake of the user's."""

    failed: int = 0
    stopped: str | None = None
    error: str | None = None
    code: int = EXIT_USER_ERROR


class Worker:
    """Builds shards; local models stay loaded from one to the next."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], LocalModel] = {}

    def here(self) -> None:
        """The worker has found its place."""

    def build(self, order: Order, quotas: Any) -> Done:
        """Build one shard within the leases of `quotas`, the handle of an actor."""
        try:
            settle_in(order.folder, order.version, order.environment)
            built = self._build(order, lambda report: quotas.report.remote(report))
        except UserError as error:
            where = f"on {gethostname()}: " if isinstance(error, StorageError) else ""  # its keys are not the driver's
            return Done(error=f"{where}{error}", code=error.exit_code)
        except OSError as error:
            if (told := system_error_message(error)) is None:
                raise
            return Done(error=told)
        return Done(built.failed, built.stopped)

    def _build(self, order: Order, exchange: Callable[[Report], Awaitable[Lease]]) -> Any:
        seen: dict[str, Any] = {}
        means = _ShardMeans(
            shard=order.shard.name,
            attempt=order.attempt,
            exchange=exchange,
            done=lambda: _numbers(**seen) if seen else {},
            kept=self._models,
            money=can_share_budget(order.config),
        )
        return build(
            order.config,
            shard=order.shard,
            update=order.update,
            resources=means,
            crash_policy=order.care,
            patience=_PATIENCE,
            on_progress=lambda writer, clients: seen.update(writer=writer, clients=clients),
        )


def settle_in(folder: str, theirs: str, environment: Mapping[str, str]) -> None:
    """Stand where the driver stands, with its secrets. Raises UserError for another version or a missing folder."""
    own = version("clair-apo")
    if own != theirs:
        raise UserError(f"a node has clair-apo {own} and the driver {theirs}; install the same on all nodes")
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"a node cannot enter {folder} ({error.strerror}); start from a folder that all nodes share"
        ) from error


@dataclass
class _ShardMeans(LeasedResources):
    """Leases, and local models that outlive the run."""

    kept: dict[tuple[str, str], LocalModel] = field(default_factory=dict)

    def model(self, role: str, config: ModelConfig) -> Model:
        """The model of a role; a local one as the shard before left it."""
        if config.path is None:
            return open_model(role, config)
        key = (role, config.model_dump_json())
        if key not in self.kept:
            opened = open_model(role, config)
            assert isinstance(opened, LocalModel)
            opened.kept = True
            self.kept[key] = opened
        return self.kept[key]


def _numbers(writer: Any, clients: Mapping[str, Any]) -> dict[str, float]:
    """What the bar and the metrics show of a shard."""
    tallies = {role: client.told for role, client in clients.items()}
    tokens = sum(tally.prompt_tokens + tally.completion_tokens for tally in tallies.values())
    budget: Budget | None = next((client.spending.budget for client in clients.values()), None)
    return {
        "pairs": writer.pairs,
        "dropped": writer.counts["dropped"],
        "calls": sum(tally.calls for tally in tallies.values()),
        "tokens": tokens,
        "spent": float(budget.spent) if budget else 0.0,
    }
