"""A Ray cluster, connected to; and the actor on it that keeps the limits of a job."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clair.cluster.shared_limits import Lease, Quotas, Report
from clair.core.errors import UserError, one_line

_STORE_BYTES = 80 * 2**20  # nothing of a job lies in the object store, and less than this Ray does not take


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected for the length of a `with` block. Raises UserError, naming both versions where they differ."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("--runner ray needs Ray, which is not installed: pip install 'clair-apo[ray]'") from error
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise UserError(f"--address {address}: Ray's client is not supported; start on a node of it, --address auto")
    own = {"include_dashboard": False, "object_store_memory": _STORE_BYTES} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises whatever it likes, plain ones too
        raise UserError(f"--address {address}: {one_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


class LimitsActor(Quotas):
    """The quotas of a job, in an actor; what shards report also goes to Ray's metrics."""

    def __init__(self, *limits: Any) -> None:
        super().__init__(*limits)
        from ray.util.metrics import Counter as Metric

        self._metrics = {name: Metric(f"clair_{name}", told) for name, told in _METRICS.items()}
        self._told: dict[tuple[str, str], float] = {}

    def report(self, report: Report) -> Lease:
        """Take a shard's report, and lease it what is its part."""
        for name, value in report.done.items():
            before = self._told.get((report.shard, name), 0.0)
            if value > before:  # a shard that is built again counts from nothing
                self._metrics[name].inc(value - before)
                self._told[report.shard, name] = value
        return super().report(report)


_METRICS = {
    "pairs": "Pairs built",
    "dropped": "Prompts that gave no pair",
    "calls": "Calls of models, without those that the ledger answered",
    "tokens": "Tokens in and out, of all replies that the rows needed",
    "spent": "What counts against the budget: money by the recipe's prices, or tokens",
}
