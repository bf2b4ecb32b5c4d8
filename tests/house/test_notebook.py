"""The notebook of the docs runs in a real kernel, where an event loop is running already."""

from __future__ import annotations

import ast
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from tests.house.pages import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "first_pairs.ipynb"


def output(cell: nbformat.NotebookNode, kind: str) -> str:
    """The last result of a cell as it is displayed, of a MIME type."""
    return next(item.data[kind] for item in reversed(cell.outputs) if kind in item.get("data", {}))


@pytest.mark.slow
def test_the_notebook_goes_from_three_prompts_to_a_trained_model(tmp_path):
    for folder in ("clair", "apo", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    cells = {cell.source.splitlines()[-1]: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert "pairs=3" in output(cells["dataset"], "text/plain")
    assert "reviser" in output(cells["clair.estimate(recipe)"], "text/plain")
    assert output(cells["run"], "text/plain").count("\n") == 0
    assert output(cells['Image(run.out / "dynamics.png")'], "image/png")
    answers = ast.literal_eval(output(cells["answers"], "text/plain"))
    assert len(answers) == 3
    assert all(before != after for before, after in answers.values())
    assert (tmp_path / "runs" / "notebook" / "apo_zero" / "model.safetensors").is_file()
