"""One role's requests through a Batch API: files are uploaded, and results matched to requests by the request's hash.

A request is queued, its row ends as Pending, and it costs no memory until its reply is in the ledger. The build then
reads its prompts again and finds the reply in the ledger like any other. So nothing above this module waits for a
batch, and after an interrupted or killed run the next run continues with the batches in the ledger.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from clair.inference.batch_queue import Batch, BatchQueue, RequestOutcome
from clair.inference.batch_service import BatchService, Pending, parse_outcome, retry_outcome, wait_for_event
from clair.inference.budget import NOTHING, Budget, BudgetExceeded
from clair.inference.config import BatchConfig
from clair.inference.model import RateLimited, Refused, RequestFailed, Unreachable
from clair.inference.openai import NotFound
from clair.ledger.ledger import Claim, ClaimResult, StoredReply, Tokens

_LINES_PER_READ = 500
_DOWNLOAD_ATTEMPTS = 3
_MALFORMED_ATTEMPTS = 2
_FINAL_STATUSES = ("completed", "expired", "cancelled", "failed")


@dataclass
class BatchClient:
    """The queue and the open batches of one role: requests in, files up, results down."""

    role: str
    service: BatchService
    config: BatchConfig
    queue: BatchQueue
    budget: Budget
    attempts: int
    failed: dict[str, tuple[str, str]]
    """The model client's requests that failed for good in this run: key -> (reason, detail)."""
    on_error: Callable[[Exception], None]
    """Called with the error of an upload in the background."""
    in_batches: int = 0
    """Requests in open batches, as of the last count."""
    answered: int = 0
    """Requests that this run's batches have answered."""
    unaffordable: Tokens | None = None
    """The worst case of a request of this pass that did not fit into the budget."""
    live_quota: int = 0
    """How many more requests of this pass may be sent live."""
    _tries: Counter[tuple[str, str]] = field(default_factory=Counter)
    _queued: int = 0
    _queued_bytes: int = 0
    _full: bool = False
    """True while the service takes no more tokens: the next file waits until an open batch has ended."""
    _refusals: int = 0
    _max_requests: int = 0
    _uploads: set[asyncio.Task[None]] = field(default_factory=set)
    _upload_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _recovered: bool = False

    def __post_init__(self) -> None:
        self._max_requests = self.config.requests

    # ---- requests in

    def takes_live(self, key: str) -> bool:
        """True if this request is one of the last few, which the recipe allows to be sent live."""
        if self.live_quota and not self.queue.contains(key):
            self.live_quota -= 1
            return True
        return False

    async def enqueue(self, key: str, claim: Claim, request: Mapping[str, Any]) -> StoredReply:
        """Queue a request and raise Pending, or return the reply if the ledger has it by now.

        Raises RequestFailed for a request that is too large.
        """
        await self._recover_batches()
        line, size = self.service.line(key, request)
        if size > self._max_bytes:
            raise RequestFailed(
                "prompt_too_long", f"the request has {size} bytes; a batch file takes {self._max_bytes}"
            )
        if not self.budget.reserve_batch(self.role, claim.max_tokens):
            self.unaffordable = claim.max_tokens
            raise Pending
        result = await self.queue.put(key, claim, line)
        if result is not ClaimResult.GRANTED:
            self.budget.settle_batch(self.role, claim.max_tokens, NOTHING)
            if isinstance(result, StoredReply):
                return result
            raise Pending
        self._queued += 1
        self._queued_bytes += len(line)
        if self._queued >= self._max_requests or self._queued_bytes >= self._max_bytes:
            self._queued = self._queued_bytes = 0
            self._start_upload()
        if len(self._uploads) > 1:  # prompts are read faster than files are uploaded: bound the queue on disk
            await asyncio.wait(set(self._uploads))
        raise Pending

    @property
    def _max_bytes(self) -> int:
        return int(self.config.megabytes * 10**6)

    # ---- files up

    def _start_upload(self) -> None:
        task = asyncio.ensure_future(self._upload_file())
        self._uploads.add(task)
        task.add_done_callback(self._uploads.discard)

    async def _upload_file(self) -> None:
        try:
            async with self._upload_lock:
                if not (self._full and self.queue.open_batches()):
                    batch = await self.queue.form_batch(self._max_requests, self._max_bytes)
                    if batch:
                        await self._send(batch)
        except Exception as error:  # of a task that nobody awaits
            self.on_error(error)

    async def end_pass(self) -> int:
        """Send the queued requests; or, if few, withdraw them to be sent live in the next pass, and return how many."""
        self.live_quota = 0
        await self.finish_uploads()
        await self._recover_batches()
        waiting = self.queue.count_waiting()
        self._queued = self._queued_bytes = 0
        if 0 < waiting < self.config.live_below:
            count, reserved = await self.queue.withdraw()
            self.budget.settle_batch(self.role, reserved, NOTHING)
            self.live_quota = count
            return count
        if not (self._full and self.queue.open_batches()):
            self._full = False
            while batch := await self.queue.form_batch(self._max_requests, self._max_bytes):
                await self._send(batch)
        return 0

    async def finish_uploads(self) -> None:
        """Wait for the uploads in progress."""
        while self._uploads:
            await asyncio.wait(set(self._uploads))

    async def close(self) -> None:
        """Finish the uploads in progress, and withdraw requests that are only queued: the next run may send them."""
        await self.finish_uploads()
        _, reserved = await self.queue.withdraw()
        self.budget.settle_batch(self.role, reserved, NOTHING)

    def abandon(self) -> None:
        """Cancel uploads. If the service has begun such a batch nevertheless, the next run finds it."""
        for task in self._uploads:
            task.cancel()

    async def _recover_batches(self) -> None:
        """Once a run: take over the batches that dead runs have sent, and discard those that were never sent."""
        if self._recovered:
            return
        async with self._upload_lock:
            if self._recovered:  # by another row, while this one waited for the lock
                return
            released = [await self.queue.discard_unsent()]
            for batch in self.queue.unconfirmed():
                assert batch.file
                id = await self.service.find_batch(batch.file)
                if id:
                    await self.queue.mark_sent(batch, id)
                else:
                    released.append(await self.queue.discard(batch))
            for tokens in released:
                self.budget.settle_batch(self.role, tokens, NOTHING)
            self._recovered = True

    async def _send(self, batch: Batch) -> None:
        """Upload the file and create the batch; each id is in the ledger before the next step."""
        with tempfile.TemporaryFile(dir=self.queue.ledger.path.parent) as file:
            for line in self.queue.lines(batch):
                file.write(self.service.fill_secrets(line))
            try:
                file_id = await self.service.upload(f"{batch.name}.jsonl", file)
            except Refused:
                self.budget.settle_batch(self.role, await self.queue.discard(batch), NOTHING)
                raise
        await self.queue.mark_uploaded(batch, file_id)
        await self.queue.mark_sent(batch, await self.service.create_batch(file_id))

    # ---- results down

    def count_in_batches(self) -> int:
        """Count the requests in open batches."""
        self.in_batches = sum(self.queue.count_waiting(batch) for batch in self.queue.open_batches())
        return self.in_batches

    async def fetch_results(self) -> int:
        """Fetch the results of the batches that have ended; return the number of requests with a new outcome."""
        await self._recover_batches()
        settled = 0
        for batch in self.queue.open_batches():
            try:
                settled += await self._poll_batch(batch)
            except (RateLimited, Unreachable):  # the next poll will do
                continue
        return settled

    async def _poll_batch(self, batch: Batch) -> int:
        assert batch.id
        try:
            info = await self.service.retrieve(batch.id)
        except NotFound as error:
            return await self._lose(batch, f"batch {batch.id} no longer exists at {self.service.url}", error)
        if info.status not in _FINAL_STATUSES:
            return 0
        if info.status == "failed":
            return await self._refused(batch, info)
        self._full, self._refusals = False, 0
        try:
            return await self._fetch(batch, info)
        except NotFound as error:
            return await self._lose(batch, f"the results of batch {batch.id} are gone from {self.service.url}", error)

    async def _fetch(self, batch: Batch, info: Any) -> int:
        """Read both files of a batch that has ended, and requeue the requests that are in neither."""
        settled = not_run = 0
        files = [id for id in (info.output_file_id, info.error_file_id) if id]
        for _ in range(_DOWNLOAD_ATTEMPTS):
            complete, listed = True, 0
            for id in files:
                new_outcomes, listed_in_file, is_whole = await self._read(batch, id)
                settled, listed, complete = settled + new_outcomes, listed + listed_in_file, complete and is_whole
            not_run = max(0, _count_not_run(info, batch) - listed)
            if complete and self.queue.count_waiting(batch) <= not_run:
                break
        # If the service has lost results, any request without an outcome may have been billed.
        billed = NOTHING if self.queue.count_waiting(batch) <= not_run else None
        return settled + await self._requeue(batch, billed, f"batch {info.status}", is_try=True)

    async def _read(self, batch: Batch, file_id: str) -> tuple[int, int, bool]:
        """Download a result file and settle its outcomes.

        Returns the number of new outcomes, that of requests listed as not run, and whether the file is whole.
        """
        settled, listed, last = 0, set(), b"\n"
        with tempfile.TemporaryFile(dir=self.queue.ledger.path.parent) as file:
            await self.service.download(file_id, file)
            file.seek(0)
            while lines := list(islice(file, _LINES_PER_READ)):
                texts = (line.decode("utf-8", "surrogateescape") for line in lines)
                redacted = self.service.model.redacted
                outcomes = [outcome for text in texts if (outcome := parse_outcome(text, redacted))]
                settled += await self._settle(batch, outcomes)
                listed |= {outcome.key for outcome in outcomes if outcome.listed}
                last = lines[-1]
        complete = last.endswith(b"\n") or parse_outcome(last.decode("utf-8", "replace"), str) is not None
        return settled, len(listed), complete

    async def _settle(self, batch: Batch, outcomes: list[RequestOutcome], *, is_try: bool = True) -> int:
        """Write outcomes to the ledger, and return the unused reserve to the budget. `is_try`: count them as tries."""
        settlements = await self.queue.settle(batch, outcomes)
        for settled in settlements:
            self.budget.settle_batch(self.role, settled.reserved, settled.billed)
            if is_try:
                self._count(settled.outcome)
        return len(settlements)

    def _count(self, outcome: RequestOutcome) -> None:
        """Count the tries of a request; note one that failed for good."""
        if outcome.error is None:
            self.answered += 1
            return
        reason, _, detail = outcome.error.partition(": ")
        tries = self._tries[outcome.key, reason] = self._tries[outcome.key, reason] + 1
        if reason == "again":
            if tries >= self.attempts:
                self.failed[outcome.key] = ("unreachable", f"no answer in {self.attempts} batches: {detail}")
        elif outcome.raw is None or tries >= _MALFORMED_ATTEMPTS:
            self.failed[outcome.key] = (reason, detail)

    # ---- batches without results

    async def _refused(self, batch: Batch, info: Any) -> int:
        """Settle a batch whose file the service rejected. Raises Refused if no single request is to blame."""
        errors = list(getattr(info.errors, "data", None) or [])
        message = "; ".join(str(error.message or error.code) for error in errors[:3]) or "no reason given"
        message = self.service.model.redacted(message)
        if any(error.code == "token_limit_exceeded" for error in errors):
            return await self._over_token_limit(batch, message)
        blamed = {self.queue.key_of_line(batch, e.line) for e in errors if isinstance(e.line, int)} - {None}
        if not blamed:
            self.budget.settle_batch(self.role, await self.queue.discard(batch), NOTHING)
            raise Refused(
                f"{self.role}: {self.service.url} refuses the file of batch {batch.id} ({message}); no request was run"
            )
        outcomes = [RequestOutcome(str(key), None, NOTHING, f"http_400: {message}") for key in blamed]
        return await self._settle(batch, outcomes) + await self._requeue(batch)

    async def _over_token_limit(self, batch: Batch, message: str) -> int:
        """Requeue a batch with more tokens than may wait at the service: for later, or in smaller files."""
        self._full = True
        if len(self.queue.open_batches()) == 1:  # no other batch of ours uses the limit; somebody else's may
            self._refusals += batch.requests == 1
            if self._refusals >= self.attempts:
                raise Refused(
                    f"{self.role}: {self.service.url} does not take even one request in a batch ({message}); "
                    f"run the same command again when it has room"
                )
            self._max_requests = max(1, min(self._max_requests, batch.requests) // 2)
            if await wait_for_event(self.service.stopped, self.config.poll):
                raise Pending
        return await self._requeue(batch)

    async def _lose(self, batch: Batch, problem: str, error: Exception) -> int:
        if self.config.lost == "refuse":
            raise Refused(
                f"{self.role}: {problem}, or belongs to another key; {self.queue.count_waiting(batch)} requests in it "
                f"may have been paid for: use the key that it was made with, or set {self.role}.batch.lost: ask_again"
            ) from error
        return await self._requeue(batch, billed=None)

    async def _requeue(
        self, batch: Batch, billed: Tokens | None = NOTHING, reason: str = "not run", *, is_try: bool = False
    ) -> int:
        """Let all requests of a batch that have no outcome be queued again."""
        requeued = 0
        while keys := self.queue.waiting_keys(batch):
            outcomes = [retry_outcome(key, reason, billed) for key in keys]
            requeued += await self._settle(batch, outcomes, is_try=is_try)
        await self.queue.close_batch(batch)
        return requeued


async def wait_for_results(batches: Sequence[BatchClient], stopped: asyncio.Event, on_poll: Callable[[], None]) -> None:
    """Fetch results until at least a fifth of the requests in batches have their outcome, so that few passes suffice.

    Raises Pending if the run is stopped, BudgetExceeded if nothing is in a batch because of the budget, Refused if the
    batches belong to another endpoint.
    """
    settled, poll = 0, min(batch.config.poll for batch in batches)
    while True:
        for batch in batches:
            settled += await batch.fetch_results()
        waiting = sum(batch.count_in_batches() for batch in batches)
        on_poll()
        if settled and 4 * settled >= waiting:
            return
        if not waiting:
            _check_nothing_waiting(batches)
        if await wait_for_event(stopped, poll):
            raise Pending
        if not waiting:  # another run has sent the same requests; their replies will be in the ledger
            return


def _check_nothing_waiting(batches: Sequence[BatchClient]) -> None:
    for batch in batches:
        if batch.unaffordable:
            cost = batch.budget.cost(batch.role, batch.unaffordable, batch=True)
            raise BudgetExceeded(batch.budget.exceeded_message(cost))
    services = {batch.queue.service for batch in batches}
    for service, run in batches[0].queue.other_runs():
        if service not in services and not batches[0].queue.ledger.owned_by_live_run(run):
            raise Refused(
                f"replies are under way in a batch of another endpoint ({service}); go on with that one first"
            )


def _count_not_run(info: Any, batch: Batch) -> int:
    """The number of requests of an ended batch that were never run, by the service's counts; no file has them."""
    counts = [getattr(info.request_counts, name, None) for name in ("completed", "failed")]
    finished = [count for count in counts if isinstance(count, int)]
    if len(finished) == len(counts):
        return max(0, batch.requests - sum(finished))
    return 0 if info.status == "completed" else batch.requests
