"""A damaged ledger is reported and never used; readable replies are recovered byte for byte."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
from pathlib import Path
from random import Random

import pytest

from clair.core.errors import UserError
from clair.ledger.ledger import Claim, ClaimResult, Ledger, LedgerError, StoredReply, Tokens, call_key
from clair.ledger.recovery import count_readable, salvage
from tests.clair.building import call_counts, clair, error_line, final_bytes, scripted_rows, write_prompts, write_recipe

PAGE = 4096
CLAIM = Claim("reviser", "m", "row", "/out", Tokens(10, 100))


def reply_to(n: int) -> str:
    """Short ones that share a page, and ones that run through chains of up to thirty."""
    random = Random(n)
    content = "".join(random.choice("abc déf🙂\n") for _ in range(random.choice([30, 300, 3000, 30_000])))
    return json.dumps({"choices": [{"message": {"content": f"{n} {content}"}}]}, ensure_ascii=False)


def key_of(n: int) -> str:
    return call_key("m", {"n": n})


async def _fill(ledger: Ledger, count: int) -> None:
    async def fill_one(n: int) -> None:
        key = key_of(n)
        assert await ledger.claim(key, CLAIM) is ClaimResult.GRANTED
        if n % 10 == 8:
            await ledger.fail(key, "malformed_reply", Tokens(0, 0), "<html>" * n)
        elif n % 10 != 9:  # those stay claimed
            await ledger.settle(key, reply_to(n), Tokens(7, 70), CLAIM.max_tokens, 0.1)

    for start in range(0, count, 20):
        await asyncio.gather(*(fill_one(n) for n in range(start, min(count, start + 20))))


def filled(path: Path, count: int = 200) -> dict[str, str]:
    """A ledger, and the replies that were paid for by key."""
    with Ledger(path) as ledger:
        asyncio.run(_fill(ledger, count))
    return {key_of(n): reply_to(n) for n in range(count) if n % 10 < 8}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    path = tmp_path_factory.mktemp("ledger") / "l.sqlite"
    return path, filled(path)


@pytest.fixture
def damaged(tmp_path, original):
    """A copy of a ledger to be damaged, and what it held."""
    path, paid = original
    return Path(shutil.copy(path, tmp_path / "l.sqlite")), paid


def saved(path: Path, paid: dict[str, str]) -> int:
    """Count the replies in a ledger. Asserts that there are no others, and that none has changed."""
    with Ledger(path) as ledger:
        by_key = {key: ledger.find(key) for key in paid}
        assert all(stored is None or stored == StoredReply(paid[key]) for key, stored in by_key.items())
        count = sum(stored is not None for stored in by_key.values())
        assert call_counts(ledger).get("done", 0) == count
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    return count


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


# ---- what is saved


def test_all_of_a_sound_ledger_can_be_read(original):
    path, paid = original
    assert count_readable(path) == len(paid) == 160


@pytest.mark.parametrize("size", [16, 100, PAGE, 3 * PAGE])
def test_with_a_zeroed_header_or_root_nothing_is_lost(damaged, size):
    """The third page is the root of the index, which is no reply's home."""
    path, paid = damaged
    lost = rows_in(path, range(2, size // PAGE + 1))
    overwrite(path, 0, bytes(size))
    with pytest.raises(LedgerError, match=rf"is damaged .*: {len(paid) - lost} paid replies can be read in it"):
        Ledger(path)
    result = salvage(path)
    assert (result.replies, result.others) == (len(paid) - lost, 40 - others_in(path, lost))
    assert saved(path, paid) == len(paid) - lost


def rows_in(path: Path, pages: range) -> int:
    """Count the paid replies that begin in some pages of an undamaged ledger: those lost without these pages."""
    copy = path.with_name("copy.sqlite")
    shutil.copy(path, copy)
    for page in pages:
        overwrite(copy, (page - 1) * PAGE, bytes(PAGE))
    lost = count_readable(path) - count_readable(copy)
    copy.unlink()
    return lost


def others_in(path: Path, lost: int) -> int:
    return 0 if not lost else 40 - salvage_counts(path)


def salvage_counts(path: Path) -> int:
    with Ledger(path) as ledger:
        return sum(count for state, count in call_counts(ledger).items() if state != "done")


@pytest.mark.parametrize("seed", range(6))
def test_of_a_truncated_ledger_all_that_lies_before_the_end_is_saved(damaged, seed):
    path, paid = damaged
    share = Random(seed).uniform(0.05, 0.95)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(LedgerError) as error:
        Ledger(path)
    readable = int(re.search(r"(\d+) paid replies can be read", str(error.value))[1])
    assert salvage(path).replies == readable == saved(path, paid)
    assert readable >= 0.5 * share * len(paid) - 12  # a long reply needs all the pages of its chain


@pytest.mark.parametrize("damage", ["ones", "zeros", "noise", "another page", "half of another page"])
@pytest.mark.parametrize("seed", range(3))
def test_overwritten_pages_cost_their_own_replies_and_never_give_another_text(damaged, damage, seed):
    path, paid = damaged
    random, pages = Random(seed), path.stat().st_size // PAGE
    hit = random.sample(range(2, pages + 1), 12)
    content = path.read_bytes()
    for page in hit:
        offset = random.randrange(PAGE, len(content) - PAGE, PAGE)
        size = PAGE // 2 if damage.startswith("half") else PAGE
        new = {"ones": b"\xff" * size, "zeros": bytes(size), "noise": random.randbytes(size)}.get(damage)
        overwrite(path, (page - 1) * PAGE + PAGE - size, new or content[offset : offset + size])
    count = count_readable(path)
    assert count >= len(paid) - 12 * 40  # a page holds few replies, and a chain belongs to one
    assert salvage(path).replies == count == saved(path, paid)


def test_replies_only_in_the_log_are_recovered_too(tmp_path):
    """A run that was killed leaves its newest replies in the log beside the ledger."""
    path = tmp_path / "l.sqlite"
    paid = filled(tmp_path / "living.sqlite", 40)
    living = Ledger(tmp_path / "living.sqlite")
    new = "new reply " * 5000  # through a chain that is in the log too
    try:
        asyncio.run(_settle(living, "new", new))
        for suffix in ("", "-wal"):
            shutil.copy(f"{living.path}{suffix}", f"{path}{suffix}")
    finally:
        living.close()
    overwrite(path, 0, bytes(100))
    overwrite(path.with_name("l.sqlite-wal"), 0, bytes(32))  # else SQLite would find the header in the log
    assert count_readable(path) == len(paid) + 1
    damaged = salvage(path).backup
    assert saved(path, {**paid, "new": new}) == len(paid) + 1
    assert damaged.with_name(f"{damaged.name}-wal").is_file()
    assert not path.with_name("l.sqlite-wal").exists()


async def _settle(ledger: Ledger, key: str, reply: str) -> None:
    await ledger.claim(key, CLAIM)
    await ledger.settle(key, reply, Tokens(1, 1), CLAIM.max_tokens, 0.1)


@pytest.mark.parametrize("offset", [0, 8, 40, 0.5])
def test_a_damaged_log_costs_the_replies_that_lay_there(tmp_path, offset):
    """SQLite drops all that follows a broken frame, and so would never read it."""
    living = Ledger(tmp_path / "living.sqlite")
    try:
        for n in range(30):
            asyncio.run(_settle(living, f"k{n}", f"reply {n}"))
        for suffix in ("", "-wal"):
            shutil.copy(f"{living.path}{suffix}", f"{tmp_path / 'l.sqlite'}{suffix}")
    finally:
        living.close()
    log = tmp_path / "l.sqlite-wal"
    overwrite(log, int(offset * log.stat().st_size) if offset < 1 else offset, b"\xff" * 24)
    overwrite(tmp_path / "l.sqlite", 0, bytes(100))
    assert count_readable(tmp_path / "l.sqlite") >= 29


def test_an_old_state_of_a_call_never_replaces_its_reply(tmp_path):
    """Older backups are read too, so that rows come in several states and in any order."""
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        asyncio.run(ledger.claim("first", CLAIM))
        asyncio.run(_settle(ledger, "second", "paid before"))
    shutil.copy(path, tmp_path / "l.sqlite.damaged-1")
    path.unlink()
    with Ledger(path) as ledger:
        asyncio.run(ledger.claim("second", CLAIM))
        asyncio.run(_settle(ledger, "first", "paid later"))
    overwrite(path, 0, bytes(100))
    assert salvage(path).replies == 2
    assert saved(path, {"first": "paid later", "second": "paid before"}) == 2


def test_a_ledger_emptied_beside_its_log_is_reported_before_sqlite_deletes_the_log(tmp_path):
    living = Ledger(tmp_path / "living.sqlite")
    try:
        asyncio.run(_settle(living, "new", "new reply"))
        shutil.copy(f"{living.path}-wal", tmp_path / "l.sqlite-wal")
    finally:
        living.close()
    (tmp_path / "l.sqlite").touch()
    with pytest.raises(LedgerError, match=r"the file is empty\): 1 paid replies can be read"):
        Ledger(tmp_path / "l.sqlite")
    salvage(tmp_path / "l.sqlite")
    assert saved(tmp_path / "l.sqlite", {"new": "new reply"}) == 1


def test_the_bill_of_what_is_saved_is_the_one_it_was(damaged):
    path, _ = damaged
    with Ledger(path) as ledger:
        spent = ledger.spent("/out")
    overwrite(path, 0, bytes(100))
    salvage(path)
    with Ledger(path) as ledger:
        assert ledger.spent("/out") == spent


# ---- what is never believed


def test_a_reply_that_was_changed_on_disk_is_reported_and_never_used(tmp_path):
    path = tmp_path / "l.sqlite"
    long = "x" * 20_000 + "the true text" + "y" * 20_000
    with Ledger(path) as ledger:
        asyncio.run(_settle(ledger, "k", long))
        asyncio.run(_settle(ledger, "sound", "reply"))
    offset = path.read_bytes().index(b"the true text")
    overwrite(path, offset, b"the false one")
    with Ledger(path) as ledger:
        assert ledger.find("sound") == StoredReply("reply")
        with pytest.raises(LedgerError, match=r"the reply to k is not what was written\): 1 paid replies can be read"):
            ledger.find("k")
    with Ledger(path) as ledger, pytest.raises(LedgerError, match="is not what was written"):
        asyncio.run(ledger.claim("k", CLAIM))
    assert salvage(path).replies == 1
    with Ledger(path) as ledger:
        assert asyncio.run(ledger.claim("k", CLAIM)) is ClaimResult.GRANTED


# ---- what is left alone


def test_the_damaged_file_is_kept_as_it_was(damaged):
    path, _ = damaged
    overwrite(path, 0, bytes(100))
    original = path.read_bytes()
    backup = salvage(path).backup
    assert backup.name == "l.sqlite.damaged-1"
    assert backup.read_bytes() == original
    overwrite(path, 0, bytes(100))
    assert salvage(path).backup.name == "l.sqlite.damaged-2"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "l.sqlite", "l.sqlite.damaged-1", "l.sqlite.damaged-2",
    ]  # fmt: skip


def test_a_salvage_that_was_cut_off_is_done_by_running_it_again(damaged, monkeypatch):
    path, paid = damaged
    overwrite(path, 0, bytes(100))

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("clair.ledger.recovery.publish", cut_off)
    with pytest.raises(KeyboardInterrupt):
        salvage(path)
    monkeypatch.undo()
    assert count_readable(path) == len(paid)
    assert salvage(path).replies == saved(path, paid) == len(paid)


def test_ledgers_that_need_no_recovery_or_allow_none_are_refused_and_left_alone(damaged):
    path, _ = damaged
    original = path.read_bytes()
    with pytest.raises(UserError, match="is not damaged: every reply in it can be read; nothing was changed"):
        salvage(path)
    with Ledger(path), pytest.raises(UserError, match="is in use by a run"):
        salvage(path)
    with pytest.raises(UserError, match="does not exist"):
        salvage(path.with_name("nowhere"))
    assert path.read_bytes() == original
    path.write_bytes(b"not a database, but 4 kB of something else entirely" * 100)
    with pytest.raises(UserError, match="no call can be read"):
        salvage(path)
    assert [file.name for file in path.parent.iterdir()] == ["l.sqlite"]


# ---- formats


@pytest.mark.parametrize("version", [1, 2])
def test_a_ledger_of_a_format_before_is_upgraded_with_a_digest_for_each_reply(damaged, version):
    path, paid = damaged
    connection = sqlite3.connect(path)
    connection.executescript("DROP INDEX calls_in_batches; DROP TABLE batches; DROP TABLE batched")
    connection.execute("ALTER TABLE calls DROP COLUMN batch")
    if version == 1:
        connection.execute("ALTER TABLE calls DROP COLUMN digest")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()
    assert saved(path, paid) == len(paid)
    assert count_readable(path) == len(paid)


# ---- as a user does it


def test_a_build_with_a_damaged_ledger_names_the_command_and_pays_only_for_what_was_lost(tmp_path, server):
    rows = [row | {"answer": row["answer"] + " long" * 200} for row in scripted_rows(["ok"] * 60)]
    write_prompts(tmp_path / "prompts.jsonl", rows)
    recipe = write_recipe(tmp_path, server.url)
    assert clair("build", recipe).code == 0
    undisturbed, request_count = final_bytes(tmp_path / "out"), len(server.requests())
    ledger = tmp_path / "out" / "ledger.sqlite"
    for page in range(2, ledger.stat().st_size // PAGE, 5):
        overwrite(ledger, page * PAGE, b"\xff" * PAGE)
    message = error_line(clair("build", recipe))
    count, command = re.search(r"(\d+) paid replies can be read in it; `clair (.*)` puts them", message).groups()
    assert 0 < int(count) < request_count
    result = clair(*command.split())
    assert result.code == 0, result
    assert result.out.startswith(f"{count} paid replies and ")
    assert clair("build", recipe).code == 0
    assert final_bytes(tmp_path / "out") == undisturbed
    assert len(server.requests()) == request_count + (request_count - int(count))


def spoil_text(path: Path) -> None:
    """Make the first reply of a ledger a text that is not UTF-8."""
    connection = sqlite3.connect(path)
    connection.execute("UPDATE calls SET reply = CAST(x'7bff7d' AS TEXT) WHERE key = ?", (key_of(0),))
    connection.commit()
    connection.close()


def test_a_reply_that_is_not_utf8_is_reported_like_any_other_damage(damaged):
    path, paid = damaged
    spoil_text(path)
    with Ledger(path) as ledger, pytest.raises(LedgerError) as caught:
        ledger.find(key_of(0))
    message = str(caught.value)
    assert message.startswith(
        f"ledger {path} is damaged (a text in it is not UTF-8): {len(paid) - 1} paid replies can be"
    )
    assert "`clair salvage " in message
    assert salvage(path).replies == len(paid) - 1 == saved(path, paid)


def test_a_claimed_reply_that_is_not_utf8_is_reported_too(damaged):
    path, _ = damaged
    spoil_text(path)
    with Ledger(path) as ledger, pytest.raises(LedgerError, match="`clair salvage "):
        asyncio.run(ledger.claim(key_of(0), CLAIM))
