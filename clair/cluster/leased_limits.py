"""A shard's side of the limits that a job shares: it asks within its lease, and reports what came of it.

`LeasedResources` takes the place of a run's own limits (`clair.inference.open.Resources`). How a report travels
to the job's `Quotas` is the caller's: a function that takes one and gives the lease.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from clair.cluster.shared_limits import NOTHING, Lease, Report, RoleLease, RoleReport
from clair.inference.budget import Budget, BudgetConfig, BudgetReached, Price
from clair.inference.client import Stop
from clair.inference.open import Resources
from clair.inference.rate_limit import Limiter, Rate
from clair.ledger.ledger import Tokens

LOST = "the keeper of this job's limits is gone"
_HEARTBEAT = 1.0
"""Seconds between two reports of a shard that waits for nothing."""


class LeasedLimiter(Limiter):
    """Requests in flight within a lease; waiters wait for the next one."""

    def __init__(self, most: int, tell: Callable[[], None]) -> None:
        super().__init__(most)
        self.limit = 0.0
        self._tell = tell
        self._answered = 0
        self._refused: list[tuple[int, float | None]] = []

    async def enter(self, *, again: bool = False) -> None:
        """Wait for a place in flight; `again` for a request that was refused or failed before."""
        if not self._open():
            self._tell()
        await super().enter(again=again)

    def succeeded(self, sent: float | None = None) -> None:
        """A request was answered."""
        self._answered += 1

    def timed_out(self, sent: float) -> None:
        """The server answered neither a request in its time nor any that came after it; `sent`: when."""
        if sent > self._lowered_at:
            self._lowered_at = self._clock()
            self.refused(0.0)

    def refused(self, retry_after: float | None) -> None:
        """A request was refused: nothing more goes out before the job's limits are heard."""
        self.refusals += 1
        self._refused.append((self.in_flight, retry_after))
        self.limit = max(0.0, min(self.limit, self.in_flight - 1.0))
        self._tell()

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return sum(not waiter.done() for waiter in self._waiters)

    def report(self) -> dict[str, Any]:
        """What came since the last report; it is told once."""
        told = {"answered": self._answered, "refused": tuple(self._refused)}
        self._answered, self._refused = 0, []
        return {"in_flight": self.in_flight, "waiting": self.waiting, **told}

    def leased(self, lease: RoleLease) -> None:
        """Work within this lease from now on."""
        if self._refused:  # they came while the lease was on its way, and it does not know of them
            return
        self.limit = float(lease.slots)
        self._closed_until = self._clock() + lease.pause
        self._let_in()


class LeasedRate(Rate):
    """A moment to go at for each request, in the order of all shards' requests."""

    def __init__(self, per_minute: float | None, tell: Callable[[], None]) -> None:
        super().__init__(per_minute)
        self._tell = tell
        self._wanted: deque[tuple[float, asyncio.Future[float]]] = deque()
        self._told: deque[asyncio.Future[float]] = deque()
        self._back = 0.0

    async def take(self, amount: float = 1.0) -> None:
        """Wait until `amount` more may go."""
        if self._seconds_each:
            future = asyncio.get_running_loop().create_future()
            self._wanted.append((amount, future))
            self._tell()
            await asyncio.sleep(await future)

    def give_back(self, amount: float) -> None:
        """Less was used than was taken."""
        if self._seconds_each:
            self._back += amount

    @property
    def waiting(self) -> bool:
        """Whether a request waits to be told its moment."""
        return bool(self._wanted)

    def report(self) -> tuple[tuple[float, ...], float]:
        """(the amounts that wait, what is given back); each is told once."""
        wanted = [(amount, future) for amount, future in self._wanted if not future.done()]
        self._wanted.clear()
        self._told.extend(future for _, future in wanted)
        back, self._back = self._back, 0.0
        return tuple(amount for amount, _ in wanted), back

    def leased(self, delays: tuple[float, ...]) -> None:
        """The seconds after which each may go."""
        for seconds in delays:
            future = self._told.popleft()
            if not future.done():
                future.set_result(seconds)


class LeasedBudget(Budget):
    """Money within a lease: `limit` is what this shard may have spent and set aside, of the job's budget."""

    def __init__(self, *args: Any, tell: Callable[[], None], **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._tell = tell
        self._waiters: deque[tuple[Decimal, asyncio.Future[None]]] = deque()
        if self.limit is not None:
            self.limit = self.spent

    async def reserve(self, role: str, most: Tokens) -> None:
        """Set the worst case aside, first in, first out; waits for the job's answer. Raises BudgetReached."""
        amount = self.cost(role, most)
        if self.limit is None or (not self._waiters and self._fits(amount)):
            self.reserved += amount
            return
        future = asyncio.get_running_loop().create_future()
        self._waiters.append((amount, future))
        self._tell()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.reserved -= amount
            raise

    def settle(self, role: str, most: Tokens, billed: Tokens) -> None:
        """What was set aside is over; `billed` is what came of it."""
        super().settle(role, most, billed)
        self._let_in()

    def _fits(self, amount: Decimal) -> bool:
        return self.limit is None or self.spent + self.reserved + amount <= self.limit

    def _let_in(self) -> None:
        while self._waiters and (self._waiters[0][1].done() or self._fits(self._waiters[0][0])):
            amount, future = self._waiters.popleft()
            if not future.done():
                self.reserved += amount
                future.set_result(None)

    @property
    def waiting(self) -> bool:
        """Whether a call waits for money."""
        return bool(self._waiters)

    def report(self, *, tight: bool) -> tuple[Decimal, Decimal, Decimal]:
        """(spent, leased, needed). Where money is short, what was kept ahead goes back here."""
        if self.limit is None:
            return self.spent, self.spent, NOTHING
        used = self.spent + self.reserved
        if tight or self._waiters or self.limit < used:
            self.limit = used
        return self.spent, self.limit, self._waiters[0][0] if self._waiters else NOTHING

    def leased(self, lease: Lease) -> None:
        """More money, or the news that there is none."""
        if self.limit is None:
            return
        self.limit += lease.more
        self._let_in()
        if lease.refused and self._waiters:
            _, future = self._waiters.popleft()
            if not future.done():
                future.set_exception(BudgetReached(lease.refused))


Exchange = Callable[[Report], Awaitable[Lease]]


@dataclass
class LeasedResources(Resources):
    """The means of one shard's run: models as `open_model` gives them, limits and money by lease.

    `exchange` carries a report to the job's Quotas. `done` gives the numbers to show. Where an exchange fails, the
    run stops, and keeps what is in flight; `lost` then says why.
    """

    shard: str
    attempt: str
    exchange: Exchange
    done: Callable[[], Mapping[str, float]] = dict
    money: bool = True
    """Whether the budget is the job's; else it is this shard's own."""
    lost: Exception | None = None
    _limiters: dict[str, LeasedLimiter] = field(default_factory=dict)
    _rates: dict[str, tuple[LeasedRate, LeasedRate]] = field(default_factory=dict)
    _budget: LeasedBudget | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _tight: bool = False
    _every: float = _HEARTBEAT

    def limiter(self, role: str, most: int) -> Limiter:
        """Requests in flight, of the job's."""
        self._limiters[role] = LeasedLimiter(most, self._wake.set)
        return self._limiters[role]

    def rates(self, role: str, requests: float | None, tokens: float | None) -> tuple[Rate, Rate]:
        """Requests and tokens a minute, of the job's."""
        self._rates[role] = LeasedRate(requests, self._wake.set), LeasedRate(tokens, self._wake.set)
        return self._rates[role]

    def budget(self, config: BudgetConfig | None, prices: Mapping[str, Price], **spent: Any) -> Budget:
        """Money, of the job's."""
        if not self.money:
            return Budget(config, prices, **spent)
        self._budget = LeasedBudget(config, prices, tell=self._wake.set, **spent)
        return self._budget

    @asynccontextmanager
    async def held(self, stop: Stop) -> AsyncIterator[None]:
        """Report while the run lasts, and a last time at its end."""
        reporting = asyncio.create_task(self._report_on(stop))
        try:
            yield
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
            if self.lost is None:
                await self._exchange(stop, last=True)

    async def _report_on(self, stop: Stop) -> None:
        while self.lost is None:
            if not self._waits():
                with suppress(TimeoutError):  # nothing happened: a sign of life
                    await asyncio.wait_for(self._wake.wait(), max(_HEARTBEAT, self._every))
            self._wake.clear()
            await self._exchange(stop)
            await asyncio.sleep(self._every)

    def _waits(self) -> bool:
        places = any(limiter.waiting for limiter in self._limiters.values())
        moments = any(rate.waiting for rates in self._rates.values() for rate in rates)
        return places or moments or (self._budget is not None and self._budget.waiting)

    async def _exchange(self, stop: Stop, *, last: bool = False) -> None:
        report = self._report(last=last)
        try:
            lease = await self.exchange(report)
        except Exception as error:  # whatever it is, nothing may be sent without leave
            self.lost = error
            stop.now(LOST)
            return
        self._every = lease.every
        if lease.stop:
            stop.now(lease.stop)
        elif not last:
            self._take(lease)

    def _report(self, *, last: bool) -> Report:
        roles = {}
        for role, limiter in self._limiters.items():
            requests, tokens = self._rates[role]
            wanted, _ = requests.report()
            amounts, back = tokens.report()
            own = limiter.report()
            roles[role] = RoleReport(requests=len(wanted), tokens=amounts, tokens_back=back, **own)
        spent, leased, needs = self._budget.report(tight=self._tight) if self._budget else (NOTHING,) * 3
        return Report(self.shard, self.attempt, roles, spent, leased, needs, dict(self.done()), last)

    def _take(self, lease: Lease) -> None:
        self._tight = lease.tight
        for role, leased in lease.roles.items():
            requests, tokens = self._rates[role]
            requests.leased(leased.requests)
            tokens.leased(leased.tokens)
            self._limiters[role].leased(leased)
        if self._budget:
            self._budget.leased(lease)
