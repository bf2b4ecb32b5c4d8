"""The limits that all shards of one job share: requests in flight, requests and tokens per minute, and money.

`SharedLimits` is one object per job and grants leases: a number of requests in flight and an amount of money to
reserve. A shard works within its lease without asking and reports its use a few times a second
(`clair.cluster.leased_limits`). When a shard is gone, its requests in flight go to the others. The objects are plain
and have no clock but the one passed in, so that the caller decides how reports travel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from clair.inference.budget import Budget
from clair.inference.rate_limit import Limiter, Rate

NOTHING = Decimal(0)
_INTERVAL_PER_SHARD = 0.05
"""Seconds between two reports of a waiting shard, for each living shard."""
_MAX_INTERVAL = 2.0
_MAX_SILENCE = 30.0
"""Seconds without a report after which the slots of a shard are given to other shards."""
_ADVANCE_DIVISOR = 4
"""A shard is leased 1/4 of its even share of the remaining money in advance of its need."""


@dataclass(frozen=True, slots=True)
class RoleLimits:
    """The limits of one role for all shards together."""

    concurrency: int
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


@dataclass(frozen=True, slots=True)
class RoleReport:
    """The state of one role in one shard, and its changes since the last report."""

    in_flight: int = 0
    waiting: int = 0
    answered: int = 0
    refused: tuple[tuple[int, float | None], ...] = ()
    """For each refusal: this shard's requests in flight, and the seconds to wait if the server stated them."""
    requests: int = 0
    """The number of new requests that wait for the rate limit."""
    tokens: tuple[float, ...] = ()
    """The tokens of each new request that waits for the rate limit."""
    tokens_refunded: float = 0.0


@dataclass(frozen=True, slots=True)
class ShardReport:
    """A report of one shard. `attempt` distinguishes an old process of the shard from the one that replaced it."""

    shard: str
    attempt: str
    roles: Mapping[str, RoleReport]
    spent: Decimal = NOTHING
    """All that the shard has spent, open calls of dead runs included."""
    leased: Decimal = NOTHING
    """The part of its lease that it keeps: spent, reserved, and held in advance; the rest is returned."""
    needs: Decimal = NOTHING
    """The worst case of its next call, if that does not fit into the lease; then it holds nothing in advance."""
    progress: Mapping[str, float] = field(default_factory=dict)
    """Numbers to show: pairs, dropped, calls, tokens."""
    last: bool = False


@dataclass(frozen=True, slots=True)
class RoleLease:
    """The slots in flight, a pause in seconds, and the delay in seconds of each waiting request and token amount."""

    slots: int
    pause: float = 0.0
    requests: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """The answer to a report.

    `more`: additional money. `refused`: why the need can never be met. `stop`: why the job ends.
    `interval`: seconds until the next report.
    """

    roles: Mapping[str, RoleLease] = field(default_factory=dict)
    more: Decimal = NOTHING
    scarce: bool = False
    """Money is scarce: hold none in advance."""
    refused: str | None = None
    stop: str | None = None
    interval: float = _INTERVAL_PER_SHARD


REPLACED = "another process builds this shard now"


@dataclass(slots=True)
class _Shard:
    attempt: str | None = None
    last_report: float = 0.0
    roles: dict[str, RoleReport] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    answered: dict[str, int] = field(default_factory=dict)
    spent: Decimal = NOTHING
    leased: Decimal = NOTHING
    needs: Decimal = NOTHING
    progress: Mapping[str, float] = field(default_factory=dict)

    def slots_held(self, role: str) -> int:
        """The number of its requests that may be in flight."""
        return max(self.slots.get(role, 0), self.roles[role].in_flight if role in self.roles else 0)


class SharedLimits:
    """The limits of a job, leased to its shards. If `budget` is None, money is only counted."""

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
        """Register the attempt that builds a shard from now on (None: no attempt); `spent` as in the shard's ledger.

        The slots of an earlier attempt are free again; its money only if `spent` is known.
        """
        old = self._shards.get(shard, _Shard())
        spent, leased = (old.spent, old.leased) if spent is None else (spent, spent)
        self._shards[shard] = _Shard(attempt, self._clock(), spent=spent, leased=leased, progress=old.progress)

    def stop(self, reason: str) -> None:
        """Let every shard end: nothing new is sent, replies in flight are kept."""
        self._stop = self._stop or reason

    def progress(self) -> dict[str, Mapping[str, float]]:
        """The numbers of each shard's last report."""
        return {
            name: {**shard.progress, "in_flight": sum(role.in_flight for role in shard.roles.values())}
            for name, shard in self._shards.items()
        }

    def report(self, report: ShardReport) -> Lease:
        """Take a shard's report and answer with its lease."""
        shard = self._shards.get(report.shard)
        if shard is None or shard.attempt != report.attempt:
            return Lease(stop=REPLACED)
        shard.last_report = self._clock()
        shard.roles, shard.progress = dict(report.roles), report.progress
        shard.spent, shard.leased = report.spent, max(report.leased, report.spent)
        shard.needs = report.needs
        for role, role_report in report.roles.items():
            self._learn(role, shard, role_report)
        if report.last:
            shard.attempt, shard.roles, shard.slots = None, {}, {}
            shard.leased, shard.needs = shard.spent, NOTHING
            return Lease()
        more, refused = self._lease_money(shard)
        shard.leased += more
        return Lease(
            roles={role: self._lease(role, shard, role_report) for role, role_report in report.roles.items()},
            more=more,
            scarce=any(s.needs > 0 for s in self._shards.values()),
            refused=refused,
            stop=self._stop,
            interval=min(_MAX_INTERVAL, _INTERVAL_PER_SHARD * len(self._living())),
        )

    # ---- requests in flight, and rates

    def _living(self) -> list[_Shard]:
        now = self._clock()
        return [s for s in self._shards.values() if s.attempt is not None and now - s.last_report <= _MAX_SILENCE]

    def _learn(self, role: str, shard: _Shard, report: RoleReport) -> None:
        """Raise the limit by answers and lower it by refusals, as in a single run."""
        limiter = self._limiters[role]
        in_other_shards = sum(s.roles[role].in_flight for s in self._living() if s is not shard and role in s.roles)
        limiter.in_flight = in_other_shards + report.in_flight
        for _ in range(report.answered):
            limiter.succeeded()
        for in_flight, retry_after in report.refused:
            limiter.in_flight = in_other_shards + in_flight
            limiter.refused(retry_after)
        shard.answered[role] = shard.answered.get(role, 0) + report.answered
        self._tokens[role].refund(report.tokens_refunded)

    def _lease(self, role: str, shard: _Shard, report: RoleReport) -> RoleLease:
        limiter, living = self._limiters[role], self._living()
        free = int(limiter.limit) - sum(s.slots_held(role) for s in living if s is not shard)
        shard.slots[role] = slots = max(0, min(_fair_share(role, shard, living, int(limiter.limit)), free))
        requests = tuple(self._requests[role].reserve() for _ in range(report.requests))
        tokens = tuple(self._tokens[role].reserve(amount) for amount in report.tokens)
        return RoleLease(slots, limiter.pause, requests, tokens)

    # ---- money

    def _lease_money(self, shard: _Shard) -> tuple[Decimal, str | None]:
        """(money leased in addition, why the need can never be met)."""
        budget = self._budget
        if budget is None or budget.limit is None or shard.needs <= 0:
            return NOTHING, None
        budget.spent = sum((s.spent for s in self._shards.values()), NOTHING)
        unspent = sum((s.leased - s.spent for s in self._shards.values()), NOTHING)
        free = budget.limit - budget.spent - unspent
        if shard.needs > free + unspent:
            return NOTHING, budget.exceeded_message(shard.needs)
        if shard.needs > free:
            return NOTHING, None  # reserves of other shards may be returned
        advance = free / (_ADVANCE_DIVISOR * max(1, len(self._living())))
        more, shard.needs = min(free, shard.needs + advance), NOTHING
        return more, None


def _fair_share(role: str, shard: _Shard, living: list[_Shard], slots: int) -> int:
    """The slots of one shard in an even split up to its demand; the rest goes to the shards with fewest answers."""
    demand = {id(s): s.roles[role].in_flight + s.roles[role].waiting for s in living if role in s.roles}
    shares = dict.fromkeys(demand, 0)
    unmet = sorted((s for s in living if demand.get(id(s))), key=lambda s: (s.answered.get(role, 0), demand[id(s)]))
    while slots > 0 and unmet:
        each = slots // len(unmet)
        for s in unmet[: slots if each == 0 else None]:
            added = min(max(1, each), demand[id(s)] - shares[id(s)])
            shares[id(s)] += added
            slots -= added
        unmet = [s for s in unmet if shares[id(s)] < demand[id(s)]]
    return shares.get(id(shard), 0)
