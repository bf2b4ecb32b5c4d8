"""A model in one role behind the ledger: each request is paid for once, within rate limits and budget, with retries."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from clair.core.backoff import backoff
from clair.core.event_loop import await_shielded
from clair.core.progress import duration, print_line
from clair.data.records import Dropped, Reply, Tools
from clair.inference.batch_client import BatchClient
from clair.inference.batch_service import Pending
from clair.inference.budget import NOTHING, BudgetExceeded, Spending, Tally, billed_tokens, max_billed_tokens
from clair.inference.endpoint_health import EndpointHealth
from clair.inference.local import LocalModel
from clair.inference.model import Model, RateLimited, Refused, RequestFailed, Unreachable, parse_reply
from clair.inference.rate_limit import Limiter
from clair.inference.servers.served_model import ServedModel
from clair.ledger.ledger import Claim, ClaimResult, Ledger, StoredReply, Tokens, call_key

_FIRST_BACKOFF = 0.5
_CLAIM_INTERVAL = 0.2
"""Seconds between two claims of a request that another run has sent."""
_MAX_WAITS = 5  # waits after which the backoff of a waiting request grows no further: 4 to 8 seconds
_NOT_WHOLE = ("server_error", "malformed_reply")
_MALFORMED_ATTEMPTS = 2  # a reply that cannot be parsed may have been paid for: one more try, not many


class Stopped(Exception):
    """The run is stopping: no new request is sent. Requests in flight are awaited and their replies kept."""


@dataclass
class StopSignal:
    """The request to end a run without losing what it has paid for."""

    reason: str | None = None
    error: Exception | None = None
    over_budget: bool = False
    """True if the budget is the reason: replies of a batch may cost less than was reserved for them."""
    requested: asyncio.Event = field(default_factory=asyncio.Event)

    def request(self, reason: str, error: Exception | None = None, *, over_budget: bool = False) -> None:
        """Stop sending requests; the first reason given is the one that is reported."""
        if self.reason is None:
            self.reason, self.error, self.over_budget = reason, error, over_budget
            self.requested.set()

    def clear(self) -> None:
        """Let the run go on."""
        self.reason, self.error, self.over_budget = None, None, False
        self.requested.clear()


@dataclass
class ModelClient:
    """One role (target, reviser, judge): a model with its request options, limits and a tally.

    `ready` is awaited before the first request that the ledger cannot answer. So a run whose replies are all in the
    ledger needs no endpoint, and a run that will spend checks every endpoint first.
    """

    role: str
    model: Model
    options: Mapping[str, Any]
    ledger: Ledger
    limiter: Limiter
    spending: Spending
    stop: StopSignal
    ready: Callable[[], Awaitable[None]]
    health: EndpointHealth
    shared_calls: dict[str, asyncio.Future[Reply | StoredReply]]
    """The calls under way in this run by their key, those of all roles: equal requests of two roles are one call."""
    batch: BatchClient | None = None
    """The queue for the Batch API, if the role uses it: then `complete` raises Pending and sends nothing itself."""
    failed: dict[str, tuple[str, str]] | None = None
    """Requests that failed for good, if the build reads its prompts more than once: key -> (reason, detail)."""
    keys: defaultdict[str, set[str]] | None = None
    """The keys of the requests by prompt id, if somebody asks for them, whichever run has paid for the replies."""
    attempts: int = 6
    tally: Tally = field(default_factory=Tally)
    earlier_calls: int = 0
    """Calls of earlier passes."""
    _slots_reported: bool = False
    _in_flight: int = 0
    _settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the last request in flight has been answered and its reply is on disk."""

    async def complete(
        self, messages: list[Any], *, row: str, sample: int = 0, tools: Tools = (), added_temperature: float = 0.0
    ) -> Reply:
        """Return the model's reply to `messages`, from the ledger or from the model; it is paid for at most once.

        `added_temperature`: added to the recipe's temperature, if set, up to 1, so that a further reply differs.

        Raises Dropped if this request failed for good, Stopped if the run is ending, Pending if the reply comes with a
        batch, Refused if no request can succeed.
        """
        request = {"messages": messages, **self.options, **({"tools": list(tools)} if tools else {})}
        if added_temperature and (temperature := request.get("temperature")) is not None:
            request["temperature"] = max(temperature, min(1.0, temperature + added_temperature))
        key, has_tools = call_key(self.model.identity, request, sample), "tools" in request
        if self.keys is not None:
            self.keys[row].add(key)
        shared = key in self.shared_calls
        stored = self.ledger.find(key)
        try:
            reply = await self._parse_stored(key, stored, has_tools) if stored else None
            if reply is None:
                if self.failed and key in self.failed:
                    raise Dropped(self.role, *self.failed[key], failed=True)
                claim = Claim(self.role, self.model.name, row, self.spending.account, max_billed_tokens(request))
                result = await self._request(_Call(key, request, sample, claim))
                stored = result if isinstance(result, StoredReply) else None
                reply = parse_reply(result.raw, tools=has_tools) if isinstance(result, StoredReply) else result
        except RequestFailed as error:
            if self.failed is not None:
                self.failed[key] = (error.reason, error.detail)
            raise Dropped(self.role, error.reason, error.detail, failed=True) from error
        self.health.answered = True
        self.tally.add(reply, reused=shared or stored is not None, batch=stored is not None and stored.batch)
        return reply

    async def _parse_stored(self, key: str, stored: StoredReply, tools: bool) -> Reply | None:
        """Parse a reply of the ledger; discard one that is not whole, which an earlier version accepted."""
        try:
            return parse_reply(stored.raw, tools=tools)
        except RequestFailed as error:
            if error.reason not in _NOT_WHOLE:
                raise
        await self.ledger.fail(key, "no whole reply", NOTHING, stored.raw)
        return None

    def next_pass(self) -> None:
        """Begin another pass over the prompts: replies of this run's earlier passes are in the ledger by now."""
        self.earlier_calls += self.tally.calls
        self.tally = Tally(retries=self.tally.retries)
        if self.batch:
            self.batch.unaffordable = None

    @property
    def total(self) -> Tally:
        """The tally of all passes of this run: a call of an earlier pass counts as a call, not as reused."""
        calls = self.earlier_calls + (self.batch.answered if self.batch else 0)
        return replace(self.tally, calls=self.tally.calls + calls, reused=max(0, self.tally.reused - calls))

    @property
    def wait_reason(self) -> str:
        """The activity of a local model or a server that starts, or why an endpoint gets fewer requests; else empty."""
        if isinstance(self.model, LocalModel) or (isinstance(self.model, ServedModel) and self.model.activity):
            return self.model.activity
        limiter = self.limiter
        message = f"the server says {self.health.message}" if self.health.message else ""
        if (pause := limiter.pause) >= 1:
            return f"paused for {duration(pause)} as the server asks{message and ': ' + message}"
        if message:
            return message
        return f"the server takes {int(limiter.limit)} at once" if int(limiter.limit) < limiter.max_in_flight else ""

    async def check(self) -> None:
        """Check that the model is there; wait if it is starting. Raises Refused."""
        attempt = 0
        while True:
            try:
                await self.model.check()
                self.health.recover()
                return
            except Unreachable as error:
                self.health.wait(error, time.monotonic())
                if dead := self.health.dead(error):
                    raise dead from error
            attempt += 1
            await asyncio.sleep(backoff(attempt, _FIRST_BACKOFF))

    async def drain(self) -> None:
        """Wait until the replies of the requests in flight, which are paid for, are on disk."""
        while self._in_flight:
            await self._settled.wait()

    # ---- claims

    async def _request(self, call: _Call) -> Reply | StoredReply:
        if self.batch is None or self.batch.takes_live(call.key):
            return await self._request_once(call)
        self._raise_if_stopped()
        await self.ready()
        return await self.batch.enqueue(call.key, call.claim, call.request)

    async def _request_once(self, call: _Call) -> Reply | StoredReply:
        """Share one call among equal requests of this run. A StoredReply if another run sent it and has the reply."""
        if (shared_call := self.shared_calls.get(call.key)) is not None:
            return await await_shielded(shared_call)
        self._raise_if_stopped()
        task = asyncio.ensure_future(self._claim_and_call(call))
        self.shared_calls[call.key] = task
        task.add_done_callback(lambda _: self.shared_calls.pop(call.key, None))
        return await await_shielded(task)

    async def _claim_and_call(self, call: _Call) -> Reply | StoredReply:
        await self.ready()
        while True:
            await self._acquire(call)
            try:
                result = await self.ledger.claim(call.key, call.claim)
            except BaseException:
                self._release(call, NOTHING)
                raise
            if result is ClaimResult.GRANTED:
                return await self._call(call)
            self._release(call, NOTHING)
            if isinstance(result, StoredReply):
                return result
            if result is ClaimResult.IN_BATCH:
                raise self._in_batch_error()
            await asyncio.sleep(_CLAIM_INTERVAL)

    def _in_batch_error(self) -> Exception:
        """The error for a live request that has been paid for already, in a batch."""
        if self.batch:
            return Pending()
        refused = Refused(
            f"{self.role}: replies of {self.model.name} are under way in a batch; set {self.role}.batch: true to fetch "
            f"them, also after cancelling the batch"
        )
        self.stop.request(str(refused), refused)
        return refused

    async def _acquire(self, call: _Call, *, retry: bool = False) -> None:
        """Wait for a slot in flight, the rate limits and the budget; the call holds all of them until `_release`."""
        spending = self.spending
        await self.limiter.acquire(retry=retry)
        try:
            self._raise_if_stopped()
            await spending.budget.reserve(self.role, call.claim.max_tokens)
        except BudgetExceeded as exceeded:
            self.limiter.release()
            self.stop.request(str(exceeded), over_budget=True)
            raise Stopped(str(exceeded)) from exceeded
        except BaseException:
            self.limiter.release()
            raise
        await spending.requests.acquire()
        await spending.tokens.acquire(sum(call.claim.max_tokens))

    def _release(self, call: _Call, billed: Tokens) -> None:
        self.limiter.release()
        self.spending.budget.settle(self.role, call.claim.max_tokens, billed)
        self.spending.tokens.refund(sum(call.claim.max_tokens) - sum(billed))

    def _raise_if_stopped(self) -> None:
        if self.stop.reason:
            raise Stopped(self.stop.reason)

    # ---- one claimed request, with its retries

    async def _call(self, call: _Call) -> Reply:
        """Send the request until it is answered or refused for good; the caller has acquired a slot for it."""
        attempt = waits = 0
        while True:
            if self.stop.reason:  # requested while the ledger was written: drain() may have ended, nothing may be sent
                self._release(call, NOTHING)
                await self.ledger.fail(call.key, self.stop.reason, call.claim.max_tokens)
                raise Stopped(self.stop.reason)
            self._in_flight += 1
            self._settled.clear()
            try:
                return await self._send(call)
            except (RateLimited, Unreachable, RequestFailed, Refused) as error:
                last: Exception = error
                if self.health.is_waiting(error):
                    waits += 1
                    await self._stop_if_out_of_patience(call, error)
                else:
                    attempt += 1
                    if attempt >= self._max_attempts(error):
                        await self._give_up(call, error)
                # After a 429 the limiter slows down as well.
                seconds = (
                    error.retry_after or 0.0
                    if isinstance(error, RateLimited)
                    else backoff(attempt + min(waits, _MAX_WAITS), _FIRST_BACKOFF)
                )
            finally:
                self._in_flight -= 1
                if not self._in_flight:
                    self._settled.set()
            self.tally.retries += 1
            await asyncio.sleep(seconds)
            try:
                await self._acquire(call, retry=True)
            except Stopped as stopped:
                await self.ledger.fail(
                    call.key, str(stopped), NOTHING if _may_be_billed(last) else call.claim.max_tokens
                )
                raise
            if _may_be_billed(last):
                try:
                    await self.ledger.reopen(call.key, call.claim.max_tokens)
                except BaseException:
                    self._release(call, NOTHING)
                    raise

    async def _send(self, call: _Call) -> Reply:
        """Try once; the reply is in the ledger when this returns. Releases the slot of the call."""
        sent = time.monotonic()
        billed = NOTHING
        try:
            raw = await self.model.complete(call.request, call.sample)
            billed = call.claim.max_tokens  # until the reply states its usage
            reply = parse_reply(raw, tools="tools" in call.request)
            billed = billed_tokens(reply, call.claim.max_tokens)
            self.health.recover()
            self.health.answered = True
            seconds = time.monotonic() - sent
            self.limiter.succeeded(None if isinstance(self.model, LocalModel) else sent)
            self._report_slots()
        except RateLimited as error:
            self.limiter.refused(error.retry_after)
            self.health.wait(error, sent)
            raise
        except Unreachable as error:
            billed = call.claim.max_tokens if error.billed else NOTHING
            self.health.fail(sent)
            if error.busy:
                self.limiter.timed_out(sent)
            raise
        finally:
            self._release(call, billed)
        await self.ledger.settle(call.key, raw, billed, call.claim.max_tokens, seconds)
        return reply

    def _report_slots(self) -> None:
        if self.limiter.slots and not self._slots_reported:
            self._slots_reported = True
            slots = f"{self.limiter.slots} requests at a time" if self.limiter.slots > 1 else "one request at a time"
            print_line(
                f"{self.role}: the server answers {slots}, so that more than {2 * self.limiter.slots} would only wait "
                f"there; fewer than {self.limiter.max_in_flight} are in flight from now on"
            )

    async def _stop_if_out_of_patience(self, call: _Call, error: Exception) -> None:
        """Stop the run if the server asks to wait longer than `patience`. Raises Refused."""
        if refused := self.health.out_of_patience(error, self.limiter.in_flight):
            self.stop.request(str(refused), refused)
            await self.ledger.fail(call.key, str(error), call.claim.max_tokens)
            raise refused from error

    def _max_attempts(self, error: Exception) -> int:
        if isinstance(error, Unreachable | RateLimited):
            return self.attempts
        return _MALFORMED_ATTEMPTS if getattr(error, "raw", None) is not None else 1

    async def _give_up(self, call: _Call, error: Exception) -> None:
        """Record that the request failed for good, and raise its error."""
        if isinstance(error, RequestFailed):
            error = self.health.add_refusal(error) or error
        if isinstance(error, Refused):
            self.stop.request(str(error), error)
        unbilled = NOTHING if _may_be_billed(error) else call.claim.max_tokens
        await self.ledger.fail(call.key, str(error), unbilled, getattr(error, "raw", None))
        if isinstance(error, RequestFailed | Refused):
            raise error
        if dead := self.health.dead(error):
            self.stop.request(str(dead), dead)
            raise dead from error
        raise RequestFailed("unreachable", f"no answer after {self.attempts} tries: {error}") from error


@dataclass(frozen=True, slots=True)
class _Call:
    key: str
    request: Mapping[str, Any]
    sample: int
    claim: Claim


def _may_be_billed(error: Exception) -> bool:
    """True if a failed try can be on the bill: it was answered, or it is not known."""
    return getattr(error, "raw", None) is not None or getattr(error, "billed", False)
