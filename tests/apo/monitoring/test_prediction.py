"""The prediction of `apo distinguish`, checked after training: by hand, against scipy, and by the three commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from apo.cli import app
from apo.monitoring.prediction import check_lines, check_order, group_metrics, rank_correlation, read_prediction
from clair.core.errors import UserError
from tests.apo.conftest import TRAINER, make_pairs
from tests.apo.recipe_command import failure, run


def report(*speeds: float, half: float = 0.1):
    clusters = [
        {"name": f"g{n}", "speed": {"value": speed, "lo": speed - half, "hi": speed + half}, "rank": [n, n]}
        for n, speed in enumerate(speeds)
    ]
    return {"by": "behaviour", "objective": "dpo", "beta": 0.1, "clusters": clusters}


def log(*rates: float, noise: float = 0.001):
    """Losses that fall from 0.7 at constant rates, over 10 steps."""
    rows = []
    for step in (0, 5, 10):
        row = {"step": step}
        for n, rate in enumerate(rates):
            row |= {f"group/g{n}/loss": 0.7 * (1 - rate * step / 10), f"group/g{n}/loss_noise": noise}
            row[f"group/g{n}/right"] = 0.5 + step / 20
        rows.append(row)
    return rows


def test_the_area_is_the_mean_fall_of_the_loss_and_the_order_is_compared():
    check = check_order(report(5, 4, 3, 2, 1), log(0.8, 0.6, 0.7, 0.2, 0.1))
    assert [group.area for group in check.groups] == pytest.approx([0.4, 0.3, 0.35, 0.1, 0.05])
    assert [group.measured_rank for group in check.groups] == [1, 3, 2, 4, 5]
    assert check.groups[0].right == 1.0
    assert check.correlation == pytest.approx(0.9)
    assert check.interval[0] <= 0.9 <= check.interval[1]
    assert check.chance == pytest.approx(5 / 120, abs=0.015)  # 5 of the 120 orders have 0.9 or more
    assert check.verdict().startswith("the prediction came true")


def test_verdicts_for_the_opposite_for_noise_and_for_few_groups():
    speeds = report(5, 4, 3, 2, 1)
    assert "did not come true" in check_order(speeds, log(0.1, 0.2, 0.3, 0.4, 0.5)).verdict()
    noisy = check_order(report(5, 4, 3, 2, 1, half=20), log(0.5, 0.4, 0.3, 0.2, 0.1, noise=0.7))
    assert noisy.correlation == pytest.approx(1.0)
    assert noisy.interval[0] < 0
    assert noisy.verdict().startswith("undecided")
    assert "3 groups are too few" in check_order(report(3, 2, 1), log(0.3, 0.2, 0.1)).verdict()
    assert check_order(speeds, log(0.1, 0.2, 0.3, 0.4, 0.5)[:1]) is None
    assert check_lines(speeds, None)[0].endswith("not yet measured twice on held-out pairs")


def test_rank_correlation_is_scipys_with_ties():
    random = np.random.default_rng(0)
    first, second = random.integers(0, 4, (20, 6)), random.normal(size=(20, 6))
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    assert rank_correlation(first, second) == pytest.approx(expected)
    assert np.isnan(rank_correlation(np.zeros(3), np.arange(3.0)))


def test_groups_are_measured_separately():
    metrics = group_metrics(["a", "b", "a", None], [(1.0, 1.0), (5.0, 0.0), (3.0, 0.5), (9.0, 0.0)])
    assert (metrics["group/a/loss"], metrics["group/a/right"], metrics["group/b/loss"]) == (2.0, 0.75, 5.0)
    assert metrics["group/a/loss_noise"] == pytest.approx(12.706, abs=1e-3)  # t(0.975, 1) times a standard error of 1
    assert "group/b/loss_noise" not in metrics


def test_what_predicts_no_order_is_one_line(tmp_path):
    (tmp_path / "distinguish.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no distinguish\.json of `apo distinguish`"):
        read_prediction(str(tmp_path))
    for change, message in (({"by": "kmeans:8"}, "is about kmeans:8, which no held-out pair names"), ({}, "has 1 ")):
        (tmp_path / "distinguish.json").write_text(json.dumps(report(1.0) | change))
        with pytest.raises(UserError, match=message):
            read_prediction(str(tmp_path))


def test_predict_train_and_diagnose(model_dir, tmp_path):
    rows = [{**row, "behaviour": ["plus", "minus"][index % 2]} for index, row in enumerate(make_pairs(24))]
    for name, part in (("train", rows[:16]), ("test", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    common = {"model": model_dir, "dataset": tmp_path / "train.jsonl"}
    assert run("distinguish", **common, by="behaviour", out=tmp_path / "predicted").exit_code == 0
    common |= {"prediction": tmp_path / "predicted", "eval": tmp_path / "test.jsonl"}
    recipe = common | {"trainer": {**TRAINER, "eval_strategy": "no"}, "samples": 0, "out": tmp_path / "run"}
    assert "no held-out pairs" in failure("train", **{**recipe, "eval": False})
    assert "is of apo_zero at beta 0.1, and this run trains dpo" in failure("train", **recipe, objective="dpo")
    assert "and `by` trains a run for each" in failure("train", **recipe, by="behaviour")
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_pairs(4)))
    assert "has no column 'behaviour'" in failure("train", **{**recipe, "eval": tmp_path / "plain.jsonl"})
    result = run("train", **recipe)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "group/plus/loss" in line]
    assert [line["step"] for line in measured] == [0, 1, 2, 3, 4, 5, 6]
    assert measured[0]["group/minus/loss"] == pytest.approx(1.0, abs=1e-5)  # apo_zero at the reference
    output = CliRunner().invoke(app, ["diagnose", str(tmp_path / "run")]).output
    assert "prediction of apo distinguish (apo_zero, beta 0.1, by behaviour)" in output
    assert "2 groups are too few to exclude chance" in output or "did not come true" in output
    assert (tmp_path / "run/order.png").read_bytes().startswith(b"\x89PNG")
