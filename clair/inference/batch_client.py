"""A role's requests through the Batch API: files up, results down, each matched by the hash of its request.

A request is put off: it goes into the queue, its row ends as Pending, and costs no memory until its reply is in the
ledger. The build goes through its prompts again then, and finds the reply as it finds any other. So nothing above
this module waits for a batch, and a run that is ended, or killed, goes on with the batches that it finds.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from pydantic import Field

from clair.core.recipe import Recipe
from clair.inference.batch_queue import NOTHING, Batch, BatchQueue, Outcome, Settled
from clair.inference.batch_results import again, outcome_of
from clair.inference.batch_service import PATH, BatchService, Pending, happens
from clair.inference.budget import Budget, BudgetReached
from clair.inference.model import Refused, RequestFailed, TooMany, Unreachable
from clair.inference.openai import NotListed
from clair.ledger.ledger import Claim, ClaimResult, StoredReply, Tokens

_LINES_AT_ONCE = 500
_TRIES_OF_DOWNLOAD = 3
_TRIES_OF_MALFORMED = 2
_OVER = ("completed", "expired", "cancelled", "failed")


class BatchConfig(Recipe):
    """`batch:` of a model: through the service's Batch API, later and cheaper. `true` takes the defaults."""

    requests: int = Field(50_000, ge=1, le=50_000)
    """The most requests in a file."""
    megabytes: float = Field(200.0, gt=0, le=200)
    """The most that a file may hold, in 10^6 bytes."""
    poll: float = Field(60.0, gt=0)
    """Seconds between two looks at open batches."""
    live_below: int = Field(0, ge=0)
    """Fewer waiting requests than this are asked live, at the full price: the stragglers."""
    discount: float = Field(0.5, ge=0, le=1)
    """The share that the service takes off `price`."""
    lost: Literal["refuse", "ask_again"] = "refuse"
    """What to do where the service no longer knows a batch: its requests may have been paid for."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a result file held: outcomes that were new, requests it lists as not run, and whether it was all there."""

    settled: int
    listed: int
    whole: bool


@dataclass
class Batches:
    """The queue and the open batches of one role, and how they go to the service and come back."""

    role: str
    service: BatchService
    config: BatchConfig
    queue: BatchQueue
    budget: Budget
    attempts: int
    failed: dict[str, tuple[str, str]]
    """The client's: requests that failed for good in this run, with reason and detail."""
    tell_error: Callable[[Exception], None]
    """Called with what went wrong in an upload that nobody waits for."""
    in_batches: int = 0
    """Requests in open batches, when that was last counted."""
    asked: int = 0
    """Requests that this run's batches have answered."""
    over_budget: Tokens | None = None
    """A request of this pass that did not fit into the budget."""
    live_left: int = 0
    """How many requests of this pass may be asked live."""
    _secrets: dict[str, Any] = field(default_factory=dict)
    """Options of the role's requests that hold secrets, as they are sent: the queue on disk has references instead."""
    _tries: Counter[tuple[str, str]] = field(default_factory=Counter)
    _queued: int = 0
    _queued_bytes: int = 0
    _crowded: bool = False
    _refusals: int = 0
    _most: int = 0
    _uploads: set[asyncio.Task[None]] = field(default_factory=set)
    _one_upload: asyncio.Lock = field(default_factory=asyncio.Lock)
    _found: bool = False

    def __post_init__(self) -> None:
        self._most = self.config.requests

    # ---- requests in

    def live(self, key: str) -> bool:
        """Whether this request is asked live: a straggler, where the recipe wants that."""
        if self.live_left and not self.queue.holds(key):
            self.live_left -= 1
            return True
        return False

    async def put_off(self, key: str, claim: Claim, request: Mapping[str, Any]) -> StoredReply:
        """Queue a request and raise Pending; the reply, where it is there by now. Raises RequestFailed."""
        await self._find_left_behind()
        line, size = self._line(key, request)
        if size > self._most_bytes:
            raise RequestFailed(
                "prompt_too_long", f"the request has {size} bytes; a batch file takes {self._most_bytes}"
            )
        if not self.budget.hold(self.role, claim.max_tokens):
            self.over_budget = claim.max_tokens
            raise Pending
        claimed = await self.queue.put(key, claim, line)
        if claimed is not ClaimResult.GRANTED:
            self.budget.replace(self.role, claim.max_tokens, NOTHING)
            if isinstance(claimed, StoredReply):
                return claimed
            raise Pending
        self._queued += 1
        self._queued_bytes += len(line)
        if self._queued >= self._most or self._queued_bytes >= self._most_bytes:
            self._queued = self._queued_bytes = 0
            self._upload_soon()
        if len(self._uploads) > 1:  # prompts are read faster than files go up: what waits on disk must stay bounded
            await asyncio.wait(set(self._uploads))
        raise Pending

    @property
    def _most_bytes(self) -> int:
        return int(self.config.megabytes * 10**6)

    def _line(self, key: str, request: Mapping[str, Any]) -> tuple[bytes, int]:
        """The line of a request for the queue, without secrets, and how many bytes are sent of it.

        The line is at least as long as the one that is sent, so that the sizes of files are right.
        """
        body = {"model": self.service.model.name, **self.service.model.body(request)}
        references = self.service.model.references(request)
        self._secrets |= {name: body[name] for name in references}
        line = {"custom_id": key, "method": "POST", "url": PATH, "body": body}
        sent = _encoded(line)
        if not references:
            return sent, len(sent)
        return _encoded(line | {"body": body | references}).rstrip().ljust(len(sent) - 1) + b"\n", len(sent)

    def _with_secrets(self, line: bytes) -> bytes:
        """A line of the queue as it is sent."""
        if not self._secrets:
            return line
        request = json.loads(line)
        request["body"] |= {name: value for name, value in self._secrets.items() if name in request["body"]}
        return _encoded(request)

    # ---- files up

    def _upload_soon(self) -> None:
        task = asyncio.ensure_future(self._upload_one())
        self._uploads.add(task)
        task.add_done_callback(self._uploaded)

    def _uploaded(self, task: asyncio.Task[None]) -> None:
        self._uploads.discard(task)
        if not task.cancelled() and (error := task.exception()) and isinstance(error, Exception):
            self.tell_error(error)

    async def _upload_one(self) -> None:
        async with self._one_upload:
            if not (self._crowded and self.queue.open()):
                batch = await self.queue.gather(self._most, self._most_bytes)
                if batch:
                    await self._send(batch)

    async def end_pass(self) -> int:
        """Send what is queued, or take it back to be asked live in the next pass: then how many requests those are."""
        self.live_left = 0
        await self.uploaded()
        await self._find_left_behind()
        waiting = self.queue.waiting()
        self._queued = self._queued_bytes = 0
        if 0 < waiting < self.config.live_below:
            count, most = await self.queue.take_back()
            self.budget.replace(self.role, most, NOTHING)
            self.live_left = count
            return count
        if not (self._crowded and self.queue.open()):
            self._crowded = False
            while batch := await self.queue.gather(self._most, self._most_bytes):
                await self._send(batch)
        return 0

    async def uploaded(self) -> None:
        """Wait for the uploads that are under way."""
        while self._uploads:
            await asyncio.wait(set(self._uploads))

    async def close(self) -> None:
        """The run ends: what is under way goes up, and what was only queued may be asked by the next run."""
        await self.uploaded()
        _, freed = await self.queue.take_back()
        self.budget.replace(self.role, freed, NOTHING)

    def abandon(self) -> None:
        """Break uploads off. A batch that the service has begun nevertheless is found by the next run."""
        for task in self._uploads:
            task.cancel()

    async def _find_left_behind(self) -> None:
        """Once a run: what a dead run left is forgotten where it was never sent, and taken on where it was."""
        if self._found:
            return
        async with self._one_upload:
            if self._found:  # another row was here first
                return
            freed = [await self.queue.clean_up()]
            for batch in self.queue.unsure():
                assert batch.file
                id = await self.service.begun(batch.file)
                if id:
                    await self.queue.sent(batch, id)
                else:
                    freed.append(await self.queue.discard(batch))
            for most in freed:
                self.budget.replace(self.role, most, NOTHING)
            self._found = True

    async def _send(self, batch: Batch) -> None:
        """Upload the file and have it begun, with every id in the ledger before the next step."""
        with tempfile.TemporaryFile(dir=self.queue.ledger.path.parent) as file:
            for line in self.queue.lines(batch):
                file.write(self._with_secrets(line))
            try:
                uploaded = await self.service.upload(f"{batch.name}.jsonl", file)
            except Refused:
                self.budget.replace(self.role, await self.queue.discard(batch), NOTHING)
                raise
        await self.queue.uploaded(batch, uploaded)
        await self.queue.sent(batch, await self.service.begin(uploaded))

    # ---- results down

    def open(self) -> list[Batch]:
        """The batches that the service works on."""
        return self.queue.open()

    def under_way(self) -> int:
        """How many requests are in open batches."""
        self.in_batches = sum(self.queue.waiting(batch) for batch in self.queue.open())
        return self.in_batches

    async def look(self) -> int:
        """Fetch the results of the batches that have ended; of how many requests the outcome is known now."""
        await self._find_left_behind()
        settled = 0
        for batch in self.queue.open():
            try:
                settled += await self._look_at(batch)
            except (TooMany, Unreachable):  # a day has many looks: the next one will do
                continue
        return settled

    async def _look_at(self, batch: Batch) -> int:
        assert batch.id
        try:
            info = await self.service.look(batch.id)
        except NotListed as error:
            return await self._lost(batch, f"batch {batch.id} no longer exists at {self.service.url}", error)
        if info.status not in _OVER:
            return 0
        if info.status == "failed":
            return await self._refused(batch, info)
        self._crowded, self._refusals = False, 0
        try:
            return await self._fetch(batch, info)
        except NotListed as error:
            return await self._lost(batch, f"the results of batch {batch.id} are gone from {self.service.url}", error)

    async def _fetch(self, batch: Batch, info: Any) -> int:
        """Read both files of a batch that has ended, and ask again for what is in neither."""
        settled = 0
        files = [id for id in (info.output_file_id, info.error_file_id) if id]
        for _ in range(_TRIES_OF_DOWNLOAD):
            whole, listed = True, 0
            for id in files:
                found = await self._read(batch, id)
                settled, whole, listed = settled + found.settled, whole and found.whole, listed + found.listed
            never_run = max(0, _never_run(info, batch) - listed)
            if whole and self.queue.waiting(batch) <= never_run:
                break
        # Where the service has lost results, any of the rest may be among them and have been billed.
        billed = NOTHING if self.queue.waiting(batch) <= never_run else None
        while keys := self.queue.keys(batch):
            outcomes = [again(key, f"batch {info.status}", billed) for key in keys]
            settled += await self._settle(batch, outcomes)
        await self.queue.over(batch)
        return settled

    async def _read(self, batch: Batch, file: str) -> _Found:
        """Settle what a result file tells."""
        settled, listed, last = 0, set(), b"\n"
        with tempfile.TemporaryFile(dir=self.queue.ledger.path.parent) as kept:
            await self.service.download(file, kept)
            kept.seek(0)
            while lines := list(islice(kept, _LINES_AT_ONCE)):
                texts = (line.decode("utf-8", "surrogateescape") for line in lines)
                redacted = self.service.model.redacted
                outcomes = [outcome for text in texts if (outcome := outcome_of(text, redacted))]
                settled += await self._settle(batch, outcomes)
                listed |= {outcome.key for outcome in outcomes if outcome.listed}
                last = lines[-1]
        whole = last.endswith(b"\n") or outcome_of(last.decode("utf-8", "replace"), str) is not None
        return _Found(settled, len(listed), whole)

    async def _settle(self, batch: Batch, outcomes: list[Outcome]) -> int:
        settled = await self.queue.settle(batch, outcomes)
        for one in settled:
            self._count(one)
        return len(settled)

    def _count(self, settled: Settled) -> None:
        """The budget gets back what was not needed; what failed is tried again, or not."""
        outcome = settled.outcome
        self.budget.replace(self.role, settled.most, settled.billed)
        if outcome.error is None:
            self.asked += 1
            return
        reason, _, detail = outcome.error.partition(": ")
        tries = self._tries[outcome.key, reason] = self._tries[outcome.key, reason] + 1
        if reason == "again":
            if tries >= self.attempts:
                self.failed[outcome.key] = ("unreachable", f"no answer in {self.attempts} batches: {detail}")
        elif outcome.raw is None or tries >= _TRIES_OF_MALFORMED:
            self.failed[outcome.key] = (reason, detail)

    # ---- batches that came to nothing

    async def _refused(self, batch: Batch, info: Any) -> int:
        """The service did not take the file: nothing was asked. Raises Refused where no request of it is to blame."""
        errors = list(getattr(info.errors, "data", None) or [])
        words = "; ".join(str(error.message or error.code) for error in errors[:3]) or "no reason given"
        words = self.service.model.redacted(words)
        if any(error.code == "token_limit_exceeded" for error in errors):
            return await self._too_much(batch, words)
        blamed = {self.queue.key_at(batch, e.line) for e in errors if isinstance(e.line, int)} - {None}
        if not blamed:
            self.budget.replace(self.role, await self.queue.discard(batch), NOTHING)
            raise Refused(
                f"{self.role}: {self.service.url} refuses the file of batch {batch.id} ({words}); nothing of "
                f"it was asked"
            )
        outcomes = [Outcome(str(key), None, NOTHING, f"http_400: {words}") for key in blamed]
        return await self._settle(batch, outcomes) + await self._free(batch)

    async def _too_much(self, batch: Batch, words: str) -> int:
        """More tokens than may wait at the service at once: later, when the others are done, or in smaller files."""
        self._crowded = True
        if len(self.queue.open()) == 1:  # nothing of ours is in the way; somebody else's batches may be
            self._refusals += batch.requests == 1
            if self._refusals >= self.attempts:
                raise Refused(
                    f"{self.role}: {self.service.url} does not take even one request in a batch ({words}); "
                    f"run the same command again when it has room"
                )
            self._most = max(1, min(self._most, batch.requests) // 2)
            if await happens(self.service.stopped, self.config.poll):
                raise Pending
        return await self._free(batch)

    async def _lost(self, batch: Batch, told: str, error: Exception) -> int:
        if self.config.lost == "refuse":
            raise Refused(
                f"{self.role}: {told}, or belongs to another key; {self.queue.waiting(batch)} requests in it may have "
                f"been paid for: use the key that it was made with, or set {self.role}.batch.lost: ask_again"
            ) from error
        return await self._free(batch, billed=None)

    async def _free(self, batch: Batch, billed: Tokens | None = NOTHING) -> int:
        """All requests that are left in a batch may be queued anew."""
        freed = 0
        while keys := self.queue.keys(batch):
            settled = await self.queue.settle(batch, [again(key, "not run", billed) for key in keys])
            for one in settled:
                self.budget.replace(self.role, one.most, one.billed)
            freed += len(settled)
        await self.queue.over(batch)
        return freed


async def results(batches: Sequence[Batches], stopped: asyncio.Event, tell: Callable[[], None]) -> None:
    """Fetch results until a quarter of what was under way is there, so that few passes find much each.

    Raises Pending where the run is stopped, BudgetReached where nothing is under way because nothing may be asked,
    Refused where nothing of this run is.
    """
    settled, poll = 0, min(batch.config.poll for batch in batches)
    while True:
        for batch in batches:
            settled += await batch.look()
        waiting = sum(batch.under_way() for batch in batches)
        tell()
        if settled and 4 * settled >= waiting:
            return
        if not waiting:
            _nothing_under_way(batches)
        if await happens(stopped, poll):
            raise Pending
        if not waiting:  # another run asks for the same, and its replies will be found in the ledger
            return


def _nothing_under_way(batches: Sequence[Batches]) -> None:
    for batch in batches:
        if batch.over_budget:
            told = batch.budget.told(batch.budget.cost(batch.role, batch.over_budget, batch=True))
            raise BudgetReached(told)
    own = {batch.queue.service for batch in batches}
    for service, run in batches[0].queue.others():
        if service not in own and not batches[0].queue.ledger.owned_by_live_run(run):
            raise Refused(
                f"replies are under way in a batch of another endpoint ({service}); go on with that one first"
            )


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"  # ASCII: some servers take U+2028 for the end of a line


def _never_run(info: Any, batch: Batch) -> int:
    """How many requests of an ended batch came to no end, as the service tells; those are not in its files."""
    counts = info.request_counts
    done = [getattr(counts, name, None) for name in ("completed", "failed")]
    if all(isinstance(number, int) for number in done):
        return max(0, batch.requests - sum(done))
    return 0 if info.status == "completed" else batch.requests
