"""`serve:`, a server of the run's own: started, waited for, used, and ended however the run ends."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from clair.core.recipe import resolve
from clair.inference.config import ModelConfig
from clair.inference.servers.command import server_command
from clair.inference.servers.served_model import ServedModel
from tests.clair.building import (
    CommandResult,
    clair,
    error_line,
    finished,
    manifest,
    pairs,
    scripted_rows,
    start_clair,
    write_prompts,
    write_recipe,
)

WORLD = shlex.join([sys.executable, "-m", "recipes.world.server", "--port", "{port}"])
GONE_SECONDS = 20.0


def with_helper(tmp_path: Path, command: str) -> str:
    """The command of a server below a shell that starts a helper too; the ids of both are appended to a file."""
    script = f'echo $$ >> "$0"; sleep 1000 & echo $! >> "$0"; {command}'
    return f"bash -c {shlex.quote(script)} {shlex.quote(str(tmp_path / 'pids'))}"


def server_pids(tmp_path: Path) -> list[int]:
    file = tmp_path / "pids"
    return [int(line) for line in file.read_text("utf-8").split()] if file.exists() else []


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], Any], seconds: float, message: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, message
        time.sleep(0.05)


def has_replies(tmp_path: Path) -> bool:
    """True if the ledger of a running build holds a reply."""
    file = tmp_path / "ledger.sqlite"
    if not file.exists():
        return False
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as ledger, suppress(sqlite3.OperationalError):
        return ledger.execute("SELECT count(*) FROM calls WHERE state = 'done'").fetchone()[0] > 0
    return False


def assert_all_ended(tmp_path: Path) -> None:
    """Shell, helper and server are gone, at once or in a few seconds."""
    pids = server_pids(tmp_path)
    assert len(pids) >= 2
    wait_until(lambda: not any(map(is_running, pids)), GONE_SECONDS, "a process of the server still runs")


def task_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"task-{n}", "prompt": f"What is {n} plus 1?", "answer": f"{n} plus 1 is {n}."} for n in range(count)
    ]


def served_recipe(tmp_path: Path, serve: str, *, count: int = 6, name: str = "out", **reviser: Any) -> Path:
    """A recipe whose reviser the run serves by `serve`; all revisions of the embedded world's reviser make pairs."""
    write_prompts(tmp_path / "prompts.jsonl", task_rows(count))
    role = {"serve": serve, "model": "world-reviser", "temperature": 0.7} | reviser
    return write_recipe(tmp_path, "", reviser=role, ledger=str(tmp_path / "ledger.sqlite"), out=str(tmp_path / name))


def last_error(result: CommandResult) -> str:
    """The error of a run that started a server, which two lines before may report."""
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.err
    return lines[0]


def test_a_build_starts_its_server_uses_it_and_ends_it_with_all_it_has_started(tmp_path):
    result = clair("build", served_recipe(tmp_path, with_helper(tmp_path, WORLD)))
    assert result.code == 0, result.err
    assert manifest(tmp_path / "out")["tokens"]["reviser"]["calls"] == 6
    assert "reviser: started `bash -c" in result.err
    assert "waiting for an answer at http://127.0.0.1:" in result.err
    assert "at most 5 min" in result.err
    assert "reviser: the server answers after" in result.err
    assert_all_ended(tmp_path)


def test_a_second_run_takes_the_replies_from_the_ledger_whatever_the_port_and_starts_nothing(tmp_path):
    served = with_helper(tmp_path, WORLD)
    assert clair("build", served_recipe(tmp_path, served)).code == 0
    started = server_pids(tmp_path)
    again = clair("build", served_recipe(tmp_path, served, name="again"))
    assert again.code == 0, again.err
    assert "started" not in again.err
    assert server_pids(tmp_path) == started
    assert pairs(tmp_path / "again") == pairs(tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / "recipe.json").read_text("utf-8"))["reviser"]
    assert recorded["url"] is None
    assert "{port}" in recorded["serve"]
    assert "127.0.0.1" not in manifest(tmp_path / "out")["models"]["reviser"]["identity"]


def test_another_command_is_another_recipe_unless_the_model_has_an_id(tmp_path):
    assert clair("build", served_recipe(tmp_path, WORLD)).code == 0
    assert "it differs in reviser.serve" in error_line(clair("build", served_recipe(tmp_path, f"{WORLD} --seed 0")))
    assert clair("build", served_recipe(tmp_path, WORLD, name="named", id="world")).code == 0
    with_id = clair("build", served_recipe(tmp_path, f"{WORLD} --seed 0", name="named", id="world"))
    assert with_id.code == 0, with_id.err


def test_a_server_that_exits_early_is_one_error_with_its_last_lines(tmp_path):
    command = shlex.join(
        [sys.executable, "-c", "print('loading'); print('no GPU here'); raise SystemExit(3)", "{port}"]
    )
    error = last_error(clair("build", served_recipe(tmp_path, command)))
    assert "ended with exit code 3; its last lines: loading | no GPU here; correct reviser.serve" in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_server_that_never_answers_ends_the_run_after_its_patience(tmp_path):
    started = time.monotonic()
    result = clair("build", served_recipe(tmp_path, with_helper(tmp_path, "sleep {port}"), patience=1.5))
    assert time.monotonic() - started < 60
    error = last_error(result)
    assert "has not answered at http://127.0.0.1:" in error
    assert "within 2 s" in error
    assert "set reviser.patience to more seconds" in error
    assert_all_ended(tmp_path)


def test_a_server_that_dies_in_the_middle_is_one_error_and_its_replies_are_kept(tmp_path):
    recipe = served_recipe(tmp_path, with_helper(tmp_path, f"{WORLD} --latency 0.5"), count=40)
    process = start_clair("build", recipe, "--set", "concurrency=4")
    wait_until(lambda: has_replies(tmp_path), 300, "no reply came")
    os.kill(server_pids(tmp_path)[0], signal.SIGKILL)
    error = last_error(finished(process))
    assert "ended with exit code 137" in error
    assert_all_ended(tmp_path)
    assert clair("build", recipe).code == 0
    tokens = manifest(tmp_path / "out")["tokens"]["reviser"]
    assert tokens["calls"] + tokens["reused"] == 40


@pytest.mark.parametrize("waiting", [True, False], ids=["while it starts", "while it answers"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_the_server_ends_with_the_run(tmp_path, number, waiting):
    command = "sleep {port}" if waiting else f"{WORLD} --latency 1"
    recipe = served_recipe(tmp_path, with_helper(tmp_path, command), count=60)
    process = start_clair("build", recipe, "--set", "concurrency=2")
    wait_until(lambda: len(server_pids(tmp_path)) == 2, 60, "no server was started")
    if waiting:
        time.sleep(0.5)
    else:
        wait_until(lambda: has_replies(tmp_path), 300, "no reply came")
    assert process.poll() is None
    process.send_signal(number)
    result = finished(process)
    assert result.code == (130 if number == signal.SIGINT else -signal.SIGKILL), result.err
    assert "Traceback" not in result.err
    assert "never retrieved" not in result.err
    assert_all_ended(tmp_path)


def test_a_line_says_at_the_start_of_the_wait_what_it_waits_for_and_how_long(tmp_path):
    process = start_clair("build", served_recipe(tmp_path, with_helper(tmp_path, "sleep {port}")))
    assert process.stderr is not None
    line = "building"
    while line.startswith("building"):
        line = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    finished(process)
    assert line.startswith("reviser: started `bash -c"), line
    assert "waiting for an answer at http://127.0.0.1:" in line
    assert "at most 5 min" in line


def test_while_it_waits_the_display_shows_the_seconds_and_the_last_words_of_the_server(tmp_path, capfd):
    async def activity() -> str:
        serve = with_helper(tmp_path, "echo loading; echo shard 2 of 3; sleep {port}")
        model = ServedModel("target", resolve(ModelConfig, {"serve": serve, "model": "m"}), {"role": "target"})
        check = asyncio.ensure_future(model.check())
        while "it says" not in model.activity:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        text = model.activity
        await model.close()
        await check
        return text

    text = asyncio.run(activity())
    assert text.startswith("waiting for an answer at http://127.0.0.1:")
    assert "s so far; it says: " in text
    assert_all_ended(tmp_path)


def test_the_command_goes_to_the_server_as_arguments_and_not_to_a_shell():
    config = resolve(
        ModelConfig,
        {"path": "a folder/m", "serve": """srv {model} --port={port} --x '{"a": {}}' '$(date)' ; rm "a b" """},
    )
    expected = ["srv", "a folder/m", "--port=80", "--x", '{"a": {}}', "$(date)", ";", "rm", "a b"]
    assert server_command(config, 80) == expected


@pytest.mark.parametrize(
    ("reviser", "message"),
    [
        ({"serve": "vllm serve m", "model": "m"}, "serve names no {port}"),
        ({"serve": "srv 'a --port {port}", "model": "m"}, "serve is no command (No closing quotation)"),
        ({"serve": "srv --port {port}", "model": "m", "url": "http://127.0.0.1/v1"}, "leave one of them out"),
        ({"serve": "srv --port {port}"}, "serve needs path"),
        ({"serve": "srv --port {port}", "model": "m", "batch_size": 4}, "batch_size is for a model in this process"),
        ({"serve": "srv --port {port}", "model": "m", "batch": True}, "batch needs one url"),
        ({"serve": "no-such-program --port {port}", "model": "m"}, "there is no program 'no-such-program'"),
        ({"serve": "sleep {port}", "path": "no/such/model"}, "no/such/model is no model file or folder"),
    ],
)
def test_mistakes_are_one_line_before_any_work(tmp_path, reviser, message):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    assert message in error_line(clair("build", write_recipe(tmp_path, "", reviser=reviser)))
    assert not (tmp_path / "out").exists()


def test_the_watchdog_passes_the_output_and_the_exit_code_on():
    code = "from clair.core.watched_process import WatchedProcess as W; import sys; sys.exit(W(sys.argv[1:]).wait())"
    command = [sys.executable, "-c", code, "bash", "-c", "echo out; echo err >&2; exit 7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
