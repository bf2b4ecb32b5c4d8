"""docs/properties_measured.md is made of the committed results, and these can be made again."""

from __future__ import annotations

import json

import pytest

from clair.core.errors import UserError
from recipes.experiments.neighbours import conformal_page
from recipes.experiments.neighbours.conformal import (
    RESULTS,
    WORLDS,
    distance_of_mean,
    jobs,
    measure,
    measure_biased,
)
from recipes.world.running import ROOT


@pytest.fixture(scope="module")
def lines():
    return conformal_page.read_lines(ROOT / RESULTS)


def test_the_page_is_made_of_the_committed_results(lines):
    text = (ROOT / conformal_page.PAGE).read_text("utf-8")
    assert text == conformal_page.HEADING + conformal_page.section(lines)


def test_results_that_are_not_whole_make_no_page(tmp_path):
    (tmp_path / "part.jsonl").write_text((ROOT / RESULTS).read_text("utf-8").partition("\n")[0] + "\n")
    with pytest.raises(UserError, match=r"lacks 274 results, such as \('table', 'diabetes'"):
        conformal_page.read_lines(tmp_path / "part.jsonl")


def test_every_distance_is_above_its_bound_and_a_constrained_model_is_never_rejected(lines):
    for key, line in lines.items():
        if key[0] == "biased":
            assert line["distance"] >= line["bound"] - 1e-12
            assert line["distance of mean"] == pytest.approx(distance_of_mean(key[1]), abs=2e-4)
        if key[0] == "table":
            assert {shape["risk"]["constrained"] for shape in line["shapes"].values()} == {0.0}


@pytest.mark.parametrize(
    "key", [pytest.param(("table", "wine", 0), marks=pytest.mark.slow), ("biased", 0.2, 1000, 100, 0)]
)
def test_a_result_can_be_made_again(lines, key):
    again = {name: value for name, value in measure(key).items() if name not in ("key", "cpu_seconds")}
    committed = {name: lines[key][name] for name in again}
    assert json.loads(json.dumps(again), parse_float=lambda x: round(float(x), 5)) == json.loads(
        json.dumps(committed), parse_float=lambda x: round(float(x), 5)
    )


def test_the_exact_risks_of_the_made_up_sides_are_the_shares_of_a_large_draw():
    import numpy as np

    a, b = np.random.default_rng(0).exponential(1.0, (2, 400_000))
    for sides, risk in WORLDS.values():
        up, down = sides(a, b)
        assert risk(2.0, 1.5) == pytest.approx(float(((up > 2.0) | (down > 1.5)).mean()), abs=3e-3)


def test_without_bias_the_bound_is_zero_and_with_it_more_rows_do_not_remove_it():
    assert measure_biased(0.0, 1000, 20, 0)["bound"] == 0
    assert distance_of_mean(0.2) > distance_of_mean(0.05) > distance_of_mean(0.0) == 0
    assert len(list(jobs())) == 275
