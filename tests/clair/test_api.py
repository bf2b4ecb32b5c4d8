"""`clair.build`, `clair.estimate` and `clair.report` do what the commands do, also inside a running event loop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

import clair
from recipes.world.running import running
from recipes.world.server import ServerOptions
from recipes.world.tasks import distinct_tasks
from tests.clair.building import clair as run_command
from tests.clair.building import final_bytes

ROWS = 12


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


def recipe_for(folder: Path, url: str) -> dict:
    """A recipe on ready wrong answers, which the world's reviser corrects. Its values hold a path."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = distinct_tasks("train", ROWS, 0)
    lines = [json.dumps({"id": task.id, "prompt": task.prompt, "answer": task.wrong}) + "\n" for task in tasks]
    (folder / "prompts.jsonl").write_text("".join(lines), "utf-8")
    return {
        "pipeline": "revised",
        "prompts": {"path": folder / "prompts.jsonl"},
        "reviser": {"url": url, "model": "world-reviser", "id": "world-reviser"},
        "out": folder / "pairs",
    }


def recipe_file(folder: Path, url: str) -> Path:
    values = json.loads(json.dumps(recipe_for(folder, url), default=str))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), "utf-8")
    return folder / "recipe.yaml"


def in_a_running_loop(function, *args, **kwargs):
    """Call a function like a notebook's cell: while the thread's event loop runs."""

    async def main():
        return function(*args, **kwargs)

    return asyncio.run(main())


def call_plainly(function, *args, **kwargs):
    return function(*args, **kwargs)


@pytest.mark.parametrize("call", [call_plainly, in_a_running_loop])
def test_build_gives_the_bytes_of_the_command(call, server, tmp_path):
    result = call(clair.build, recipe_for(tmp_path / "python", server.url))
    assert run_command("build", recipe_file(tmp_path / "command", server.url)).code == 0
    assert final_bytes(tmp_path / "python" / "pairs") == final_bytes(tmp_path / "command" / "pairs")
    assert result.out == tmp_path / "python" / "pairs"
    pairs = result.manifest["counts"]["pairs"]
    assert pairs + result.manifest["counts"]["dropped"] == ROWS
    assert pairs > 0
    dropped = ROWS - pairs
    assert repr(result) == f"BuildResult({str(result.out)!r}, pairs={pairs}, dropped={dropped}, failed=0)"


def test_a_recipe_is_a_path_a_mapping_or_a_config_and_takes_overrides(server, tmp_path):
    path = recipe_file(tmp_path, server.url)
    config = clair.load_recipe(clair.BuildConfig, path)
    outputs = {}
    for name, recipe in {
        "text": str(path),
        "path": path,
        "mapping": yaml.safe_load(path.read_text()),
        "config": config,
    }.items():
        changes = {"reviser.temperature": 0.25, "limit": 5}
        result = clair.build(recipe, out=tmp_path / name, overrides=changes, show_progress=False)
        assert result.manifest["recipe"]["reviser"]["temperature"] == 0.25
        assert result.manifest["counts"]["prompts"] == 5
        outputs[name] = final_bytes(tmp_path / name)
    assert len(set(map(str, outputs.values()))) == 1
    assert clair.build(path, out=tmp_path / "two", limit=2).manifest["counts"]["prompts"] == 2


@pytest.mark.parametrize("call", [call_plainly, in_a_running_loop])
def test_estimate_counts_calls_and_runs_a_probe(call, server, tmp_path):
    recipe = recipe_for(tmp_path, server.url)
    roles = call(clair.estimate, recipe)
    assert (roles["reviser"].max_calls, roles["reviser"].prompt) == (2 * ROWS, None)
    roles = call(clair.estimate, recipe, probe=4)
    assert roles["reviser"].prompt is not None
    assert roles["reviser"].prompt.value > 0
    assert clair.build(recipe).manifest["tokens"]["reviser"]["reused"] == 4


def test_report_writes_the_page_and_returns_its_path(server, tmp_path):
    folder = clair.build(recipe_for(tmp_path, server.url)).out
    assert clair.report(folder) == folder / "report.html"
    assert (folder / "report.html").read_text("utf-8").startswith("<!doctype html>")
    other = clair.report(folder, out=tmp_path / "page.html", filters=["split=train"])
    assert other == tmp_path / "page.html"
    assert other.stat().st_size > 1000


def test_a_mistake_is_one_line(tmp_path):
    recipe = recipe_for(tmp_path, "http://127.0.0.1:9/v1")
    with pytest.raises(clair.UserError, match=r"unknown key 'reviser.temprature' \(did you mean 'temperature'"):
        clair.build(recipe, overrides={"reviser.temprature": 1})
    with pytest.raises(clair.UserError, match="recipe holds a value that is no text, number, list or mapping"):
        clair.build(recipe | {"seed": {1, 2}})
    with pytest.raises(clair.UserError, match=r"limit: .*greater than or equal to 1, found 0"):
        clair.estimate(recipe, limit=0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["prompts.jsonl"]


@pytest.mark.parametrize("call", [call_plainly, in_a_running_loop])
def test_an_interrupt_keeps_the_replies_in_flight_and_the_same_call_resumes(call, tmp_path):
    with running(ServerOptions(latency=1.0)) as slow:
        recipe = recipe_for(tmp_path, slow.url) | {"concurrency": 3}

        def interrupt_once_in_flight() -> None:
            while slow.stats()["max_in_flight"] < 3:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt_once_in_flight)
        thread.start()
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match="every reply so far is kept"):
            call(clair.build, recipe, show_progress=False)
        thread.join()
        assert signal.getsignal(signal.SIGINT) is handler
        paid = slow.stats()["requests"]
        assert 3 <= paid < ROWS
        assert not (tmp_path / "pairs" / "manifest.json").exists()
        result = call(clair.build, recipe, overrides={"concurrency": 64}, show_progress=False)
    assert result.manifest["tokens"]["reviser"]["reused"] == paid
    assert result.manifest["counts"]["prompts"] == ROWS
