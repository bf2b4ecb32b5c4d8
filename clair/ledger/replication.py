"""A ledger's rows in an object store: what a reply is not used without, so that a lost machine loses nothing paid.

SQLite needs a disk of this machine. So the ledger lies in one, and each transaction of its writing thread, once it is
committed there, goes up as a segment before anyone is told of it: `ledger/000000000007-000000000007.jsonl.gz`, the rows
that it changed, as they are now. Since a group of writes is one transaction, the way to the store delays replies
and slows nothing down.

Triggers note in the table `unsent` which rows a transaction changed, within the transaction: whatever a process dies
of, what was committed and did not go up is known, and goes up first when the ledger is opened again. A ledger that is
missing here, or older, is made up from the segments. Every so often small segments are put together, from the first
one's number to the last one's; a segment whose numbers another one holds too counts no more.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import sqlite3
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

from clair.storage.object_store import AlreadyExists, StorageError, Store

_TABLES = {"calls": "key", "batches": "name", "batched": "key"}
_FOLDER = "ledger/"
_ROWS = 1000
_SEGMENTS_TOGETHER = 256
_BYTES_TOGETHER = 16_000_000
_OWN = """
CREATE TABLE IF NOT EXISTS unsent (kind TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (kind, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sent (log TEXT NOT NULL, last INTEGER NOT NULL);
"""


class _Segment(NamedTuple):
    first: int
    last: int
    name: str


class Segments:
    """The segments of one ledger. `check` raises where this run may not write any more."""

    def __init__(self, store: Store, check: Callable[[], None]) -> None:
        self.store = store
        self._check = check
        self._log = ""
        self._last = 0
        self._tail: list[tuple[_Segment, bytes]] = []
        self._failed: StorageError | None = None

    def open(self, connection: sqlite3.Connection, *, all_new: bool = False) -> None:
        """Make a ledger and its segments agree, and note what changes from now on. `all_new`: all of it is to go up."""
        for statement in filter(str.strip, _OWN.split(";")):
            connection.execute(statement)
        segments = self._segments()
        self._log, self._last = connection.execute("SELECT log, last FROM sent").fetchone() or ("", 0)
        last = segments[-1].last if segments else 0
        if all_new or self._last > last or (segments and self._log != self._name_of(segments[0])):
            self._begin_anew(connection, segments)
        for segment in segments:
            if segment.last > self._last:
                self._apply(connection, segment)
        self._load_tail(segments)
        for table, key in _TABLES.items():
            for event, row in (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD")):
                connection.execute(
                    f"CREATE TEMP TRIGGER note_{event}_{table} AFTER {event} ON main.{table} BEGIN "  # noqa: S608
                    f"INSERT OR IGNORE INTO unsent VALUES ('{table}', {row}.{key}); END"
                )
        self.send(connection)

    def send(self, connection: sqlite3.Connection) -> None:
        """Put up what was committed and is not there yet. Raises StorageError; after the first one it does no more."""
        if self._failed:
            raise self._failed
        try:
            while changed := connection.execute("SELECT kind, key FROM unsent LIMIT ?", (_ROWS,)).fetchall():
                self._send(connection, changed)
        except StorageError as error:
            (count,) = connection.execute("SELECT count(*) FROM unsent").fetchone()
            self._failed = StorageError(
                f"{error}; the {count} newest entries of the ledger are kept on this machine, run the same command "
                f"again on it"
            )
            raise self._failed from error

    def close(self) -> None:
        """Put the last small segments together."""
        if len(self._tail) > 1 and not self._failed:
            with suppress(StorageError):  # small ones hold as much
                self._check()
                self._put_together()

    def _send(self, connection: sqlite3.Connection, changed: list[tuple[str, str]]) -> None:
        self._check()
        number = self._last + 1
        lines: list[Any] = [{"log": self._log or uuid.uuid4().hex, "number": number}]
        for kind, key in changed:
            found = connection.execute(f"SELECT * FROM {kind} WHERE {_TABLES[kind]} = ?", (key,))  # noqa: S608 (our names)
            row = found.fetchone()
            columns = [column[0] for column in found.description]
            lines.append([kind, key, row and {c: _plain(v) for c, v in zip(columns, row, strict=True)}])
        text = "".join(json.dumps(line) + "\n" for line in lines)
        segment = _Segment(number, number, _name(number, number))
        data = gzip.compress(text.encode(), 1, mtime=0)
        try:
            self.store.create(segment.name, data)
        except AlreadyExists as error:
            raise StorageError(f"{self.store.name} is written by another run too; this one stops") from error
        self._log, self._last = lines[0]["log"], number
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("DELETE FROM unsent WHERE kind = ? AND key = ?", changed)
        self._note(connection)
        connection.execute("COMMIT")
        self._tail.append((segment, data))
        size = sum(len(content) for _, content in self._tail)
        if len(self._tail) >= _SEGMENTS_TOGETHER or size > _BYTES_TOGETHER:
            self._put_together()

    def _note(self, connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM sent")
        connection.execute("INSERT INTO sent VALUES (?, ?)", (self._log, self._last))

    def _begin_anew(self, connection: sqlite3.Connection, segments: list[_Segment]) -> None:
        """The ledger here is not what the segments come from: all of it is to go up, and all of them come down."""
        self._log, self._last = (self._name_of(segments[0]) if segments else ""), 0
        connection.execute("BEGIN IMMEDIATE")
        for table, key in _TABLES.items():
            connection.execute(f"INSERT OR IGNORE INTO unsent SELECT '{table}', {key} FROM {table}")  # noqa: S608
        self._note(connection)
        connection.execute("COMMIT")

    # ---- from the store

    def _segments(self) -> list[_Segment]:
        """The segments that count, in order. Raises StorageError where one is missing."""
        found = [_parsed(name) for name in self.store.names(_FOLDER)]
        counting: list[_Segment] = []
        for segment in sorted(found, key=lambda segment: (segment.first, -segment.last)):
            if not counting or segment.last > counting[-1].last:
                counting.append(segment)
        for before, after in pairwise([_Segment(0, 0, ""), *counting]):
            if after.first != before.last + 1:
                raise StorageError(
                    f"{self.store.name}/{_FOLDER} lacks segment {before.last + 1}; put a copy of it in its place, or "
                    f"choose another --out"
                )
        return counting

    def _name_of(self, segment: _Segment) -> str:
        head = next(self._lines(segment, self.store.get(segment.name)))
        return head["log"]

    def _lines(self, segment: _Segment, data: bytes) -> Iterator[Any]:
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as lines:
                yield from map(json.loads, lines)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise self._damaged(segment, error) from error

    def _damaged(self, segment: _Segment, error: Exception) -> StorageError:
        where = f"{self.store.name}/{segment.name}"
        return StorageError(f"{where} is damaged ({error}); put a copy of it in its place, or choose another --out")

    def _apply(self, connection: sqlite3.Connection, segment: _Segment) -> None:
        data = self.store.get(segment.name)
        connection.execute("BEGIN IMMEDIATE")
        try:
            for line in self._lines(segment, data):
                if isinstance(line, dict):
                    self._log = line["log"]
                else:
                    _put(connection, *line)
            self._last = segment.last
            self._note(connection)
            connection.execute("COMMIT")
        except (ValueError, KeyError, TypeError) as error:
            connection.execute("ROLLBACK")
            raise error if isinstance(error, StorageError) else self._damaged(segment, error) from error
        except BaseException:
            connection.execute("ROLLBACK")
            raise

    def _load_tail(self, segments: list[_Segment]) -> None:
        single: list[_Segment] = []
        for segment in segments:
            single = [*single, segment] if segment.first == segment.last else []
        contents = self.store.get_all([segment.name for segment in single])
        self._tail = list(zip(single, contents, strict=True))
        if len(self._tail) >= _SEGMENTS_TOGETHER:
            self._put_together()

    def _put_together(self) -> None:
        """One segment of many; gzip's parts one behind the other are one file."""
        segments = [segment for segment, _ in self._tail]
        name = _name(segments[0].first, segments[-1].last)
        self.store.put(name, b"".join(data for _, data in self._tail))
        self._tail = []
        with suppress(StorageError):  # what stays counts no more
            self.store.delete([segment.name for segment in segments])


def _put(connection: sqlite3.Connection, kind: str, key: str, row: dict[str, Any] | None) -> None:
    """A row as a segment has it, unless what is here and did not go up yet is worth more."""
    name = _TABLES[kind]
    unsent = connection.execute("SELECT 1 FROM unsent WHERE kind = ? AND key = ?", (kind, key)).fetchone()
    if unsent and kind == "calls" and row:
        mine = connection.execute("SELECT run, state, open_prompt, open_completion FROM calls WHERE key = ?", (key,))
        run, state, *_ = mine.fetchone()
        if run == row["run"]:
            return  # the same run wrote both, and here last
        if state == "done" and row["state"] != "done":
            # Both asked; the worst case of the other's tries stays on the bill.
            connection.execute(
                "UPDATE calls SET open_prompt = ?, open_completion = ? WHERE key = ?",
                (row["open_prompt"], row["open_completion"], key),
            )
            return
    if row is None:
        connection.execute(f"DELETE FROM {kind} WHERE {name} = ?", (key,))  # noqa: S608 (our names)
        return
    if not row.keys() <= {column[1] for column in connection.execute(f"PRAGMA table_info({kind})")}:
        raise ValueError("a row has columns that the ledger has not")
    places = ", ".join(f":{column}" for column in row)
    values = {column: _bytes(value) for column, value in row.items()}
    connection.execute(f"INSERT OR REPLACE INTO {kind} ({', '.join(row)}) VALUES ({places})", values)  # noqa: S608


def _plain(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _bytes(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value


def _name(first: int, last: int) -> str:
    return f"{_FOLDER}{first:012}-{last:012}.jsonl.gz"


def _parsed(name: str) -> _Segment:
    first, _, last = name.removeprefix(_FOLDER).removesuffix(".jsonl.gz").partition("-")
    return _Segment(int(first), int(last), name)
