"""The pages of objectives and training say what the code does."""

from __future__ import annotations

import pytest
from datasets import Dataset

from apo.losses.objectives import _KINDS, _OPTIONAL_INPUTS, OBJECTIVES, apo_down, apo_zero, dpo, resolve_objective
from apo.monitoring.diagnosis import RULES
from apo.monitoring.guard import GuardMeasurement, guard_metrics
from apo.monitoring.metrics import CONDITIONAL_METRICS, LOGP_MEANS, QUANTILES, RATIO_MEANS, SHARES
from apo.monitoring.token_diagnostics import METRICS as PROBED
from tests.apo.conftest import make_model, make_pairs, make_tokenizer
from tests.apo.losses.derivatives import gradients
from tests.house.pages import blocks, pages, tables


def rows_of(kind):
    ((_, _, (_, *rows)),) = tables(kind)
    return rows


def test_every_objective_has_a_row_with_its_kind():
    kinds = {row[0].strip("`"): row[1] for row in rows_of("objectives")}
    assert kinds == {name: resolve_objective(name).kind for name in OBJECTIVES}


def test_the_table_of_gradients_is_what_autograd_says():
    for winner, loser, *cells in rows_of("gradients"):
        for objective, cell in zip((apo_zero, apo_down, dpo), cells, strict=True):
            documented = [float(number) for number in cell.split(",")]
            assert list(gradients(objective, float(winner), float(loser), beta=1.0)) == pytest.approx(
                documented, abs=6e-5
            )


def test_the_table_of_kinds_is_what_a_function_is_offered():
    for row, (first_two, kind) in zip(rows_of("kinds"), _KINDS.items(), strict=True):
        assert row[0] == kind
        assert all(f"`{name}`" in row[1] for name in first_two)
        assert set(row[2].replace("`", "").split(", ")) == _OPTIONAL_INPUTS[kind]


def test_every_metric_is_explained():
    documented = {name for row in rows_of("metrics") for name in row[0].replace("`", "").split(", ")}
    quantiles = {f"rewards/{side}_{word}" for side in ("chosen", "rejected") for word in QUANTILES}
    speed = {"pairs_per_second", "tokens_per_second", "mfu"}
    assert documented == {*LOGP_MEANS, *RATIO_MEANS, *SHARES, *CONDITIONAL_METRICS, *quantiles, *speed}


def test_every_metric_of_the_probe_and_the_guard_is_explained():
    documented = {name for row in rows_of("probe") for name in row[0].replace("`", "").split(", ")}
    assert documented == set(PROBED)
    looks = guard_metrics(
        GuardMeasurement((1.0, 2.0), (1, 2), (1.0, 0.0)), GuardMeasurement((1.0, 2.0), (1, 2), (1.0, 0.0))
    )
    page = pages()["docs/training_monitoring.md"]
    assert all(f"`{name}`" in page for name in looks)


def test_every_rule_is_explained():
    assert [row[0].strip("`") for row in rows_of("rules")] == list(RULES)


def test_an_objective_written_as_the_page_says_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = Dataset.from_list(make_pairs(8))
    namespace = {"model": make_model(), "tokenizer": make_tokenizer(), "pairs": pairs}
    page = [block.code for block in blocks("python") if block.page == "docs/own_objective.md"]
    assert len(page) == 2
    for code in page:
        exec(code.replace("max_steps=100", "max_steps=2, save_strategy='no', disable_tqdm=True"), namespace)
    assert sum(len(code.strip().splitlines()) for code in page) <= 20
