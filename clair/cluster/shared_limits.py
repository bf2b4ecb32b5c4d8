"""What the shards of one job share: requests in flight, requests and tokens a minute, and money.

`Quotas` stands in one place and gives out leases: so many requests in flight, so much money to set aside. Each shard
works within its lease without asking, and reports a few times a second what came of it
(`clair.cluster.leased_limits`). What a
shard that is gone had in flight goes to the others. Plain objects and no clock but the one given, so that whoever
runs the shards decides how reports travel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from clair.inference.budget import Budget
from clair.inference.rate_limit import Limiter, Rate

NOTHING = Decimal(0)
_EVERY = 0.05
"""Seconds between two reports of a shard that waits for something, where there is one shard; more shards, more."""
_LONGEST = 2.0
_SILENT = 30.0
"""Seconds without a report after which the requests in flight of a shard are given to others."""
_PART_AHEAD = 4
"""Of the money left, one in so many of each shard's part is leased ahead of its need."""


@dataclass(frozen=True, slots=True)
class RoleLimits:
    """What all shards together may do in one role."""

    concurrency: int
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


@dataclass(frozen=True, slots=True)
class RoleReport:
    """What one shard does in one role, and what came since its last report."""

    in_flight: int = 0
    waiting: int = 0
    answered: int = 0
    refused: tuple[tuple[int, float | None], ...] = ()
    """For each refusal: how many of this shard's were in flight, and the seconds to wait where the server told."""
    requests: int = 0
    """How many requests want a moment to be sent at."""
    tokens: tuple[float, ...] = ()
    """How many tokens the requests want that wait for them."""
    tokens_back: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """What one shard tells. `attempt` tells an old process of the shard from the one that took its place."""

    shard: str
    attempt: str
    roles: Mapping[str, RoleReport]
    spent: Decimal = NOTHING
    """All that the shard ever spent, open calls of dead runs included."""
    leased: Decimal = NOTHING
    """What it spent, has set aside and keeps for its next calls; what it had beyond is given back."""
    needs: Decimal = NOTHING
    """What its next call may cost, where that does not fit into the lease; it then keeps nothing ahead."""
    done: Mapping[str, float] = field(default_factory=dict)
    """Numbers to show: pairs, dropped, calls, tokens."""
    last: bool = False


@dataclass(frozen=True, slots=True)
class RoleLease:
    """So many requests in flight, none before `pause` seconds are over, and how long each waiting request waits."""

    slots: int
    pause: float = 0.0
    requests: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """The answer to a report. `more` money; `refused`, where what is needed never fits; `stop`, where the job ends."""

    roles: Mapping[str, RoleLease] = field(default_factory=dict)
    more: Decimal = NOTHING
    tight: bool = False
    """Money is short: keep none ahead."""
    refused: str | None = None
    stop: str | None = None
    every: float = _EVERY


GONE = "another process builds this shard now"


@dataclass(slots=True)
class _Shard:
    attempt: str | None = None
    heard: float = 0.0
    roles: dict[str, RoleReport] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    spent: Decimal = NOTHING
    leased: Decimal = NOTHING
    needs: Decimal = NOTHING
    done: Mapping[str, float] = field(default_factory=dict)

    def held(self, role: str) -> int:
        """Requests that may be in flight on its account."""
        return max(self.slots.get(role, 0), self.roles[role].in_flight if role in self.roles else 0)


class Quotas:
    """The limits of a job, leased to its shards. `budget` None: money is only counted."""

    def __init__(
        self,
        roles: Mapping[str, RoleLimits],
        budget: Budget | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._budget = budget
        self._limiters = {role: Limiter(limits.concurrency, clock) for role, limits in roles.items()}
        self._requests = {role: Rate(limits.requests_per_minute, clock) for role, limits in roles.items()}
        self._tokens = {role: Rate(limits.tokens_per_minute, clock) for role, limits in roles.items()}
        self._shards: dict[str, _Shard] = {}
        self._stop: str | None = None

    def begin(self, shard: str, attempt: str | None, spent: Decimal | None) -> None:
        """A shard is about to be built by this attempt (None: by nobody); `spent` is what its ledger says.

        Whatever an earlier attempt held is free again; its money only where `spent` is known.
        """
        old = self._shards.get(shard, _Shard())
        spent, leased = (old.spent, old.leased) if spent is None else (spent, spent)
        self._shards[shard] = _Shard(attempt, self._clock(), spent=spent, leased=leased, done=old.done)

    def stop(self, reason: str) -> None:
        """Let every shard end: nothing new is sent, what is in flight is kept."""
        self._stop = self._stop or reason

    def progress(self) -> dict[str, Mapping[str, float]]:
        """The numbers that each shard told last, by shard."""
        flying = {name: sum(role.in_flight for role in shard.roles.values()) for name, shard in self._shards.items()}
        return {name: {**shard.done, "in_flight": flying[name]} for name, shard in self._shards.items()}

    def report(self, report: Report) -> Lease:
        """Take a shard's report, and lease it what is its part."""
        shard = self._shards.get(report.shard)
        if shard is None or shard.attempt != report.attempt:
            return Lease(stop=GONE)
        shard.heard = self._clock()
        shard.roles, shard.done = dict(report.roles), report.done
        shard.spent, shard.leased = report.spent, max(report.leased, report.spent)
        shard.needs = report.needs
        for role, told in report.roles.items():
            self._learn(role, shard, told)
        if report.last:
            shard.attempt, shard.roles, shard.slots = None, {}, {}
            shard.leased, shard.needs = shard.spent, NOTHING
            return Lease()
        more, refused = self._money(shard)
        shard.leased += more
        return Lease(
            roles={role: self._lease(role, shard, told) for role, told in report.roles.items()},
            more=more,
            tight=any(other.needs > 0 for other in self._shards.values()),
            refused=refused,
            stop=self._stop,
            every=min(_LONGEST, _EVERY * len(self._living())),
        )

    # ---- requests in flight, and how often

    def _living(self) -> list[_Shard]:
        now = self._clock()
        return [s for s in self._shards.values() if s.attempt is not None and now - s.heard <= _SILENT]

    def _learn(self, role: str, shard: _Shard, told: RoleReport) -> None:
        """Answers raise the limit and refusals lower it, as in a single run."""
        limiter = self._limiters[role]
        elsewhere = sum(s.roles[role].in_flight for s in self._living() if s is not shard and role in s.roles)
        limiter.in_flight = elsewhere + told.in_flight
        for _ in range(told.answered):
            limiter.succeeded()
        for in_flight, retry_after in told.refused:
            limiter.in_flight = elsewhere + in_flight
            limiter.refused(retry_after)
        shard.answered[role] = shard.answered.get(role, 0) + told.answered
        self._tokens[role].give_back(told.tokens_back)

    def _lease(self, role: str, shard: _Shard, told: RoleReport) -> RoleLease:
        limiter, living = self._limiters[role], self._living()
        free = int(limiter.limit) - sum(other.held(role) for other in living if other is not shard)
        shard.slots[role] = slots = max(0, min(_fair_part(role, shard, living, int(limiter.limit)), free))
        requests = tuple(self._requests[role].reserve() for _ in range(told.requests))
        tokens = tuple(self._tokens[role].reserve(amount) for amount in told.tokens)
        return RoleLease(slots, limiter.pause, requests, tokens)

    # ---- money

    def _money(self, shard: _Shard) -> tuple[Decimal, str | None]:
        """(money leased beyond what the shard has, why what it needs never fits)."""
        budget = self._budget
        if budget is None or budget.limit is None or shard.needs <= 0:
            return NOTHING, None
        budget.spent = sum((s.spent for s in self._shards.values()), NOTHING)
        held = sum((s.leased - s.spent for s in self._shards.values()), NOTHING)
        free = budget.limit - budget.spent - held
        if shard.needs > free + held:
            return NOTHING, budget.told(shard.needs)
        if shard.needs > free:
            return NOTHING, None  # what is set aside elsewhere may come cheaper
        ahead = free / (_PART_AHEAD * max(1, len(self._living())))
        more, shard.needs = min(free, shard.needs + ahead), NOTHING
        return more, None


def _fair_part(role: str, shard: _Shard, living: list[_Shard], slots: int) -> int:
    """The part of one shard where all get alike, none more than it wants; odd ones go to who was answered least."""
    wants = {id(s): s.roles[role].in_flight + s.roles[role].waiting for s in living if role in s.roles}
    parts = dict.fromkeys(wants, 0)
    hungry = sorted((s for s in living if wants.get(id(s))), key=lambda s: (s.answered.get(role, 0), wants[id(s)]))
    while slots > 0 and hungry:
        each = slots // len(hungry)
        for s in hungry[: slots if each == 0 else None]:
            given = min(max(1, each), wants[id(s)] - parts[id(s)])
            parts[id(s)] += given
            slots -= given
        hungry = [s for s in hungry if parts[id(s)] < wants[id(s)]]
    return parts.get(id(shard), 0)
