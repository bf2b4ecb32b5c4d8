"""Asking a model in one role: through the ledger, within the limits, with our own retries, each request once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from clair.budget import Budget, BudgetReached, most_tokens
from clair.ledger import IN_BATCH, MINE, Claim, Ledger, Stored, Tokens, call_key
from clair.limits import Limiter, Rate
from clair.models import Model, Refused, RequestFailed, TooMany, Unreachable, reply_of
from clair.models.batch import Batches
from clair.models.batch_service import Pending
from clair.models.local import LocalModel
from clair.records import Dropped, Reply, Tools

NOTHING = Tokens(0, 0)
_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 60.0
_LOOK_AGAIN = 0.2
_TRIES_OF_MALFORMED = 2  # a reply that cannot be read may have been paid for: one more try, not many


class Stopped(Exception):
    """The run is stopping: no new request is sent. What is in flight is waited for and kept."""


@dataclass
class Stop:
    """The switch that lets a run end without losing what it paid for."""

    reason: str | None = None
    error: Exception | None = None
    short: bool = False
    """It is the budget: replies that come with a batch may be cheaper than what was set aside for them."""
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self, reason: str, error: Exception | None = None, *, short: bool = False) -> None:
        """Send nothing more; the first reason given is the one that is told."""
        if self.reason is None:
            self.reason, self.error, self.short = reason, error, short
            self.happened.set()

    def clear(self) -> None:
        """Go on."""
        self.reason, self.error, self.short = None, None, False
        self.happened.clear()


@dataclass
class Tally:
    """What one role has cost this run. Of the tokens, `batched` came at the price of a Batch API."""

    calls: int = 0
    reused: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    batched: Tokens = NOTHING
    without_reason: int = 0
    """Replies without a finish reason: whether they were cut off cannot be known."""

    def add(self, reply: Reply, *, reused: bool, batch: bool = False) -> None:
        """Count a reply: as a call, or as reused where the ledger had it or an equal request was being asked."""
        tokens = _usage(reply, NOTHING)
        self.reused += reused
        self.calls += not reused
        self.prompt_tokens += tokens.prompt
        self.completion_tokens += tokens.completion
        self.without_reason += not reply.finish_reason
        if batch:
            self.batched = Tokens(self.batched.prompt + tokens.prompt, self.batched.completion + tokens.completion)


@dataclass
class Spending:
    """Whose money a role spends, and how fast it may: the run's budget, and the endpoint's rates."""

    payer: str
    budget: Budget
    requests: Rate = field(default_factory=lambda: Rate(None))
    tokens: Rate = field(default_factory=lambda: Rate(None))


@dataclass
class Asker:
    """One role (target, reviser, judge): a model with its request options, limits and a tally.

    `ready` is awaited before the first request that the ledger cannot answer, so that a run which finds everything
    in the ledger needs no endpoint at all, and one that will spend checks every endpoint first.
    """

    role: str
    model: Model
    options: Mapping[str, Any]
    ledger: Ledger
    limiter: Limiter
    spending: Spending
    stop: Stop
    ready: Callable[[], Awaitable[None]]
    batch: Batches | None = None
    """Where requests are put off to, instead of being sent; raises Pending out of `ask`."""
    failed: dict[str, tuple[str, str]] | None = None
    """Requests that failed for good, where the build goes through its prompts more than once: reason and detail."""
    attempts: int = 6
    patience: float = 120.0
    """Seconds without any answer, while requests fail to get through, after which the endpoint counts as dead."""
    tally: Tally = field(default_factory=Tally)
    asked: int = 0
    """Calls of earlier passes."""
    _asking: dict[str, asyncio.Future[str | Stored]] = field(default_factory=dict)
    _calls: set[asyncio.Task[Any]] = field(default_factory=set)
    _last_answer: float = field(default_factory=time.monotonic)

    async def ask(self, messages: list[Any], *, row: str, sample: int = 0, tools: Tools = ()) -> Reply:
        """The model's reply to `messages`, from the ledger or from the model; paid for at most once.

        Raises Dropped where this request failed for good, Stopped where the run is ending, Pending where the reply
        comes with a batch, Refused where no request can succeed.
        """
        request = {"messages": messages, **self.options, **({"tools": list(tools)} if tools else {})}
        key = call_key(self.model.identity, request, sample)
        stored = self.ledger.find(key)
        shared = key in self._asking
        if self.failed and key in self.failed and not stored:
            raise Dropped(self.role, *self.failed[key], failed=True)
        if stored and _is_broken(stored.raw):  # an earlier version took it for a reply
            await self.ledger.fail(key, "no whole reply", NOTHING, stored.raw)
            stored = None
        try:
            found = stored or await self._ask(key, request, sample, row)
            reply = reply_of(found if isinstance(found, str) else found.raw, tools="tools" in request)
        except RequestFailed as error:
            if self.failed is not None:
                self.failed[key] = (error.reason, error.detail)
            raise Dropped(self.role, error.reason, error.detail, failed=True) from error
        known = isinstance(found, Stored)
        self.tally.add(reply, reused=shared or known, batch=known and found.batch)
        return reply

    def next_pass(self) -> None:
        """The build goes through its prompts once more: what this run asked for already is found in the ledger then."""
        self.asked += self.tally.calls
        self.tally = Tally(retries=self.tally.retries)
        if self.batch:
            self.batch.over_budget = None

    @property
    def told(self) -> Tally:
        """The tally of the whole run, of however many passes: what an earlier pass asked for is a call, not reused."""
        asked = self.asked + (self.batch.asked if self.batch else 0)
        return replace(self.tally, calls=self.tally.calls + asked, reused=max(0, self.tally.reused - asked))

    @property
    def waiting_for(self) -> str:
        """What a local model is at, or why an endpoint is asked less than the recipe allows; else nothing."""
        if isinstance(self.model, LocalModel):
            return self.model.doing
        limiter = self.limiter
        if (pause := limiter.pause) >= 1:
            return f"paused for {pause:.0f} s as the server asks"
        return f"the server takes {int(limiter.limit)} at once" if int(limiter.limit) < limiter.most else ""

    async def drain(self) -> None:
        """Wait for the requests in flight, which are paid for, until their replies are on disk."""
        while self._calls:
            await asyncio.wait(set(self._calls))

    async def _ask(self, key: str, request: Mapping[str, Any], sample: int, row: str) -> str | Stored:
        if self.batch is None or self.batch.live(key):
            return await self._ask_once(key, request, sample, row)
        self._may_go_on()
        await self.ready()
        claim = Claim(self.role, self.model.name, row, self.spending.payer, most_tokens(request))
        return await self.batch.put_off(key, claim, request)

    async def _ask_once(self, key: str, request: Mapping[str, Any], sample: int, row: str) -> str | Stored:
        """Equal requests of this run wait for one call. Stored where another run was asking it and has the reply."""
        if (asking := self._asking.get(key)) is not None:
            return await asyncio.shield(asking)
        self._may_go_on()
        call = _Call(key, request, sample, row, most_tokens(request))
        task = asyncio.ensure_future(self._claim_and_call(call))
        self._asking[key] = task
        task.add_done_callback(lambda done: (self._asking.pop(key, None), _seen(done)))
        return await asyncio.shield(task)

    async def _claim_and_call(self, call: _Call) -> str | Stored:
        await self.ready()
        while True:
            await self._enter(call)
            claim = Claim(self.role, self.model.name, call.row, self.spending.payer, call.most)
            try:
                claimed = await self.ledger.claim(call.key, claim)
            except BaseException:
                self._leave(call, NOTHING)
                raise
            if claimed is MINE:
                return await self._call(call)
            self._leave(call, NOTHING)
            if isinstance(claimed, Stored):
                return claimed
            if claimed is IN_BATCH:
                raise self._in_batch()
            await asyncio.sleep(_LOOK_AGAIN)

    def _in_batch(self) -> Exception:
        """A request that was to be asked live has been paid for: its reply comes with a batch."""
        if self.batch:
            return Pending()
        refused = Refused(
            f"{self.role}: replies of {self.model.name} are under way in a batch; set {self.role}.batch: true to fetch "
            f"them, also after cancelling the batch"
        )
        self.stop.now(str(refused), refused)
        return refused

    async def _enter(self, call: _Call, *, again: bool = False) -> None:
        """Wait for a place in flight, for the rates and for the budget; all are the call's until `_leave`."""
        spending = self.spending
        await self.limiter.enter(again=again)
        try:
            self._may_go_on()
            await spending.budget.reserve(self.role, call.most)
        except BudgetReached as reached:
            self.limiter.leave()
            self.stop.now(str(reached), short=True)
            raise Stopped(str(reached)) from reached
        except BaseException:
            self.limiter.leave()
            raise
        await spending.requests.take()
        await spending.tokens.take(sum(call.most))

    def _leave(self, call: _Call, billed: Tokens) -> None:
        self.limiter.leave()
        self.spending.budget.settle(self.role, call.most, billed)
        self.spending.tokens.give_back(sum(call.most) - sum(billed))

    def _may_go_on(self) -> None:
        if self.stop.reason:
            raise Stopped(self.stop.reason)

    async def _call(self, call: _Call) -> str:
        """Send the request until it is answered or refused for good; the caller holds a place in flight for it."""
        attempt = 0
        while True:
            if self.stop.reason:  # it came while the ledger was written: drain() may be over, nothing may go out
                self._leave(call, NOTHING)
                await self.ledger.fail(call.key, self.stop.reason, call.most)
                raise Stopped(self.stop.reason)
            sent = asyncio.ensure_future(self._send(call))
            self._calls.add(sent)
            sent.add_done_callback(lambda done: (self._calls.discard(done), _seen(done)))
            try:
                # A cancelled row leaves its call to drain(): what is paid for is written down.
                return await asyncio.shield(sent)
            except TooMany as error:
                last: Exception = error
                wait = error.retry_after or 0.0
            except (Unreachable, RequestFailed, Refused) as error:
                last = error
                attempt += 1
                if attempt >= self._tries(error):
                    await self._give_up(call, error)
                wait = random.uniform(0.5, 1.0) * min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** (attempt - 1))
            self.tally.retries += 1
            await asyncio.sleep(wait)
            try:
                await self._enter(call, again=True)
            except Stopped as stopped:
                await self.ledger.fail(call.key, str(stopped), NOTHING if _may_be_billed(last) else call.most)
                raise
            if _may_be_billed(last):
                try:
                    await self.ledger.reopen(call.key, call.most)
                except BaseException:
                    self._leave(call, NOTHING)
                    raise

    async def _send(self, call: _Call) -> str:
        """One try: the reply is in the ledger when this returns. Gives the place in flight back."""
        started = time.monotonic()
        billed = NOTHING
        try:
            raw = await self.model.complete(call.request, call.sample)
            billed = call.most  # until the reply tells its usage
            reply = reply_of(raw, tools="tools" in call.request)
            billed = _usage(reply, call.most)
            self._last_answer = time.monotonic()
            self.limiter.succeeded()
        except TooMany as error:
            self.limiter.refused(error.retry_after)
            raise
        except Unreachable as error:
            billed = call.most if error.billed else NOTHING
            raise
        finally:
            self._leave(call, billed)
        await self.ledger.settle(call.key, raw, billed, call.most, self._last_answer - started)
        return raw

    def _tries(self, error: Exception) -> int:
        if isinstance(error, Unreachable):
            return self.attempts
        return _TRIES_OF_MALFORMED if getattr(error, "raw", None) is not None else 1

    async def _give_up(self, call: _Call, error: Exception) -> None:
        if isinstance(error, Refused):
            self.stop.now(str(error), error)
        unbilled = NOTHING if _may_be_billed(error) else call.most
        await self.ledger.fail(call.key, str(error), unbilled, getattr(error, "raw", None))
        if isinstance(error, RequestFailed | Refused):
            raise error
        silent = time.monotonic() - self._last_answer
        if silent > self.patience:
            gone = Refused(
                f"{self.role}: no answer for {silent:.0f} s ({error}); everything paid for is kept, run the same "
                f"command again when the endpoint is back"
            )
            self.stop.now(str(gone), gone)
            raise gone from error
        raise RequestFailed("unreachable", f"no answer after {self.attempts} tries: {error}") from error


@dataclass(frozen=True, slots=True)
class _Call:
    key: str
    request: Mapping[str, Any]
    sample: int
    row: str
    most: Tokens


def _seen(task: asyncio.Future[Any]) -> None:
    """Nobody may be left to hear how a call ended, once its row is cancelled; asyncio must not complain about it."""
    if not task.cancelled():
        task.exception()


def _usage(reply: Reply, most: Tokens) -> Tokens:
    """What a reply was billed for; the most it can have been, where the server does not tell."""
    usage = reply.usage
    return Tokens(usage.get("prompt_tokens", most.prompt), usage.get("completion_tokens", most.completion))


def _is_broken(raw: str) -> bool:
    try:
        reply_of(raw)
    except RequestFailed as error:
        return error.reason in ("server_error", "malformed_reply")
    return False


def _may_be_billed(error: Exception) -> bool:
    """Whether a try that gave no usable reply can be on the bill: it was answered, or we do not know."""
    return getattr(error, "raw", None) is not None or getattr(error, "billed", False)
