"""The ledger: each reply is paid once, written before its use, and read again after any crash."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from clair.ledger.ledger import Claim, ClaimResult, Ledger, LedgerError, StoredReply, Tokens, call_key
from tests.clair.building import call_counts

ROOT = Path(__file__).parents[3]
REQUEST = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5, "extra": {"a": [1]}}
CLAIM = Claim("reviser", "m", "row", "/out", Tokens(10, 100))
FREE = Tokens(0, 0)


def do(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def pay(ledger: Ledger, key: str, raw: str = "reply") -> None:
    assert await ledger.claim(key, CLAIM) is ClaimResult.GRANTED
    await ledger.settle(key, raw, Tokens(7, 70), CLAIM.max_tokens, 0.1)


# ---- keys


@pytest.mark.parametrize(
    ("identity", "request_", "sample"),
    [
        ("n", REQUEST, 0),
        ("m", REQUEST | {"temperature": 0.6}, 0),
        ("m", REQUEST | {"messages": [{"role": "user", "content": "Hi "}]}, 0),
        ("m", REQUEST | {"messages": [{"role": "system", "content": "Hi"}]}, 0),
        ("m", REQUEST | {"messages": REQUEST["messages"] * 2}, 0),
        ("m", REQUEST | {"extra": {"a": [1, 2]}}, 0),
        ("m", REQUEST | {"max_tokens": 5}, 0),
        ("m", {k: v for k, v in REQUEST.items() if k != "extra"}, 0),
        ("m", REQUEST, 1),
    ],
)
def test_anything_different_in_a_request_is_another_key(identity, request_, sample):
    assert call_key(identity, request_, sample) != call_key("m", REQUEST)


def test_the_order_of_options_is_no_difference():
    assert call_key("m", dict(reversed(REQUEST.items()))) == call_key("m", REQUEST)


# ---- one run


def test_an_old_sqlite_is_refused_before_a_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(LedgerError, match=r"^a ledger needs SQLite 3\.35; this Python has \d"):
        Ledger(tmp_path / "l.sqlite")
    assert not list(tmp_path.iterdir())


def test_a_reply_is_found_again(tmp_path):
    raw = '{"text": "é \\ud83d \\u0000"}\x00end'
    with Ledger(tmp_path / "l.sqlite") as ledger:
        do(pay(ledger, "k", raw))
        assert ledger.find("k") == StoredReply(raw)
        assert ledger.find("other") is None
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert ledger.find("k") == StoredReply(raw)
        assert do(ledger.claim("k", CLAIM)) == StoredReply(raw)
        assert call_counts(ledger) == {"done": 1}


def test_an_unanswered_request_of_this_run_may_be_requested_again(tmp_path):
    async def twice(ledger):
        assert await ledger.claim("k", CLAIM) is ClaimResult.GRANTED
        assert await ledger.claim("k", CLAIM) is ClaimResult.GRANTED

    with Ledger(tmp_path / "l.sqlite") as ledger:
        do(twice(ledger))
        assert ledger.find("k") is None
        assert call_counts(ledger) == {"asked": 1}


def test_a_failed_request_keeps_its_error_and_may_be_requested_again(tmp_path):
    async def fail(ledger):
        await ledger.claim("k", CLAIM)
        await ledger.fail("k", "http_400: too long" + "x" * 5000, CLAIM.max_tokens, "<html>")
        return await ledger.claim("k", CLAIM)

    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert do(fail(ledger)) is ClaimResult.GRANTED
        error, reply, attempts = row_of(ledger.path, "k", "error, reply, attempts")
        assert error.startswith("http_400: too long")
        assert len(error) <= 2000
        assert (reply, attempts) == ("<html>", 2)


def row_of(path: Path, key: str, columns: str) -> tuple:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(f"SELECT {columns} FROM calls WHERE key = ?", (key,)).fetchone()
    finally:
        connection.close()


def test_the_bill_counts_what_was_answered_and_the_worst_of_what_was_not(tmp_path):
    async def bill(ledger):
        await pay(ledger, "answered")
        await ledger.claim("in flight", CLAIM)
        await ledger.claim("refused", CLAIM)
        await ledger.fail("refused", "429", CLAIM.max_tokens)
        await ledger.claim("timeout, then answered", CLAIM)
        await ledger.reopen("timeout, then answered", CLAIM.max_tokens)
        await ledger.settle("timeout, then answered", "reply", Tokens(7, 70), CLAIM.max_tokens, 1.0)
        return ledger.spent("/out")

    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert do(bill(ledger)) == {"reviser": Tokens(7 + 10 + 0 + 7 + 10, 70 + 100 + 0 + 70 + 100)}
        assert ledger.spent("/another") == {}
        keys = ["answered", "in flight", "refused", "timeout, then answered"]
        assert (ledger.paid(keys), sorted(ledger.seconds(keys))) == (Tokens(14, 140), [0.1, 1.0])
        assert (ledger.paid(keys[:1]), ledger.seconds(keys[:1])) == (Tokens(7, 70), [0.1])
        assert (ledger.paid(["never sent"]), ledger.seconds([])) == (Tokens(0, 0), [])


def test_writes_that_gather_are_committed_together(tmp_path, monkeypatch):
    commits = []
    really = Ledger._commit

    def slowly(self, connection, batch):
        commits.append(len(batch))
        time.sleep(0.05)
        return really(self, connection, batch)

    async def write_all(ledger):
        await asyncio.gather(*(pay(ledger, f"k{n}") for n in range(200)))

    monkeypatch.setattr(Ledger, "_commit", slowly)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        do(write_all(ledger))
        assert call_counts(ledger) == {"done": 200}
    assert sum(commits) == 400
    assert len(commits) <= 10


@asynccontextmanager
async def busy_thread(ledger: Ledger) -> AsyncIterator[None]:
    """Keep the writing thread busy inside the block, so that what is written there gathers in one transaction."""
    began, gate = threading.Event(), threading.Event()
    first = asyncio.ensure_future(ledger.write(lambda _: (began.set(), gate.wait(10))))
    await asyncio.to_thread(began.wait, 10)
    yield
    gate.set()
    await first


def test_the_rows_of_one_transaction_continue_in_one_turn_of_the_event_loop(tmp_path, monkeypatch):
    async def write_together(ledger: Ledger) -> tuple[list[int], int]:
        loop = asyncio.get_running_loop()
        async with busy_thread(ledger):
            others = [asyncio.ensure_future(ledger.write(lambda _, value=value: value)) for value in range(50)]
            await asyncio.sleep(0)
            turns, turn = [], loop.call_soon_threadsafe
            monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: (turns.append(call), turn(*call)))
        return await asyncio.gather(*others), len(turns)

    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert do(write_together(ledger)) == (list(range(50)), 2)


async def in_one_transaction(ledger: Ledger, *writes: Coroutine[Any, Any, Any]) -> list[Any]:
    """The results of writes that gather while the writing thread is busy."""
    async with busy_thread(ledger):
        tasks = [asyncio.ensure_future(write) for write in writes]
        await asyncio.sleep(0)
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_calls_written_together_are_those_written_one_by_one(tmp_path):
    claims = {f"k{n}": Claim(f"role {n}", f"m{n}", f"row {n}", f"/out{n}", Tokens(n, 2 * n)) for n in range(150)}

    def settle(ledger: Ledger, key: str) -> Coroutine[Any, Any, None]:
        n = int(key[1:])
        return ledger.settle(key, f"reply {n} é\x00end", Tokens(n // 2, n), claims[key].max_tokens, n / 8)

    async def together(ledger):
        for keys in ([*claims][:70], [*claims][50:]):  # some are answered, claimed in vain, and settled again
            await in_one_transaction(ledger, *(ledger.claim(key, claims[key]) for key in keys))
            await in_one_transaction(ledger, *(settle(ledger, key) for key in [*claims][:100] if key in keys))

    async def one_by_one(ledger):
        for keys in ([*claims][:70], [*claims][50:]):
            for key in keys:
                await ledger.claim(key, claims[key])
            for key in [*claims][:100]:
                if key in keys:
                    await settle(ledger, key)

    calls = []
    for name, write in (("together", together), ("one by one", one_by_one)):
        with Ledger(tmp_path / f"{name}.sqlite") as ledger:
            ledger.run = "run"
            do(write(ledger))
            calls.append(ledger.read("SELECT * FROM calls ORDER BY key"))
            assert call_counts(ledger) == {"done": 100, "asked": 50}
    assert calls[0] == calls[1]


def test_a_request_claimed_twice_in_one_transaction_has_one_row_with_the_cost_of_both(tmp_path):
    async def claim(ledger):
        return await in_one_transaction(ledger, *(ledger.claim(key, CLAIM) for key in ("k", "another", "k")))

    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert do(claim(ledger)) == [ClaimResult.GRANTED] * 3
        query = "SELECT key, attempts, open_prompt, open_completion FROM calls ORDER BY key"
        assert ledger.read(query) == [("another", 1, 10, 100), ("k", 2, 20, 200)]


def test_a_claim_beside_the_reply_of_a_cancelled_caller_gets_the_reply(tmp_path):
    async def claim(ledger):
        await ledger.claim("k", CLAIM)
        settling = ledger.settle("k", "reply", FREE, CLAIM.max_tokens, 1.0)
        first_claim = ledger.claim("another", CLAIM)  # so that the claims are the first kind in the queue
        return await in_one_transaction(ledger, first_claim, settling, ledger.claim("k", CLAIM))

    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert do(claim(ledger)) == [ClaimResult.GRANTED, None, StoredReply("reply")]


def test_a_cancelled_row_does_not_cancel_the_writing_of_what_it_paid_for(tmp_path):
    async def cancel(ledger):
        await ledger.claim("k", CLAIM)
        writing = asyncio.ensure_future(ledger.settle("k", "reply", FREE, CLAIM.max_tokens, 1.0))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

    with Ledger(tmp_path / "l.sqlite") as ledger:
        do(cancel(ledger))
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert ledger.find("k") == StoredReply("reply")


def test_closing_writes_what_is_queued(tmp_path):
    async def queue(ledger):
        await ledger.claim("k", CLAIM)
        writing = asyncio.ensure_future(ledger.settle("k", "reply", FREE, CLAIM.max_tokens, 1.0))
        await asyncio.sleep(0)
        writing.cancel()

    ledger = Ledger(tmp_path / "l.sqlite")
    do(queue(ledger))
    ledger.close()
    assert [f.name for f in tmp_path.iterdir()] == ["l.sqlite"]  # no lock, no log left
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert ledger.find("k") == StoredReply("reply")


# ---- several runs

HOLDER = """
import asyncio, sys, time
from clair.ledger.ledger import Claim, Ledger, Tokens
ledger = Ledger(sys.argv[1])
async def take():
    for key in sys.argv[2:]:
        print((await ledger.claim(key, Claim("reviser", "m", "row", "/theirs", Tokens(10, 100)))).name)
asyncio.run(take())
print("ready", flush=True)
time.sleep(60)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT, bufsize=1
    )


@pytest.fixture
def holder(tmp_path):
    """Another living process that has claimed `k` and is asking."""
    process = start(HOLDER, str(tmp_path / "l.sqlite"), "k")
    assert process.stdout.readline() == "GRANTED\n"
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait(10)
    process.stdout.close()


def test_a_second_living_run_waits_and_a_dead_runs_row_is_taken_over(tmp_path, holder):
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert do(ledger.claim("k", CLAIM)) is ClaimResult.IN_OTHER_RUN
        assert do(ledger.claim("mine", CLAIM)) is ClaimResult.GRANTED
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(10)
        assert do(ledger.claim("k", CLAIM)) is ClaimResult.GRANTED
        assert row_of(ledger.path, "k", "attempts, payer") == (2, "/out")
        assert list(tmp_path.glob("*.run-*")) == [ledger._lock_path]  # the dead run's lock is gone


def test_a_new_run_tidies_up_after_dead_ones_and_leaves_living_ones_alone(tmp_path, holder):
    (tmp_path / "l.sqlite.run-dead").touch()
    with Ledger(tmp_path / "l.sqlite") as ledger:
        left = {path.name for path in tmp_path.glob("*.run-*")}
        assert "l.sqlite.run-dead" not in left
        assert len(left) == 2  # the holder's and ours
        assert do(ledger.claim("k", CLAIM)) is ClaimResult.IN_OTHER_RUN


def test_a_lock_that_was_taken_for_a_dead_runs_is_taken_again(tmp_path, monkeypatch):
    really, stolen = fcntl.flock, []

    def steal(handle, how):
        if how == fcntl.LOCK_EX and not stolen:  # between the making of the file and its locking
            (path,) = tmp_path.glob("*.run-*")
            path.unlink()
            stolen.append(path)
        really(handle, how)

    monkeypatch.setattr(fcntl, "flock", steal)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert stolen
        assert ledger._lock_path.exists()


def test_a_run_that_is_stopped_but_alive_keeps_its_rows(tmp_path, holder):
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        with Ledger(tmp_path / "l.sqlite") as ledger:
            assert do(ledger.claim("k", CLAIM)) is ClaimResult.IN_OTHER_RUN
    finally:
        os.kill(holder.pid, signal.SIGCONT)


TOGETHER = """
import multiprocessing, sys
from clair.ledger.ledger import Ledger
context = multiprocessing.get_context("fork")
def begin(together, names):
    for name in names:
        together.wait(10)
        Ledger(name).close()
together = context.Barrier(4)
runs = [context.Process(target=begin, args=(together, sys.argv[1:])) for _ in range(4)]
for run in runs:
    run.start()
for run in runs:
    run.join()
sys.exit(sum(run.exitcode for run in runs))
"""


def test_runs_that_begin_a_ledger_at_the_same_moment_all_get_it(tmp_path):
    process = start(TOGETHER, *(str(tmp_path / f"{n}.sqlite") for n in range(100)))
    assert process.wait(60) == 0
    process.stdout.close()


def test_the_open_cost_of_a_dead_run_stays_on_the_bill(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(10)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        do(pay_after_taking_over(ledger))
        assert ledger.spent("/out")["reviser"].prompt == 7 + 10  # this call, and the one of unknown outcome


async def pay_after_taking_over(ledger: Ledger) -> None:
    await pay(ledger, "k")


# ---- kill -9

WRITER = """
import asyncio, sys
from clair.ledger.ledger import Claim, Ledger, Tokens
most = Tokens(10, 100)
async def one(ledger, n):
    key = f"k{n}"
    await ledger.claim(key, Claim("reviser", "m", key, "/out", most))
    await ledger.settle(key, key + "x" * 3000, Tokens(1, 1), most, 0.1)
    print(key, flush=True)
async def main():
    with Ledger(sys.argv[1]) as ledger:
        for first in range(0, 100_000, 8):
            await asyncio.gather(*(one(ledger, n) for n in range(first, first + 8)))
asyncio.run(main())
"""


@pytest.mark.parametrize("seed", range(3))
def test_rows_reported_as_written_survive_kill_9(tmp_path, seed):
    process = start(WRITER, str(tmp_path / "l.sqlite"))
    written = [process.stdout.readline().strip() for _ in range(8)]
    time.sleep(0.5 * Random(seed).random())
    os.kill(process.pid, signal.SIGKILL)
    written += [line.strip() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    process.wait(10)
    process.stdout.close()
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert all(ledger.find(key) == StoredReply(key + "x" * 3000) for key in written)
        assert call_counts(ledger)["done"] <= len(written) + 8
    assert integrity(tmp_path / "l.sqlite") == "ok"


def integrity(path: Path) -> str:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]
    finally:
        connection.close()


# ---- damage


def filled(path: Path, rows: int = 400) -> None:
    async def fill(ledger):
        await asyncio.gather(*(pay(ledger, f"k{n}", "x" * 500) for n in range(rows)))

    with Ledger(path) as ledger:
        do(fill(ledger))


def one_line(error: BaseException) -> str:
    assert isinstance(error, LedgerError)
    message = str(error)
    assert "\n" not in message
    return message


def test_a_file_that_is_no_ledger_is_one_line_and_stays_as_it_was(tmp_path):
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"not a database, but 4 kB of something else entirely" * 100)
    original = path.read_bytes()
    with pytest.raises(LedgerError) as error:
        Ledger(path)
    assert "is damaged" in one_line(error.value)
    assert "no reply can be read in it; replace it with a copy" in one_line(error.value)
    assert path.read_bytes() == original


@pytest.mark.parametrize("damage", ["schema", "page"])
def test_a_damaged_ledger_is_one_line_that_names_the_command_to_recover_it(tmp_path, damage):
    path = tmp_path / "l.sqlite"
    filled(path)
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        for offset in [100] if damage == "schema" else range(4096, size, 4096):
            file.seek(offset)
            file.write(b"\xff" * 600)
    original = path.read_bytes()

    async def ask(ledger):
        ledger.find("k17")
        await ledger.claim("k17", CLAIM)

    with pytest.raises(LedgerError) as error, Ledger(path) as ledger:
        do(ask(ledger))
    assert "is damaged" in one_line(error.value)
    assert path.read_bytes() == original


def test_a_ledger_of_a_later_format_is_refused(tmp_path):
    path = tmp_path / "l.sqlite"
    filled(path, 1)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(LedgerError, match="has format 99"):
        Ledger(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_ledger_that_may_not_be_written_is_one_line(tmp_path):
    path = tmp_path / "l.sqlite"
    filled(path, 1)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(LedgerError) as error:
            Ledger(path)
        assert "cannot be written" in one_line(error.value)
    finally:
        tmp_path.chmod(0o755)


def test_a_ledger_whose_folder_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LedgerError) as error:
        Ledger(tmp_path / "file" / "l.sqlite")
    assert str(tmp_path / "file") in one_line(error.value)


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def pay_until_failure(ledger: Ledger, paid: list[str]) -> None:
    for n in range(10_000):
        await pay(ledger, f"k{n}", "x" * 5000)
        paid.append(f"k{n}")


def test_a_full_disk_is_one_line_loses_nothing_and_resumes_when_there_is_room(small_disk):
    paid: list[str] = []
    with pytest.raises(LedgerError) as error, Ledger(small_disk / "l.sqlite") as ledger:
        do(pay_until_failure(ledger, paid))
    assert "make room" in one_line(error.value)
    assert len(paid) > 20
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    with Ledger(small_disk / "l.sqlite") as ledger:
        assert all(ledger.find(key) for key in paid)
        do(pay(ledger, "new"))
        assert ledger.find("new")
    assert integrity(small_disk / "l.sqlite") == "ok"


LIMITED = """
import asyncio, resource, signal, sys
from clair.ledger.ledger import Claim, Ledger, LedgerError, Tokens
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
most = Tokens(10, 100)
async def main():
    with Ledger(sys.argv[1]) as ledger:
        for n in range(10_000):
            await ledger.claim(f"k{n}", Claim("reviser", "m", "row", "/out", most))
            await ledger.settle(f"k{n}", "x" * 5000, Tokens(1, 1), most, 0.1)
            print(f"k{n}")
try:
    asyncio.run(main())
except LedgerError as error:
    print("told:", error)
"""


def test_a_file_that_may_not_grow_is_one_line_and_loses_nothing(tmp_path):
    path = tmp_path / "l.sqlite"
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    *paid, last = run.stdout.splitlines()
    assert last.startswith("told: ledger ")
    assert "make room" in last
    assert run.stderr == ""
    assert len(paid) > 5
    with Ledger(path) as ledger:
        assert all(ledger.find(key) for key in paid)


def test_an_error_while_writing_reaches_every_waiting_row(tmp_path, monkeypatch):
    async def many(ledger):
        await asyncio.gather(*(ledger.claim(f"k{n}", CLAIM) for n in range(20)))
        really = Ledger._commit

        def broken(self, connection, batch):
            batch[0].work = lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("database or disk is full"))
            return really(self, connection, batch)

        monkeypatch.setattr(Ledger, "_commit", broken)
        writes = (ledger.settle(f"k{n}", "reply", FREE, CLAIM.max_tokens, 1.0) for n in range(20))
        return await asyncio.gather(*writes, return_exceptions=True)

    with Ledger(tmp_path / "l.sqlite") as ledger:
        results = do(many(ledger))
        assert all(isinstance(result, LedgerError) for result in results)
        assert "make room" in one_line(results[0])
    monkeypatch.undo()
    with Ledger(tmp_path / "l.sqlite") as ledger:
        assert call_counts(ledger) == {"asked": 20}
        assert json.dumps(call_counts(ledger))


def test_a_write_that_fails_after_its_caller_was_cancelled_prints_nothing(tmp_path):
    cancelled, printed = threading.Event(), []

    def fail(_: sqlite3.Connection) -> None:
        cancelled.wait(10)
        raise sqlite3.OperationalError("disk I/O error")

    async def cancel_and_fail(ledger: Ledger) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: printed.append(context))
        caller = asyncio.ensure_future(ledger.write(fail))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait({caller})
        cancelled.set()
        # In the same transaction, in the next one, which succeeds, or refused: in any case `fail` has ended.
        await asyncio.gather(ledger.write(lambda connection: None), return_exceptions=True)
        with pytest.raises(LedgerError):
            await ledger.write(lambda connection: None)

    def run() -> None:
        with Ledger(tmp_path / "l.sqlite") as ledger:
            do(cancel_and_fail(ledger))

    run()
    gc.collect()  # asyncio prints an error that nobody has seen when its future is deleted
    assert printed == []
