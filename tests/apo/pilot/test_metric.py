"""Gains of pilots over the base by each of the three metrics, on the tiny world's models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from apo.advice.config import AdviseConfig
from apo.evaluation.config import Outcome
from apo.pilot.metric import BASE, measure_gains, metric_name
from clair.core.errors import UserError
from clair.core.recipe import resolve
from clair.data.records import Prompt
from recipes.world.running import ROOT, running
from recipes.world.tasks import distinct_tasks
from tests.apo.conftest import write_jsonl

MODEL = ROOT / "recipes/world/model"
PROMPTS = [Prompt(task.id, ({"role": "user", "content": task.prompt},)) for task in distinct_tasks("validation", 12, 0)]
CHECKER = {"command": [sys.executable, "-m", "recipes.world.checker"], "seconds": 120, "processes": 1}


def config(tmp_path: Path, pilot: dict, **keys: object) -> AdviseConfig:
    values = {
        "dataset": "pairs.jsonl",
        "model": {"path": str(MODEL), "temperature": 1.0, "max_tokens": 48, "batch_size": 64},
        "pilot": {"recipe": "train.yaml", **pilot},
        "out": str(tmp_path / "advice"),
    }
    return resolve(AdviseConfig, values | keys)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """The base, a model that answers nonsense, and a copy of the base."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("broken", "copy"):
        shutil.copytree(MODEL, folder / name)
    weights = load_file(folder / "broken/model.safetensors")
    save_file({k: -w if "norm" in k else w for k, w in weights.items()}, folder / "broken/model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return {BASE: str(MODEL), **{name: str(folder / name) for name in ("broken", "copy")}}


@pytest.mark.parametrize(
    ("pilot", "keys", "name"),
    [
        ({}, {"judge": {"url": "http://127.0.0.1:9/v1", "model": "j"}}, "judge"),
        ({"checker": CHECKER}, {"judge": {"url": "http://127.0.0.1:9/v1", "model": "j"}}, "checker"),
        ({"benchmark": "ifeval.yaml"}, {}, "benchmark"),
    ],
)
def test_a_checker_or_a_benchmark_takes_precedence_of_the_judge(tmp_path, pilot, keys, name):
    assert metric_name(config(tmp_path, pilot, **keys)) == name


def test_prompts_beside_a_benchmark_would_be_ignored(tmp_path):
    with pytest.raises(UserError, match=r"pilot.prompts would be ignored"):
        metric_name(config(tmp_path, {"benchmark": "ifeval.yaml", "prompts": {"path": "p.jsonl"}}))


def test_a_budget_beside_a_benchmark_would_not_limit_it(tmp_path):
    with pytest.raises(UserError, match=r"^budget would not limit the benchmark; leave it out, and give ifeval.yaml"):
        metric_name(config(tmp_path, {"benchmark": "ifeval.yaml"}, budget={"tokens": 1000}))


def test_the_budget_of_a_benchmark_covers_the_base_and_all_pilots(tmp_path, monkeypatch):
    recipe = {"prompts": "input.jsonl", "model": {"path": str(MODEL)}, "budget": {"tokens": 300}, "out": "unused"}
    (tmp_path / "ifeval.yaml").write_text(json.dumps(recipe))
    pilot = {"benchmark": str(tmp_path / "ifeval.yaml"), "objectives": ["sft", "dpo"], "displacements": [0.1]}
    budgets = {}

    def evaluate(evaluation, name):
        budgets[name] = evaluation.budget.tokens
        return Outcome(out=tmp_path, stopped="enough" if name == "sft-0.1" else None)

    monkeypatch.setattr("apo.pilot.metric._evaluate", evaluate)
    # The guard has stopped the other pilot, which takes nothing away from the parts, and gives them nothing.
    assert measure_gains(config(tmp_path, pilot), {BASE: "m", "sft-0.1": "n"}, [], print).stopped == "enough"
    assert budgets == {BASE: 100, "sft-0.1": 100}


@pytest.mark.parametrize(("difference", "pilot"), [(0.5, {}), (2, {}), (0, {"checker": CHECKER})])
def test_a_gain_that_matters_is_a_share_below_one_half_without_a_checker(tmp_path, difference, pilot):
    with pytest.raises(UserError, match="difference"):
        config(tmp_path, pilot, difference=difference)


@pytest.mark.parametrize("difference", [0.001, 0.3, 2])
def test_with_a_checker_a_gain_is_in_its_unit_and_the_sample_of_pairs_has_its_default_size(tmp_path, difference):
    checked = config(tmp_path, {"checker": CHECKER}, difference=difference)
    assert (checked.difference, checked.sample_difference) == (difference, 0.1)


@pytest.mark.slow
def test_a_judge_compares_with_the_base_in_both_orders_and_is_paid_once(tmp_path, models):
    with running() as server:
        judged = config(tmp_path, {}, judge={"url": server.url, "model": "world-judge", "id": "judge"})
        (tmp_path / "advice").mkdir()
        gains = measure_gains(judged, models, PROMPTS, lambda _: None)
        paid = server.stats()["paid_total"]
        again = measure_gains(judged, models, PROMPTS, lambda _: None)
        assert server.stats()["paid_total"] == paid
    assert 0 < paid <= 2 * len(PROMPTS)  # the copy's answers are the base's: nothing to judge
    assert len(gains.clusters) + gains.left_out == len(PROMPTS)
    assert set(gains.by_pilot["copy"]) == {0.0}
    assert sum(gains.by_pilot["broken"]) < 0
    assert all(-0.5 <= gain <= 0.5 for gain in gains.by_pilot["broken"])
    assert (again.by_pilot, again.clusters) == (gains.by_pilot, gains.clusters)


@pytest.mark.slow
def test_a_checker_scores_all_answers_to_a_prompt_at_once(tmp_path, models):
    (tmp_path / "advice").mkdir()
    gains = measure_gains(config(tmp_path, {"checker": CHECKER}), models, PROMPTS, lambda _: None)
    assert len(gains.clusters) == len(PROMPTS)
    assert set(gains.by_pilot["copy"]) == {0.0}
    assert sum(gains.by_pilot["broken"]) < 0


@pytest.mark.slow
def test_a_benchmark_is_run_on_every_model_and_paired_by_row(tmp_path, models):
    pytest.importorskip("langdetect")
    rows = [
        {"key": n, "prompt": task.prompt, "instruction_id_list": ["length_constraints:number_words"],
         "kwargs": [{"relation": "at least", "num_words": 3}]}
        for n, task in enumerate(distinct_tasks("validation", 8, 0))
    ]  # fmt: skip
    write_jsonl(tmp_path / "input.jsonl", rows)
    recipe = {"prompts": str(tmp_path / "input.jsonl"), "out": str(tmp_path / "unused"),
              "model": {"path": str(MODEL), "max_tokens": 24, "batch_size": 64}}  # fmt: skip
    (tmp_path / "ifeval.yaml").write_text(json.dumps(recipe))
    measured = config(tmp_path, {"benchmark": str(tmp_path / "ifeval.yaml")})
    gains = measure_gains(measured, models, [], lambda _: None)
    assert len(gains.clusters) == 8
    assert set(gains.by_pilot) == {"broken", "copy"}
    assert set(gains.by_pilot["copy"]) == {0.0}
