"""What can be saved of a damaged ledger: its pages are read one by one, without SQLite and without its tree.

A ledger is a table whose rows lie in the pages of a B-tree (`WITHOUT ROWID`), long ones running on in chains of
overflow pages. Each page that can still be read, in the file or in the log beside it, gives its rows, whatever became
of the header, of the pages above it, or of the file's end. A reply is taken only with the hash that was written with
it: damage never becomes wrong text, and since a reply is never changed, an old page is as good as a new one.
Format: https://www.sqlite.org/fileformat2.html, sections 1.3 to 1.6, 2.1 and 4.1.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clair.core.errors import UserError
from clair.core.files import publish
from clair.ledger.ledger import SCHEMA, VERSION, digest_of, emptied, living_runs

_MAGIC = b"SQLite format 3\0"
_PAGE_SIZES = {1 if size == 65536 else size: size for size in (512 << shift for shift in range(8))}
_USUAL_PAGE_SIZE = 4096
_INNER, _LEAF = 2, 10  # pages of an index B-tree; its inner ones hold rows too
_LOG_HEADER, _FRAME_HEADER = 32, 24
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_COUNTS = ("attempts", "prompt_tokens", "completion_tokens", "open_prompt", "open_completion")
_UNREADABLE = (ValueError, IndexError, struct.error)


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What was saved: paid replies, other calls (their cost stays on the bill), and where the damaged file is kept."""

    replies: int
    others: int
    kept: Path


def readable(path: str | Path) -> int:
    """How many paid replies can be read in the ledger at `path`, in whatever state it is."""
    return len({hash(row["key"]) for row in _rows(Path(path)) if row["state"] == "done"})


def salvage(path: str | Path) -> Salvaged:
    """Put what can be read of a damaged ledger into a fresh one in its place; the damaged file is kept beside it.

    Calls that got no reply are saved too, because a budget counts what they may have cost. Raises UserError where
    there is nothing to save, nothing is damaged, or a run is using the ledger; nothing is changed then.
    """
    ledger = Path(path)
    if not ledger.is_file():
        raise UserError(f"ledger {ledger} does not exist; give the file that the error named")
    if living_runs(ledger):
        raise UserError(f"ledger {ledger} is in use by a run; wait for it, or stop it first")
    if _is_sound(ledger):
        raise UserError(f"ledger {ledger} is not damaged: every reply in it can be read; nothing was changed")
    fresh = ledger.with_name(f".{ledger.name}.{os.getpid()}.tmp")
    try:
        replies, others = _fill(fresh, ledger)
        if not replies + others:
            raise UserError(f"no call can be read in {ledger}; nothing was changed")
        return Salvaged(replies, others, _put_in_place(fresh, ledger))
    finally:
        fresh.unlink(missing_ok=True)


def _is_sound(ledger: Path) -> bool:
    """Whether SQLite finds nothing wrong and every reply is what was written."""
    if emptied(ledger):
        return False
    try:
        with closing(sqlite3.connect(f"{ledger.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.create_function("digest_of", 2, digest_of, deterministic=True)
            (checked,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            (wrong,) = connection.execute(
                "SELECT count(*) FROM calls WHERE reply IS NOT NULL AND digest IS NOT digest_of(key, reply)"
            ).fetchone()
    except (sqlite3.Error, UnicodeDecodeError):
        return False
    return checked == "ok" and not wrong


def _fill(fresh: Path, ledger: Path) -> tuple[int, int]:
    fresh.unlink(missing_ok=True)
    with closing(sqlite3.connect(fresh, isolation_level=None)) as connection:
        connection.executescript(SCHEMA)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("BEGIN")
        # What was kept before is read again: a salvage that was cut off may have moved the log there.
        sources = (ledger, *sorted(ledger.parent.glob(f"{ledger.name}.damaged-*[0-9]")))
        for row in (row for source in sources for row in _rows(source)):
            found = connection.execute("SELECT state, attempts FROM calls WHERE key = ?", (row["key"],)).fetchone()
            # An old page may hold a row as it was before; a reply comes last, and more tries come later.
            if found is None or (found[0] != "done" and (row["state"] == "done" or row["attempts"] > found[1])):
                places = ", ".join(f":{column}" for column in row)
                connection.execute(f"INSERT OR REPLACE INTO calls VALUES ({places})", row)  # noqa: S608 (our columns)
        connection.execute("COMMIT")
        counts = dict(connection.execute("SELECT state = 'done', count(*) FROM calls GROUP BY 1"))
    return counts.get(1, 0), counts.get(0, 0)


def _put_in_place(fresh: Path, ledger: Path) -> Path:
    """The fresh ledger under the old one's name; cut off in between, the old one is there and can be salvaged again."""
    number = 1
    while (kept := ledger.with_name(f"{ledger.name}.damaged-{number}")).exists():
        number += 1
    try:
        os.link(ledger, kept)
    except OSError:  # a file system without hard links
        shutil.copyfile(ledger, kept)
    with suppress(FileNotFoundError):  # a log beside a file that it does not belong to would be written into it
        os.rename(_log_of(ledger), _log_of(kept))
    ledger.with_name(f"{ledger.name}-shm").unlink(missing_ok=True)
    publish(fresh, ledger)
    return kept


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


# ---- rows out of pages


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row of the table `calls` that can be read with certainty, by column; an old version of one may come too."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        columns = [row[1] for row in connection.execute("PRAGMA table_info(calls)")]
    with _Pages(path) as pages:
        for page in pages.each():
            for payload in _payloads(pages, page):
                with suppress(*_UNREADABLE):
                    values = _record(payload)
                    missing = [None] * (len(columns) - len(values))  # columns that are younger than the row
                    row = dict(zip(columns, values + missing, strict=True))
                    if _is_call(row):
                        yield row


def _is_call(row: dict[str, Any]) -> bool:
    texts = all(isinstance(row[name], str) for name in ("key", "state", "role", "model", "row", "run", "payer"))
    numbers = all(isinstance(row[name], int) for name in _COUNTS)
    known = row["state"] in ("asked", "failed") or (row["state"] == "done" and row["reply"] is not None)
    return texts and numbers and known and row["digest"] == digest_of(row["key"], row["reply"])


def _payloads(pages: _Pages, page: bytes) -> Iterator[bytes]:
    """The payload of each cell of a page, its overflow pages included; nothing of a page of another kind."""
    if len(page) < pages.size or page[0] not in (_INNER, _LEAF):
        return
    head = 12 if page[0] == _INNER else 8
    for place in range(min(int.from_bytes(page[3:5]), (pages.size - head) // 2)):
        with suppress(*_UNREADABLE):
            (start,) = struct.unpack_from(">H", page, head + 2 * place)
            size, start = _varint(page, start + (4 if page[0] == _INNER else 0))
            yield _whole(pages, page, start, size)


def _whole(pages: _Pages, page: bytes, start: int, size: int) -> bytes:
    """A payload of `size` bytes that begins at `start` of a page and may run on elsewhere. Raises ValueError."""
    most = (pages.usable - 12) * 64 // 255 - 23
    here = size
    if size > most:
        least = (pages.usable - 12) * 32 // 255 - 23
        rest = least + (size - least) % (pages.usable - 4)
        here = rest if rest <= most else least
    if size > pages.usable * pages.count or start + here > pages.usable:
        raise ValueError("longer than the file, or than the page")
    pieces, left = [page[start : start + here]], size - here
    following = int.from_bytes(page[start + here : start + here + 4]) if left else 0
    while left:
        page = pages.get(following)
        pieces.append(page[4 : min(pages.usable, 4 + left)])
        if len(pieces[-1]) == 0:
            raise ValueError("the chain ends too early")
        left -= len(pieces[-1])
        following = int.from_bytes(page[:4])
    return b"".join(pieces)


def _record(payload: bytes) -> list[Any]:
    """The values of a record. Raises ValueError where it is none."""
    head, at = _varint(payload, 0)
    kinds = []
    while at < head:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    values: list[Any] = []
    for kind in kinds:
        size = _INTEGERS.get(kind, 8 if kind == 7 else (kind - 12) // 2 if kind >= 12 else 0)
        content = payload[at : at + size]
        at += size
        values.append(_value(kind, content))
    if at != len(payload):
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


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """The number of up to 9 bytes at a place, and the place behind it. Raises IndexError at the end of the page."""
    value = 0
    for count in range(9):
        byte = page[at + count]
        if count == 8:
            return value << 8 | byte, at + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + count + 1
    raise AssertionError


class _Pages:
    """The pages of a ledger: those of the file, and those in the log, which are newer."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        header = self._file.read(100)
        whole = header.startswith(_MAGIC) and len(header) == 100
        self.size = _PAGE_SIZES.get(int.from_bytes(header[16:18]), _USUAL_PAGE_SIZE) if whole else _USUAL_PAGE_SIZE
        self.usable = self.size - (header[20] if whole else 0)
        self._in_file = self._file.seek(0, os.SEEK_END) // self.size
        self._log = open(_log_of(path), "rb") if _log_of(path).is_file() else None  # noqa: SIM115
        self._frames: list[int] = []
        self._newest: dict[int, int] = {}
        if self._log is not None:
            self._find_frames(self._log)
        self.count = max(self._in_file, *self._newest, 0)

    def __enter__(self) -> _Pages:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._log is not None:
            self._log.close()

    def get(self, number: int) -> bytes:
        """The newest version of a page, from 1. Raises ValueError for a number that no page has."""
        if number in self._newest:
            return self._read(self._log, self._newest[number])
        if not 1 <= number <= self._in_file:
            raise ValueError(f"no page {number}")
        return self._read(self._file, (number - 1) * self.size)

    def each(self) -> Iterator[bytes]:
        """Every page in every version that there is."""
        for number in range(1, self._in_file):
            yield self._read(self._file, number * self.size)
        for place in self._frames:
            yield self._read(self._log, place)

    def _read(self, file: BinaryIO | None, place: int) -> bytes:
        assert file is not None
        file.seek(place)
        return file.read(self.size)

    def _find_frames(self, log: BinaryIO) -> None:
        """Where each frame's page is; what stands behind the newest frames is left of an older log, by its salt."""
        log.seek(_LOG_HEADER)
        salt = b""
        while len(frame := log.read(_FRAME_HEADER + self.size)) == _FRAME_HEADER + self.size:
            self._frames.append(log.tell() - self.size)
            salt = salt or frame[8:16]
            if frame[8:16] == salt:
                self._newest[int.from_bytes(frame[:4])] = self._frames[-1]
