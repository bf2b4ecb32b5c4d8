"""A worker of a cluster, in this process: what it keeps from shard to shard, and what it refuses."""

from __future__ import annotations

import os
from decimal import Decimal
from importlib.metadata import version
from socket import gethostname
from types import SimpleNamespace

import pytest

from clair.cluster.merge import merge
from clair.cluster.shared_limits import RoleLimits, SharedLimits
from clair.cluster.worker import ShardResult, ShardTask, Worker
from clair.inference.local import LocalModel
from clair.inference.open import open_model
from clair.pipeline.build import build
from clair.pipeline.shards import CrashPolicy, Shard
from clair.storage.location import Location
from tests.clair import tiny_model
from tests.clair.building import drops, final_bytes, manifest
from tests.clair.scripted import Scripted, endpoint, recipe, revision


class Handle:
    """The quotas of a job as a worker sees an actor."""

    def __init__(self, *roles):
        self.quotas = SharedLimits({role: RoleLimits(8) for role in roles})
        self.report = SimpleNamespace(remote=self._report)

    async def _report(self, report):
        return self.quotas.report(report)


def order(config, index, of, **changes):
    defaults = {
        "attempt": "1",
        "update": False,
        "crash_policy": CrashPolicy(),
        "folder": os.getcwd(),
        "environment": {},
    }
    return ShardTask(config=config, shard=Shard(index, of), **{**defaults, "version": version("clair-apo"), **changes})


def built(worker, handle, item):
    handle.quotas.begin(item.shard.name, "1", Decimal(0))
    return worker.build(item, handle)


@pytest.mark.slow
def test_a_local_model_is_loaded_once_for_all_shards_of_a_worker(tmp_path, monkeypatch):
    folder = tiny_model.save(tmp_path / "model")
    reviser, loads = Scripted("reviser", revision), []
    opened = lambda role, config: open_model(role, config) if config.path else reviser  # noqa: E731 (stands in for it)
    really = LocalModel._load
    monkeypatch.setattr(LocalModel, "_load", lambda self: (loads.append(self._loaded is None), really(self))[1])
    monkeypatch.setattr("clair.cluster.worker.open_model", opened)
    target = {"path": str(folder), "max_tokens": 8, "temperature": 0.7}
    keys = {"pipeline": "revised", "target": target, "reviser": endpoint()}
    config = recipe(tmp_path / "all", [{"prompt": f"question {n}"} for n in range(12)], **keys)
    worker, handle = Worker(), Handle("target", "reviser")
    for index in (1, 2):
        assert built(worker, handle, order(config, index, 2)) == ShardResult()
    assert loads.count(True) == 1
    merge(tmp_path / "all-shards")
    monkeypatch.setattr("clair.inference.open.open_model", opened)
    build(config.model_copy(update={"out": Location(tmp_path / "one")}))
    assert loads.count(True) == 2
    assert final_bytes(tmp_path / "all") == final_bytes(tmp_path / "one")
    assert manifest(tmp_path / "all")["models"] == manifest(tmp_path / "one")["models"]


def test_a_worker_takes_secrets_from_the_driver_and_refuses_another_version_or_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("clair.cluster.worker.open_model", lambda role, config: Scripted("reviser", revision))
    config = recipe(tmp_path / "all", [{"prompt": "q", "answer": "bad"}], pipeline="revised", reviser=endpoint())
    worker, handle = Worker(), Handle("reviser")
    error = built(worker, handle, order(config, 1, 1, version="0.0.9")).error
    assert f"a node has clair-apo {version('clair-apo')} and the driver 0.0.9" in error
    error = built(worker, handle, order(config, 1, 1, folder=str(tmp_path / "none"))).error
    assert f"a node cannot enter {tmp_path / 'none'} (No such file or directory)" in error
    assert not (tmp_path / "all-shards").exists()
    monkeypatch.setenv("CLAIR_TEST_OWN", "mine")
    monkeypatch.delenv("CLAIR_TEST_KEY", raising=False)
    secrets = {"CLAIR_TEST_KEY": "secret", "CLAIR_TEST_OWN": "theirs"}
    assert built(worker, handle, order(config, 1, 1, environment=secrets)) == ShardResult()
    assert (os.environ.pop("CLAIR_TEST_KEY"), os.environ["CLAIR_TEST_OWN"]) == ("secret", "mine")


def test_a_worker_whose_node_may_not_write_at_the_url_names_the_node(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("no")

    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("clair.storage.object_store.write_atomically", refuse)
    url = f"file://{tmp_path}/bucket/all"
    config = recipe(tmp_path / "all", [{"prompt": "q", "answer": "bad"}], pipeline="revised", reviser=endpoint())
    error = built(Worker(), Handle("reviser"), order(config.model_copy(update={"out": Location(url)}), 1, 1)).error
    assert error.startswith(f"on {gethostname()}: cannot write {url}-shards/1-of-1: no permission"), error


def test_rows_are_built_one_by_one_and_noted_where_care_is_taken_and_killers_are_left_out(tmp_path, monkeypatch):
    notes = []
    noted = tmp_path / "all-shards" / "1-of-1" / ".row"

    def script(messages, sample):
        notes.append(noted.read_text())
        return revision(messages, sample)

    monkeypatch.setattr("clair.cluster.worker.open_model", lambda role, config: Scripted("reviser", script))
    prompt_rows = [{"id": f"row-{n}", "prompt": f"q {n}", "answer": f"bad {n}"} for n in range(5)]
    config = recipe(tmp_path / "all", prompt_rows, pipeline="revised", reviser=endpoint())
    care = CrashPolicy(poison_rows=frozenset({"row-3"}), log_rows=True)
    assert built(Worker(), Handle("reviser"), order(config, 1, 1, crash_policy=care)) == ShardResult(failed=1)
    assert notes == ["row-0", "row-1", "row-2", "row-4"]
    (dropped,) = drops(noted.parent)
    assert (dropped["id"], dropped["reason"], dropped["failed"]) == ("row-3", "killed_worker", True)
    assert not noted.exists()
