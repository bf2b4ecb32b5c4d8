"""Tracked files: no paths of a machine, nothing nameless, and an architecture page that names every folder."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Written in pieces, so that this file does not match itself.
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
    count, matches = 0, []
    for name in tracked:
        try:
            text = (ROOT / name).read_text("utf-8")
        except UnicodeDecodeError:
            continue
        count += 1
        matches += [f"{name}: {match[0]}" for match in MACHINE_PATHS.finditer(text)]
    print(f"looked at {count} of {len(tracked)} files")
    assert count >= 60
    assert not matches


def test_no_module_is_called_by_what_it_is_not(tracked):
    assert not [name for name in tracked if Path(name).name in NAMELESS]


def test_the_tree_names_every_top_level_thing_and_every_folder_of_recipes(tracked):
    names = set()
    for name in tracked:
        first, *folders = name.split("/")
        names.add(name if first == ".ci" else first)
        if len(folders) > 1 and first == "recipes":
            names.add(f"{first}/{folders[0]}")
    names -= {".gitignore"}
    listed = tree()
    print(f"looked at {len(names)} entries")
    assert len(names) >= 20
    assert not sorted(names - listed), "not in the tree of docs/architecture.md"
    assert not sorted(name for name in listed if not (ROOT / name).exists()), "in the tree, but not there"


def tree() -> set[str]:
    """The paths that the tree of the architecture page names: entries indented under a folder belong to it."""
    block = re.search(
        r"<!-- tree -->\n+```text\n(.*?)```", (ROOT / "docs/architecture.md").read_text("utf-8"), re.DOTALL
    )
    assert block, "docs/architecture.md has no tree: a ```text block after <!-- tree -->"
    paths, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            paths.add(f"{folder}/{name.rstrip('/')}")
        else:
            folder = name.rstrip("/")
            paths.add(folder)
    return paths
