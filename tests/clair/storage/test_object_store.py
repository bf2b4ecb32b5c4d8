"""Outputs and prompts at URLs: the same bytes, nothing paid is lost, one run at a time, no secret printed."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import sqlite3
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import pytest

from apo.evaluation.config import redacted as redacted_evaluation
from apo.evaluation.pairs import PairsConfig
from apo.evaluation.winrate.run import WinrateConfig
from clair.cluster.merge import merge
from clair.core.errors import UserError
from clair.core.recipe import resolve, resolved
from clair.inference.batch_queue import BatchQueue, RequestOutcome
from clair.ledger import replication
from clair.ledger.ledger import Claim, Ledger, LedgerError, Tokens
from clair.ledger.replication import LedgerReplica
from clair.pipeline.build import build
from clair.pipeline.output_dir import lock_output
from clair.pipeline.shards import Shard
from clair.storage import object_store as storage
from clair.storage import url_lock
from clair.storage.location import Location, local
from clair.storage.object_store import AlreadyExists, StorageError, Store
from clair.storage.url_lock import lock_url
from tests.clair.building import SPLIT_FILES, clair, error_line, final_bytes, write_prompts
from tests.clair.scripted import Scripted, endpoint, install, recipe, revision

FILES = (*SPLIT_FILES, "dropped.jsonl", "README.md")
CLAIM = Claim("reviser", "m", "row", "/out", Tokens(10, 100))


@pytest.fixture(params=["memory", pytest.param("file", marks=pytest.mark.slow)])
def url(request, tmp_path) -> str:
    return (
        f"memory://{tmp_path.name}-{id(tmp_path)}/run" if request.param == "memory" else f"file://{tmp_path}/bucket/run"
    )


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Leases and patience of a test's length."""
    monkeypatch.setattr(url_lock, "LEASE", 1.0)
    monkeypatch.setattr(url_lock, "BEAT", 0.1)
    monkeypatch.setattr(storage, "_PATIENCE", 0.2)


def another_machine(monkeypatch, tmp_path, name: str) -> None:
    """From here on with a disk of its own."""
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / name))


def settings(out, count=40, **keys):
    rows = [{"prompt": f"question {n}", "answer": f"bad answer {n}" if n % 5 else f"fine {n}"} for n in range(count)]
    keys = {"pipeline": "revised", "reviser": endpoint(), "test_fraction": 0.2} | keys
    return recipe(Path(out), rows, **keys)


def with_out(config, url):
    return config.model_copy(update={"out": Location(url)})


def url_bytes(url) -> dict[str, bytes]:
    return dict(zip(FILES, Store(url).get_all(FILES), strict=True))


# ---- a run at a URL


def test_a_run_at_a_url_gives_the_bytes_of_one_in_a_folder_and_another_machine_requests_nothing(
    tmp_path, monkeypatch, url
):
    model = Scripted("reviser", revision)
    install(monkeypatch, reviser=model)
    local = settings(tmp_path / "here")
    build(local)
    model.requests.clear()
    assert build(with_out(local, url)).out == Location(url).folder
    assert len(model.requests) == 40
    assert url_bytes(url) == {name: (tmp_path / "here" / name).read_bytes() for name in FILES}
    assert json.loads(Store(url).get("manifest.json"))["recipe"]["out"] == url
    another_machine(monkeypatch, tmp_path, "second")
    with pytest.raises(UserError, match=r"holds the run of another recipe \(it differs in seed\)"):
        build(with_out(local, url).model_copy(update={"seed": 1}))
    build(with_out(local, url))
    assert len(model.requests) == 40
    assert url_bytes(url)["README.md"] == (tmp_path / "here" / "README.md").read_bytes()


@pytest.mark.slow
def test_shards_at_a_url_are_merged_on_a_machine_that_built_none_of_them(tmp_path, monkeypatch, url):
    model = Scripted("reviser", revision)
    install(monkeypatch, reviser=model)
    local = settings(tmp_path / "here")
    build(local)
    model.requests.clear()
    for index in (1, 2, 3):
        another_machine(monkeypatch, tmp_path, f"machine-{index}")
        build(with_out(local, url), shard=Shard(index, 3))
        if index < 3:
            with pytest.raises(UserError, match=f"lacks shard {index + 1}/3"):
                merge(f"{url}-shards")
    another_machine(monkeypatch, tmp_path, "fourth")
    merge(f"{url}-shards")
    assert url_bytes(url) == {name: (tmp_path / "here" / name).read_bytes() for name in FILES}
    another_machine(monkeypatch, tmp_path, "fifth")
    build(with_out(local, url))
    assert len(model.requests) == 40
    merge(f"{url}-shards", tmp_path / "merged")
    assert final_bytes(tmp_path / "merged") == final_bytes(tmp_path / "here")


def test_the_budget_counts_what_another_machine_spent(tmp_path, monkeypatch, url):
    model = Scripted("reviser", revision)
    install(monkeypatch, reviser=model)
    config = with_out(settings(tmp_path / "here", reviser=endpoint(max_tokens=50)), url)
    few = config.model_copy(update={"limit": 20})
    build(few)
    another_machine(monkeypatch, tmp_path, "second")
    spent = sum(json.loads(Store(url).get("manifest.json"))["tokens"]["reviser"][k] for k in ("prompt", "completion"))
    budget = {"budget": {"tokens": spent + 1}}
    checked = type(config).model_validate({**config.model_dump(), **budget})
    assert "budget reached" in build(checked).stopped
    assert len(model.requests) == 20


def test_a_store_that_fails_ends_the_run_and_what_was_paid_is_kept_here(tmp_path, monkeypatch, url):
    model = Scripted("reviser", revision, latency=0.01)
    install(monkeypatch, reviser=model)
    config = with_out(settings(tmp_path / "here", count=200, concurrency=8), url)
    create, left = Store.create, [12]

    def full(self, name, data):
        if name.startswith("ledger/"):
            left[0] -= 1
            if left[0] < 0:
                raise StorageError(f"cannot write {self.name}: no room is left there")
        return create(self, name, data)

    monkeypatch.setattr(Store, "create", full)
    with pytest.raises(UserError, match=r"no room is left there; the \d+ newest entries .* are kept on this machine"):
        build(config)
    request_count = len(model.requests)
    assert 0 < request_count < 200
    assert "manifest.json" not in Store(url).names()
    monkeypatch.setattr(Store, "create", create)
    build(config)
    assert len(model.requests) == 200


# ---- segments


def log_of(url, check=lambda: None) -> LedgerReplica:
    return LedgerReplica(Store(url), check)


def dump(path) -> dict[str, list[tuple]]:
    with closing(sqlite3.connect(path)) as connection:
        return {t: connection.execute(f"SELECT * FROM {t}").fetchall() for t in ("calls", "batches", "batched")}


async def some_writes(ledger: Ledger, draw: Random, count: int) -> None:
    queue = BatchQueue(ledger, "service", "/out")
    for _ in range(count):
        key = f"key-{draw.randrange(30)}"
        choice = draw.randrange(5)
        if choice == 0:
            await asyncio.gather(*(ledger.claim(f"key-{draw.randrange(30)}", CLAIM) for _ in range(5)))
        elif choice == 1:
            await ledger.settle(key, f"reply é \x00 {draw.random()}", Tokens(7, 70), CLAIM.max_tokens, draw.random())
        elif choice == 2:
            await ledger.fail(key, "broken", CLAIM.max_tokens)
        elif choice == 3 and not queue.contains(key):
            await queue.put(key, CLAIM, bytes(draw.randrange(256) for _ in range(20)))
        elif batch := await queue.form_batch(3, 1000):
            await queue.mark_uploaded(batch, "file")
            await queue.mark_sent(batch, f"id-{draw.random()}")
            await queue.settle(batch, [RequestOutcome(k, "raw", Tokens(1, 2)) for k in queue.waiting_keys(batch)[:2]])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_a_ledger_made_up_from_its_segments_is_the_ledger_at_every_point(tmp_path, url, seed, monkeypatch):
    monkeypatch.setattr(replication, "_MAX_SMALL_SEGMENTS", 7)
    monkeypatch.setattr(replication, "_ROWS_PER_SEGMENT", 3)
    draw = Random(seed)
    for time_ in range(3):
        with Ledger(tmp_path / "l.sqlite", log_of(url)) as ledger:
            asyncio.run(some_writes(ledger, draw, 25))
            copy = tmp_path / f"copy-{time_}.sqlite"
            Ledger(copy, log_of(url)).close()  # a lost machine's, while the other's last segments are still small
            assert dump(copy) == dump(tmp_path / "l.sqlite")
    assert len(dump(tmp_path / "l.sqlite")["calls"]) > 20
    assert len(Store(url).names("ledger/")) < 25
    older = tmp_path / "copy-0.sqlite"
    Ledger(older, log_of(url)).close()
    assert dump(older) == dump(tmp_path / "l.sqlite")


def test_small_segments_that_could_not_be_deleted_count_no_more(tmp_path, url, monkeypatch):
    def refuse(self, names):
        raise StorageError("may not delete")

    monkeypatch.setattr(replication, "_MAX_SMALL_SEGMENTS", 5)
    monkeypatch.setattr(Store, "delete", refuse)
    for number in range(2):
        with Ledger(tmp_path / "l.sqlite", log_of(url)) as ledger:
            asyncio.run(some_writes(ledger, Random(number), 12))
    names = Store(url).names("ledger/")
    assert sum(name.count("000001-") for name in names) == 2  # the first, alone and with others
    Ledger(tmp_path / "copy.sqlite", log_of(url)).close()
    assert dump(tmp_path / "copy.sqlite") == dump(tmp_path / "l.sqlite")


def test_every_reply_is_in_the_store_before_anyone_has_it(tmp_path, url):
    async def pay(ledger, key):
        await ledger.claim(key, CLAIM)
        await ledger.settle(key, "reply", Tokens(7, 70), CLAIM.max_tokens, 0.1)
        copy = tmp_path / f"{key}.sqlite"
        with Ledger(copy, log_of(url)) as rebuilt:
            return rebuilt.find(key)

    with Ledger(tmp_path / "l.sqlite", log_of(url)) as ledger:
        assert all(asyncio.run(pay(ledger, f"k{n}")) for n in range(3))


async def settle(ledger, key, raw):
    await ledger.settle(key, raw, Tokens(7, 70), CLAIM.max_tokens, 0.1)


def test_ledgers_of_two_machines_are_joined_and_the_bill_is_never_too_low(tmp_path, url, monkeypatch):
    first, second = tmp_path / "first.sqlite", tmp_path / "second.sqlite"
    broken = []

    def check():
        if broken:
            raise StorageError("unreachable")

    with Ledger(first, log_of(url, check)) as ledger:
        asyncio.run(ledger.claim("both", CLAIM))
        asyncio.run(ledger.claim("mine", CLAIM))
        broken.append(True)
        for key in ("both", "mine"):
            with pytest.raises(LedgerError, match="unreachable"):
                asyncio.run(settle(ledger, key, "first's"))
    with Ledger(second, log_of(url)) as ledger:  # the first one's machine seems lost
        for key in ("both", "mine"):
            asyncio.run(ledger.claim(key, CLAIM))
        asyncio.run(settle(ledger, "both", "second's"))
    with Ledger(first, log_of(url)) as ledger:
        assert ledger.find("both").raw == "second's"
        assert ledger.find("mine").raw == "first's"
        (spent,) = ledger.spent("/out").values()
        assert spent == Tokens(7 + 10 + 7 + 20, 70 + 100 + 70 + 200)
    Ledger(second, log_of(url)).close()
    assert dump(second) == dump(first)


def test_a_segment_that_arrived_though_its_answer_was_lost_costs_nothing_twice(tmp_path, url, monkeypatch):
    create = Store.create

    def lost(self, name, data):
        create(self, name, data)
        raise StorageError("no answer")

    with Ledger(tmp_path / "l.sqlite", log_of(url)) as ledger:
        asyncio.run(ledger.claim("first", CLAIM))
        monkeypatch.setattr(Store, "create", lost)
        with pytest.raises(LedgerError, match="no answer"):
            asyncio.run(ledger.claim("second", CLAIM))
        monkeypatch.setattr(Store, "create", create)
        with pytest.raises(LedgerError, match="no answer"):  # it stops, and what was under way is still written here
            asyncio.run(settle(ledger, "first", "reply"))
        asyncio.run(refused(ledger, "second"))
    with Ledger(tmp_path / "l.sqlite", log_of(url)) as ledger:
        assert ledger.find("first").raw == "reply"
        assert ledger.spent("/out") == {"reviser": Tokens(7, 70)}
    Ledger(tmp_path / "copy.sqlite", log_of(url)).close()
    assert dump(tmp_path / "copy.sqlite") == dump(tmp_path / "l.sqlite")


async def refused(ledger, key):
    with pytest.raises(LedgerError):
        await ledger.fail(key, "not sent", CLAIM.max_tokens)


def test_a_failed_write_whose_caller_is_gone_is_dropped(tmp_path, url, caplog):
    def check():
        raise StorageError("unreachable")

    async def leave(ledger):
        waiting = asyncio.ensure_future(ledger.claim("first", CLAIM))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(LedgerError, match="unreachable"):  # written after the first
            await ledger.claim("second", CLAIM)

    with Ledger(tmp_path / "l.sqlite", log_of(url, check)) as ledger:
        asyncio.run(leave(ledger))
        gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_url_that_was_emptied_gets_all_that_is_here(tmp_path, url):
    with Ledger(tmp_path / "l.sqlite", log_of(url)) as ledger:
        asyncio.run(some_writes(ledger, Random(1), 30))
    store = Store(url)
    store.delete(store.names("ledger/"))
    Ledger(tmp_path / "l.sqlite", log_of(url)).close()
    Ledger(tmp_path / "copy.sqlite", log_of(url)).close()
    assert dump(tmp_path / "copy.sqlite") == dump(tmp_path / "l.sqlite")


def test_a_url_that_was_emptied_takes_any_recipe(tmp_path, monkeypatch, url):
    install(monkeypatch, reviser=Scripted("reviser", revision))
    config = with_out(settings(tmp_path / "here"), url)
    build(config)
    store = Store(url)
    store.delete(store.names())
    build(config.model_copy(update={"seed": 1}))
    assert json.loads(store.get("manifest.json"))["seed"] == 1


def test_a_damaged_or_missing_segment_is_reported(tmp_path, url, monkeypatch):
    with Ledger(tmp_path / "l.sqlite", log_of(url)) as ledger:
        asyncio.run(some_writes(ledger, Random(1), 10))
        store = Store(url)
        names = store.names("ledger/")
        content = store.get(names[1])
        store.put(names[1], content[:-20])
        with pytest.raises(StorageError, match=f"{names[1]} is damaged"):
            Ledger(tmp_path / "copy.sqlite", log_of(url))
        store.delete([names[1]])
        with pytest.raises(StorageError, match="lacks segment 2"):
            Ledger(tmp_path / "copy.sqlite", log_of(url))
        store.put(names[1], content)


# ---- one run at a time


def test_a_url_in_use_is_reported_with_its_owner_and_free_again_after(tmp_path, monkeypatch, url):
    with lock_output(url):
        with pytest.raises(UserError, match="is in use by process"):  # the same machine
            lock_output(url).__enter__()
        another_machine(monkeypatch, tmp_path, "second")
        with pytest.raises(StorageError, match=r"is in use by process \d+ on .*; wait for it"):
            lock_output(url).__enter__()
        monkeypatch.undo()
    with lock_output(url):
        pass


def test_a_run_that_is_known_to_be_ending_is_waited_for(tmp_path, url):
    (tmp_path / "second").mkdir()
    first = lock_url(Store(url), tmp_path)
    first.__enter__()
    ending = threading.Timer(2 * url_lock.LEASE, first.__exit__, (None, None, None))
    ending.start()
    with lock_url(Store(url), tmp_path / "second", patience=60):
        assert not ending.is_alive()
    ending.join()


def check_for_a_while(hold) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        hold.check()
        time.sleep(0.05)


def test_a_run_without_a_sign_of_life_is_taken_over_and_stops_where_it_comes_back(tmp_path, monkeypatch, url):
    store = Store(url)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    asleep = threading.Event()
    put = Store.put

    def silent(self, name, data):
        if self is store and asleep.is_set():
            raise StorageError("unreachable")
        put(self, name, data)

    monkeypatch.setattr(Store, "put", silent)
    with lock_url(store, tmp_path / "first") as first:
        first.check()
        asleep.set()
        began = time.monotonic()
        with lock_url(Store(url), tmp_path / "second") as second:
            assert time.monotonic() - began >= url_lock.LEASE
            second.check()
            asleep.clear()
            with pytest.raises(StorageError, match="was taken over by process"):
                check_for_a_while(first)
            second.check()


def test_a_dead_run_of_this_machine_is_followed_at_once(tmp_path, url, monkeypatch):
    monkeypatch.setattr(url_lock, "LEASE", 3600.0)
    monkeypatch.setattr(url_lock.UrlLock, "release", lambda self: self._released.set())  # as after kill -9
    for _ in range(2):
        with lock_output(url):
            pass


def test_one_of_several_runs_that_begin_at_once_gets_the_url(tmp_path):
    url = f"file://{tmp_path}/bucket/run"
    won, lost = [], []
    start = threading.Barrier(4)

    def run(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        start.wait()
        try:
            with lock_url(Store(url), folder):
                won.append(number)
                finished.wait(30)
        except StorageError as error:
            lost.append(str(error))

    finished = threading.Event()
    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads]
    until = time.monotonic() + 30
    while len(won) + len(lost) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    finished.set()
    [thread.join() for thread in threads]
    assert (len(won), len(lost)) == (1, 3), lost


def test_a_segment_of_another_run_ends_this_one(tmp_path, url):
    with Ledger(tmp_path / "l.sqlite", log_of(url)) as ledger:
        asyncio.run(ledger.claim("k", CLAIM))
        store = Store(url)
        store.create("ledger/000000000002-000000000002.jsonl.gz", b"another's")
        with pytest.raises(LedgerError, match="is written by another run too"):
            asyncio.run(ledger.claim("k2", CLAIM))
        store.delete(["ledger/000000000002-000000000002.jsonl.gz"])


# ---- prompts at a URL


def test_prompts_at_a_url_are_read_and_their_errors_name_it(tmp_path, monkeypatch, url):
    install(monkeypatch, reviser=Scripted("reviser", revision))
    local = settings(tmp_path / "here")
    path = f"{url}.jsonl"
    store = Store(url.rpartition("/")[0])
    store.upload("run.jsonl", Path(local.prompts.path))
    remote = local.model_copy(
        update={
            "out": Location(tmp_path / "there"),
            "prompts": local.prompts.model_copy(update={"path": Location(path)}),
        }
    )
    build(local), build(remote)
    assert final_bytes(tmp_path / "there") == final_bytes(tmp_path / "here")
    store.put("run.jsonl", b'{"prompt": "q"}\nno json\n')
    with pytest.raises(UserError, match=rf"^{path}, line 2: not JSON"):
        build(remote)
    store.put("run.jsonl", b'{"prompt": 5}\n')
    with pytest.raises(UserError, match=rf"^{path}, line 1: the prompt is int"):
        build(remote)
    store.delete(["run.jsonl"])
    with pytest.raises(UserError, match="nothing is there"):
        build(remote)


def test_prompts_that_another_process_is_fetching_are_left_to_it_and_older_ones_are_not_kept(tmp_path, url):
    store = Store(url)
    store.put("p.jsonl", b"one")
    with Location(f"{url}/p.jsonl").local_copy() as first:
        assert first.read_bytes() == b"one"
    fetching = first.with_name(".another.1234.tmp")
    fetching.touch()
    store.put("p.jsonl", b"three")
    with Location(f"{url}/p.jsonl").local_copy() as second:
        assert second.read_bytes() == b"three"
    assert set(first.parent.iterdir()) == {second, fetching}


# ---- refusals, and secrets


def written(tmp_path, **changes) -> Path:
    write_prompts(tmp_path / "p.jsonl", [{"prompt": "q", "answer": "a"}])
    values = {"pipeline": "revised", "prompts": {"path": str(tmp_path / "p.jsonl")}, "reviser": endpoint()}
    (tmp_path / "r.yaml").write_text(json.dumps({**values, "out": str(tmp_path / "out"), **changes}))
    return tmp_path / "r.yaml"


@pytest.mark.parametrize(
    "changes", [{"out": "s3://user:hunter22@bucket/run"}, {"prompts": {"path": "https://u:hunter22@h/p.jsonl"}}]
)
def test_a_url_with_a_password_is_refused_and_not_repeated(tmp_path, changes):
    message = error_line(clair("build", written(tmp_path, **changes)))
    assert "a URL with a password in it; give credentials by the environment" in message
    assert "hunter22" not in message
    assert "hunter22" not in error_line(clair("merge", "s3://user:hunter22@bucket/run-shards"))


def test_a_ledger_of_its_own_cannot_go_with_a_url(tmp_path):
    message = error_line(clair("build", written(tmp_path, out="memory://x/run", ledger="l.sqlite")))
    assert "ledger is a file of this machine, and cannot go with URLs; remove it" in message


def test_a_missing_implementation_is_reported_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    message = error_line(clair("build", written(tmp_path), "--out", "s3://bucket/run"))
    assert message == "s3://bucket/run: s3:// needs s3fs: pip install 'clair-apo[s3]'"
    assert "Protocol not known: nope" in error_line(clair("build", written(tmp_path), "--out", "nope://bucket/run"))


def test_something_else_at_a_url_is_not_written_over(tmp_path, url):
    Store(url).put("thesis.tex", b"x")
    message = error_line(clair("build", written(tmp_path), "--out", url))
    assert "is not a dataset folder and not empty (it holds thesis.tex)" in message


def test_a_stores_message_is_reported_without_secrets_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
    store = Store(f"file://{tmp_path}?signature=abc123")

    def refuse(*_, **__):
        raise PermissionError("for verysecret with abc123 at ftp://me:hunter22@host/x: no")

    monkeypatch.setattr(storage, "write_atomically", refuse)
    with pytest.raises(StorageError, match="no permission; give the environment credentials") as caught:
        store.put("a", b"")
    assert not any(secret in str(caught.value) for secret in ("verysecret", "abc123", "hunter22"))


def test_a_secret_of_several_lines_is_redacted_too(monkeypatch, tmp_path):
    monkeypatch.setenv("PRIVATE_KEY", "BEGIN\n  verysecret\nEND")
    store = Store(f"file://{tmp_path}")
    assert (
        store.redacted_message(OSError("no\nroom for BEGIN\n  verysecret\nEND " + "x" * 400))
        == "no room for *** " + "x" * 284
    )


def test_a_signed_url_of_prompts_is_written_down_without_its_signature(tmp_path, monkeypatch):
    from clair.pipeline.config import redacted

    config = settings(tmp_path / "out")
    signed = config.prompts.model_copy(update={"path": Location("https://host/p.jsonl?X-Amz-Signature=abc")})
    assert redacted(config.model_copy(update={"prompts": signed}))["prompts"]["path"] == "https://host/p.jsonl"
    pairs = resolve(PairsConfig, {"model": "m", "reference": "r", "dataset": "https://host/d?sig=abc", "out": "o"})
    assert resolved(pairs, public=True)["dataset"] == "https://host/d"
    assert resolved(pairs)["dataset"] == "https://host/d?sig=abc"
    answers = {"base": "b.jsonl", "tuned": "t.jsonl", "judge": endpoint(), "out": str(tmp_path / "rate")}
    winrate = resolve(WinrateConfig, {"prompts": {"path": "https://host/p.jsonl?sig=abc"}, **answers})
    assert redacted_evaluation(winrate)["prompts"]["path"] == "https://host/p.jsonl"


def test_an_object_is_created_once_and_a_try_whose_answer_was_lost_counts(url):
    store = Store(url)
    store.create("a", b"1")
    store.create("a", b"1")
    with pytest.raises(AlreadyExists):
        store.create("a", b"2")
    assert store.get("a") == b"1"


def test_one_of_several_writers_creates_an_object(tmp_path):
    url = f"file://{tmp_path}/bucket/run"
    together, created = threading.Barrier(4), []

    def create(number: int) -> None:
        store = Store(url)
        for round in range(100):
            together.wait(30)
            with suppress(AlreadyExists):
                store.create(f"objects/{round}", str(number).encode())
                created.append(round)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(created) == list(range(100))


def test_a_url_where_a_local_path_is_written_is_reported_without_its_secrets():
    """Typer has made a Path of it, whose two slashes are one."""
    for url in ("s3://bucket/a", "gs://bucket/a/b.png", "file:///a", "s3://me:secret@bucket/a?signature=secret"):
        with pytest.raises(UserError, match=r"is a URL, and this is written to local files only; give a path") as error:
            local(Path(url))
        assert "secret" not in str(error.value)
        assert str(error.value).startswith(url[:4])
    for path in (Path("a"), Path("/a/b"), Path("../a:b/c"), Path("C:/a"), None):
        assert local(path) is path


def test_a_half_written_file_of_a_killed_run_is_no_object(tmp_path):
    store = Store(f"file://{tmp_path}")
    store.put("hold/000001.json", b"{}")
    (tmp_path / "hold" / ".000002.json.abc.tmp").write_bytes(b"{")
    assert store.names("hold/") == ["hold/000001.json"]


def test_copies_of_this_machine_may_be_deleted_at_any_time(tmp_path, monkeypatch, url):
    model = Scripted("reviser", revision)
    install(monkeypatch, reviser=model)
    config = with_out(settings(tmp_path / "here"), url)
    shutil.rmtree(build(config).out)
    build(config)
    assert len(model.requests) == 40
