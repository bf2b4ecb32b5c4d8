"""The connection to a Ray cluster, and the actor that holds the limits of a job."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from clair.cluster.shared_limits import Lease, ShardReport, SharedLimits
from clair.core.errors import UserError, one_line
from clair.inference.config import ModelConfig

_STORE_BYTES = 80 * 2**20  # the minimum that Ray accepts; a job stores no objects


def check_no_servers(models: Mapping[str, ModelConfig]) -> None:
    """Check that no model (by role) has a server of the run's own, which lives on one machine. Raises UserError."""
    for role, model in models.items():
        if model.serve is not None:
            raise UserError(
                f"{role}.serve starts a server on one machine, and --runner ray uses several; start it yourself and "
                f"give its url and model"
            )


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to Ray for the length of a `with` block. Raises UserError, with both versions if they differ."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--runner ray needs Ray, which is not installed: pip install 'clair-apo[ray]'") from error
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise UserError(f"--address {address}: Ray's client is not supported; start on a node of it, --address auto")
    options = {"include_dashboard": False, "object_store_memory": _STORE_BYTES} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises many kinds, plain Exception too
        raise UserError(f"--address {address}: {one_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


class LimitsActor(SharedLimits):
    """The shared limits of a job as an actor; the numbers that shards report also go to Ray's metrics."""

    def __init__(self, *limits: Any) -> None:
        super().__init__(*limits)
        from ray.util.metrics import Counter as Metric

        self._metrics = {name: Metric(f"clair_{name}", description) for name, description in _METRICS.items()}
        self._reported: dict[tuple[str, str], float] = {}

    def report(self, report: ShardReport) -> Lease:
        """Take a shard's report and answer with its lease."""
        for name, value in report.progress.items():
            reported = self._reported.get((report.shard, name), 0.0)
            if value > reported:  # a shard that is built again counts from zero
                self._metrics[name].inc(value - reported)
                self._reported[report.shard, name] = value
        return super().report(report)


_METRICS = {
    "pairs": "Pairs built",
    "dropped": "Prompts that gave no pair",
    "calls": "Calls of models, without those that the ledger answered",
    "tokens": "Tokens in and out, of all replies that the rows needed",
    "spent": "What counts against the budget: money by the recipe's prices, or tokens",
}
