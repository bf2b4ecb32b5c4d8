"""A worker process that builds shards of a job on a Ray cluster, one at a time. It does not import Ray."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from socket import gethostname
from typing import Any

from clair.cluster.leased_limits import LeasedResources
from clair.cluster.shared_limits import Lease, ShardReport
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
"""Seconds to wait until the process of an earlier attempt has released the folder."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The shard that a worker builds, and the driver's working folder, version and secrets."""

    config: BuildConfig
    shard: Shard
    attempt: str
    update: bool
    crash_policy: CrashPolicy
    folder: str
    version: str
    environment: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ShardResult:
    """The end of a shard's build: finished, stopped early with the reason, or failed with a UserError."""

    failed: int = 0
    stopped: str | None = None
    error: str | None = None
    code: int = EXIT_USER_ERROR


class Worker:
    """Builds shards; local models stay loaded between shards."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], LocalModel] = {}

    def is_placed(self) -> None:
        """Return as soon as Ray has placed the worker on a node."""

    def build(self, task: ShardTask, limits: Any) -> ShardResult:
        """Build one shard within the leases of `limits`, the handle of a LimitsActor."""
        try:
            enter_driver_environment(task.folder, task.version, task.environment)
            built = self._build(task, lambda report: limits.report.remote(report))
        except UserError as error:
            node = f"on {gethostname()}: " if isinstance(error, StorageError) else ""  # a node has keys of its own
            return ShardResult(error=f"{node}{error}", code=error.exit_code)
        except OSError as error:
            if (message := system_error_message(error)) is None:
                raise
            return ShardResult(error=message)
        return ShardResult(built.failed, built.stopped)

    def _build(self, task: ShardTask, exchange: Callable[[ShardReport], Awaitable[Lease]]) -> Any:
        state: dict[str, Any] = {}
        resources = _WorkerResources(
            shard=task.shard.name,
            attempt=task.attempt,
            exchange=exchange,
            progress=lambda: _progress(**state) if state else {},
            local_models=self._models,
            shares_budget=can_share_budget(task.config),
        )
        return build(
            task.config,
            shard=task.shard,
            update=task.update,
            resources=resources,
            crash_policy=task.crash_policy,
            patience=_PATIENCE,
            on_progress=lambda writer, clients: state.update(writer=writer, clients=clients),
        )


def enter_driver_environment(folder: str, driver_version: str, environment: Mapping[str, str]) -> None:
    """Enter the driver's folder and set its secrets. Raises UserError for another version or a missing folder."""
    node_version = version("clair-apo")
    if node_version != driver_version:
        raise UserError(
            f"a node has clair-apo {node_version} and the driver {driver_version}; install the same on all nodes"
        )
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"a node cannot enter {folder} ({error.strerror}); start from a folder that all nodes share"
        ) from error


@dataclass
class _WorkerResources(LeasedResources):
    """Leased resources with local models that stay loaded after the run."""

    local_models: dict[tuple[str, str], LocalModel] = field(default_factory=dict)

    def model(self, role: str, config: ModelConfig) -> Model:
        """Open the model of a role, or reuse a local one that an earlier shard has loaded."""
        if config.path is None:
            return open_model(role, config)
        key = (role, config.model_dump_json())
        if key not in self.local_models:
            model = open_model(role, config)
            assert isinstance(model, LocalModel)
            model.keep_loaded = True
            self.local_models[key] = model
        return self.local_models[key]


def _progress(writer: Any, clients: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a shard for the progress bar and the metrics."""
    tallies = {role: client.total for role, client in clients.items()}
    tokens = sum(tally.prompt_tokens + tally.completion_tokens for tally in tallies.values())
    budget: Budget | None = next((client.spending.budget for client in clients.values()), None)
    return {
        "pairs": writer.pairs,
        "dropped": writer.counts["dropped"],
        "calls": sum(tally.calls for tally in tallies.values()),
        "tokens": tokens,
        "spent": float(budget.spent) if budget else 0.0,
    }
