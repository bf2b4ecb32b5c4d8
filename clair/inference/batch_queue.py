"""The part of the ledger that holds the requests for a Batch API: those queued, and those in one of its batches.

A request is claimed and queued in one transaction. So if the process dies, a queued request is known not to be billed,
and the replies of a batch are fetched by the next run that opens the ledger.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clair.inference.budget import NOTHING
from clair.ledger.ledger import Claim, ClaimResult, Ledger, StoredReply, Tokens
from clair.ledger.schema import reply_digest

_ROWS_PER_READ = 500
_QUEUED = ""  # the batch of a request that is in none yet
_FREE = (
    "UPDATE calls SET state = 'failed', error = ?, open_prompt = open_prompt - most_prompt, "
    "open_completion = open_completion - most_completion FROM batched "
    "WHERE batched.key = calls.key AND batched.batch = ? AND batched.service = ? AND batched.run = ?"
)
_BATCHES = "SELECT name, run, requests, file, id FROM batches"
_FORGET = "DELETE FROM batched WHERE batch = ? AND service = ? AND run = ?"


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests that are sent together. `name` is ours; `file` and `id` are the service's, once it has them."""

    name: str
    run: str
    requests: int
    file: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """The result of one request of a batch: a reply (`error` None), or an error with the raw text received, if any.

    `billed` is None if it is not known: then the worst case stays on the bill. `listed`: the result file says that the
    request was not run in time.
    """

    key: str
    raw: str | None
    billed: Tokens | None
    error: str | None = None
    listed: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """An outcome that is in the ledger: it replaced `reserved` tokens on our bill with `billed` ones."""

    outcome: RequestOutcome
    reserved: Tokens
    billed: Tokens


@dataclass(frozen=True, slots=True)
class BatchQueue:
    """The queued requests and open batches of one service (a role's model at a URL), billed to `account`."""

    ledger: Ledger
    service: str
    account: str

    # ---- into the queue

    def contains(self, key: str) -> bool:
        """True if a request is queued or in a batch, of any service."""
        return bool(self.ledger.read("SELECT 1 FROM batched WHERE key = ?", key))

    async def put(self, key: str, claim: Claim, body: bytes) -> StoredReply | ClaimResult:
        """Claim a request for this run and queue it, unless it is answered, in a batch, or sent by another run."""

        def work(connection: sqlite3.Connection) -> StoredReply | ClaimResult:
            result = self.ledger.claim_within(connection, key, claim, _QUEUED)
            if result is ClaimResult.GRANTED:
                values = (key, self.service, self.ledger.run, _QUEUED, *claim.max_tokens, body)
                connection.execute("INSERT INTO batched VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            return result

        return await self.ledger.write(work)

    async def withdraw(self) -> tuple[int, Tokens]:
        """Empty this run's queue; return the number of requests, and the tokens that were reserved for them."""
        return await self.ledger.write(lambda connection: self._release(connection, _QUEUED, self.ledger.run))

    async def discard(self, batch: Batch) -> Tokens:
        """Remove a batch that the service never began, so that its requests can be sent again; return its reserve."""
        return await self.ledger.write(lambda connection: self._discard(connection, batch.name, batch.run))

    async def discard_unsent(self) -> Tokens:
        """Remove the requests of runs that died before they uploaded a file; return their reserve."""
        unsent = self.ledger.read(
            "SELECT DISTINCT batch, run FROM batched WHERE service = ? AND batch NOT IN (SELECT name FROM batches "
            "WHERE file IS NOT NULL)",
            self.service,
        )
        released = [
            await self.ledger.write(lambda connection, b=batch, r=run: self._discard(connection, b, r))
            for batch, run in unsent
            if run != self.ledger.run and not self.ledger.owned_by_live_run(run)
        ]
        return Tokens(sum(f.prompt for f in released), sum(f.completion for f in released))

    def _discard(self, connection: sqlite3.Connection, batch: str, run: str) -> Tokens:
        _, released = self._release(connection, batch, run)
        connection.execute("DELETE FROM batches WHERE name = ?", (batch,))
        return released

    def _release(self, connection: sqlite3.Connection, batch: str, run: str) -> tuple[int, Tokens]:
        values = (batch, self.service, run)
        query = (
            "SELECT count(*), total(iif(payer = ?, most_prompt, 0)), total(iif(payer = ?, most_completion, 0)) "
            "FROM batched JOIN calls USING (key) WHERE batched.batch = ? AND service = ? AND batched.run = ?"
        )
        count, prompt, completion = connection.execute(query, (self.account, self.account, *values)).fetchone()
        connection.execute(_FREE, ("not sent", *values))
        connection.execute(_FORGET, values)
        return count, Tokens(int(prompt), int(completion))

    # ---- out of the queue, into a batch

    async def form_batch(self, max_requests: int, max_bytes: int) -> Batch | None:
        """Move queued requests into a new batch, as many as fit; None if none is queued."""
        return await self.ledger.write(lambda connection: self._form_batch(connection, max_requests, max_bytes))

    def _form_batch(self, connection: sqlite3.Connection, max_requests: int, max_bytes: int) -> Batch | None:
        name, keys, size = uuid.uuid4().hex, [], 0
        queued = connection.execute(
            "SELECT key, length(body) FROM batched WHERE batch = ? AND service = ? AND run = ? ORDER BY key LIMIT ?",
            (_QUEUED, self.service, self.ledger.run, max_requests),
        ).fetchall()
        for key, length in queued:
            size += length
            if size > max_bytes and keys:
                break
            keys.append((name, key))
        if not keys:
            return None
        connection.executemany("UPDATE batched SET batch = ? WHERE key = ?", keys)
        connection.execute(
            "INSERT INTO batches (name, service, run, requests) VALUES (?, ?, ?, ?)",
            (name, self.service, self.ledger.run, len(keys)),
        )
        return Batch(name, self.ledger.run, len(keys))

    def lines(self, batch: Batch) -> Iterator[bytes]:
        """The lines of a batch's file, in the order of their keys."""
        last = ""
        while rows := self.ledger.read(
            "SELECT key, body FROM batched WHERE batch = ? AND service = ? AND run = ? AND key > ? ORDER BY key "
            "LIMIT ?",
            batch.name,
            self.service,
            batch.run,
            last,
            _ROWS_PER_READ,
        ):
            yield from (body for _, body in rows)
            last = rows[-1][0]

    async def mark_uploaded(self, batch: Batch, file: str) -> None:
        """Record the service's id of an uploaded file."""
        await self.ledger.write(
            lambda connection: connection.execute("UPDATE batches SET file = ? WHERE name = ?", (file, batch.name))
        )

    async def mark_sent(self, batch: Batch, id: str) -> None:
        """Record the service's id of a batch, and drop the bodies of its requests, which the service has."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE batches SET id = ? WHERE name = ?", (id, batch.name))
            connection.execute("UPDATE batched SET body = NULL WHERE batch = ?", (batch.name,))

        await self.ledger.write(work)

    # ---- back from the service

    def open_batches(self) -> list[Batch]:
        """The batches at the service whose results are not all in the ledger, of all runs."""
        query = f"{_BATCHES} WHERE service = ? AND id IS NOT NULL AND NOT over"
        return [Batch(*row) for row in self.ledger.read(query, self.service)]

    def unconfirmed(self) -> list[Batch]:
        """The batches of dead runs whose file was uploaded and which the service may or may not have begun."""
        query = f"{_BATCHES} WHERE service = ? AND file IS NOT NULL AND id IS NULL"
        batches = (Batch(*row) for row in self.ledger.read(query, self.service))
        return [
            batch for batch in batches if batch.run != self.ledger.run and not self.ledger.owned_by_live_run(batch.run)
        ]

    def count_waiting(self, batch: Batch | None = None) -> int:
        """Count the requests without an outcome in a batch; without `batch`, those queued by this run."""
        query = "SELECT count(*) FROM batched WHERE batch = ? AND service = ? AND run = ?"
        name, run = (batch.name, batch.run) if batch else (_QUEUED, self.ledger.run)
        return self.ledger.read(query, name, self.service, run)[0][0]

    def waiting_keys(self, batch: Batch) -> list[str]:
        """The first requests of a batch without an outcome, in the order of their keys."""
        query = "SELECT key FROM batched WHERE batch = ? AND service = ? AND run = ? ORDER BY key LIMIT ?"
        return [key for (key,) in self.ledger.read(query, batch.name, self.service, batch.run, _ROWS_PER_READ)]

    def key_of_line(self, batch: Batch, line: int) -> str | None:
        """The request in a line of the file, counted from 1, if no request of the batch has an outcome yet."""
        query = "SELECT key FROM batched WHERE batch = ? AND service = ? AND run = ? ORDER BY key LIMIT 1 OFFSET ?"
        rows = self.ledger.read(query, batch.name, self.service, batch.run, line - 1) if line > 0 else []
        return rows[0][0] if rows else None

    async def settle(self, batch: Batch, outcomes: Sequence[RequestOutcome]) -> list[Settled]:
        """Write outcomes to the ledger; skip requests that are not in the batch or have an outcome already."""
        if not outcomes:
            return []
        return await self.ledger.write(
            lambda connection: [s for o in outcomes if (s := self._settle(connection, batch.name, o))]
        )

    def _settle(self, connection: sqlite3.Connection, name: str, outcome: RequestOutcome) -> Settled | None:
        row = connection.execute(
            "DELETE FROM batched WHERE key = ? AND batch = ? RETURNING most_prompt, most_completion",
            (outcome.key, name),
        ).fetchone()
        if row is None:
            return None
        worst_case = Tokens(*row)
        billed, released = outcome.billed, worst_case
        if billed is None:  # not known: the worst case stays on the bill, as the cost of a reply or of an open call
            billed, released = (NOTHING, NOTHING) if outcome.error else (worst_case, worst_case)
        (account,) = connection.execute(
            "UPDATE calls SET state = ?, reply = ?, digest = ?, error = ?, prompt_tokens = ?, "
            "completion_tokens = ?, batch = ?, open_prompt = open_prompt - ?, "
            "open_completion = open_completion - ? WHERE key = ? RETURNING payer",
            (
                "failed" if outcome.error else "done",
                outcome.raw,
                reply_digest(outcome.key, outcome.raw),
                outcome.error,
                *billed,
                name,
                *released,
                outcome.key,
            ),
        ).fetchone()
        return Settled(outcome, released, billed) if account == self.account else Settled(outcome, NOTHING, NOTHING)

    async def close_batch(self, batch: Batch) -> None:
        """Record that every request of a batch has an outcome."""
        await self.ledger.write(
            lambda connection: connection.execute("UPDATE batches SET over = 1 WHERE name = ?", (batch.name,))
        )

    def other_runs(self) -> list[tuple[str, str]]:
        """The (service, run) pairs of the ledger's other services with requests queued or in batches."""
        rows = self.ledger.read("SELECT DISTINCT service, run FROM batched WHERE service != ?", self.service)
        return [(service, run) for service, run in rows]
