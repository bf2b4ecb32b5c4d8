"""The ledger: every paid request and its reply in SQLite, committed before the pipeline uses the reply.

`calls` has one row per request, keyed by the hash of model identity, whole request and sample index. A reply is
committed and on disk before the pipeline sees it. A run that is killed at any instant pays again at most for the
requests that were in flight. Several runs may share a ledger: an open request belongs to the run that sent it, and a
run is alive as long as its process holds its lock file (run_locks.py).

The ledger also records what a call may have cost: the usage of its reply, and `open_*`, the maximum that requests
without a known end may have been billed for. The open calls of a dead process stay on the bill.

SQLite detects a page whose structure is broken, but not changed text. Therefore each reply is verified against a digest
of its key and text: a damaged ledger raises an error and never returns wrong text. recovery.py saves what is intact.

One thread does all writes. It commits all writes that are queued in one transaction (group commit): a commit costs a
disk flush, and hundreds of replies a second leave no time for one flush each.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sqlite3
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clair.core.errors import UserError
from clair.core.files import content_hash
from clair.ledger.grouped import Settlement, insert_new, settle_all
from clair.ledger.recovery import damage_message, error_message
from clair.ledger.run_locks import acquire_lock, count_live_runs, is_locked, lock_path
from clair.ledger.schema import (
    BUSY_TIMEOUT,
    VERSION,
    enable_write_ahead_log,
    lost_content,
    migrate,
    reply_digest,
)
from clair.storage.object_store import StorageError

if TYPE_CHECKING:
    from clair.ledger.replication import LedgerReplica

_SPENT = (
    "SELECT role, sum(prompt_tokens + open_prompt), sum(completion_tokens + open_completion) FROM calls "
    "WHERE payer = ? GROUP BY role"
)
_SPENT_IN_BATCHES = _SPENT.replace("GROUP BY", "AND batch IS NOT NULL GROUP BY")
_PAID = "SELECT total(prompt_tokens), total(completion_tokens) FROM calls WHERE key IN (SELECT value FROM json_each(?))"
_SECONDS = (
    "SELECT seconds FROM calls WHERE key IN (SELECT value FROM json_each(?)) AND state = 'done' AND seconds IS NOT NULL"
)
_MAX_WRITES_PER_COMMIT = 1000
_MIN_SQLITE = (3, 35)
"""The version of 2021 with UPDATE FROM and RETURNING."""


class LedgerError(UserError):
    """The ledger cannot be used or written. Its content is unharmed."""


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A reply in the ledger: the server's raw JSON text, and whether it came through a batch."""

    raw: str
    batch: bool = False


class Tokens(NamedTuple):
    """Counts of prompt and completion tokens."""

    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A request to be sent: its role and model, the id of its prompt, the account billed, and its maximal cost."""

    role: str
    model: str
    prompt_id: str
    account: str
    max_tokens: Tokens


class ClaimResult(Enum):
    """The state of a claimed request that has no reply yet."""

    GRANTED = "granted"
    """This run sends the request."""
    IN_OTHER_RUN = "in other run"
    """Another live run has sent the request: claim it again a little later."""
    IN_BATCH = "in batch"
    """The request waits for a batch, or is in one."""


def call_key(identity: str, request: Mapping[str, Any], sample: int = 0) -> str:
    """The key of a request: the hash of model identity, whole request, and index among equal samples."""
    return content_hash([identity, request, sample])


class Ledger(AbstractContextManager["Ledger"]):
    """A ledger file, open for one run. Use it as a context manager; its coroutines need a running event loop."""

    def __init__(self, path: str | Path, replica: LedgerReplica | None = None, *, send_all: bool = False) -> None:
        """Open or create the ledger at `path`.

        `replica` receives every write before its caller continues. `send_all` also sends what the file holds already.
        """
        if sqlite3.sqlite_version_info < _MIN_SQLITE:
            raise LedgerError(
                f"a ledger needs SQLite 3.35; this Python has {sqlite3.sqlite_version}: use a newer build"
            )
        self.path = Path(path)
        self.run = uuid.uuid4().hex[:12]
        self._replica = replica
        self._lock_path = lock_path(self.path, self.run)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._reader, self._writer = self._connect(), self._connect()
            count_live_runs(self.path)  # removes the lock files of dead runs
            self._lock = acquire_lock(self._lock_path)
            if replica:
                try:
                    replica.open(self._writer, send_all=send_all)
                except BaseException:
                    self._release()
                    raise
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(error_message(self.path, error)) from error
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._broken: LedgerError | None = None
        self._thread = threading.Thread(target=self._write_loop, name="ledger", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is queued, then close the files and release the lock."""
        self._queue.put(None)
        self._thread.join()
        if self._replica:
            self._replica.close()
        self._release()

    def _release(self) -> None:
        self._reader.close()
        self._writer.close()
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)

    # ---- reading

    def find(self, key: str) -> StoredReply | None:
        """The reply to a request, or None if it has none."""
        rows = self.read("SELECT reply, digest, batch FROM calls WHERE key = ? AND state = 'done'", key)
        return self.verify(key, *rows[0]) if rows else None

    def spent(self, account: str, *, in_batches: bool = False) -> dict[str, Tokens]:
        """The maximum that the calls of an account may have been billed for, as tokens by role.

        Calls without a known end count with their maximal cost. `in_batches` counts only those of a Batch API.
        """
        rows = self.read(_SPENT_IN_BATCHES if in_batches else _SPENT, account)
        return {role: Tokens(prompt, completion) for role, prompt, completion in rows}

    def paid(self, keys: Collection[str]) -> Tokens:
        """The usage of the calls with these keys."""
        return Tokens(*map(int, self.read(_PAID, json.dumps([*keys]))[0]))

    def seconds(self, keys: Collection[str]) -> list[float]:
        """The duration of each answered call with one of these keys, from sending it to the end of its reply."""
        return [seconds for (seconds,) in self.read(_SECONDS, json.dumps([*keys]))]

    def read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query. Raises LedgerError."""
        if self._broken:
            raise self._broken
        try:
            return self._reader.execute(query, values).fetchall()
        except sqlite3.Error as error:
            self._broken = LedgerError(error_message(self.path, error))
            raise self._broken from error

    def verify(self, key: str, reply: str, digest: str, batch: str | None) -> StoredReply:
        """The reply, if it equals what was written. Raises LedgerError if it does not."""
        if reply_digest(key, reply) != digest:
            self._broken = LedgerError(damage_message(self.path, f"the reply to {key[:12]} is not what was written"))
            raise self._broken
        return StoredReply(reply, batch is not None)

    # ---- writing

    async def claim(self, key: str, claim: Claim) -> StoredReply | ClaimResult:
        """Claim a request for this run, unless it is answered, in a batch, or claimed by another live run."""
        return await self._write(self._claim_all, (key, claim))

    async def settle(self, key: str, raw: str, usage: Tokens, max_tokens: Tokens, seconds: float) -> None:
        """Write a reply and its usage, which replaces the `max_tokens` on the bill. On disk when this returns."""
        await self._write(settle_all, Settlement(key, raw, seconds, *usage, *max_tokens))

    async def reopen(self, key: str, max_tokens: Tokens) -> None:
        """Record another attempt at a request whose last one may have been billed: the maximum of both is billed."""
        await self.write(
            lambda connection: connection.execute(
                "UPDATE calls SET attempts = attempts + 1, open_prompt = open_prompt + ?, "
                "open_completion = open_completion + ? WHERE key = ?",
                (*max_tokens, key),
            )
        )

    async def fail(self, key: str, error: str, unbilled: Tokens, raw: str | None = None) -> None:
        """Record that a request got no usable reply, with the raw text that came, if any.

        `unbilled` is subtracted from the bill: the maximal cost of a last attempt that was refused.
        """
        await self.write(
            lambda connection: connection.execute(
                "UPDATE calls SET state = 'failed', error = ?, reply = ?, digest = ?, open_prompt = open_prompt - ?, "
                "open_completion = open_completion - ? WHERE key = ?",
                (error[:2000], raw, reply_digest(key, raw), *unbilled, key),
            )
        )

    async def write(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run `work` in a transaction of the writing thread. Returns its result once it is on disk."""
        return await self._write(_call_each, work)

    async def _write(self, work: _Work, item: Any) -> Any:
        """Have an item written by `work` with all others of its transaction. Returns its result once it is on disk."""
        if self._broken:
            raise self._broken
        future = asyncio.get_running_loop().create_future()
        self._queue.put(_Write(work, item, future))
        return await future  # cancelling the caller cancels this future, never the write: a paid reply is on disk

    def _claim_all(
        self, connection: sqlite3.Connection, claims: list[tuple[str, Claim]], batch: str | None = None
    ) -> list[StoredReply | ClaimResult]:
        """Claim requests together; one that the ledger knows, or that comes twice, by itself."""
        rows = {
            key: (key, claim.role, claim.model, claim.prompt_id, self.run, claim.account, *claim.max_tokens, batch)
            for key, claim in claims
        }
        existing, results = insert_new(connection, [*rows.values()]), []
        for key, claim in claims:
            is_new = key not in existing
            results.append(ClaimResult.GRANTED if is_new else self._claim_again(connection, key, claim, batch))
            existing.add(key)
        return results

    def claim_within(
        self, connection: sqlite3.Connection, key: str, claim: Claim, batch: str | None = None
    ) -> StoredReply | ClaimResult:
        """Claim a request within a transaction of the writing thread; `batch` as in the table `calls`."""
        return self._claim_all(connection, [(key, claim)], batch)[0]

    def _claim_again(
        self, connection: sqlite3.Connection, key: str, claim: Claim, batch: str | None
    ) -> StoredReply | ClaimResult:
        query = "SELECT state, run, reply, digest, batch FROM calls WHERE key = ?"
        state, run, *stored = connection.execute(query, (key,)).fetchone()
        if state == "done":
            return self.verify(key, *stored)
        if state == "asked" and self.in_batch(connection, key):
            return ClaimResult.IN_BATCH
        if state == "asked" and self.owned_by_live_run(run):
            return ClaimResult.IN_OTHER_RUN
        connection.execute(
            "UPDATE calls SET state = 'asked', role = ?, run = ?, payer = ?, batch = ?, attempts = attempts + 1, "
            "open_prompt = open_prompt + ?, open_completion = open_completion + ? WHERE key = ?",
            (claim.role, self.run, claim.account, batch, *claim.max_tokens, key),
        )
        return ClaimResult.GRANTED

    def in_batch(self, connection: sqlite3.Connection, key: str) -> bool:
        """True if a request waits for a batch or is in one. Removes a request that a dead run queued but never sent."""
        queued = connection.execute(
            "SELECT batched.run, file FROM batched LEFT JOIN batches ON name = batch WHERE key = ?", (key,)
        ).fetchone()
        if queued is None:
            return False
        run, file = queued
        if file is not None or run == self.run or self.owned_by_live_run(run):
            return True
        query = "DELETE FROM batched WHERE key = ? RETURNING most_prompt, most_completion"
        max_tokens = connection.execute(query, (key,)).fetchone()
        connection.execute(
            "UPDATE calls SET open_prompt = open_prompt - ?, open_completion = open_completion - ? WHERE key = ?",
            (*max_tokens, key),
        )
        return False

    def owned_by_live_run(self, run: str) -> bool:
        """True if `run` is another run than this one and its process is alive."""
        return run != self.run and is_locked(lock_path(self.path, run))

    def _write_loop(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            last = False
            while len(batch) < _MAX_WRITES_PER_COMMIT and not last and not self._queue.empty():
                following = self._queue.get()
                last = following is None
                batch += [following] if following else []
            _resolve(self._commit(self._writer, batch))
            if last:
                break

    def _commit(self, connection: sqlite3.Connection, batch: list[_Write]) -> list[tuple[_Write, Any]]:
        try:
            with connection:  # commits, or rolls back after an error
                connection.execute("BEGIN IMMEDIATE")
                results = self._work_off(connection, batch)
            if self._replica:
                self._replica.send(connection)
        except StorageError as error:  # the local ledger has these writes, and will have those in flight
            return [(write, LedgerError(str(error))) for write in batch]
        except Exception as error:  # any error has to reach the coroutines that wait
            self._broken = error if isinstance(error, LedgerError) else LedgerError(error_message(self.path, error))
            return [(write, self._broken) for write in batch]
        return results

    def _work_off(self, connection: sqlite3.Connection, batch: list[_Write]) -> list[tuple[_Write, Any]]:
        """The results of the writes of a transaction, equal kinds together.

        Claims come last: what was written about the same request before, by a caller that was cancelled, is then there.
        """
        kinds: defaultdict[_Work, list[_Write]] = defaultdict(list)
        for write in batch:
            kinds[write.work].append(write)
        results: list[tuple[_Write, Any]] = []
        for work in sorted(kinds, key=lambda work: work == self._claim_all):
            results += zip(kinds[work], work(connection, [write.item for write in kinds[work]]), strict=True)
        return results

    # ---- opening

    def _connect(self) -> sqlite3.Connection:
        if lost_content(self.path):
            raise LedgerError(damage_message(self.path, "the file is empty"))
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        enable_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise LedgerError(f"ledger {self.path} has format {version}; this version reads {VERSION}")
        if version < VERSION:
            migrate(connection)
        return connection


_Work = Callable[[sqlite3.Connection, list[Any]], list[Any]]
"""Writes items and returns a result for each."""


@dataclass(slots=True)
class _Write:
    work: _Work
    item: Any
    future: asyncio.Future[Any]
    """Its result, in the event loop that waits for it."""


def _call_each(connection: sqlite3.Connection, items: list[Callable[[sqlite3.Connection], Any]]) -> list[Any]:
    return [item(connection) for item in items]


def _resolve(results: list[tuple[_Write, Any]]) -> None:
    """Give the writes of one transaction their results, in one turn of each event loop that waits for them.

    Rows that continue together also queue their next writes together: one transaction, not one for each reply.
    """

    def set_results(items: list[tuple[_Write, Any]]) -> None:
        for write, result in items:
            if write.future.done():  # cancelled with its event loop
                continue
            if isinstance(result, LedgerError):
                write.future.set_exception(result)
            else:
                write.future.set_result(result)

    for loop in {write.future.get_loop() for write, _ in results}:
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            loop.call_soon_threadsafe(set_results, [item for item in results if item[0].future.get_loop() is loop])
