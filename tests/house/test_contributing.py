"""docs/contributing.md is followed to the letter: every step in a copy of the project, and every command run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.pages import ROOT, Block, contributions


@pytest.fixture
def copy(tmp_path) -> Path:
    """The working tree as git sees it, untracked files included."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    if not names:
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("contribution", contributions())
def test_every_step_works_as_written(contribution, copy):
    counts = {"diff": 0, "python": 0, "sh": 0}
    for block in contributions()[contribution]:
        if block.language == "diff":
            apply(block, copy)
        elif block.language == "python":
            assert not (copy / block.title).exists(), f"{block.location}: {block.title} is there already"
            (copy / block.title).write_text(block.code, "utf-8")
        else:
            for command in block.code.strip().splitlines():
                run(command, copy)
        counts[block.language] += 1
    assert all(counts.values()), counts


def apply(block: Block, copy: Path) -> None:
    """Replace the old lines of a diff, which stand in the file exactly once, by its new lines."""
    lines = block.code.splitlines()
    assert all(line[:1] in ("", " ", "+", "-") for line in lines), block.location
    old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
    new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
    file = copy / block.title
    text = file.read_text("utf-8")
    assert text.count(old) == 1, f"{block.location}: these lines stand in {block.title} {text.count(old)} times:\n{old}"
    file.write_text(text.replace(old, new), "utf-8")


def run(command: str, copy: Path) -> None:
    environment = {
        **os.environ, "PYTHONPATH": str(copy), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }  # fmt: skip
    result = subprocess.run(
        shlex.split(command), cwd=copy, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
