"""A wheel built from the tree works in an environment of its own, outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.house.pages import ROOT

PAIR = {"prompt": "What is 2 + 2?", "chosen": "2 + 2 is 4.", "rejected": "2 + 2 is 5."}


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command, outside of the repository and without its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def test_every_pinned_package_can_be_installed_on_the_oldest_python():
    ours = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["requires-python"])
    (oldest,) = (specifier.version for specifier in ours)
    pins = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    too_new, installed = {}, 0
    for name in (Requirement(pin).name for pin in pins):
        try:
            required = metadata(name)["Requires-Python"] or ""
        except PackageNotFoundError:  # of another extra
            continue
        installed += 1
        if not SpecifierSet(required).contains(f"{oldest}.0"):
            too_new[name] = required
    assert installed > 50
    assert too_new == {}


@pytest.mark.slow
def test_a_built_wheel_runs_both_commands_outside_of_the_repository(tmp_path):
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if name.split("/")[0] in {"clair", "apo", "pyproject.toml", "README.md", "LICENSE"} and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("clair_apo-*.whl")
    (sdist,) = (tmp_path / "dist").glob("clair_apo-*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("clair/prompting/reviser.j2") for name in archive.getnames())

    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    dependencies = Path(pytest.__file__).parents[1]
    (packages / "dependencies.pth").write_text(f"{dependencies}\n", "utf-8")  # a path only: no editable install of ours

    location = run(python, "-c", "import clair, apo; print(clair.__file__, apo.__file__)", cwd=tmp_path)
    assert all(Path(file).is_relative_to(packages) for file in location.split())
    commands = {name: tmp_path / "env" / "bin" / name for name in ("clair", "apo")}
    for command in commands.values():
        assert "Usage" in run(command, "--help", cwd=tmp_path)

    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Why?", "response": "Because."}) + "\n", "utf-8")
    (tmp_path / "data.yaml").write_text(
        "pipeline: revised\nprompts: {path: rows.jsonl, columns: {answer: response}}\nout: pairs\n"
        "reviser: {url: 'http://127.0.0.1:9/v1', model: reviser}\n",
        "utf-8",
    )
    assert run(commands["clair"], "build", "data.yaml", "--dry-run", cwd=tmp_path)
    shutil.copytree(ROOT / "recipes" / "world" / "model", tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(PAIR) + "\n" for _ in range(4)), "utf-8")
    recipe = (
        "model: model\ndataset: pairs.jsonl\nobjective: apo_zero\nout: run\ntrainer: {max_steps: 1, use_cpu: true}\n"
    )
    (tmp_path / "train.yaml").write_text(recipe, "utf-8")
    run(commands["apo"], "train", "train.yaml", cwd=tmp_path)
    assert (tmp_path / "run" / "model.safetensors").is_file()
