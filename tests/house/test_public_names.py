"""`__all__` is sorted, everything in it is there and documented, and importing the packages stays cheap."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from clair.storage.location import local

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HEAVY = ("torch", "openai", "datasets", "transformers", "trl", "pyarrow", "aiohttp", "numpy")
PACKAGES = ("clair", "apo")


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_there_and_documented(package):
    module = importlib.import_module(package)
    names = module.__all__
    # Constants, then classes, then functions: the order that ruff keeps a literal `__all__` in.
    assert list(names) == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert len(names) == len(set(names)) >= 8
    assert dir(module) == sorted(names)
    for name in names:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"{package}.{name} has no docstring"
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        module.nothing_of_the_kind  # noqa: B018


def modules_of(code: str) -> set[str]:
    """The modules that are loaded after `code` has run in a fresh interpreter."""
    report = "import sys; print(*sys.modules, sep='\\n', file=sys.stderr)"
    code = f"import atexit; atexit.register(lambda: exec({report!r})); {code}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stderr.split())


# Counted, not timed: tests/benchmarks/bench_start.py measures seconds.


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_few_modules_and_nothing_heavy(package):
    loaded = modules_of(f"import {package}") - modules_of("pass")
    assert not loaded & set(HEAVY)
    assert len(loaded) <= 10


@pytest.mark.parametrize(("command", "max_modules"), [("clair", 250), ("apo", 420)])
def test_the_help_of_a_command_imports_few_modules_and_nothing_heavy(command, max_modules):
    loaded = modules_of(f"import sys; sys.argv = ['{command}', '--help']; from {command}.cli import main; main()")
    assert not loaded & set(HEAVY)
    assert len(loaded - modules_of("pass")) <= max_modules


@pytest.mark.parametrize("command", PACKAGES)
def test_every_output_of_a_command_that_is_a_local_path_refuses_a_url(command, tmp_path):
    """Options that take a folder or URL are declared as text: a Path of a URL would create a folder `s3:`."""

    def commands(app):
        for group in app.registered_groups:
            yield from commands(group.typer_instance)
        yield from (command.callback for command in app.registered_commands)

    declared = [
        typing.get_type_hints(function, include_extras=True).get("out")
        for function in commands(importlib.import_module(f"{command}.cli").app)
    ]
    paths = [hint for hint in declared if hint and Path in (hint.__origin__, *typing.get_args(hint.__origin__))]
    assert len(paths) >= {"clair": 3, "apo": 12}[command]
    assert [hint for hint in paths if hint.__metadata__[0].callback is not local] == []
    arguments = {"clair": ["report", "nowhere"], "apo": ["merge", "nowhere"]}[command]
    result = subprocess.run(
        [BIN / command, *arguments, "--out", "s3://bucket/a"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr.count("\n"), list(tmp_path.iterdir())) == (2, 1, [])
    assert result.stderr.startswith("error: s3://bucket/a is a URL")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_api_page_renders_every_public_name(package):
    page = (ROOT / "docs/api.md").read_text("utf-8")
    assert sorted(re.findall(rf"^::: {package}\.(\w+)$", page, re.MULTILINE)) == sorted(
        importlib.import_module(package).__all__
    )
