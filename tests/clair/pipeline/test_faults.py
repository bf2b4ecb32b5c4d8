"""Builds that are killed, interrupted, starved of disk or cut off: nothing is lost, and nothing bought twice."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from clair.pipeline.build import build
from recipes.world.running import Running, running
from recipes.world.server import ServerOptions
from recipes.world.tasks import distinct_tasks, write_prompts
from tests.clair.building import (
    CommandResult,
    clair,
    config_for,
    drops,
    error_line,
    final_bytes,
    finished,
    manifest,
    outcomes,
    pairs,
    scripted_rows,
    start_clair,
    write_recipe,
)
from tests.clair.building import write_prompts as write_rows

COUNT = 160
REQUESTS = 2 * COUNT  # the target's and the reviser's
CONCURRENCY = 8
LATENCY = 0.05


@pytest.fixture(scope="module")
def slow_world() -> Iterator[Running]:
    with running(ServerOptions(latency=LATENCY)) as server:
        yield server


def world_recipe(tmp_path: Path, url: str, count: int = COUNT, **changes: object) -> Path:
    write_prompts(tmp_path / "prompts.jsonl", distinct_tasks("train", count, 0))
    roles = {
        "target": {"url": url, "model": "world-target", "id": "t"},
        "reviser": {"url": url, "model": "world-reviser", "id": "r"},
    }
    return write_recipe(tmp_path, url, **roles, concurrency=CONCURRENCY, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """The files of a build that nothing happened to."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    with running(ServerOptions()) as server:
        assert clair("build", world_recipe(tmp_path, server.url)).code == 0
    return final_bytes(tmp_path / "out")


def wait_for_requests(server: Running, more_than: int, process: subprocess.Popen[str]) -> None:
    """Until the server has had more requests than that, or the process has ended."""
    until = time.monotonic() + 60
    while server.stats()["requests"] <= more_than and process.poll() is None:
        assert time.monotonic() < until, "the build asks nothing"
        time.sleep(0.01)


def build_and(
    sent: signal.Signals, server: Running, recipe: Path, out: Path, moment: float, *, all: bool
) -> CommandResult:
    """Start a build and send it a signal after a number of requests and a part of an answer's time.

    `all`: its children get it too, as Ctrl-C in a terminal and a killed container do; else it alone, and whatever it
    started must end with it.
    """
    request_count = server.stats()["requests"]
    process = start_clair("build", recipe, "--out", out, start_new_session=True)
    wait_for_requests(server, request_count + int(moment), process)
    time.sleep(LATENCY * (moment % 1))
    if process.poll() is None:
        (os.killpg if all else os.kill)(process.pid, sent)
    result = finished(process)
    until = time.monotonic() + 60
    while survivors(process.pid):
        assert time.monotonic() < until, f"{survivors(process.pid)} outlived the build"
        time.sleep(0.01)
    return result


def survivors(session: int) -> list[int]:
    """The processes of a session that are still at work."""
    numbers = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = folder.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                numbers.append(int(folder.name))
    return numbers


# ---- kill -9


def assert_survives_kills(server: Running, tmp_path: Path, undisturbed: dict[str, bytes], moments: list[float]) -> None:
    recipe = world_recipe(tmp_path, server.url, seed=0)
    earlier = server.stats()
    killed = in_flight = 0
    for number, moment in enumerate(moments):
        result = build_and(signal.SIGKILL, server, recipe, tmp_path / "out", moment, all=number % 2 == int(moment) % 2)
        assert result.code in (-signal.SIGKILL, 0), result
        killed += result.code != 0
        in_flight += in_flight_at_the_end(tmp_path / "out" / "ledger.sqlite")
    assert killed >= len(moments) - 1  # one at the very end may come too late
    assert in_flight <= killed * 2 * CONCURRENCY  # the maximum of each of the two roles
    last = finished(start_clair("build", recipe))
    assert last.code == 0, last
    assert final_bytes(tmp_path / "out") == undisturbed
    twice = server.stats()["paid_total"] - earlier["paid_total"] - REQUESTS
    print(f"{killed} kills with {in_flight} requests in flight: {twice} paid twice")
    assert 0 <= twice <= in_flight
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        ".lock",
        "README.md",
        "data",
        "dropped.jsonl",
        "ledger.sqlite",
        "manifest.json",
        "recipe.json",
    ]
    assert len(list((tmp_path / "out" / "data").iterdir())) == 2


def in_flight_at_the_end(ledger: Path) -> int:
    """The number of requests that a dead run had claimed and not completed."""
    with contextlib.closing(sqlite3.connect(f"{ledger.as_uri()}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT count(*) FROM calls WHERE state = 'asked'").fetchone()[0]


def moments(seed: int, count: int) -> list[float]:
    """Random moments from the first request to the last, as many as that for each of some builds in turn."""
    random = Random(seed)
    return [random.uniform(0, (REQUESTS - 1) / count) for _ in range(count)]


def test_killed_at_three_random_moments_it_ends_with_the_same_bytes(tmp_path, slow_world, undisturbed):
    assert_survives_kills(slow_world, tmp_path, undisturbed, moments(20, 3))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, slow_world, undisturbed, seed):
    assert_survives_kills(slow_world, tmp_path, undisturbed, moments(seed, 1))


@pytest.mark.slow
def test_killed_while_it_finishes_it_leaves_the_old_dataset_or_the_new_one(tmp_path, slow_world, undisturbed):
    """Every reply is in the ledger, so that a run is little but the writing of its files."""
    recipe = world_recipe(tmp_path, slow_world.url)
    assert finished(start_clair("build", recipe)).code == 0
    request_count = slow_world.stats()["requests"]
    for wait in (0.9, 1.1, 1.3, 1.5):
        process = start_clair("build", recipe)
        time.sleep(wait)
        process.kill()
        finished(process)
        assert final_bytes(tmp_path / "out") == undisturbed
    assert clair("build", recipe).code == 0
    assert slow_world.stats()["requests"] == request_count


# ---- Ctrl-C


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_all_that_was_paid_and_resumes_from_there(tmp_path, undisturbed, sent):
    with running(ServerOptions(latency=LATENCY)) as server:
        recipe = world_recipe(tmp_path, server.url)
        for moment in (80.5, 120.0):
            result = build_and(sent, server, recipe, tmp_path / "out", moment, all=True)
            assert result.code == 130, result
            assert "interrupted: every reply so far is kept; run the same command again to go on" in result.err
            assert "Traceback" not in result.err
            assert not (tmp_path / "out" / "manifest.json").exists()
        assert 0 < server.stats()["paid_total"] < REQUESTS
        assert finished(start_clair("build", recipe)).code == 0
        stats = server.stats()
    assert stats["paid_more_than_once"] == 0
    assert stats["paid_total"] == REQUESTS
    assert final_bytes(tmp_path / "out") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_interrupted_at_any_moment_it_buys_nothing_twice(tmp_path, undisturbed, seed):
    with running(ServerOptions(latency=LATENCY)) as server:
        recipe = world_recipe(tmp_path, server.url)
        (moment,) = moments(seed, 1)
        result = build_and(signal.SIGINT, server, recipe, tmp_path / "out", moment, all=seed % 2 == 0)
        assert result.code in (0, 130, -signal.SIGINT)  # the last: it was finished, and Python shutting down
        assert finished(start_clair("build", recipe)).code == 0
        assert server.stats()["paid_total"] == server.stats()["paid_distinct"] == REQUESTS
    assert final_bytes(tmp_path / "out") == undisturbed


def scripted_recipe(tmp_path: Path, url: str, scripts: list[str], **changes: object) -> Path:
    write_rows(tmp_path / "prompts.jsonl", scripted_rows(scripts))
    return write_recipe(tmp_path, url, **changes)


def wait_for_seen(server, count: int) -> None:
    until = time.monotonic() + 60
    while len(server.requests()) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("script", ["429:60", "500 500 500 500 500"])
def test_interrupted_while_rows_wait_to_ask_again_it_ends_at_once(tmp_path, server, script):
    process = start_clair("build", scripted_recipe(tmp_path, server.url, [script] * 10))
    wait_for_seen(server, 10)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    result = finished(process)
    assert result.code == 130, result
    assert len(server.requests()) < 5 * 10  # no row used all its attempts


def test_interrupted_twice_it_leaves_at_once(tmp_path, server):
    process = start_clair("build", scripted_recipe(tmp_path, server.url, ["wait:600"] * 10))
    wait_for_seen(server, 10)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None  # it waits for what is in flight
    process.send_signal(signal.SIGINT)
    result = finished(process)  # which waits for less time than an answer takes
    assert result.code == 130, result
    assert "Traceback" not in result.err
    first, second = (line for line in result.err.splitlines() if "in flight" in line and "building" not in line)
    assert first.startswith("interrupted: waiting for the replies in flight (reviser 10), at most 10 min more; ")
    assert "Ctrl-C again leaves without them; the same command goes on" in first
    assert second.startswith("leaving at once: the 10 replies in flight are not kept, and will be asked for again; ")


def test_an_interrupt_before_the_first_request_is_reported(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", ({"prompt": f"Task {n}", "answer": "a"} for n in range(400_000)))
    process = start_clair("build", write_recipe(tmp_path, "http://127.0.0.1:9/v1"))
    assert "checking recipe and prompts" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    result = finished(process)
    assert result.code == 130, result
    assert "Traceback" not in result.err


# ---- one process a folder


def test_a_folder_in_use_is_reported_with_the_owners_pid(tmp_path, server):
    recipe = scripted_recipe(tmp_path, server.url, ["wait:3"] * 4)
    process = start_clair("build", recipe)
    wait_for_seen(server, 4)
    message = error_line(clair("build", recipe))
    assert message == f"{tmp_path / 'out'} is in use by process {process.pid}; wait for it, or choose another --out"
    assert finished(process).code == 0
    assert len(server.requests()) == 4
    assert len(pairs(tmp_path / "out")) == 4
    assert clair("build", recipe).code == 0  # free again


# ---- no room


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes at out/."""
    folder = tmp_path / "out"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_build_in_one_line_and_loses_nothing(tmp_path, server, small_disk):
    count, concurrency = 300, 8
    rows = [{"id": n, "prompt": f"Task {n}", "answer": f"bad {n} " + "word " * 3000 + "."} for n in range(count)]
    write_rows(tmp_path / "prompts.jsonl", rows)
    recipe = write_recipe(tmp_path, server.url, concurrency=concurrency)
    message = error_line(finished(start_clair("build", recipe)))
    assert "make room" in message
    assert str(small_disk) in message
    request_count = len(server.requests())
    assert concurrency < request_count < count
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert finished(start_clair("build", recipe)).code == 0
    assert count <= len(server.requests()) <= count + 2 * concurrency
    assert len(pairs(small_disk)) == count


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_files_that_cannot_be_written_are_one_line_and_the_old_ones_stay(tmp_path, server, monkeypatch, code):
    recipe = scripted_recipe(tmp_path, server.url, ["ok"] * 5)
    assert clair("build", recipe).code == 0
    files = final_bytes(tmp_path / "out")
    scripted_recipe(tmp_path, server.url, ["ok"] * 9)

    def fail(*_):
        raise OSError(code, os.strerror(code), str(tmp_path / "out" / "data"))

    monkeypatch.setattr("clair.data.dataset.publish", fail)
    message = error_line(clair("build", recipe))
    assert os.strerror(code) in message
    assert final_bytes(tmp_path / "out") == files
    assert len(list((tmp_path / "out" / "data").iterdir())) == 2  # no temporary file is left to fill the disk
    monkeypatch.undo()
    assert clair("build", recipe).code == 0
    assert len(server.requests()) == 9


# ---- the endpoint goes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_build_waits_for_an_endpoint_that_dies_and_returns(tmp_path, undisturbed):
    options = ServerOptions(port=free_port(), latency=LATENCY)
    with running(options) as first:
        process = start_clair("build", world_recipe(tmp_path, first.url))
        wait_for_requests(first, 60, process)
    time.sleep(2.0)
    with running(options) as second:
        result = finished(process)
        assert result.code == 0, result
        assert 0 < second.stats()["paid_total"] < REQUESTS
    assert final_bytes(tmp_path / "out") == undisturbed
    assert manifest(tmp_path / "out")["tokens"]["reviser"]["retries"] > 0


def test_an_endpoint_that_stays_away_gives_failed_rows_and_a_rerun_mends_them(tmp_path, undisturbed):
    options = ServerOptions(port=free_port(), latency=LATENCY)
    with running(options) as first:
        process = start_clair("build", world_recipe(tmp_path, first.url, attempts=2))
        wait_for_requests(first, 60, process)
    result = finished(process)
    assert result.code == 3, result
    failed = [row for row in drops(tmp_path / "out") if row["failed"]]
    assert failed
    assert {row["reason"] for row in failed} == {"unreachable"}
    assert len(outcomes(tmp_path / "out")) == COUNT
    with running(options):
        assert finished(start_clair("build", tmp_path / "recipe.yaml")).code == 0
    assert final_bytes(tmp_path / "out") == undisturbed


def test_an_endpoint_that_is_gone_for_long_ends_the_run_and_keeps_what_was_paid(tmp_path, server):
    reviser = {"url": server.url, "model": "m", "patience": 0.2}
    write_rows(tmp_path / "prompts.jsonl", scripted_rows(["ok"] * 4 + ["drop"] * 200))
    message = error_line(clair("build", write_recipe(tmp_path, server.url, reviser=reviser, concurrency=4, attempts=2)))
    assert "no answer for" in message
    assert "run the same command again" in message
    assert len(server.requests()) < 4 + 2 * 200
    write_rows(tmp_path / "prompts.jsonl", scripted_rows(["ok"] * 4))
    request_count = len(server.requests())
    assert clair("build", tmp_path / "recipe.yaml").code == 0
    assert len(server.requests()) == request_count


# ---- clocks


def test_a_clock_that_jumps_disturbs_nothing(tmp_path, server, monkeypatch):
    """Waiting and leases follow the monotonic clock and the kernel, and a date to wait for the server's own clock."""
    times = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    write_rows(tmp_path / "prompts.jsonl", scripted_rows(["429:0.3 ok", "500 ok", "ok", "429date ok"]))
    build(config_for(tmp_path, server.url))
    assert len(pairs(tmp_path / "out")) == 4
