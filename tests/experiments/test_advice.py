"""The measurement of the advice: its design, regrets by pencil, and one combination from pairs to a trained model."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from clair.core.errors import UserError
from clair.data.dataset import DatasetWriter, load_pairs
from clair.data.records import Pair
from recipes.experiments.advice import measure as design
from recipes.experiments.advice.measure import (
    COMBINATIONS,
    QUESTIONS,
    RATES,
    TARGETS,
    prepare,
    relabelled,
    train_and_score,
    training_jobs,
)
from recipes.experiments.advice.table import PAGE, against, mean_regret, measured, page, policies, regrets
from recipes.experiments.paper_mini import results
from recipes.world.running import ROOT
from recipes.world.tasks import distinct_tasks


def test_the_design_has_24_combinations_of_six_new_targets_and_all_kinds():
    assert len(COMBINATIONS) == 24
    assert Counter(of.target for of in COMBINATIONS) == dict.fromkeys(TARGETS, 4)
    assert {of.kind for of in COMBINATIONS} == set(design.Kind.__args__)
    assert all(len(of.writers) == {"off_policy": 2, "stronger": 1}.get(of.kind, 0) for of in COMBINATIONS)


def advised(objective: str, **more: object) -> dict:
    advice = {"objective": objective, "sure": "high", "beta": None if objective == "none" else 0.05,
            "learning_rate": None if objective == "none" else 2e-5}  # fmt: skip
    return {
        "advice": advice,
        "alone": {**advice, "objective": "dpo", "sure": "low"},
        "distrust": None,
        "pairs": 9,
        **more,
    }


def test_runs_go_seed_by_seed_with_the_advice_s_beta_and_each_objective_s_rate():
    names = [of.name(number) for number, of in enumerate(COMBINATIONS)]
    advice_by_name = {names[0]: advised("apo_zero", dataset="a"), names[5]: advised("none", dataset="b")}
    planned = list(training_jobs(advice_by_name, Path("run")))
    assert [job.seed for job in planned] == [0] * 6 + [1] * 6
    assert [job.objective for job in planned[:3]] == list(RATES)
    assert {(o.dataset, o.beta) for o in planned} == {("a", 0.05), ("b", design.BETA)}
    assert {(o.objective, o.learning_rate) for o in planned} == set(RATES.items())
    assert len({job.out for job in planned}) == len({job.name for job in planned}) == 12


def test_labels_are_exchanged_in_half_of_the_pairs_or_in_all(tmp_path):
    writer = DatasetWriter(tmp_path / "built", seed=0, test_fraction=0.0)
    for task in distinct_tasks("train", 40, seed=0):
        writer.add(Pair(task.id, ({"role": "user", "content": task.prompt},), task.right, task.wrong).row())
    writer.close(keep=True)
    right = {task.prompt: task.right for task in distinct_tasks("train", 40, seed=0)}
    for half, expected in ((True, 20), (False, 0)):
        out = relabelled(tmp_path / "built", tmp_path / str(half), 1, half=half)
        rows = list(load_pairs(out))
        correct = sum(row["chosen"][0]["content"] == right[row["prompt"][0]["content"]] for row in rows)
        assert len(rows) == 40
        assert correct == pytest.approx(expected, abs=5 * half)  # half of each template's, some of which are odd


def test_a_writer_has_its_share_of_right_answers_and_its_wording():
    (task,), rng = distinct_tasks("train", 1, seed=0), Random(0)
    texts = [design.written((0.3, (0.0, 0.5, 0.5)), task, rng) for _ in range(1000)]
    assert 0.25 < sum(task.right in text for text in texts) / 1000 < 0.35
    assert 0.45 < sum(text in (task.right, task.wrong) for text in texts) / 1000 < 0.55


# ---- regrets by pencil


def lines(number: int, objective: str, base: int, right: dict[str, tuple[int, int]], **more: object) -> list[dict]:
    """An advice and its six runs, with these numbers of right answers of ten."""
    name = COMBINATIONS[number].name(number)
    advice = {"kind": "advice", "name": name, **advised(objective, base={"right": ones(base)}), **more}
    runs = [
        {
            "kind": "run",
            "name": f"{name}/{of}/{seed}",
            "objective": of,
            "learning_rate": RATES[of],
            "right": ones(count),
        }
        for of, counts in right.items()
        for seed, count in enumerate(counts)
    ]
    return [advice, *runs]


def at_rate(objective: str) -> dict:
    return {"objective": objective, "learning_rate": RATES[objective]}


def ones(count: int) -> str:
    return "1" * count + "0" * (10 - count)


FOUR = [
    *lines(0, "apo_zero", 4, {"apo_zero": (8, 6), "apo_down": (3, 3), "dpo": (6, 6)}),  # best 0.7: the advice
    *lines(4, "dpo", 4, {"apo_zero": (8, 8), "apo_down": (2, 2), "dpo": (6, 5)}),  # 0.25 below the best
    *lines(8, "none", 7, {"apo_zero": (5, 5), "apo_down": (6, 6), "dpo": (4, 4)}),  # not to train is the best
    *lines(12, "apo_down", 5, {"apo_zero": (4, 4), "apo_down": (6, 6), "dpo": (7, 7)}),  # 0.1 below
]


def test_regret_by_pencil():
    measurements, rules = measured(FOUR), policies()
    assert [measurement.best for measurement in measurements] == ["apo_zero", "apo_zero", "none", "dpo"]
    assert regrets(measurements, rules["the advice, with a judge"]) == pytest.approx([0, 0.25, 0, 0.1])
    assert regrets(measurements, rules["the advice, without"]) == pytest.approx([0.1, 0.25, 0.3, 0])
    assert regrets(measurements, rules["always apo_zero"]) == pytest.approx([0, 0, 0.2, 0.3])
    assert regrets(measurements, rules["always none"]) == pytest.approx([0.3, 0.4, 0, 0.2])
    assert mean_regret(measurements, rules["always dpo"]).mean == pytest.approx((0.1 + 0.25 + 0.3 + 0) / 4)
    difference = against(measurements, rules["the advice, with a judge"], rules["always apo_zero"])
    assert difference.estimate.mean == pytest.approx((0 + 0.25 - 0.2 - 0.2) / 4)
    assert (difference.worse, difference.better) == (2, 1)  # of the regret: lower on two, higher on one
    assert difference.estimate.clusters == 4


def test_a_seed_that_not_all_objectives_have_is_left_out_and_the_page_says_what_is_missing():
    assert "**Not finished: 24 of 144 runs are in the tables, of 4 of 24 combinations" in page(FOUR)
    assert "**Not finished: 21 of 144 runs" in page(FOUR[:-1])
    first = measured(FOUR[:6])[0]  # of the first combination the last run, dpo's second, is not there
    assert first.seeds == 1
    assert first.right == {"apo_zero": 0.8, "apo_down": 0.3, "dpo": 0.6, "none": 0.4}
    assert measured([FOUR[0], *FOUR[2:3]]) == []
    with pytest.raises(UserError, match="1 complete combinations of 1 targets; continue with"):
        page(FOUR[:7])


def test_runs_at_another_rate_are_reported_and_not_counted():
    name = COMBINATIONS[0].name(0)
    tried = {"kind": "run", "name": f"{name}/dpo/0", "objective": "dpo", "learning_rate": 1.5e-5, "right": ones(6)}
    text = page([*FOUR, tried])
    assert "1.5e-05 for all three, was tried first" in " ".join(text.split())
    assert "after 1 runs: they changed the accuracy by 20.0 points on average, 20.0 at most" in text
    assert measured([*FOUR, tried])[0].right == measured(FOUR)[0].right
    assert "tried first" not in page(FOUR)


def test_the_page_says_what_the_advice_comes_to_and_hides_nothing():
    text = page(FOUR)
    assert re.search(r"\| the advice, with a judge \| 8\.[78] \[", text)
    assert re.search(r"does not differ clearly from always apo_zero \(-3\.[78] \[", text)
    assert "| 04-middling-revised | 9 | dpo (high) | dpo (low) | 40.0 | **+40.0** | -20.0 | +15.0 | 25.0 |" in text
    assert "| 08-fair-revised | 9 | none (high) | dpo (low) | **70.0** | -20.0 | -10.0 | -30.0 | 0.0 |" in text
    clear = [line for number in range(24) for line in lines(
        number, "apo_zero", 4, {"apo_zero": (8, 8), "apo_down": (3, 3), "dpo": (6, 6 - (number % 5 == 0))}
    )]  # fmt: skip
    assert "All 144 runs are in the tables" in page(clear)
    assert (
        "does not clearly beat both constant rules: it does not differ clearly from always apo_zero (+0.0 [no interval]"
        in page(clear)
    )
    assert "and beats always dpo (-21.0 [" in page(clear)


def test_the_committed_page_is_made_of_the_committed_results():
    lines = [line for line in results.read(ROOT / design.RESULTS) if line["world"] == design.world()]
    assert sum(map(design.is_at_tuned_rate, lines)) == 144
    assert (ROOT / PAGE).read_text("utf-8") == page(lines)


# ---- one combination, for real


@pytest.mark.slow
def test_a_combination_from_pairs_to_advice_and_a_trained_model(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/weak").symlink_to(ROOT / "recipes/world/model")
    of = design.Combination("weak", "off_policy", pairs=36, writers=((1.0, (0, 1, 0)), (0.0, (0, 1, 0))))
    line = prepare(of, 0, tmp_path)
    assert line["pairs"] == 36
    assert line["advice"]["objective"] == "apo_zero"
    assert line["evidence"]["right"]["value"] > 0.8
    assert len(line["base"]["right"]) == QUESTIONS
    assert json.loads(json.dumps(line)) == line
    target = str(tmp_path / "models/weak")
    trained = train_and_score(
        design.TrainingJob("one", line["dataset"], target, "apo_zero", 0.1, 3e-5, 0, str(tmp_path / "out"))
    )
    assert (trained["objective"], trained["seed"], len(trained["right"])) == ("apo_zero", 0, QUESTIONS)
    assert trained["right"].count("1") > line["base"]["right"].count("1")
    assert not (tmp_path / "out").exists()
