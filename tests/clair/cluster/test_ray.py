"""Builds on a real Ray cluster of this machine, whose parts are killed: the same bytes, little paid twice."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from clair.pipeline.shards import Shard
from clair.storage.object_store import Store
from tests.clair.building import (
    ROOT,
    clair,
    error_line,
    final_bytes,
    finished,
    manifest,
    outcomes,
    scripted_rows,
    start_clair,
    write_prompts,
    write_recipe,
)
from tests.clair.ray_nodes import CONCURRENCY, cluster, paid_twice, wait_until, write_all_fates
from tests.clair.s3_server import FILES, KEYS, SHORT, fetched, in_s3, machines_at, s3_server


@pytest.fixture(scope="module")
def nodes():
    with cluster() as running:
        yield running


@pytest.fixture(scope="module")
def plain(tmp_path_factory, scripted_server):
    """The folder of a recipe with its prompts, and in `one` the build of a single process: 150 rows, of all fates."""
    folder = tmp_path_factory.mktemp("plain")
    path = write_all_fates(folder, scripted_server.url, rows=150)
    assert clair("build", path, "--out", folder / "one").code == 3
    return folder


@pytest.fixture
def recipe(plain, server):
    """That recipe; nothing is built of it yet but `one`, and the server knows of nothing."""
    for name in ("all", "all-shards"):
        shutil.rmtree(plain / name, ignore_errors=True)
    return plain / "recipe.yaml"


SECONDS = 400  # far more than it takes, on a machine that is far too busy


def start(recipe, nodes, *more, out=None, **options):
    arguments = ["--out", out or recipe.parent / "all", "--runner", "ray", "--address", nodes.address, *more]
    return start_clair("build", recipe, *arguments, **options)


def assert_same(recipe, result, server, deaths):
    folder = recipe.parent
    assert result.code == 3, result
    assert final_bytes(folder / "all") == final_bytes(folder / "one")
    first, second = manifest(folder / "one"), manifest(folder / "all")
    for key in ("counts", "drop_reasons", "contrast", "models", "prompts_sha256", "files", "cost"):
        assert first[key] == second[key], key
    assert paid_twice(server) <= deaths * CONCURRENCY


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_node_dies_at_a_random_moment_and_the_dataset_is_that_of_one_machine(recipe, nodes, server, seed):
    dying, living = nodes.add(), nodes.add()
    build = start(recipe, nodes, "--shards", "5")
    moment = random.Random(seed).randrange(1, 100)
    wait_until(lambda: len(server.requests()) > moment)
    nodes.kill(dying)
    assert_same(recipe, finished(build, SECONDS), server, deaths=1)
    nodes.kill(living)


@pytest.mark.slow
def test_the_keeper_of_limits_and_then_a_worker_are_killed_and_the_dataset_is_that_of_one_machine(
    recipe, nodes, server
):
    node = nodes.add()
    build = start(recipe, nodes, "--shards", "2")
    wait_until(lambda: len(server.requests()) > 20)
    os.kill(nodes.processes("LimitsActor")[0].pid, signal.SIGKILL)
    request_count = len(server.requests()) + CONCURRENCY
    wait_until(lambda: len(server.requests()) > request_count)
    os.kill(nodes.processes("Worker.build")[0].pid, signal.SIGKILL)
    assert_same(recipe, finished(build, SECONDS), server, deaths=1)
    nodes.kill(node)


@pytest.mark.slow
def test_a_driver_is_killed_and_run_again_and_a_second_one_beside_it_is_refused(recipe, nodes, server):
    node = nodes.add()
    build = start(recipe, nodes, "--shards", "2")
    wait_until(lambda: len(server.requests()) > 30)
    refused = finished(start(recipe, nodes), SECONDS)
    assert f"all-shards is in use by process {build.pid}" in error_line(refused)
    build.kill()
    finished(build, SECONDS)
    again = start(recipe, nodes)
    assert_same(recipe, finished(again, SECONDS), server, deaths=1)
    assert sorted(path.name for path in (recipe.parent / "all-shards").iterdir() if path.is_dir()) == [
        "1-of-2",
        "2-of-2",
    ]
    nodes.kill(node)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_in_flight_and_the_same_command_resumes(recipe, nodes, server):
    node = nodes.add()
    build = start(recipe, nodes, "--shards", "2")
    wait_until(lambda: len(server.requests()) > 30)
    build.send_signal(signal.SIGINT)
    result = finished(build, SECONDS)
    assert result.code == 130, result
    assert "interrupted: every reply so far is kept" in result.err
    assert not (recipe.parent / "all" / "manifest.json").exists()
    assert_same(recipe, finished(start(recipe, nodes), SECONDS), server, deaths=0)
    nodes.kill(node)


@pytest.mark.slow
def test_at_a_url_the_machines_of_driver_and_worker_are_lost_and_others_go_on_and_a_second_driver_is_refused(
    tmp_path, nodes, server, monkeypatch
):
    pytest.importorskip("s3fs", reason="clair-apo[s3] is not installed")
    pytest.importorskip("moto", reason="moto, the S3 server of this test, is not installed")
    out = "s3://pairs/all"
    late = [n for n in range(40) if Shard(1, 2).contains(f"row-{n}")][-6:]  # in flight when the machines are lost
    scripts = ["wait:600 ok" if n in late else "ok" for n in range(40)]
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(scripts))
    reviser = {"url": server.url, "model": "m", "max_tokens": 50, "price": {"input": 1, "output": 1}}
    path = write_recipe(tmp_path, server.url, reviser=reviser, concurrency=CONCURRENCY, budget={"money": 1})
    (tmp_path / "sitecustomize.py").write_text(SHORT)
    with s3_server() as (url, _):
        for name, value in {**machines_at(url, tmp_path), "CLAIR_CACHE": str(tmp_path / "first")}.items():
            monkeypatch.setenv(name, value)
        node = nodes.add()
        build = start(path, nodes, "--shards", "2", out=out)
        wait_until(lambda: server.steps().count("wait:600") == len(late))
        message = error_line(
            finished(start(path, nodes, out=out, environment={"CLAIR_CACHE": str(tmp_path / "other")}))
        )
        assert message.startswith(f"{out}-shards is in use by process {build.pid} on "), message
        assert build.poll() is None
        build.kill()
        finished(build)
        nodes.kill(node)
        shutil.rmtree(tmp_path / "first")
        monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "second"))
        node = nodes.add()
        result = finished(start(path, nodes, out=out), SECONDS)
        assert result.code == 0, result
        assert f"it is at {out}" in result.out
        nodes.kill(node)
        assert paid_twice(server) == len(late)
        assert clair("build", path).code == 0
        assert fetched(url, out) == {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
        code = (
            "from clair.storage.object_store import Store\n"
            "s = Store('s3://pairs')\nprint(s.names(), s.get_all(s.names()))"
        )
        everything = in_s3(url, code)
        assert "'all-shards/2-of-2/ledger/" in everything
        assert not any(secret in everything + result.out + result.err for secret in KEYS.values())


KILLED_WORKER = """
import os, jinja2
render = jinja2.Template.render
def deadly(self, *words, **more):
    text = render(self, *words, **more)
    if "Task 7 " in text:
        os.kill(os.getpid(), 9)
    return text
jinja2.Template.render = deadly
"""


@pytest.mark.slow
@pytest.mark.parametrize("as_url", [False, True])
def test_on_a_ray_of_its_own_one_row_that_kills_its_process_is_dropped_and_the_rest_is_built(tmp_path, server, as_url):
    (tmp_path / "sitecustomize.py").write_text(KILLED_WORKER)
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"] * 20))
    path = write_recipe(tmp_path, server.url, out=f"{'file://' if as_url else ''}{tmp_path / 'out'}")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "RAY_ADDRESS": "", "CLAIR_CACHE": str(tmp_path / "c")}
    result = finished(start_clair("build", path, "--runner", "ray", "--shards", "1", environment=environment), SECONDS)
    assert result.code == 3, result
    built = outcomes(tmp_path / "out")
    assert built.pop("row-7") == "!prompts.killed_worker"
    assert built == {f"row-{n}": f"good answer {n}" for n in range(20) if n != 7}
    assert paid_twice(server) == 0
    assert not (tmp_path / "out-shards" / "1-of-1" / ".row").exists()


@pytest.mark.slow
def test_a_cluster_of_another_version_is_reported_with_both(recipe, nodes):
    from ray._private import ray_constants
    from ray._raylet import GcsClient

    client = GcsClient(address=nodes.address)
    key = (b"CLUSTER_METADATA", ray_constants.KV_NAMESPACE_CLUSTER)
    was = client.internal_kv_get(*key)
    assert was
    client.internal_kv_put(key[0], was.replace(b"2.", b"1.", 1), True, key[1])
    try:
        message = error_line(finished(start(recipe, nodes), SECONDS))
    finally:
        client.internal_kv_put(key[0], was, True, key[1])
    import ray

    assert f"Ray: {ray.__version__}" in message
    assert f"Ray: {ray.__version__.replace('2.', '1.', 1)}" in message


def test_builds_that_cannot_run_on_a_cluster_are_refused_before_any_work(tmp_path, monkeypatch):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    path = write_recipe(tmp_path, "http://127.0.0.1:9/v1")

    def refusal(*more):
        return error_line(clair("build", path, *more))

    assert "unknown runner 'dask'; allowed: ray" in refusal("--runner", "dask")
    assert "--shards is for --runner ray" in refusal("--shards", "2")
    assert "--shard builds one shard and --runner ray builds all" in refusal("--runner", "ray", "--shard", "1/2")
    assert "Ray's client is not supported" in refusal("--runner", "ray", "--address", "ray://head:10001")
    assert "accept: 3 takes the first pairs" in refusal("--runner", "ray", "--set", "accept=3")
    (tmp_path / "out-shards" / "1-of-3").mkdir(parents=True)
    assert "holds shards of 3; go on with --shards 3" in refusal("--runner", "ray", "--shards", "2")
    (tmp_path / "out-shards" / "1-of-2").mkdir()
    assert "holds shards of several numbers (2, 3)" in refusal("--runner", "ray")
    for name in ("1-of-3", "1-of-2"):
        (tmp_path / "out-shards" / name).rmdir()
    (tmp_path / "out" / "ledger.sqlite").touch()
    assert "holds the replies of a run without shards" in refusal("--runner", "ray")
    (tmp_path / "out" / "ledger.sqlite").unlink()
    url = f"file://{tmp_path}/far"
    Store(f"{url}-shards/1-of-3").put("recipe.json", b"{}")
    assert f"{url}-shards holds shards of 3; go on with" in refusal("--runner", "ray", "--shards", "2", "--out", url)
    Store(f"{url}-shards/1-of-3").delete(["recipe.json"])
    Store(url).put("recipe.json", b"{}")
    Store(url).put("ledger/000000000001-000000000001.jsonl.gz", gzip.compress(b'{"log": "l", "number": 1}\n'))
    assert f"{url} holds the replies of a run without shards" in refusal("--runner", "ray", "--out", url)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert "pip install 'clair-apo[ray]'" in refusal("--runner", "ray")
    assert not Path(tmp_path / "out" / "manifest.json").exists()
