"""Crash isolation: after repeated deaths of a shard's worker, find the row that kills the process, and skip it."""

from __future__ import annotations

from dataclasses import dataclass, field

from clair.pipeline.shards import CrashPolicy

MAX_CRASHES = 6
"""Deaths without a new reply after which the shard is given up."""
_MAX_UNEXPLAINED = 2
"""Deaths without a new reply after which rows are built one by one, to identify the row that kills the process."""


@dataclass(slots=True)
class CrashHistory:
    """The deaths of one shard's workers without progress, and the policy for its next worker."""

    policy: CrashPolicy = field(default_factory=CrashPolicy)
    _crashes: int = 0
    _answered: int | None = None
    _suspect: str | None = None

    def add_crash(self, answered: int | None, row: str | None) -> bool:
        """Record a death; True if the shard is to be built again.

        `answered`: the tokens of its replies, if known. `row`: the row it was at, if its policy notes rows.
        """
        if answered is not None:
            self._crashes = self._crashes + 1 if self._answered == answered else 1
            self._answered = answered
        row = row if self.policy.log_rows else None
        if row and row == self._suspect:
            self.policy = CrashPolicy(self.policy.poison_rows | {row})
            self._crashes = 0
        elif self._crashes >= MAX_CRASHES:
            return False
        elif self._crashes >= _MAX_UNEXPLAINED:
            self.policy = CrashPolicy(self.policy.poison_rows, log_rows=True)
        self._suspect = row
        return True
