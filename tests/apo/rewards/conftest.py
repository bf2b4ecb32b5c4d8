"""The world that the tests of rewards share."""

from __future__ import annotations

import random

import pytest

from tests.apo.conftest import make_model, make_tokenizer
from tests.apo.recipe_command import run
from tests.apo.rewards.tastes import USERS, taste, write


@pytest.fixture(scope="package")
def world(tmp_path_factory):
    """A tiny model, comparisons of users of two opposite tastes, and a reward of each kind fitted on them."""
    folder = tmp_path_factory.mktemp("rewards")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = [row for user in range(USERS) for row in taste(rng, f"u{user}", user % 2 == 0, 20)]
    write(folder / "pairs.jsonl", rows)
    for kind in ("bradley_terry", "pal", "vpl"):
        result = run("reward fit", dataset=folder / "pairs.jsonl", model=folder / "model", kind=kind, out=folder / kind)
        assert result.exit_code == 0, result.output
    return folder
