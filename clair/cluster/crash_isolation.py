"""What a shard died of: the care that its next process takes, until the row is found that kills it."""

from __future__ import annotations

from dataclasses import dataclass, field

from clair.pipeline.shards import CrashPolicy

HOPELESS = 6
"""Deaths without any new reply that no care has helped against."""
_STRIKES = 2
"""Deaths without any new reply after which rows are built one by one, to find the one that the shard dies of."""


@dataclass(slots=True)
class CrashHistory:
    """How often one shard died without coming any further, and the care that it needs."""

    care: CrashPolicy = field(default_factory=CrashPolicy)
    _strikes: int = 0
    _answered: int | None = None
    _suspect: str | None = None

    def one_more(self, answered: int | None, row: str | None) -> bool:
        """Whether it may be built again. `answered`: the tokens of its replies, if known; `row`: what it was at."""
        if answered is not None:
            self._strikes = self._strikes + 1 if self._answered == answered else 1
            self._answered = answered
        row = row if self.care.log_rows else None
        if row and row == self._suspect:
            self.care = CrashPolicy(self.care.poison_rows | {row})
            self._strikes = 0
        elif self._strikes >= HOPELESS:
            return False
        elif self._strikes >= _STRIKES:
            self.care = CrashPolicy(self.care.poison_rows, log_rows=True)
        self._suspect = row
        return True
