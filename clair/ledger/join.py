"""Join the ledgers of several shards in one."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from clair.ledger.ledger import Ledger

_COLUMNS = (
    "key, state, role, model, row, run, attempts, reply, error, seconds, prompt_tokens, completion_tokens, "
    "open_prompt, open_completion, digest, batch"
)


_ANSWERED = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS.split(", ") if not name.startswith("open"))
_OPEN = ", ".join(f"{name} = max(calls.{name}, excluded.{name})" for name in ("open_prompt", "open_completion"))


def join_ledgers(sources: Sequence[Path], target: Path, account: str) -> None:
    """Copy the calls of several ledgers into `target`, billed to one account, so that none is paid for again.

    An answered call takes precedence over an equal one without a reply, in a source or from an earlier join.
    """
    Ledger(target).close()
    with closing(sqlite3.connect(target, isolation_level=None)) as connection:
        for state, conflict in (
            ("= 'done'", f"UPDATE SET {_ANSWERED}, {_OPEN} WHERE calls.state != 'done'"),
            ("!= 'done'", "NOTHING"),
        ):
            for source in sources:
                connection.execute("ATTACH ? AS shard", (str(source),))
                connection.execute(
                    f"INSERT INTO main.calls ({_COLUMNS}, payer) SELECT {_COLUMNS}, ? FROM shard.calls "  # noqa: S608 (our columns)
                    f"WHERE state {state} ON CONFLICT DO {conflict}",
                    (account,),
                )
                connection.execute("DETACH shard")
