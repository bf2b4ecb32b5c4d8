"""A shard's side of the limits that a job shares: it works within its lease, and reports its use.

`LeasedResources` replaces a run's own resources (`clair.inference.open.Resources`). The caller provides the transport:
a function that carries a report to the job's `SharedLimits` and returns the lease.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from clair.cluster.shared_limits import NOTHING, Lease, RoleLease, RoleReport, ShardReport
from clair.inference.budget import Budget, BudgetConfig, BudgetExceeded, Price
from clair.inference.client import StopSignal
from clair.inference.open import Resources
from clair.inference.rate_limit import Limiter, Rate
from clair.ledger.ledger import Tokens

LIMITS_LOST = "the actor with this job's limits is gone"
_HEARTBEAT = 1.0
"""Seconds between two reports of a shard that waits for no lease."""


class LeasedLimiter(Limiter):
    """The limit on requests in flight, by lease. `on_need` is called when a request needs a new lease."""

    def __init__(self, max_in_flight: int, on_need: Callable[[], None]) -> None:
        super().__init__(max_in_flight)
        self.limit = 0.0
        self._on_need = on_need
        self._answered = 0
        self._refused: list[tuple[int, float | None]] = []

    async def acquire(self, *, retry: bool = False) -> None:
        """Wait for a slot in flight; `retry`: the request was refused or failed before."""
        if not self._open():
            self._on_need()
        await super().acquire(retry=retry)

    def succeeded(self, sent: float | None = None) -> None:
        """Record an answer."""
        self._answered += 1

    def timed_out(self, sent: float) -> None:
        """Record a timeout of a request sent at time `sent`, if no later request was answered either."""
        if sent > self._lowered_time:
            self._lowered_time = self._clock()
            self.refused(0.0)

    def refused(self, retry_after: float | None) -> None:
        """Record a refusal: nothing more is sent before the next lease."""
        self._refused.append((self.in_flight, retry_after))
        self.limit = max(0.0, min(self.limit, self.in_flight - 1.0))
        self._on_need()

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return sum(not waiter.done() for waiter in self._waiters)

    def report(self) -> dict[str, Any]:
        """The fields of a RoleReport on requests in flight; answers and refusals count since the last report."""
        results = {"answered": self._answered, "refused": tuple(self._refused)}
        self._answered, self._refused = 0, []
        return {"in_flight": self.in_flight, "waiting": self.waiting, **results}

    def update(self, lease: RoleLease) -> None:
        """Apply a new lease."""
        if self._refused:  # since the report that this lease answers
            return
        self.limit = float(lease.slots)
        self._closed_until = self._clock() + lease.pause
        self._admit()


class LeasedRate(Rate):
    """A rate limit shared by all shards: each amount waits for the delay that the job assigns to it."""

    def __init__(self, per_minute: float | None, on_need: Callable[[], None]) -> None:
        super().__init__(per_minute)
        self._on_need = on_need
        self._unreported: deque[tuple[float, asyncio.Future[float]]] = deque()
        self._reported: deque[asyncio.Future[float]] = deque()
        self._refunded = 0.0

    async def acquire(self, amount: float = 1.0) -> None:
        """Wait until `amount` more may be sent."""
        if self._seconds_per_unit:
            future = asyncio.get_running_loop().create_future()
            self._unreported.append((amount, future))
            self._on_need()
            await asyncio.sleep(await future)

    def refund(self, amount: float) -> None:
        """Return the part of an acquired amount that was not used."""
        if self._seconds_per_unit:
            self._refunded += amount

    @property
    def waiting(self) -> bool:
        """True if an amount waits that is not reported yet."""
        return bool(self._unreported)

    def report(self) -> tuple[tuple[float, ...], float]:
        """The new (waiting amounts, refunded amount) since the last report."""
        waiting = [(amount, future) for amount, future in self._unreported if not future.done()]
        self._unreported.clear()
        self._reported.extend(future for _, future in waiting)
        refunded, self._refunded = self._refunded, 0.0
        return tuple(amount for amount, _ in waiting), refunded

    def update(self, delays: tuple[float, ...]) -> None:
        """Assign a delay in seconds to each reported amount, in order."""
        for seconds in delays:
            future = self._reported.popleft()
            if not future.done():
                future.set_result(seconds)


class LeasedBudget(Budget):
    """The leased part of the job's budget: `limit` is the amount that this shard may have spent and reserved."""

    def __init__(self, *args: Any, on_need: Callable[[], None], **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._on_need = on_need
        self._waiters: deque[tuple[Decimal, asyncio.Future[None]]] = deque()
        if self.limit is not None:
            self.limit = self.spent

    async def reserve(self, role: str, worst_case: Tokens) -> None:
        """Reserve the worst case, first in, first out; wait for a lease if it does not fit. Raises BudgetExceeded."""
        amount = self.cost(role, worst_case)
        if self.limit is None or (not self._waiters and self._fits(amount)):
            self.reserved += amount
            return
        future = asyncio.get_running_loop().create_future()
        self._waiters.append((amount, future))
        self._on_need()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.reserved -= amount
            raise

    def settle(self, role: str, worst_case: Tokens, billed: Tokens) -> None:
        """Replace the reserve of a call by what was billed."""
        super().settle(role, worst_case, billed)
        self._admit()

    def _fits(self, amount: Decimal) -> bool:
        return self.limit is None or self.spent + self.reserved + amount <= self.limit

    def _admit(self) -> None:
        while self._waiters and (self._waiters[0][1].done() or self._fits(self._waiters[0][0])):
            amount, future = self._waiters.popleft()
            if not future.done():
                self.reserved += amount
                future.set_result(None)

    @property
    def waiting(self) -> bool:
        """True if a call waits for money."""
        return bool(self._waiters)

    def report(self, *, scarce: bool) -> tuple[Decimal, Decimal, Decimal]:
        """The (spent, leased, needed) amounts. If money is scarce, the shard returns what it holds in advance."""
        if self.limit is None:
            return self.spent, self.spent, NOTHING
        used = self.spent + self.reserved
        if scarce or self._waiters or self.limit < used:
            self.limit = used
        return self.spent, self.limit, self._waiters[0][0] if self._waiters else NOTHING

    def update(self, lease: Lease) -> None:
        """Add the leased money, or fail the first waiting call if the budget is used up."""
        if self.limit is None:
            return
        self.limit += lease.more
        self._admit()
        if lease.refused and self._waiters:
            _, future = self._waiters.popleft()
            if not future.done():
                future.set_exception(BudgetExceeded(lease.refused))


Exchange = Callable[[ShardReport], Awaitable[Lease]]


@dataclass
class LeasedResources(Resources):
    """The resources of one shard's run: its models, and rate limits and budget by lease.

    `exchange` carries a report to the job's SharedLimits. `progress` returns the numbers to show. If an exchange fails,
    the run stops and keeps the replies in flight, and `lost` holds the error.
    """

    shard: str
    attempt: str
    exchange: Exchange
    progress: Callable[[], Mapping[str, float]] = dict
    shares_budget: bool = True
    """True if the budget is the job's, False if it is this shard's own."""
    lost: Exception | None = None
    _limiters: dict[str, LeasedLimiter] = field(default_factory=dict)
    _rates: dict[str, tuple[LeasedRate, LeasedRate]] = field(default_factory=dict)
    _budget: LeasedBudget | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _scarce: bool = False
    _interval: float = _HEARTBEAT

    def limiter(self, role: str, max_in_flight: int) -> Limiter:
        """The job's limit in flight."""
        self._limiters[role] = LeasedLimiter(max_in_flight, self._wake.set)
        return self._limiters[role]

    def rates(self, role: str, requests: float | None, tokens: float | None) -> tuple[Rate, Rate]:
        """The job's limits on requests and tokens per minute."""
        self._rates[role] = LeasedRate(requests, self._wake.set), LeasedRate(tokens, self._wake.set)
        return self._rates[role]

    def budget(self, config: BudgetConfig | None, prices: Mapping[str, Price], **spent: Any) -> Budget:
        """The job's budget, or this shard's own."""
        if not self.shares_budget:
            return Budget(config, prices, **spent)
        self._budget = LeasedBudget(config, prices, on_need=self._wake.set, **spent)
        return self._budget

    @asynccontextmanager
    async def in_use(self, stop: StopSignal) -> AsyncIterator[None]:
        """Report for the length of the block, and once more at its end."""
        reporting = asyncio.create_task(self._report_loop(stop))
        try:
            yield
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
            if self.lost is None:
                await self._exchange(stop, last=True)

    async def _report_loop(self, stop: StopSignal) -> None:
        while self.lost is None:
            if not self._is_waiting():
                with suppress(TimeoutError):  # nothing to report: a heartbeat
                    await asyncio.wait_for(self._wake.wait(), max(_HEARTBEAT, self._interval))
            self._wake.clear()
            await self._exchange(stop)
            await asyncio.sleep(self._interval)

    def _is_waiting(self) -> bool:
        slots = any(limiter.waiting for limiter in self._limiters.values())
        rates = any(rate.waiting for pair in self._rates.values() for rate in pair)
        return slots or rates or (self._budget is not None and self._budget.waiting)

    async def _exchange(self, stop: StopSignal, *, last: bool = False) -> None:
        report = self._report(last=last)
        try:
            lease = await self.exchange(report)
        except Exception as error:  # of any kind: without a lease nothing may be sent
            self.lost = error
            stop.request(LIMITS_LOST)
            return
        self._interval = lease.interval
        if lease.stop:
            stop.request(lease.stop)
        elif not last:
            self._update(lease)

    def _report(self, *, last: bool) -> ShardReport:
        roles = {}
        for role, limiter in self._limiters.items():
            requests, tokens = self._rates[role]
            request_amounts, _ = requests.report()
            token_amounts, refunded = tokens.report()
            roles[role] = RoleReport(
                requests=len(request_amounts), tokens=token_amounts, tokens_refunded=refunded, **limiter.report()
            )
        spent, leased, needs = self._budget.report(scarce=self._scarce) if self._budget else (NOTHING,) * 3
        return ShardReport(self.shard, self.attempt, roles, spent, leased, needs, dict(self.progress()), last)

    def _update(self, lease: Lease) -> None:
        self._scarce = lease.scarce
        for role, role_lease in lease.roles.items():
            requests, tokens = self._rates[role]
            requests.update(role_lease.requests)
            tokens.update(role_lease.tokens)
            self._limiters[role].update(role_lease)
        if self._budget:
            self._budget.update(lease)
