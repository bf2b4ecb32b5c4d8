"""The layers of pyproject.toml hold, and the check sees every module there is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.house.pages import ROOT, tables


def test_every_folder_keeps_to_its_layer():
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    analyzed = int(re.search(r"Analyzed (\d+) files", result.stdout)[1])
    modules = [file for package in ("clair", "apo", "recipes") for file in (ROOT / package).rglob("*.py")]
    print(f"looked at {analyzed} modules")
    assert analyzed == len(modules) >= 40
    assert "6 kept, 0 broken" in result.stdout


def test_the_architecture_page_shows_every_layer_folder_and_module():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = {c["containers"][0]: c["layers"] for c in contracts if c["type"] == "layers" and c.get("exhaustive")}
    shown = {package: rows for _, package, (_, *rows) in tables("layers")}
    assert set(shown) == set(layers) == {"clair", "apo"}
    for package, rows in shown.items():
        expected = [
            (str(number), folder)
            for number, layer in enumerate(reversed(layers[package]), 1)
            for folder in sorted(layer.split(" : "))
        ]
        assert [(number, folder.strip("`")) for number, folder, _, _ in rows] == expected, package
        for _, folder, _, listed in rows:
            root = ROOT / package / folder.strip("`")
            modules = {file.relative_to(root).with_suffix("").as_posix() for file in root.rglob("*.py")}
            modules = {name for name in modules if not name.endswith("__init__")}
            assert set(re.findall(r"`([^`]+)`", listed)) == modules, f"{package}/{folder}"


def test_no_folder_of_code_has_more_than_sixteen_modules_and_each_says_what_it_is_for():
    for package in ("clair", "apo"):
        for init in (ROOT / package).rglob("__init__.py"):
            modules = [file for file in init.parent.glob("*.py") if file.name != "__init__.py"]
            assert len(modules) <= 16, init.parent
            assert ast.get_docstring(ast.parse(init.read_text("utf-8"))), init
