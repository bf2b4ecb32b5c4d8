"""Helpers of the tests of evaluations: the judge's server, the command in this or another process, results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apo import cli
from apo.evaluation.mixeval.config import MixEvalConfig
from apo.evaluation.mixeval.run import MixEvalOutcome, evaluate
from clair.core.recipe import resolve
from recipes.world.running import running_module
from tests.clair.building import CommandResult, run_command

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class JudgeServer:
    """A judge_server.py that answers at `url`: model `j` judges, model `t` answers."""

    url: str

    def requests(self) -> list[dict[str, Any]]:
        """The bodies of all requests."""
        return self._get("/seen")

    def paid(self) -> int:
        """The number of requests."""
        return self._get("/paid")

    def forget(self) -> None:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/forget", timeout=30):
            pass

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=30) as response:
            return json.load(response)


@contextmanager
def judging(latency: float = 0.0) -> Iterator[JudgeServer]:
    """The server for the length of a `with` block, stopped by its own pid."""
    with running_module("tests.apo.evaluation.judge_server", ["--latency", str(latency)]) as server:
        yield JudgeServer(server.url)


def config_for(data: Path, out: Path, **changes: Any) -> MixEvalConfig:
    """A checked config; a change to None leaves a key out."""
    values = {"data": str(data), "out": str(out), "judge": "rule"} | changes
    return resolve(MixEvalConfig, {key: value for key, value in values.items() if value is not None})


def write_recipe(file: Path, **values: Any) -> Path:
    """Write a recipe and return its file. Paths become text; a value of None is left out."""
    plain = json.loads(json.dumps({key: value for key, value in values.items() if value is not None}, default=str))
    file.write_text(yaml.safe_dump(plain), "utf-8")
    return file


def mixeval_command(data: Path, out: Path, **values: Any) -> list[str | Path]:
    """`apo eval mixeval` with a recipe beside `out`."""
    return ["eval", "mixeval", write_recipe(out.with_name(f"{out.name}.yaml"), data=data, out=out, **values)]


def evaluated(data: Path, out: Path, **changes: Any) -> MixEvalOutcome:
    """An evaluation in this process."""
    return evaluate(config_for(data, out, **changes))


def apo(*arguments: str | Path) -> CommandResult:
    """The `apo` command in this process."""
    return run_command(cli.main, "apo", *arguments)


def start_apo(*arguments: str | Path) -> subprocess.Popen[str]:
    """The `apo` command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from apo.cli import main; main()", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
    )


def final(out: Path) -> dict[str, Any]:
    """Score and items: they must not depend on interruptions."""
    score = json.loads((out / "score.json").read_text("utf-8"))
    passing = ("usage", "seconds", "git_commit")
    return {key: value for key, value in score.items() if key not in passing} | {
        "items": (out / "items.jsonl").read_bytes()
    }
