"""Every paid call in SQLite: asked once, written down before it is used, never lost.

One row per request, keyed by the hash of model identity, whole request and sample index. A reply is committed and on
disk before the pipeline sees it, so that a run killed at any instant pays again at most for what was in flight.
Several runs may share a ledger: a row being asked belongs to the run that asked it, and a run lives as long as it
holds its lock file, which the kernel lets go of however the process ends.

What a call may have cost is written down with it: the usage of its reply, and `open_*`, the most that requests without
a known end may have been billed for. A process that dies leaves its open calls on the bill.

SQLite notices a page whose structure is broken, not one whose text is: each reply is read against a hash of itself and
its key, so that a damaged ledger is told and never gives wrong text. `clair.ledger.recovery` saves
what can be saved of it.

Requests for a Batch API wait in the table `batched` until their replies are in; inference/batch_queue.py writes it.

Writes go through one thread that commits what has gathered meanwhile in one transaction (group commit): a commit
costs a disk flush, and at hundreds of replies a second there is no time for one each.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import queue
import shlex
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clair.core.errors import UserError
from clair.core.files import content_hash
from clair.storage.object_store import StorageError

if TYPE_CHECKING:
    from clair.ledger.replication import Segments

SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('asked', 'done', 'failed')),
    role TEXT NOT NULL,
    model TEXT NOT NULL,
    row TEXT NOT NULL,
    run TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 1,
    reply TEXT,
    error TEXT,
    seconds REAL,
    payer TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0,
    open_prompt INTEGER NOT NULL DEFAULT 0,
    open_completion INTEGER NOT NULL DEFAULT 0,
    digest TEXT,
    batch TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS calls_by_payer ON calls (payer, role, prompt_tokens, completion_tokens, open_prompt,
    open_completion);
"""
# `calls.batch` names the batch that a call is or was in, and so its price; NULL for a live one.
_BATCHES = """
CREATE INDEX IF NOT EXISTS calls_in_batches ON calls (payer, role) WHERE batch IS NOT NULL;
CREATE TABLE IF NOT EXISTS batches (
    name TEXT PRIMARY KEY,
    service TEXT NOT NULL,
    run TEXT NOT NULL,
    requests INTEGER NOT NULL,
    file TEXT,
    id TEXT,
    over INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batched (
    key TEXT PRIMARY KEY,
    service TEXT NOT NULL,
    run TEXT NOT NULL,
    batch TEXT NOT NULL,
    most_prompt INTEGER NOT NULL,
    most_completion INTEGER NOT NULL,
    body BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS batched_by_batch ON batched (batch, service, run);
"""
SCHEMA += _BATCHES
VERSION = 3
_SPENT = (
    "SELECT role, sum(prompt_tokens + open_prompt), sum(completion_tokens + open_completion) FROM calls "
    "WHERE payer = ? GROUP BY role"
)
_SPENT_IN_BATCHES = _SPENT.replace("GROUP BY", "AND batch IS NOT NULL GROUP BY")
_MOST_PER_COMMIT = 1000
_WAIT = 60.0  # seconds, for another process's transaction
_FULL = ("disk is full", "disk I/O error", "readonly database")


class LedgerError(UserError):
    """The ledger cannot be used or cannot be written; nothing that was in it is harmed."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A reply in the ledger: the server's raw JSON text, and whether it came through a batch."""

    raw: str
    batch: bool = False


class Tokens(NamedTuple):
    """Tokens in and out."""

    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Who asks what for whom: the role and model asked, the prompt's id, whose money, and the most it can cost."""

    role: str
    model: str
    row: str
    payer: str
    most: Tokens


class Elsewhere:
    """The request is being asked by another living run: look again a little later."""


class InBatch:
    """The request waits for a batch, or is in one."""


class Mine:
    """The request is this run's to ask."""


ELSEWHERE, IN_BATCH, MINE = Elsewhere(), InBatch(), Mine()


def call_key(identity: str, request: Mapping[str, Any], sample: int = 0) -> str:
    """The key of a request: model identity, the whole request, and which of several equal samples it is."""
    return content_hash([identity, request, sample])


def digest_of(key: str, reply: str | None) -> str | None:
    """What a stored reply is read against: 16 hex digits of the hash of its key and itself; None without a reply."""
    if reply is None:
        return None
    return hashlib.blake2b(f"{key}\0{reply}".encode(), digest_size=8).hexdigest()


class Ledger:
    """A ledger file, open for one run. Use it as a context manager; its coroutines need a running event loop."""

    def __init__(self, path: str | Path, log: Segments | None = None, *, all_new: bool = False) -> None:
        """`log`: where every write goes too before anyone is told of it; `all_new`: what is here already as well."""
        self.path = Path(path)
        self.run = uuid.uuid4().hex[:12]
        self._log = log
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._reader, self._writer = self._open(), self._open()
            self._lock_file = self._take_lock()
            if log:
                self._agree(log, all_new)
        except OSError as error:
            raise LedgerError(_told(self.path, error)) from error
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._broken: LedgerError | None = None
        self._thread = threading.Thread(target=self._write_loop, name="ledger", daemon=True)
        self._thread.start()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is queued, and let the ledger go."""
        self._queue.put(None)
        self._thread.join()
        if self._log:
            self._log.close()
        self._let_go()

    def _let_go(self) -> None:
        self._reader.close()
        self._writer.close()
        self._lock_path(self.run).unlink(missing_ok=True)
        os.close(self._lock_file)

    # ---- reading

    def find(self, key: str) -> Stored | None:
        """The reply to a request, if it was ever answered."""
        query = "SELECT reply, digest, batch FROM calls WHERE key = ? AND state = 'done'"
        found = self.read(query, key)
        return self.sound(key, *found[0]) if found else None

    def spent(self, payer: str, *, in_batches: bool = False) -> dict[str, Tokens]:
        """The most that a payer's calls can have been billed, in tokens by role; calls without a known end included.

        `in_batches`: only those that were asked through a Batch API.
        """
        query = _SPENT_IN_BATCHES if in_batches else _SPENT
        found = self.read(query, payer)
        return {role: Tokens(prompt, completion) for role, prompt, completion in found}

    def paid(self, role: str, row: str) -> Tokens:
        """What the answered calls of a role for one prompt took."""
        query = "SELECT total(prompt_tokens), total(completion_tokens) FROM calls WHERE role = ? AND row = ?"
        ((prompt, completion),) = self.read(query, role, row)
        return Tokens(int(prompt), int(completion))

    def seconds(self, role: str, row: str) -> list[float]:
        """How long the answered calls of a role for one prompt took, each from being sent to its whole reply."""
        query = "SELECT seconds FROM calls WHERE role = ? AND row = ? AND state = 'done' AND seconds IS NOT NULL"
        return [seconds for (seconds,) in self.read(query, role, row)]

    def counts(self) -> dict[str, int]:
        """How many requests are in each state."""
        return dict(self.read("SELECT state, count(*) FROM calls GROUP BY state"))

    def read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query. Raises LedgerError."""
        if self._broken:
            raise self._broken
        try:
            return self._reader.execute(query, values).fetchall()
        except sqlite3.Error as error:
            self._broken = LedgerError(_told(self.path, error))
            raise self._broken from error

    def sound(self, key: str, reply: str, digest: str, batch: str | None) -> Stored:
        """A reply that is the one that was written. Raises LedgerError for any other."""
        if digest_of(key, reply) != digest:
            self._broken = LedgerError(_damaged(self.path, f"the reply to {key[:12]} is not what was written"))
            raise self._broken
        return Stored(reply, batch is not None)

    # ---- writing

    async def claim(self, key: str, claim: Claim) -> Stored | Elsewhere | InBatch | Mine:
        """Take a request for this run, unless it is answered already, in a batch, or asked by another living run."""
        return await self.write(lambda connection: self._claim(connection, key, claim))

    async def settle(self, key: str, raw: str, usage: Tokens, most: Tokens, seconds: float) -> None:
        """Write a reply down, with what it cost in place of the `most` it might have. On disk when this returns."""
        await self.write(
            lambda connection: connection.execute(
                "UPDATE calls SET state = 'done', reply = ?, digest = ?, seconds = ?, error = NULL, prompt_tokens = ?, "
                "completion_tokens = ?, open_prompt = open_prompt - ?, open_completion = open_completion - ? "
                "WHERE key = ?",
                (raw, digest_of(key, raw), seconds, *usage, *most, key),
            )
        )

    async def reopen(self, key: str, most: Tokens) -> None:
        """Another try of a request whose last one may have been billed: its `most` stays on the bill beside the new."""
        await self.write(
            lambda connection: connection.execute(
                "UPDATE calls SET attempts = attempts + 1, open_prompt = open_prompt + ?, "
                "open_completion = open_completion + ? WHERE key = ?",
                (*most, key),
            )
        )

    async def fail(self, key: str, error: str, unbilled: Tokens, raw: str | None = None) -> None:
        """Write down that a request got no usable reply, with the raw text of what came if anything did.

        `unbilled` comes off the bill: the most of a last try that was refused.
        """
        await self.write(
            lambda connection: connection.execute(
                "UPDATE calls SET state = 'failed', error = ?, reply = ?, digest = ?, open_prompt = open_prompt - ?, "
                "open_completion = open_completion - ? WHERE key = ?",
                (error[:2000], raw, digest_of(key, raw), *unbilled, key),
            )
        )

    async def write(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """What `work` returns, done in a transaction of the writing thread; on disk when this returns."""
        if self._broken:
            raise self._broken
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        future.add_done_callback(lambda done: done.exception())  # whoever waited may be gone; asyncio would complain
        self._queue.put(_Write(work, loop, future))
        # A cancelled caller must not cancel the write: what was paid for is written whatever happens to the caller.
        return await asyncio.shield(future)

    def _claim(self, connection: sqlite3.Connection, key: str, claim: Claim) -> Any:
        inserted = connection.execute(
            "INSERT OR IGNORE INTO calls (key, state, role, model, row, run, payer, open_prompt, open_completion) "
            "VALUES (?, 'asked', ?, ?, ?, ?, ?, ?, ?)",
            (key, claim.role, claim.model, claim.row, self.run, claim.payer, *claim.most),
        )
        if inserted.rowcount:
            return MINE
        found = connection.execute(
            "SELECT state, run, reply, digest, batch FROM calls WHERE key = ?", (key,)
        ).fetchone()
        state, run, *stored = found
        if state == "done":
            return self.sound(key, *stored)
        if state == "asked" and self.in_batch(connection, key):
            return IN_BATCH
        if state == "asked" and self.elsewhere(run):
            return ELSEWHERE
        connection.execute(
            "UPDATE calls SET state = 'asked', run = ?, payer = ?, batch = NULL, attempts = attempts + 1, "
            "open_prompt = open_prompt + ?, open_completion = open_completion + ? WHERE key = ?",
            (self.run, claim.payer, *claim.most, key),
        )
        return MINE

    def in_batch(self, connection: sqlite3.Connection, key: str) -> bool:
        """Whether a request waits for a batch or is in one. One that a dead run queued and never sent is let go."""
        found = connection.execute(
            "SELECT batched.run, file FROM batched LEFT JOIN batches ON name = batch WHERE key = ?", (key,)
        ).fetchone()
        if found is None or found[1] is not None or found[0] == self.run or self._lives(found[0]):
            return found is not None
        query = "DELETE FROM batched WHERE key = ? RETURNING most_prompt, most_completion"
        most = connection.execute(query, (key,)).fetchone()
        connection.execute(
            "UPDATE calls SET open_prompt = open_prompt - ?, open_completion = open_completion - ? WHERE key = ?",
            (*most, key),
        )
        return False

    def _write_loop(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            last = False
            while len(batch) < _MOST_PER_COMMIT and not last and not self._queue.empty():
                following = self._queue.get()
                last = following is None
                batch += [following] if following else []
            _answer(self._commit(self._writer, batch))
            if last:
                break

    def _agree(self, log: Segments, all_new: bool) -> None:
        try:
            log.open(self._writer, all_new=all_new)
        except sqlite3.Error as error:
            self._let_go()
            raise LedgerError(_told(self.path, error)) from error
        except BaseException:
            self._let_go()
            raise

    def _commit(self, connection: sqlite3.Connection, batch: list[_Write]) -> list[tuple[_Write, Any]]:
        try:
            connection.execute("BEGIN IMMEDIATE")
            results = [(write, write.work(connection)) for write in batch]
            connection.execute("COMMIT")
            if self._log:
                self._log.send(connection)
        except StorageError as error:  # kept here, and what is still under way will be
            return [(write, LedgerError(str(error))) for write in batch]
        except Exception as error:  # whatever it is, the waiting coroutines must be told
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            self._broken = error if isinstance(error, LedgerError) else LedgerError(_told(self.path, error))
            return [(write, self._broken) for write in batch]
        return results

    # ---- opening, and who else is here

    def _open(self) -> sqlite3.Connection:
        if emptied(self.path):
            raise LedgerError(_damaged(self.path, "the file is empty"))
        try:
            connection = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
            _write_ahead(connection)
            connection.execute("PRAGMA synchronous = FULL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise LedgerError(f"ledger {self.path} has format {version}; this version reads {VERSION}")
            if version < VERSION:
                _migrate(connection)
        except sqlite3.Error as error:
            raise LedgerError(_told(self.path, error)) from error
        return connection

    def _lock_path(self, run: str) -> Path:
        return self.path.with_name(f"{self.path.name}.run-{run}")

    def _take_lock(self) -> int:
        living_runs(self.path)
        while True:
            handle = os.open(self._lock_path(self.run), os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(self._lock_path(self.run))):
                    return handle
            os.close(handle)  # another run saw the file before it was locked, and took it away as a dead run's

    def elsewhere(self, run: str) -> bool:
        """Whether a run is another one, and lives."""
        return run != self.run and self._lives(run)

    def _lives(self, run: str) -> bool:
        return _holds(self._lock_path(run))


def living_runs(path: Path) -> int:
    """How many processes have the ledger open. What dead ones left behind is taken away."""
    return sum(_holds(lock) for lock in path.parent.glob(f"{path.name}.run-*"))


def _holds(lock: Path) -> bool:
    """Whether the process of a run still holds its lock; asked of the kernel, so clocks do not matter.

    What a dead run left behind is taken away.
    """
    try:
        handle = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        lock.unlink(missing_ok=True)
        return False
    finally:
        os.close(handle)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn the write-ahead log on. SQLite does not wait by itself here for another process that is at it too."""
    give_up = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        time.sleep(0.01)


def _migrate(connection: sqlite3.Connection) -> None:
    """Make a new ledger, or bring an older one to this format, in one transaction: another process may be at it too."""
    connection.create_function("digest_of", 2, digest_of, deterministic=True)
    connection.execute("BEGIN IMMEDIATE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    steps = {
        0: SCHEMA,
        1: "ALTER TABLE calls ADD COLUMN digest TEXT;"
        "UPDATE calls SET digest = digest_of(key, reply) WHERE reply IS NOT NULL",
        2: f"ALTER TABLE calls ADD COLUMN batch TEXT; {_BATCHES}",
    }
    while version < VERSION:
        for statement in filter(str.strip, steps[version].split(";")):
            connection.execute(statement)
        version = version + 1 if version else VERSION
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def emptied(path: Path) -> bool:
    """Whether a ledger lost its content and not its log: SQLite would begin it anew, and throw the log away."""
    log = path.with_name(f"{path.name}-wal")
    return path.is_file() and path.stat().st_size == 0 and log.is_file() and log.stat().st_size > 0


@dataclass(slots=True)
class _Write:
    work: Callable[[sqlite3.Connection], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]


def _answer(results: list[tuple[_Write, Any]]) -> None:
    """Tell the waiting coroutines, loop by loop, what became of their writes."""

    def tell() -> None:
        for write, result in results:
            if write.future.done():
                continue
            if isinstance(result, LedgerError):
                write.future.set_exception(result)
            else:
                write.future.set_result(result)

    loop = results[0][0].loop
    if not loop.is_closed():
        loop.call_soon_threadsafe(tell)


def _told(path: Path, error: Exception) -> str:
    message = str(error)
    if any(words in message for words in _FULL):
        return f"ledger {path} cannot be written ({message}): make room or permissions, then run the same command again"
    if isinstance(error, sqlite3.Error) and message.startswith("Could not decode"):  # what follows is the text itself
        return _damaged(path, "a text in it is not UTF-8")
    if isinstance(error, sqlite3.DatabaseError) and ("malformed" in message or "not a database" in message):
        return _damaged(path, message)
    return f"ledger {path}: {message}"


def _damaged(path: Path, why: str) -> str:
    from clair.ledger.recovery import readable

    count = readable(path)
    if not count:
        return (
            f"ledger {path} is damaged ({why}) and no reply can be read in it; put a copy of it in its place, or move "
            f"it away to ask everything anew"
        )
    return (
        f"ledger {path} is damaged ({why}): {count} paid replies can be read in it; `clair salvage "
        f"{shlex.quote(str(path))}` puts them into a fresh ledger and keeps the damaged file"
    )


_CALLS = (
    "key, state, role, model, row, run, attempts, reply, error, seconds, prompt_tokens, completion_tokens, "
    "open_prompt, open_completion, digest, batch"
)


def join_ledgers(sources: Sequence[Path], target: Path, payer: str) -> None:
    """All calls of several ledgers in one more, on one account; so that what they hold is never asked for again."""
    Ledger(target).close()
    with closing(sqlite3.connect(target, isolation_level=None)) as connection:
        for state in ("= 'done'", "!= 'done'"):  # of equal requests, an answered one goes first
            for source in sources:
                connection.execute("ATTACH ? AS shard", (str(source),))
                connection.execute(
                    f"INSERT OR IGNORE INTO main.calls ({_CALLS}, payer) SELECT {_CALLS}, ? FROM shard.calls "  # noqa: S608 (our columns)
                    f"WHERE state {state}",
                    (payer,),
                )
                connection.execute("DETACH shard")
