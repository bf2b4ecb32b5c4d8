"""Requests that wait for a Batch API, or are in one of its batches: the part of the ledger that lets them survive.

A request is claimed and queued in one transaction. Whatever a process dies of, a queued request is known not to have
been billed, and one of a batch is fetched by the next run that opens the ledger.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clair.ledger.ledger import Claim, ClaimResult, Ledger, StoredReply, Tokens
from clair.ledger.schema import reply_digest

NOTHING = Tokens(0, 0)
_AT_ONCE = 500
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
    """Requests that go out together: under our name, and once the service has them, under its own."""

    name: str
    run: str
    requests: int
    file: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request of a batch: a reply (`error` None), or an error with the raw text that came, if any.

    `billed` is None where it is not known: then the worst case stays on the bill. `listed`: its line says that it was
    not run in time.
    """

    key: str
    raw: str | None
    billed: Tokens | None
    error: str | None = None
    listed: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """An outcome that is in the ledger, and by how much it changed our bill: from the worst case to what it was."""

    outcome: Outcome
    most: Tokens
    billed: Tokens


class BatchQueue:
    """The queued requests and open batches of one service: a role's model at a URL. `payer` is whose bill we watch."""

    def __init__(self, ledger: Ledger, service: str, payer: str) -> None:
        self.ledger = ledger
        self.service = service
        self.payer = payer

    # ---- into the queue

    def holds(self, key: str) -> bool:
        """Whether a request is queued or in a batch, of whatever service."""
        return bool(self.ledger.read("SELECT 1 FROM batched WHERE key = ?", key))

    async def put(self, key: str, claim: Claim, body: bytes) -> StoredReply | ClaimResult:
        """Claim a request for this run and queue it, unless it is answered, in a batch or asked elsewhere."""
        return await self.ledger.write(lambda connection: self._put(connection, key, claim, body))

    def _put(self, connection: sqlite3.Connection, key: str, claim: Claim, body: bytes) -> StoredReply | ClaimResult:
        run = self.ledger.run
        found = connection.execute(
            "SELECT state, run, reply, digest, batch FROM calls WHERE key = ?", (key,)
        ).fetchone()
        if found is None:
            connection.execute(
                "INSERT INTO calls (key, state, role, model, row, run, payer, open_prompt, open_completion, batch) "
                "VALUES (?, 'asked', ?, ?, ?, ?, ?, ?, ?, ?)",
                (key, claim.role, claim.model, claim.prompt_id, run, claim.account, *claim.max_tokens, _QUEUED),
            )
        elif found[0] == "done":
            return self.ledger.verify(key, *found[2:])
        elif found[0] == "asked" and self.ledger.in_batch(connection, key):
            return ClaimResult.IN_BATCH
        elif found[0] == "asked" and self.ledger.owned_by_live_run(found[1]):
            return ClaimResult.IN_OTHER_RUN
        else:
            connection.execute(
                "UPDATE calls SET state = 'asked', role = ?, run = ?, payer = ?, batch = ?, attempts = attempts + 1, "
                "open_prompt = open_prompt + ?, open_completion = open_completion + ? WHERE key = ?",
                (claim.role, run, claim.account, _QUEUED, *claim.max_tokens, key),
            )
        values = (key, self.service, run, _QUEUED, *claim.max_tokens, body)
        connection.execute("INSERT INTO batched VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        return ClaimResult.GRANTED

    async def take_back(self) -> tuple[int, Tokens]:
        """Empty this run's queue: how many requests that were, and what was set aside for them."""
        return await self.ledger.write(lambda connection: self._free(connection, _QUEUED, self.ledger.run))

    async def discard(self, batch: Batch) -> Tokens:
        """Forget a batch that the service never began; its requests may be asked anew. What was set aside for it."""
        return await self.ledger.write(lambda connection: self._discard(connection, batch.name, batch.run))

    async def clean_up(self) -> Tokens:
        """Forget what runs left behind that died before a file of theirs was uploaded. What was set aside for it."""
        left_behind = self.ledger.read(
            "SELECT DISTINCT batch, run FROM batched WHERE service = ? AND batch NOT IN (SELECT name FROM batches "
            "WHERE file IS NOT NULL)",
            self.service,
        )
        freed = [
            await self.ledger.write(lambda connection, b=batch, r=run: self._discard(connection, b, r))
            for batch, run in left_behind
            if run != self.ledger.run and not self.ledger.owned_by_live_run(run)
        ]
        return Tokens(sum(f.prompt for f in freed), sum(f.completion for f in freed))

    def _discard(self, connection: sqlite3.Connection, batch: str, run: str) -> Tokens:
        _, freed = self._free(connection, batch, run)
        connection.execute("DELETE FROM batches WHERE name = ?", (batch,))
        return freed

    def _free(self, connection: sqlite3.Connection, batch: str, run: str) -> tuple[int, Tokens]:
        place = (batch, self.service, run)
        query = (
            "SELECT count(*), total(iif(payer = ?, most_prompt, 0)), total(iif(payer = ?, most_completion, 0)) "
            "FROM batched JOIN calls USING (key) WHERE batched.batch = ? AND service = ? AND batched.run = ?"
        )
        count, prompt, completion = connection.execute(query, (self.payer, self.payer, *place)).fetchone()
        connection.execute(_FREE, ("not sent", *place))
        connection.execute(_FORGET, place)
        return count, Tokens(int(prompt), int(completion))

    # ---- out of the queue, into a batch

    async def gather(self, most: int, most_bytes: int) -> Batch | None:
        """Put queued requests into a new batch, as many as fit; None where none is queued."""
        return await self.ledger.write(lambda connection: self._gather(connection, most, most_bytes))

    def _gather(self, connection: sqlite3.Connection, most: int, most_bytes: int) -> Batch | None:
        name, keys, size = uuid.uuid4().hex, [], 0
        queued = connection.execute(
            "SELECT key, length(body) FROM batched WHERE batch = ? AND service = ? AND run = ? ORDER BY key LIMIT ?",
            (_QUEUED, self.service, self.ledger.run, most),
        ).fetchall()
        for key, length in queued:
            size += length
            if size > most_bytes and keys:
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
        while found := self.ledger.read(
            "SELECT key, body FROM batched WHERE batch = ? AND service = ? AND run = ? AND key > ? ORDER BY key "
            "LIMIT ?",
            batch.name, self.service, batch.run, last, _AT_ONCE,
        ):  # fmt: skip
            yield from (body for _, body in found)
            last = found[-1][0]

    async def uploaded(self, batch: Batch, file: str) -> None:
        """The file of a batch is at the service."""
        query = "UPDATE batches SET file = ? WHERE name = ?"
        await self.ledger.write(lambda connection: connection.execute(query, (file, batch.name)))

    async def sent(self, batch: Batch, id: str) -> None:
        """The service works on a batch; the words of its requests are kept there from now on."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE batches SET id = ? WHERE name = ?", (id, batch.name))
            connection.execute("UPDATE batched SET body = NULL WHERE batch = ?", (batch.name,))

        await self.ledger.write(work)

    # ---- back from the service

    def open(self) -> list[Batch]:
        """The batches that the service has and whose results are not all here; those of other runs too."""
        query = f"{_BATCHES} WHERE service = ? AND id IS NOT NULL AND NOT over"
        return [Batch(*found) for found in self.ledger.read(query, self.service)]

    def unsure(self) -> list[Batch]:
        """Batches of dead runs whose file was uploaded, and of which it is not known whether the service began them."""
        query = (
            "SELECT name, run, requests, file, id FROM batches WHERE service = ? AND file IS NOT NULL AND id IS NULL"
        )
        found = (Batch(*values) for values in self.ledger.read(query, self.service))
        return [
            batch for batch in found if batch.run != self.ledger.run and not self.ledger.owned_by_live_run(batch.run)
        ]

    def waiting(self, batch: Batch | None = None) -> int:
        """How many requests are in a batch, or queued by this run, without an outcome."""
        query = "SELECT count(*) FROM batched WHERE batch = ? AND service = ? AND run = ?"
        name, run = (batch.name, batch.run) if batch else (_QUEUED, self.ledger.run)
        return self.ledger.read(query, name, self.service, run)[0][0]

    def keys(self, batch: Batch) -> list[str]:
        """Some of the requests without an outcome, in the order of their keys."""
        query = "SELECT key FROM batched WHERE batch = ? AND service = ? AND run = ? ORDER BY key LIMIT ?"
        return [key for (key,) in self.ledger.read(query, batch.name, self.service, batch.run, _AT_ONCE)]

    def key_at(self, batch: Batch, line: int) -> str | None:
        """The request in a line of the file, the first being 1, where nothing of the batch has an outcome yet."""
        query = "SELECT key FROM batched WHERE batch = ? AND service = ? AND run = ? ORDER BY key LIMIT 1 OFFSET ?"
        found = self.ledger.read(query, batch.name, self.service, batch.run, line - 1) if line > 0 else []
        return found[0][0] if found else None

    async def settle(self, batch: Batch, outcomes: Sequence[Outcome]) -> list[Settled]:
        """Write outcomes down; those of requests that are not in the batch, or have one already, are left out."""
        if not outcomes:
            return []
        return await self.ledger.write(
            lambda connection: [s for o in outcomes if (s := self._settle(connection, batch.name, o))]
        )

    def _settle(self, connection: sqlite3.Connection, name: str, outcome: Outcome) -> Settled | None:
        found = connection.execute(
            "DELETE FROM batched WHERE key = ? AND batch = ? RETURNING most_prompt, most_completion",
            (outcome.key, name),
        ).fetchone()
        if found is None:
            return None
        most = Tokens(*found)
        billed, freed = outcome.billed, most
        if billed is None:  # not told: the worst case stays on the bill, as the cost of a reply or as an open one
            billed, freed = (NOTHING, NOTHING) if outcome.error else (most, most)
        (payer,) = connection.execute(
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
                *freed,
                outcome.key,
            ),
        ).fetchone()
        return Settled(outcome, freed, billed) if payer == self.payer else Settled(outcome, NOTHING, NOTHING)

    async def over(self, batch: Batch) -> None:
        """All of a batch has an outcome."""
        query = "UPDATE batches SET over = 1 WHERE name = ?"
        await self.ledger.write(lambda connection: connection.execute(query, (batch.name,)))

    def others(self) -> list[tuple[str, str]]:
        """(service, run) of whatever else is queued or in batches in this ledger."""
        query = "SELECT DISTINCT service, run FROM batched WHERE service != ?"
        return [(service, run) for service, run in self.ledger.read(query, self.service)]
