"""Helpers of the tests of builds: recipes, prompt files, servers as processes, and outputs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from clair import cli
from clair.core.recipe import resolve
from clair.ledger.ledger import Ledger
from clair.pipeline.config import BuildConfig
from recipes.world.running import running_module

ROOT = Path(__file__).parents[2]
SPLIT_FILES = ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")


def call_counts(ledger: Ledger) -> dict[str, int]:
    """The number of requests in each state."""
    return dict(ledger.read("SELECT state, count(*) FROM calls GROUP BY state"))


# ---- what goes in


def write_prompts(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def scripted_rows(scripts: Sequence[str]) -> list[dict[str, Any]]:
    """One row a script; a reply that is put to the wrong row shows in the answer's number."""
    return [
        {"id": f"row-{n}", "prompt": f"Task {n} [[{script}]]", "answer": f"bad answer {n}"}
        for n, script in enumerate(scripts)
    ]


def recipe_for(tmp_path: Path, url: str, **changes: Any) -> dict[str, Any]:
    """The values of a recipe on the server at `url`: prompts.jsonl in, out/ out. A change to None leaves a key out."""
    values = {
        "pipeline": "revised",
        "prompts": {"path": str(tmp_path / "prompts.jsonl")},
        "reviser": {"url": url, "model": "m", "temperature": 0.7},
        "out": str(tmp_path / "out"),
    } | changes
    return {key: value for key, value in values.items() if value is not None}


def config_for(tmp_path: Path, url: str, **changes: Any) -> BuildConfig:
    """The same as a checked config."""
    return resolve(BuildConfig, recipe_for(tmp_path, url, **changes))


def write_recipe(tmp_path: Path, url: str, **changes: Any) -> Path:
    """The same as a file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_for(tmp_path, url, **changes), sort_keys=False), "utf-8")
    return path


# ---- running


@dataclass(frozen=True)
class CommandResult:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str


def clair(*arguments: str | Path) -> CommandResult:
    """The `clair` command in this process."""
    return run_command(cli.main, "clair", *arguments)


def run_command(main: Callable[[], None], name: str, *arguments: str | Path) -> CommandResult:
    """A command in this process, by its `main`."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_info:
            main()
    finally:
        sys.argv = argv
    code = exit_info.value.code
    return CommandResult(code if isinstance(code, int) else 0 if code is None else 1, out.getvalue(), err.getvalue())


def start_clair(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """The `clair` command in a process of its own, with some more in its environment."""
    code = "from clair.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200", **(environment or {})},
        **options,
    )


def finished(process: subprocess.Popen[str], seconds: float = 120) -> CommandResult:
    """Wait for a command's end; it is killed where it takes longer."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {seconds} s; its stderr: {err[-2000:]}") from None
    return CommandResult(process.returncode, out, err)


def error_line(result: CommandResult) -> str:
    """The one line of a user's error."""
    bars = ("building", "evaluating", "checking", "probing", "counting")
    lines = [line for line in result.err.splitlines() if line.strip() and not line.lstrip().startswith(bars)]
    assert result.code == 2, result
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


# ---- the scripted server


@dataclass(frozen=True)
class ScriptedServer:
    """A scripted_server.py that answers at `url`."""

    url: str
    pid: int

    def requests(self) -> list[dict[str, Any]]:
        """Every request that the server received."""
        return json.loads(self._get("/seen"))

    def model_requests(self) -> list[dict[str, str]]:
        """The headers of every request for the list of models."""
        return json.loads(self._get("/looked-at"))

    def forget(self) -> None:
        """Forget the requests and begin every script anew."""
        self._get("/forget")

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=30) as response:
            return response.read()

    def steps(self) -> list[str]:
        """The step that each request was answered with."""
        return [request["step"] for request in self.requests()]


@contextmanager
def scripted() -> Iterator[ScriptedServer]:
    """A scripted server for the length of a `with` block, stopped by its own pid."""
    with running_module("tests.clair.scripted_server", []) as server:
        yield ScriptedServer(server.url, server.pid)


@dataclass(frozen=True)
class BatchService(ScriptedServer):
    """A batch_server.py that answers at `url`."""

    def trouble(self, **odds: Any) -> None:
        """Set the faults from now on, and forget everything before."""
        self.forget()
        self._post("/trouble", odds)

    def end(self, status: str) -> None:
        """All batches end now, in this status."""
        self._post(f"/end/{status}", {})

    def lose(self, *, files: bool = False) -> None:
        """The service forgets its batches, or only their result files."""
        self._post("/lose", {"files": files})

    def poll_batches(self) -> None:
        """Request the status of every batch, which advances it."""
        for number in range(len(self.books()["batches"])):
            self._get(f"/v1/batches/batch-{number}")

    def books(self) -> dict[str, Any]:
        """The numbers of requests uploaded, run and delivered."""
        return json.loads(self._get("/books"))

    def _post(self, path: str, body: Any) -> None:
        data = json.dumps(body).encode()
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, data=data, timeout=30):
            pass


@contextmanager
def batch_service() -> Iterator[BatchService]:
    """A service with a Batch API for the length of a `with` block, stopped by its own pid."""
    with running_module("tests.clair.batch_server", []) as server:
        yield BatchService(server.url, server.pid)


# ---- what comes out


def pairs(out: Path) -> list[dict[str, Any]]:
    """All pairs of a dataset folder, train before test."""
    return [row for name in SPLIT_FILES for row in pq.read_table(out / name).to_pylist()]


def drops(out: Path) -> list[dict[str, Any]]:
    """The lines of dropped.jsonl."""
    return [json.loads(line) for line in (out / "dropped.jsonl").read_text("utf-8").split("\n") if line]


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text("utf-8"))


def outcomes(out: Path) -> dict[str, str]:
    """By row id: the chosen text of a pair, or `stage.reason` of a drop (`!` before it where it counts as failed)."""
    chosen = {row["id"]: row["chosen"][0]["content"] for row in pairs(out)}
    dropped = {row["id"]: f"{'!' * row['failed']}{row['stage']}.{row['reason']}" for row in drops(out)}
    assert not set(chosen) & set(dropped)
    return chosen | dropped


def final_bytes(out: Path) -> dict[str, bytes]:
    """The files that must not depend on how often a build was interrupted."""
    return {name: (out / name).read_bytes() for name in (*SPLIT_FILES, "dropped.jsonl")}
