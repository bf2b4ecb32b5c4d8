"""What is in git: no paths of anybody's machine, nothing nameless, and a README that names every top-level thing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Written in pieces, so that this file does not name what it looks for.
MACHINE_PATHS = re.compile(
    "|".join(["/" + "work/", "/" + "root/", "/" + "home/[a-z]", "/" + "Users/", "/opt/" + "[pw]"])
)
NAMELESS = ("utils.py", "helpers.py", "common.py", "misc.py")


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    if not files:
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    return files


def test_no_tracked_file_names_a_path_of_one_machine(tracked):
    looked_at, found = 0, []
    for name in tracked:
        try:
            text = (ROOT / name).read_text("utf-8")
        except UnicodeDecodeError:
            continue
        looked_at += 1
        found += [f"{name}: {match[0]}" for match in MACHINE_PATHS.finditer(text)]
    print(f"looked at {looked_at} of {len(tracked)} files")
    assert looked_at >= 60
    assert not found


def test_no_module_is_called_by_what_it_is_not(tracked):
    assert not [name for name in tracked if Path(name).name in NAMELESS]


def test_the_readme_tree_names_every_top_level_thing_and_every_module(tracked):
    there = set()
    for name in tracked:
        first, *rest = name.split("/")
        there.add(name if first == ".ci" else first)
        if rest and first in ("clair", "apo", "recipes") and rest[0] != "__init__.py":
            there.add(f"{first}/{rest[0]}")
    there -= {".gitignore"}
    named = readme_tree()
    print(f"looked at {len(there)} entries")
    assert len(there) >= 40
    assert not sorted(there - named), "not in the tree of README.md"
    assert not sorted(name for name in named if not (ROOT / name).exists()), "in the tree of README.md, but not there"


def readme_tree() -> set[str]:
    """The paths that the tree of the README names: entries indented under a folder belong to it."""
    block = re.search(r"<!-- tree -->\n+```text\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert block, "README.md has no tree: a ```text block after <!-- tree -->"
    named, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            named.add(f"{folder}/{name.rstrip('/')}")
        else:
            folder = name.rstrip("/")
            named.add(folder)
    return named
