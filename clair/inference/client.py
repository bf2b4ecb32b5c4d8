"""Asking a model in one role: through the ledger, within the limits, with our own retries, each request once."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from clair.core.progress import duration, tell
from clair.data.records import Dropped, Reply, Tools
from clair.inference.batch_client import Batches
from clair.inference.batch_service import Pending
from clair.inference.budget import Budget, BudgetReached, most_tokens
from clair.inference.local import LocalModel
from clair.inference.model import LimitReached, Model, Refused, RequestFailed, TooMany, Unreachable, reply_of
from clair.inference.rate_limit import Limiter, Rate
from clair.ledger.ledger import Claim, ClaimResult, Ledger, StoredReply, Tokens, call_key

NOTHING = Tokens(0, 0)
_FIRST_BACKOFF = 0.5
_LONGEST_BACKOFF = 60.0
_LOOK_AGAIN = 0.2
_MOST_WAITS = 5  # by so many the pauses grow of a request that waits for its turn: 4 to 8 seconds in the end
_SAME_REFUSALS = 5  # the first requests of a role, after which all others would be refused too
_MOST_WORDS = 5  # different words of a server that are told at once; a bar shows the last ones
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
class ModelClient:
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
    patience: float = 300.0
    """Seconds without any answer, while requests fail to get through, after which the endpoint counts as dead; also the
    most that it may ask to wait."""
    tally: Tally = field(default_factory=Tally)
    asked: int = 0
    """Calls of earlier passes."""
    words: str = ""
    """What the server said when it last asked us to wait; nothing once it has answered again."""
    _answered: bool = False
    _refusals: dict[str, list[RequestFailed]] = field(default_factory=dict)
    _told_words: set[str] = field(default_factory=set)
    _told_slots: bool = False
    _failing_since: float | None = None
    _asking: dict[str, asyncio.Future[str | StoredReply]] = field(default_factory=dict)
    _calls: set[asyncio.Task[Any]] = field(default_factory=set)

    async def ask(
        self, messages: list[Any], *, row: str, sample: int = 0, tools: Tools = (), warmer: float = 0.0
    ) -> Reply:
        """The model's reply to `messages`, from the ledger or from the model; paid for at most once.

        `warmer` is added to the temperature, where the recipe sets one, as far as 1: a further reply shall differ.

        Raises Dropped where this request failed for good, Stopped where the run is ending, Pending where the reply
        comes with a batch, Refused where no request can succeed.
        """
        request = {"messages": messages, **self.options, **({"tools": list(tools)} if tools else {})}
        if warmer and (temperature := request.get("temperature")) is not None:
            request["temperature"] = max(temperature, min(1.0, temperature + warmer))
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
        known = isinstance(found, StoredReply)
        self._answered = True
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
        said = f"the server says {self.words}" if self.words else ""
        if (pause := limiter.pause) >= 1:
            return f"paused for {duration(pause)} as the server asks{said and ': ' + said}"
        if said:
            return said
        return f"the server takes {int(limiter.limit)} at once" if int(limiter.limit) < limiter.most else ""

    async def check(self) -> None:
        """See that the model is there; wait for one that is starting. Raises Refused."""
        attempt = 0
        while True:
            try:
                await self.model.check()
                self._failing_since, self.words = None, ""
                return
            except Unreachable as error:
                self._hear(error, time.monotonic())
                if (silent := self._silent()) > self.patience:
                    raise self._gone(silent, error) from error
            attempt += 1
            await asyncio.sleep(_backoff(attempt))

    def check_refusals(self) -> None:
        """At the end of a run: where all requests were refused in the same words, none is to blame. Raises Refused."""
        for failures in self._refusals.values():
            of_the_key = failures[0].reason == "http_403"
            if not self._answered and len(self._refusals) == 1 and len(failures) >= (1 if of_the_key else 2):
                raise self._refuses_all(failures)

    async def drain(self) -> None:
        """Wait for the requests in flight, which are paid for, until their replies are on disk."""
        while self._calls:
            await asyncio.wait(set(self._calls))

    async def _ask(self, key: str, request: Mapping[str, Any], sample: int, row: str) -> str | StoredReply:
        if self.batch is None or self.batch.live(key):
            return await self._ask_once(key, request, sample, row)
        self._may_go_on()
        await self.ready()
        claim = Claim(self.role, self.model.name, row, self.spending.payer, most_tokens(request))
        return await self.batch.put_off(key, claim, request)

    async def _ask_once(self, key: str, request: Mapping[str, Any], sample: int, row: str) -> str | StoredReply:
        """Share one call among equal requests of this run. A StoredReply if another run sent it and has the reply."""
        if (asking := self._asking.get(key)) is not None:
            return await asyncio.shield(asking)
        self._may_go_on()
        call = _Call(key, request, sample, row, most_tokens(request))
        task = asyncio.ensure_future(self._claim_and_call(call))
        self._asking[key] = task
        task.add_done_callback(lambda done: (self._asking.pop(key, None), _seen(done)))
        return await asyncio.shield(task)

    async def _claim_and_call(self, call: _Call) -> str | StoredReply:
        await self.ready()
        while True:
            await self._enter(call)
            claim = Claim(self.role, self.model.name, call.row, self.spending.payer, call.most)
            try:
                claimed = await self.ledger.claim(call.key, claim)
            except BaseException:
                self._leave(call, NOTHING)
                raise
            if claimed is ClaimResult.GRANTED:
                return await self._call(call)
            self._leave(call, NOTHING)
            if isinstance(claimed, StoredReply):
                return claimed
            if claimed is ClaimResult.IN_BATCH:
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
        attempt = waits = 0
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
            except (TooMany, Unreachable, RequestFailed, Refused) as error:
                last: Exception = error
                if self._is_wait(error):
                    waits += 1
                    await self._end_if_too_long(call, error)
                else:
                    attempt += 1
                    if attempt >= self._tries(error):
                        await self._give_up(call, error)
                # A server that is asked too often is spared by the limiter, too.
                wait = (
                    error.retry_after or 0.0
                    if isinstance(error, TooMany)
                    else _backoff(attempt + min(waits, _MOST_WAITS))
                )
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
            self._failing_since, self.words, self._answered = None, "", True
            seconds = time.monotonic() - started
            self.limiter.succeeded(None if isinstance(self.model, LocalModel) else started)
            self._tell_slots()
        except TooMany as error:
            self.limiter.refused(error.retry_after)
            self._hear(error, started)
            raise
        except Unreachable as error:
            billed = call.most if error.billed else NOTHING
            self._failing_since = self._failing_since or started
            if error.busy:
                self.limiter.timed_out(started)
            raise
        finally:
            self._leave(call, billed)
        await self.ledger.settle(call.key, raw, billed, call.most, seconds)
        return raw

    # ---- tries that came to nothing

    def _hear(self, error: Exception, started: float) -> None:
        """The server asks to wait: what it says is told at once, and once."""
        self._failing_since = self._failing_since or started
        self.words = str(error)
        alike = re.sub(r"[\d.]+", "#", self.words)  # `try again in 1.2 s`
        if alike not in self._told_words and len(self._told_words) < _MOST_WORDS:
            self._told_words.add(alike)
            after = getattr(error, "retry_after", None)
            tell(f"{self.role}: the server says {self.words}" + (f"; wait for {duration(after)}" if after else ""))

    def _tell_slots(self) -> None:
        if self.limiter.slots and not self._told_slots:
            self._told_slots = True
            slots = f"{self.limiter.slots} requests at a time" if self.limiter.slots > 1 else "one request at a time"
            tell(
                f"{self.role}: the server answers {slots}, so that more than {2 * self.limiter.slots} would only wait "
                f"there; fewer than {self.limiter.most} are in flight from now on"
            )

    def _silent(self) -> float:
        """Seconds since requests began to fail, of which none was answered since."""
        return time.monotonic() - (self._failing_since or time.monotonic())

    def _is_wait(self, error: Exception) -> bool:
        """Whether a request waits, which is no try: within the limits, for a place at the server, or until it is up."""
        if isinstance(error, TooMany):
            return not error.in_body
        return isinstance(error, Unreachable) and (error.waiting or (error.starting and not self._answered))

    async def _end_if_too_long(self, call: _Call, error: Exception) -> None:
        """End the run where the server asks for more patience than there is. Raises Refused."""
        after, silent = getattr(error, "retry_after", None) or 0.0, self._silent()
        if after <= self.patience and (silent <= self.patience or self.limiter.in_flight):
            return
        over = self._over(error, after, silent) if isinstance(error, TooMany) else self._gone(silent, error)
        self.stop.now(str(over), over)
        await self.ledger.fail(call.key, str(error), call.most)
        raise over from error

    def _over(self, error: TooMany, after: float, silent: float) -> Refused:
        asks = f"asks to wait for {duration(after)}" if after > self.patience else f"refuses since {duration(silent)}"
        at = time.strftime("after %Y-%m-%d %H:%M", time.localtime(time.time() + after))
        return LimitReached(
            f"{self.role}: the server {asks} ({error}), and {self.role}.patience is {self.patience:g} s; every reply "
            f"so far is kept: run the same command again {at if after else 'when the limit is over'}"
        )

    def _gone(self, silent: float, error: Exception) -> Refused:
        return Refused(
            f"{self.role}: no answer for {silent:.0f} s ({error}); everything paid for is kept, run the same command "
            f"again when the endpoint is back"
        )

    def _refuses_all(self, failures: list[RequestFailed]) -> Refused:
        key = failures[0].reason == "http_403"
        what = "refuses the key" if key else f"refuses every request ({len(failures)} of {len(failures)})"
        to_do = (
            "check api_key_env and the variable it names" if key else "correct the recipe; nothing of it was answered"
        )
        return Refused(
            f"{self.role}: {getattr(self.model, 'url', self.model.name)} {what} ({failures[0].detail}); {to_do}"
        )

    def _tries(self, error: Exception) -> int:
        if isinstance(error, Unreachable | TooMany):
            return self.attempts
        return _TRIES_OF_MALFORMED if getattr(error, "raw", None) is not None else 1

    async def _give_up(self, call: _Call, error: Exception) -> None:
        if isinstance(error, RequestFailed) and self._is_refused_by_all(error):
            error = self._refuses_all(next(iter(self._refusals.values())))
        if isinstance(error, Refused):
            self.stop.now(str(error), error)
        unbilled = NOTHING if _may_be_billed(error) else call.most
        await self.ledger.fail(call.key, str(error), unbilled, getattr(error, "raw", None))
        if isinstance(error, RequestFailed | Refused):
            raise error
        if (silent := self._silent()) > self.patience:
            gone = self._gone(silent, error)
            self.stop.now(str(gone), gone)
            raise gone from error
        raise RequestFailed("unreachable", f"no answer after {self.attempts} tries: {error}") from error

    def _is_refused_by_all(self, error: RequestFailed) -> bool:
        """Count a refusal before any answer; whether the first ones were all in the same words."""
        if self._answered or error.moderated or not error.reason.startswith("http_"):
            return False
        alike = self._refusals.setdefault(re.sub(r"\d+", "#", error.detail), [])
        alike.append(error)
        return len(self._refusals) == 1 and len(alike) >= _SAME_REFUSALS


@dataclass(frozen=True, slots=True)
class _Call:
    key: str
    request: Mapping[str, Any]
    sample: int
    row: str
    most: Tokens


def _backoff(attempt: int) -> float:
    """Seconds to wait after so many tries."""
    return random.uniform(0.5, 1.0) * min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** max(0, attempt - 1))


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
