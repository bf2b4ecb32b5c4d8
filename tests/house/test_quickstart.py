"""The promises of docs/quickstart.md, checked on the quickstart itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.house.pages import ROOT, pages


@pytest.mark.slow
def test_the_quickstart_teaches_what_it_promises():
    """It goes on from a run that is there already; a run from nothing takes a minute or two."""
    result = subprocess.run(
        [sys.executable, "-m", "recipes.world.quickstart"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads((ROOT / "runs" / "quickstart" / "summary.json").read_text("utf-8"))
    assert summary["delta"] >= 0.15
    assert summary["ci95"][0] > 0.05
    assert sum(skill["tuned"] > skill["base"] for skill in summary["by_skill"].values()) >= 3
    assert summary["swapped"] - summary["base"] < 0.03
    assert 0.4 <= summary["base"] <= 0.7
    assert summary["n"] >= 500
    assert summary["pairs"] + summary["dropped"] == 1200
    assert summary["seconds"] < 300


def test_readme_and_quickstart_page_show_the_same_output():
    shown = [re.search(r"```text\n(Right answers.*?)```", pages()[page], re.DOTALL)[1] for page in PAGES]
    assert shown[0] == shown[1]
    points, low, high = re.search(r"\+([\d.]+) points, 95 % interval \+([\d.]+) to \+([\d.]+)", shown[0]).groups()
    assert f"+{points} points, 95 % interval +{low} to +{high}" in pages()["docs/recipes.md"]


PAGES = ("README.md", "docs/quickstart.md")
