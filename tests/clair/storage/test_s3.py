"""Builds on an S3-compatible server, a process of its own: moto's, where it is installed with s3fs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clair.core.files import write_json
from clair.data.dataset import read_manifest, read_rows
from clair.reporting.review import fingerprint
from tests.browser.synthetic import synthetic_pairs, write_dataset
from tests.clair.building import (
    ROOT,
    CommandResult,
    clair,
    error_line,
    finished,
    scripted_rows,
    write_prompts,
    write_recipe,
)
from tests.clair.s3_server import ENVIRONMENT, FILES, KEYS, bucket, fetched, in_s3, s3_server

pytest.importorskip("s3fs", reason="clair-apo[s3] is not installed")
pytest.importorskip("moto", reason="moto, the S3 server of these tests, is not installed")
pytest.importorskip("flask", reason="flask, which moto's server needs, is not installed")
pytestmark = pytest.mark.slow

COUNT, CONCURRENCY = 60, 4


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as (url, _):
        bucket(url, "pairs")
        yield url


def start(machine: Path, url: str, *arguments: str | Path, patience: float = 30) -> subprocess.Popen[str]:
    """The `clair` command on a machine of its own, that is with a cache of its own, and a lease of 3 s."""
    code = (
        "from clair.storage import object_store, url_lock\n"
        f"object_store._PATIENCE, url_lock.LEASE, url_lock.BEAT = {patience}, 3.0, 0.5\n"
        "from clair.cli import main\nmain()"
    )
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT, "AWS_ENDPOINT_URL": url, "CLAIR_CACHE": str(machine), "COLUMNS": "200"},
    )


def run(machine: Path, url: str, *arguments: str | Path, **options: float) -> CommandResult:
    return finished(start(machine, url, *arguments, **options))


def recipe(tmp_path: Path, server, script: str = "ok", count: int = COUNT) -> Path:
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows([script] * count))
    return write_recipe(tmp_path, server.url, concurrency=CONCURRENCY)


def wait_for_seen(server, count: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while len(server.requests()) < count and process.poll() is None:
        assert time.monotonic() < until, "the build asks nothing"
        time.sleep(0.02)


def test_a_machine_lost_mid_run_costs_at_most_what_was_in_flight(tmp_path, server, s3):
    path = recipe(tmp_path, server, "wait:0.05")
    assert clair("build", path).code == 0
    server.forget()
    out = "s3://pairs/lost"
    process = start(tmp_path / "first", s3, "build", path, "--out", out)
    wait_for_seen(server, COUNT // 2, process)
    process.send_signal(signal.SIGKILL)
    finished(process)
    shutil.rmtree(tmp_path / "first")
    begun = len(server.requests())
    assert COUNT // 2 <= begun < COUNT
    result = run(tmp_path / "second", s3, "build", path, "--out", out)
    assert result.code == 0, result
    twice = len(server.requests()) - COUNT
    print(f"{twice} paid twice")
    assert 0 <= twice <= CONCURRENCY
    assert fetched(s3, out) == {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    everything = in_s3(
        s3, f"from clair.storage.object_store import Store\ns = Store({out!r})\nprint(b''.join(s.get_all(s.names())))"
    )
    assert not any(secret in everything + result.out + result.err for secret in KEYS.values())


def test_a_second_driver_of_one_url_is_refused_and_requests_nothing(tmp_path, server, s3):
    path = recipe(tmp_path, server, "wait:60", count=4)
    first = start(tmp_path / "first", s3, "build", path, "--out", "s3://pairs/two")
    wait_for_seen(server, 4, first)
    message = error_line(run(tmp_path / "second", s3, "build", path, "--out", "s3://pairs/two"))
    assert message.startswith(f"s3://pairs/two is in use by process {first.pid} on "), message
    assert len(server.requests()) == 4
    assert first.poll() is None
    first.kill()
    finished(first)


def test_without_a_bucket_or_a_server_nothing_is_requested(tmp_path, server, s3):
    path = recipe(tmp_path, server, count=3)
    message = error_line(run(tmp_path / "m", s3, "build", path, "--out", "s3://no-such-bucket/run"))
    assert message.startswith("cannot write s3://no-such-bucket/run: the bucket is not there"), message
    message = error_line(
        run(tmp_path / "m", "http://127.0.0.1:9", "build", path, "--out", "s3://pairs/run", patience=1)
    )
    assert message.startswith("cannot list s3://pairs/run: it cannot be reached or fails"), message
    assert server.requests() == []


def test_without_permission_nothing_is_requested_and_no_key_is_printed(tmp_path, server):
    path = recipe(tmp_path, server, count=3)
    with s3_server(INITIAL_NO_AUTH_ACTION_COUNT="1") as (url, _):
        bucket(url, "pairs")  # the one action that is allowed to all
        message = error_line(run(tmp_path / "m", url, "build", path, "--out", "s3://pairs/run"))
    assert (
        "s3://pairs/run: no permission; give the environment credentials that may list, read and write there" in message
    ), message
    assert not any(secret in message for secret in KEYS.values())
    assert server.requests() == []


def test_a_server_that_goes_mid_run_ends_it_and_what_was_paid_is_kept(tmp_path, server):
    path = recipe(tmp_path, server, "wait:0.05")
    with s3_server() as (url, process):
        bucket(url, "pairs")
        running = start(tmp_path / "m", url, "build", path, "--out", "s3://pairs/run", patience=1)
        wait_for_seen(server, COUNT // 3, running)
        process.kill()
        process.wait(10)
        message = error_line(finished(running))
    assert "cannot write s3://pairs/run: it cannot be reached or fails" in message, message
    assert "are kept on this machine, run the same command again on it" in message, message
    request_count = len(server.requests())
    assert request_count < COUNT
    with s3_server() as (url, _):  # empty: all that is on this machine goes up
        bucket(url, "pairs")
        result = run(tmp_path / "m", url, "build", path, "--out", "s3://pairs/run")
        assert result.code == 0, result
        assert len(server.requests()) == COUNT
        assert "s3://pairs/run" in result.out


def test_a_dataset_in_a_bucket_is_reviewed_there(tmp_path, s3):
    folder = write_dataset(tmp_path / "pairs", synthetic_pairs(20, characters=60), 3)
    out, names = "s3://pairs/reviewed", [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]
    in_s3(
        s3,
        "from clair.storage.object_store import Store\n"
        f"[Store({out!r}).upload(n, {str(folder)!r} + '/' + n) for n in {names!r}]",
    )
    decisions = {"format": 1, "dataset": fingerprint(read_manifest(folder))}
    write_json(tmp_path / "d.json", {**decisions, "decisions": {next(read_rows(folder))["id"]: "drop"}})
    result = run(tmp_path / "first", s3, "keep", out, tmp_path / "d.json")
    assert result.code == 0, result
    assert clair("keep", folder, tmp_path / "d.json").code == 0
    assert fetched(s3, out) == {name: (folder / name).read_bytes() for name in FILES}
    result = run(tmp_path / "second", s3, "export", out, tmp_path / "there.jsonl")
    assert result.code == 0, result
    assert clair("export", folder, tmp_path / "here.jsonl").code == 0
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
