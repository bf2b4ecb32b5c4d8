"""The floors of pyproject.toml hold, and the check sees every module there is."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.house.pages import ROOT, tables


def test_every_module_keeps_to_its_floor():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    looked_at = int(re.search(r"Analyzed (\d+) files", done.stdout)[1])
    modules = [file for package in ("clair", "apo", "recipes") for file in (ROOT / package).rglob("*.py")]
    print(f"looked at {looked_at} modules")
    assert looked_at == len(modules) >= 40
    assert "5 kept, 0 broken" in done.stdout


def test_the_architecture_page_shows_the_floors_of_the_check():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = {c["containers"][0]: c["layers"] for c in contracts if c["type"] == "layers"}
    shown = {package: rows for _, package, (_, *rows) in tables("floors")}
    assert set(shown) == set(layers)
    for package, rows in shown.items():
        expected = [sorted(layer.split(" : ")) for layer in reversed(layers[package])]
        assert [sorted(row[1].replace("`", "").split(", ")) for row in rows] == expected, package
