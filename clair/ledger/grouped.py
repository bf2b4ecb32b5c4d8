"""The claims and the settlements of one transaction, many in one statement.

Each statement gives Python's lock to the event loop, and waits up to 5 ms until a busy loop gives it back. With one
statement for each of a hundred writes, the loop of a build would wait for the writing thread a quarter of its time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from clair.ledger.schema import reply_digest

_ROWS = 64
"""The maximum number of rows of one statement."""
_SETTLE = (
    "UPDATE calls SET state = 'done', reply = new.column2, seconds = new.column3, error = NULL, "
    "prompt_tokens = new.column4, completion_tokens = new.column5, open_prompt = open_prompt - new.column6, "
    "open_completion = open_completion - new.column7, digest = new.column8 "
    "FROM (VALUES {}) AS new WHERE key = new.column1"
)
_EXISTING = "SELECT key FROM calls WHERE key IN (VALUES {})"
_INSERT = (
    "INSERT INTO calls (key, role, model, row, run, payer, open_prompt, open_completion, batch, state) "
    "SELECT *, 'asked' FROM (VALUES {})"
)


class Settlement(NamedTuple):
    """A reply to a claimed request, its usage, which replaces the maximum on the bill, and the seconds it took."""

    key: str
    raw: str
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    max_prompt: int
    max_completion: int


def settle_all(connection: sqlite3.Connection, settlements: Sequence[Settlement]) -> list[None]:
    """Write replies to claimed requests, each to another one."""
    rows = [(*settlement, reply_digest(settlement.key, settlement.raw)) for settlement in settlements]
    for placeholders, values in _groups(rows):
        connection.execute(_SETTLE.format(placeholders), values)
    return [None] * len(settlements)


def insert_new(connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> set[str]:
    """Insert claims whose keys are new: (key, role, model, row, run, payer, two open counts, batch).

    Each row has another key. Returns the keys that exist; their rows are not inserted.
    """
    existing: set[str] = set()
    for placeholders, keys in _groups([row[:1] for row in rows]):
        existing.update(key for (key,) in connection.execute(_EXISTING.format(placeholders), keys))
    for placeholders, values in _groups([row for row in rows if row[0] not in existing]):
        connection.execute(_INSERT.format(placeholders), values)
    return existing


def _groups(rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[str, list[Any]]]:
    """The placeholders and the values of up to `_ROWS` rows at a time."""
    for start in range(0, len(rows), _ROWS):
        chunk = rows[start : start + _ROWS]
        placeholders = f"({', '.join('?' * len(chunk[0]))})"
        yield ", ".join([placeholders] * len(chunk)), list(chain.from_iterable(chunk))
