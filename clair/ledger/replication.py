"""The replica of a ledger in an object store, as a log of segments: losing the machine loses no paid reply.

SQLite needs a local disk. The ledger file is local, and each committed transaction of its writing thread is uploaded as
a segment before any reply in it is used: `ledger/000000000007-000000000007.jsonl.gz` holds the rows that it changed, in
their new state. Since a group of writes is one transaction, the upload adds latency and does not lower the throughput.

Triggers record in the table `unsent` which rows a transaction changed, within the transaction. However a process dies,
committed rows that were not uploaded are known, and are uploaded first when the ledger is opened again. A local ledger
that is missing or older is rebuilt from the segments. From time to time the small segments are merged in one, which is
named from the first number to the last; a segment whose numbers lie within another one is ignored.
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
_ROWS_PER_SEGMENT = 1000
_MAX_SMALL_SEGMENTS = 256
_MAX_SMALL_BYTES = 16_000_000
_LOCAL_TABLES = """
CREATE TABLE IF NOT EXISTS unsent (kind TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (kind, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sent (log TEXT NOT NULL, last INTEGER NOT NULL);
"""


class _Segment(NamedTuple):
    first: int
    last: int
    name: str


class LedgerReplica:
    """The replica of one ledger in `store`. `check` raises an error once this run may no longer write there."""

    def __init__(self, store: Store, check: Callable[[], None]) -> None:
        self.store = store
        self._check = check
        self._log = ""
        """The id of the log that the local ledger belongs to."""
        self._last = 0
        """The number of the last segment that the local ledger contains."""
        self._tail: list[tuple[_Segment, bytes]] = []
        self._failed: StorageError | None = None

    def open(self, connection: sqlite3.Connection, *, send_all: bool = False) -> None:
        """Synchronize the ledger with its segments, and record its changes from now on. `send_all` uploads all rows."""
        for statement in filter(str.strip, _LOCAL_TABLES.split(";")):
            connection.execute(statement)
        segments = self._segments()
        self._log, self._last = connection.execute("SELECT log, last FROM sent").fetchone() or ("", 0)
        last = segments[-1].last if segments else 0
        if send_all or self._last > last or (segments and self._log != self._replica_id(segments[0])):
            self._restart(connection, segments)
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
        """Upload the committed rows that the store lacks. Raises StorageError; every later call raises it again."""
        if self._failed:
            raise self._failed
        try:
            query = "SELECT kind, key FROM unsent LIMIT ?"
            while changed := connection.execute(query, (_ROWS_PER_SEGMENT,)).fetchall():
                self._send(connection, changed)
        except StorageError as error:
            (count,) = connection.execute("SELECT count(*) FROM unsent").fetchone()
            self._failed = StorageError(
                f"{error}; the {count} newest entries of the ledger are kept on this machine, run the same command "
                f"again on it"
            )
            raise self._failed from error

    def close(self) -> None:
        """Merge the last small segments."""
        if len(self._tail) > 1 and not self._failed:
            with suppress(StorageError):  # the small segments hold the same rows
                self._check()
                self._merge_tail()

    def _send(self, connection: sqlite3.Connection, changed: list[tuple[str, str]]) -> None:
        self._check()
        number = self._last + 1
        lines: list[Any] = [{"log": self._log or uuid.uuid4().hex, "number": number}]
        for kind, key in changed:
            cursor = connection.execute(f"SELECT * FROM {kind} WHERE {_TABLES[kind]} = ?", (key,))  # noqa: S608 (our names)
            row = cursor.fetchone()
            columns = [column[0] for column in cursor.description]
            lines.append([kind, key, row and {c: _encode_bytes(v) for c, v in zip(columns, row, strict=True)}])
        text = "".join(json.dumps(line) + "\n" for line in lines)
        segment = _Segment(number, number, _segment_name(number, number))
        data = gzip.compress(text.encode(), 1, mtime=0)
        try:
            self.store.create(segment.name, data)
        except AlreadyExists as error:
            raise StorageError(f"{self.store.name} is written by another run too; this one stops") from error
        self._log, self._last = lines[0]["log"], number
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("DELETE FROM unsent WHERE kind = ? AND key = ?", changed)
            self._save_position(connection)
        self._tail.append((segment, data))
        size = sum(len(content) for _, content in self._tail)
        if len(self._tail) >= _MAX_SMALL_SEGMENTS or size > _MAX_SMALL_BYTES:
            self._merge_tail()

    def _save_position(self, connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM sent")
        connection.execute("INSERT INTO sent VALUES (?, ?)", (self._log, self._last))

    def _restart(self, connection: sqlite3.Connection, segments: list[_Segment]) -> None:
        """Mark all local rows as unsent and all segments as unread: the segments come from another ledger."""
        self._log, self._last = (self._replica_id(segments[0]) if segments else ""), 0
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for table, key in _TABLES.items():
                connection.execute(f"INSERT OR IGNORE INTO unsent SELECT '{table}', {key} FROM {table}")  # noqa: S608
            self._save_position(connection)

    # ---- from the store

    def _segments(self) -> list[_Segment]:
        """The current segments, in order. Raises StorageError if one is missing."""
        stored = [_parse_name(name) for name in self.store.names(_FOLDER)]
        current: list[_Segment] = []
        for segment in sorted(stored, key=lambda segment: (segment.first, -segment.last)):
            if not current or segment.last > current[-1].last:
                current.append(segment)
        for previous, following in pairwise([_Segment(0, 0, ""), *current]):
            if following.first != previous.last + 1:
                raise StorageError(
                    f"{self.store.name}/{_FOLDER} lacks segment {previous.last + 1}; restore it from a copy, or choose "
                    f"another --out"
                )
        return current

    def _replica_id(self, segment: _Segment) -> str:
        return next(self._lines(segment, self.store.get(segment.name)))["log"]

    def _lines(self, segment: _Segment, data: bytes) -> Iterator[Any]:
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as lines:
                yield from map(json.loads, lines)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise self._damaged(segment, error) from error

    def _damaged(self, segment: _Segment, error: Exception) -> StorageError:
        url = f"{self.store.name}/{segment.name}"
        return StorageError(f"{url} is damaged ({error}); restore it from a copy, or choose another --out")

    def _apply(self, connection: sqlite3.Connection, segment: _Segment) -> None:
        data = self.store.get(segment.name)
        try:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                for line in self._lines(segment, data):
                    if isinstance(line, dict):
                        self._log = line["log"]
                    else:
                        _apply_row(connection, *line)
                self._last = segment.last
                self._save_position(connection)
        except (ValueError, KeyError, TypeError) as error:
            raise error if isinstance(error, StorageError) else self._damaged(segment, error) from error

    def _load_tail(self, segments: list[_Segment]) -> None:
        tail: list[_Segment] = []
        for segment in segments:
            tail = [*tail, segment] if segment.first == segment.last else []
        contents = self.store.get_all([segment.name for segment in tail])
        self._tail = list(zip(tail, contents, strict=True))
        if len(self._tail) >= _MAX_SMALL_SEGMENTS:
            self._merge_tail()

    def _merge_tail(self) -> None:
        """Merge the small segments in one. Concatenated gzip files are one gzip file."""
        segments = [segment for segment, _ in self._tail]
        name = _segment_name(segments[0].first, segments[-1].last)
        self.store.put(name, b"".join(data for _, data in self._tail))
        self._tail = []
        with suppress(StorageError):  # a small segment that remains is ignored
            self.store.delete([segment.name for segment in segments])


def _apply_row(connection: sqlite3.Connection, kind: str, key: str, row: dict[str, Any] | None) -> None:
    """Write the row of a segment to the ledger, unless an unsent local row takes precedence."""
    name = _TABLES[kind]
    unsent = connection.execute("SELECT 1 FROM unsent WHERE kind = ? AND key = ?", (kind, key)).fetchone()
    if unsent and kind == "calls" and row:
        run, state = connection.execute("SELECT run, state FROM calls WHERE key = ?", (key,)).fetchone()
        if run == row["run"]:
            return  # the same run wrote both, the local one later
        if state == "done" and row["state"] != "done":
            # Both runs sent the request; the maximal cost of the other run's attempts stays on the bill.
            connection.execute(
                "UPDATE calls SET open_prompt = ?, open_completion = ? WHERE key = ?",
                (row["open_prompt"], row["open_completion"], key),
            )
            return
    if row is None:
        connection.execute(f"DELETE FROM {kind} WHERE {name} = ?", (key,))  # noqa: S608 (our names)
        return
    if not row.keys() <= {column[1] for column in connection.execute(f"PRAGMA table_info({kind})")}:
        raise ValueError("a row has columns that the ledger lacks")
    placeholders = ", ".join(f":{column}" for column in row)
    values = {column: _decode_bytes(value) for column, value in row.items()}
    connection.execute(f"INSERT OR REPLACE INTO {kind} ({', '.join(row)}) VALUES ({placeholders})", values)  # noqa: S608


def _encode_bytes(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _decode_bytes(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value


def _segment_name(first: int, last: int) -> str:
    return f"{_FOLDER}{first:012}-{last:012}.jsonl.gz"


def _parse_name(name: str) -> _Segment:
    first, _, last = name.removeprefix(_FOLDER).removesuffix(".jsonl.gz").partition("-")
    return _Segment(int(first), int(last), name)
