"""Recover the calls of a damaged ledger: parse its database pages one by one, without SQLite and without the tree.

A ledger is a table whose rows are stored in the pages of a B-tree (`WITHOUT ROWID`). Long rows continue in chains of
overflow pages. Every intact page of the file or of its write-ahead log yields its rows, even if the header, the parent
pages or the end of the file are damaged. A reply is accepted only with the digest that was written with it. Damage
therefore never becomes wrong text; and since a reply never changes, an old version of a page is as good as a new one.
Format: https://www.sqlite.org/fileformat2.html, sections 1.3 to 1.6, 2.1 and 4.1.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clair.core.errors import UserError
from clair.core.files import publish
from clair.ledger.run_locks import count_live_runs
from clair.ledger.schema import SCHEMA, VERSION, lost_content, reply_digest

_MAGIC = b"SQLite format 3\0"
_PAGE_SIZES = {1 if size == 65536 else size: size for size in (512 << shift for shift in range(8))}
_DEFAULT_PAGE_SIZE = 4096
_INNER, _LEAF = 2, 10  # page types of an index B-tree, whose inner pages hold rows too
_LOG_HEADER, _FRAME_HEADER = 32, 24
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_COUNTS = ("attempts", "prompt_tokens", "completion_tokens", "open_prompt", "open_completion")
_CANNOT_WRITE = ("disk is full", "disk I/O error", "readonly database")
_UNREADABLE = (ValueError, IndexError, struct.error)


@dataclass(frozen=True, slots=True)
class Salvaged:
    """The result of `salvage`: the number of paid replies, of other calls, and the path of the damaged file."""

    replies: int
    others: int
    """Calls without a reply; their cost stays on the bill."""
    backup: Path


def count_readable(path: str | Path) -> int:
    """The number of paid replies that can be read in the ledger at `path`, however damaged it is."""
    return len({hash(row["key"]) for row in _rows(Path(path)) if row["state"] == "done"})


def salvage(path: str | Path) -> Salvaged:
    """Replace a damaged ledger by a new one with every readable call; the damaged file stays beside it.

    Calls without a reply are recovered too, because the budget counts what they may have cost. Raises UserError, and
    changes nothing, if no call can be read, if the ledger is not damaged, or if a run is using it.
    """
    ledger = Path(path)
    if not ledger.is_file():
        raise UserError(f"ledger {ledger} does not exist; give the file that the error named")
    if count_live_runs(ledger):
        raise UserError(f"ledger {ledger} is in use by a run; wait for it, or stop it first")
    if _is_intact(ledger):
        raise UserError(f"ledger {ledger} is not damaged: every reply in it can be read; nothing was changed")
    rebuilt = ledger.with_name(f".{ledger.name}.{os.getpid()}.tmp")
    try:
        replies, others = _fill(rebuilt, ledger)
        if not replies + others:
            raise UserError(f"no call can be read in {ledger}; nothing was changed")
        return Salvaged(replies, others, _replace_ledger(rebuilt, ledger))
    finally:
        rebuilt.unlink(missing_ok=True)


def _is_intact(ledger: Path) -> bool:
    """True if SQLite's integrity check passes and the digest of every reply matches."""
    if lost_content(ledger):
        return False
    try:
        with closing(sqlite3.connect(f"{ledger.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.create_function("reply_digest", 2, reply_digest, deterministic=True)
            (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            (wrong_digests,) = connection.execute(
                "SELECT count(*) FROM calls WHERE reply IS NOT NULL AND digest IS NOT reply_digest(key, reply)"
            ).fetchone()
    except (sqlite3.Error, UnicodeDecodeError):
        return False
    return verdict == "ok" and not wrong_digests


def _fill(target: Path, damaged: Path) -> tuple[int, int]:
    target.unlink(missing_ok=True)
    with closing(sqlite3.connect(target, isolation_level=None)) as connection:
        connection.executescript(SCHEMA)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("BEGIN")
        # Earlier damaged files are read again, because an interrupted salvage may have moved the log to one of them.
        sources = (damaged, *sorted(damaged.parent.glob(f"{damaged.name}.damaged-*[0-9]")))
        for row in (row for source in sources for row in _rows(source)):
            query = "SELECT state, attempts FROM calls WHERE key = ?"
            state, attempts = connection.execute(query, (row["key"],)).fetchone() or ("", -1)
            # An old page may hold an earlier state of a call. A reply is its last state, and attempts only increase.
            if state != "done" and (row["state"] == "done" or row["attempts"] > attempts):
                columns = ", ".join(f":{column}" for column in row)
                connection.execute(f"INSERT OR REPLACE INTO calls VALUES ({columns})", row)  # noqa: S608 (our columns)
        connection.execute("COMMIT")
        counts = dict(connection.execute("SELECT state = 'done', count(*) FROM calls GROUP BY 1"))
    return counts.get(1, 0), counts.get(0, 0)


def _replace_ledger(rebuilt: Path, ledger: Path) -> Path:
    """Move the rebuilt ledger to the name of the damaged one. Returns the new path of the damaged one.

    If it is interrupted, the damaged ledger still has its name and can be salvaged again.
    """
    number = 1
    while (backup := ledger.with_name(f"{ledger.name}.damaged-{number}")).exists():
        number += 1
    try:
        os.link(ledger, backup)
    except OSError:  # a file system without hard links
        shutil.copyfile(ledger, backup)
    with suppress(FileNotFoundError):  # SQLite would apply the old log to the new file
        os.rename(_write_ahead_log(ledger), _write_ahead_log(backup))
    ledger.with_name(f"{ledger.name}-shm").unlink(missing_ok=True)
    publish(rebuilt, ledger)
    return backup


def _write_ahead_log(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


# ---- rows from pages


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row of the table `calls` that can be read with certainty, as column -> value; old versions included."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        columns = [row[1] for row in connection.execute("PRAGMA table_info(calls)")]
    with _Pages(path) as pages:
        for page in pages.each():
            for payload in _payloads(pages, page):
                with suppress(*_UNREADABLE):
                    values = _record(payload)
                    missing = [None] * (len(columns) - len(values))  # columns added after the row was written
                    row = dict(zip(columns, values + missing, strict=True))
                    if _is_call(row):
                        yield row


def _is_call(row: dict[str, Any]) -> bool:
    texts = all(isinstance(row[name], str) for name in ("key", "state", "role", "model", "row", "run", "payer"))
    numbers = all(isinstance(row[name], int) for name in _COUNTS)
    valid_state = row["state"] in ("asked", "failed") or (row["state"] == "done" and row["reply"] is not None)
    return texts and numbers and valid_state and row["digest"] == reply_digest(row["key"], row["reply"])


def _payloads(pages: _Pages, page: bytes) -> Iterator[bytes]:
    """The payload of each cell of a page, overflow pages included; nothing for a page of another type."""
    if len(page) < pages.size or page[0] not in (_INNER, _LEAF):
        return
    header_size = 12 if page[0] == _INNER else 8
    for index in range(min(int.from_bytes(page[3:5]), (pages.size - header_size) // 2)):
        with suppress(*_UNREADABLE):
            (start,) = struct.unpack_from(">H", page, header_size + 2 * index)
            size, start = _varint(page, start + (4 if page[0] == _INNER else 0))
            yield _assemble_payload(pages, page, start, size)


def _assemble_payload(pages: _Pages, page: bytes, start: int, size: int) -> bytes:
    """A payload of `size` bytes that begins at `start` of a page and may continue in overflow pages.

    Raises ValueError if the payload cannot be complete.
    """
    max_local = (pages.usable - 12) * 64 // 255 - 23
    local = size
    if size > max_local:
        min_local = (pages.usable - 12) * 32 // 255 - 23
        candidate = min_local + (size - min_local) % (pages.usable - 4)
        local = candidate if candidate <= max_local else min_local
    if size > pages.usable * pages.count or start + local > pages.usable:
        raise ValueError("longer than the file, or than the page")
    pieces, remaining = [page[start : start + local]], size - local
    next_page = int.from_bytes(page[start + local : start + local + 4]) if remaining else 0
    while remaining:
        page = pages.get(next_page)
        pieces.append(page[4 : min(pages.usable, 4 + remaining)])
        if len(pieces[-1]) == 0:
            raise ValueError("the chain ends too early")
        remaining -= len(pieces[-1])
        next_page = int.from_bytes(page[:4])
    return b"".join(pieces)


def _record(payload: bytes) -> list[Any]:
    """The values of a record. Raises ValueError if the payload is not a record."""
    header_size, offset = _varint(payload, 0)
    kinds = []
    while offset < header_size:
        kind, offset = _varint(payload, offset)
        kinds.append(kind)
    values: list[Any] = []
    for kind in kinds:
        size = _INTEGERS.get(kind, 8 if kind == 7 else (kind - 12) // 2 if kind >= 12 else 0)
        content = payload[offset : offset + size]
        offset += size
        values.append(_value(kind, content))
    if offset != len(payload):
        raise ValueError("the values do not fill the record")
    return values


def _value(kind: int, content: bytes) -> Any:
    if kind in _INTEGERS:
        return int.from_bytes(content, signed=True)
    if kind == 7:
        return struct.unpack(">d", content)[0]
    if kind >= 12:
        return content.decode() if kind % 2 else content
    return {0: None, 8: 0, 9: 1}.get(kind, content)


def _varint(page: bytes, offset: int) -> tuple[int, int]:
    """Decode the variable-length integer (1 to 9 bytes) at `offset`. Returns it and the offset after it.

    Raises IndexError at the end of the page.
    """
    value = 0
    for count in range(8):
        byte = page[offset + count]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, offset + count + 1
    return value << 8 | page[offset + 8], offset + 9


class _Pages(AbstractContextManager["_Pages"]):
    """The pages of a ledger file and of its write-ahead log, whose versions are newer."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        header = self._file.read(100)
        has_header = header.startswith(_MAGIC) and len(header) == 100
        stored_size = int.from_bytes(header[16:18]) if has_header else 0
        self.size = _PAGE_SIZES.get(stored_size, _DEFAULT_PAGE_SIZE)
        self.usable = self.size - (header[20] if has_header else 0)
        self._in_file = self._file.seek(0, os.SEEK_END) // self.size
        self._log = open(_write_ahead_log(path), "rb") if _write_ahead_log(path).is_file() else None  # noqa: SIM115
        self._frames: list[int] = []
        self._newest: dict[int, int] = {}
        if self._log is not None:
            self._index_frames(self._log)
        self.count = max(self._in_file, *self._newest, 0)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._log is not None:
            self._log.close()

    def get(self, number: int) -> bytes:
        """The newest version of a page, counted from 1. Raises ValueError if there is no page of this number."""
        if number in self._newest:
            return self._read(self._log, self._newest[number])
        if not 1 <= number <= self._in_file:
            raise ValueError(f"no page {number}")
        return self._read(self._file, (number - 1) * self.size)

    def each(self) -> Iterator[bytes]:
        """Every page in every version."""
        for number in range(1, self._in_file):
            yield self._read(self._file, number * self.size)
        for offset in self._frames:
            yield self._read(self._log, offset)

    def _read(self, file: BinaryIO | None, offset: int) -> bytes:
        assert file is not None
        file.seek(offset)
        return file.read(self.size)

    def _index_frames(self, log: BinaryIO) -> None:
        """Index the frames of the log. Frames with another salt than the first one remain from an older log."""
        log.seek(_LOG_HEADER)
        salt = b""
        while len(frame := log.read(_FRAME_HEADER + self.size)) == _FRAME_HEADER + self.size:
            self._frames.append(log.tell() - self.size)
            salt = salt or frame[8:16]
            if frame[8:16] == salt:
                self._newest[int.from_bytes(frame[:4])] = self._frames[-1]


def error_message(path: Path, error: Exception) -> str:
    """The line for an error of SQLite: the ledger, the problem, and what helps."""
    message = str(error)
    if any(reason in message for reason in _CANNOT_WRITE):
        remedy = "make room or give permission, then run the same command again"
        return f"ledger {path} cannot be written ({message}): {remedy}"
    if isinstance(error, sqlite3.Error) and message.startswith("Could not decode"):  # the rest is the text itself
        return damage_message(path, "a text in it is not UTF-8")
    if isinstance(error, sqlite3.DatabaseError) and ("malformed" in message or "not a database" in message):
        return damage_message(path, message)
    return f"ledger {path}: {message}"


def damage_message(path: Path, damage: str) -> str:
    """The line for a damaged ledger, with the number of replies that can be read in it."""
    count = count_readable(path)
    if not count:
        return (
            f"ledger {path} is damaged ({damage}) and no reply can be read in it; replace it with a copy, or move it "
            f"away to send every request again"
        )
    return (
        f"ledger {path} is damaged ({damage}): {count} paid replies can be read in it; `clair salvage "
        f"{shlex.quote(str(path))}` puts them into a fresh ledger and keeps the damaged file"
    )
