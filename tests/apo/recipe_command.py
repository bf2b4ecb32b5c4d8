"""Run a command of `apo` in this process, with a recipe of the given keys."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from apo.cli import app
from clair.core.errors import UserError
from tests.apo.evaluation.evaluating import write_recipe


def run(command: str, *, input: str | None = None, **keys: Any) -> Result:
    """Run `command` with a recipe of `keys`; `input` is what is typed."""
    with TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder) / "recipe.yaml", **keys)
        return CliRunner().invoke(app, [*command.split(), str(recipe)], input=input)


def failure(command: str, *, input: str | None = None, **keys: Any) -> str:
    """Run `command` like `run` and return its error, which is one line."""
    result = run(command, input=input, **keys)
    assert isinstance(result.exception, UserError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)
