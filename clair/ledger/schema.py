"""The tables of a ledger, their migration from older formats, and the digest that proves a stored reply intact.

A row of `calls` is one request. Its `row` is the id of the prompt that the request is for; `payer` is the account that
is billed; `open_*` are the tokens that requests without a known end may have cost at most. `batch` names the batch that
the request is or was in, and so its price; it is NULL for a live request. The table `batched` holds the requests that
wait for a Batch API.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from pathlib import Path

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
SCHEMA = f"""
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
{_BATCHES}"""
VERSION = 3
BUSY_TIMEOUT = 60.0
"""Seconds to wait for the transaction of another process."""


def reply_digest(key: str, reply: str | None) -> str | None:
    """The digest that is stored with a reply: 16 hex digits of the hash of key and reply; None without a reply."""
    if reply is None:
        return None
    return hashlib.blake2b(f"{key}\0{reply}".encode(), digest_size=8).hexdigest()


def enable_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Set the journal mode to WAL. SQLite itself does not wait here while another process does the same."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def migrate(connection: sqlite3.Connection) -> None:
    """Create the tables, or bring those of an older format to `VERSION`.

    One transaction reads the version and changes the tables, because another process may migrate at the same time.
    """
    connection.create_function("reply_digest", 2, reply_digest, deterministic=True)
    connection.execute("BEGIN IMMEDIATE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    steps = {
        0: SCHEMA,
        1: "ALTER TABLE calls ADD COLUMN digest TEXT;"
        "UPDATE calls SET digest = reply_digest(key, reply) WHERE reply IS NOT NULL",
        2: f"ALTER TABLE calls ADD COLUMN batch TEXT; {_BATCHES}",
    }
    while version < VERSION:
        for statement in filter(str.strip, steps[version].split(";")):
            connection.execute(statement)
        version = version + 1 if version else VERSION
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def lost_content(path: Path) -> bool:
    """True if the ledger file is empty while its write-ahead log is not.

    SQLite would take such a file for a new database and discard the log.
    """
    log = path.with_name(f"{path.name}-wal")
    return path.is_file() and path.stat().st_size == 0 and log.is_file() and log.stat().st_size > 0
