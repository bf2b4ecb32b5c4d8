"""`apo advise --pilot`: what is refused before any work, and the whole on the tiny world through the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

import apo
from apo.advice.config import AdviseConfig
from apo.monitoring.result_plots import draw_pilots
from apo.pilot.plan import pilot_overrides, plan_pilots
from apo.pilot.run import _train as train_pilots
from apo.pilot.run import match_rates, stop_reason
from apo.run_dir.files import read_run, record_stop, write_new_run
from apo.training.config import TrainConfig
from apo.training.plan import plan
from apo.training.run_json import run_facts
from clair.core.errors import UserError
from clair.core.files import write_json
from clair.core.recipe import load_recipe, resolved
from clair.data.dataset import DatasetWriter, load_pairs
from clair.data.records import Pair
from recipes.world.running import ROOT
from recipes.world.tasks import distinct_tasks
from tests.apo.command import call

MODEL = ROOT / "recipes/world/model"
CHECKER = {"command": [sys.executable, "-m", "recipes.world.checker"], "seconds": 120, "processes": 1}


def write_pairs(folder: Path, seed: int = 3) -> None:
    """Pairs of the world, right against wrong."""
    writer = DatasetWriter(folder, seed=0, test_fraction=0.25)
    for task in distinct_tasks("train", 64, seed):
        writer.add(Pair(task.id, ({"role": "user", "content": task.prompt},), task.right, task.wrong).row())
    writer.close(keep=True)


def write_recipes(folder: Path, train: dict | None = None, **pilot) -> Path:
    """Pairs of the world, a training recipe, and the recipe of the advice."""
    write_pairs(folder / "pairs")
    trainer = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "logging_steps": 2, "use_cpu": True}
    recipe = {"model": str(MODEL), "dataset": str(folder / "pairs"), "trainer": trainer, "probe": 0, "samples": 0}
    (folder / "train.yaml").write_text(yaml.safe_dump({**recipe, "out": str(folder / "full"), **(train or {})}))
    model = {"path": str(MODEL), "max_tokens": 48, "batch_size": 64}
    section = {"recipe": str(folder / "train.yaml"), "objectives": ["sft", "apo_zero"], "displacements": [0.1], **pilot}
    advise = {"dataset": str(folder / "pairs"), "model": model, "pilot": section, "out": str(folder / "advice")}
    (folder / "advise.yaml").write_text(yaml.safe_dump(advise))
    return folder / "advise.yaml"


@pytest.mark.parametrize(
    ("train", "pilot", "message"),
    [
        ({}, {}, "pilot: nothing to choose by; give a judge, pilot.checker or pilot.benchmark"),
        ({}, {"checker": CHECKER, "benchmark": "ifeval.yaml"}, "give a checker or a benchmark to choose by, not both"),
        ({}, {"checker": {"command": ["no-such-program"]}}, "pilot.checker.command: there is no program"),
        ({}, {"checker": CHECKER, "objectives": ["apo_zer"]}, "did you mean 'apo_zero'"),
        ({}, {"benchmark": "nowhere.yaml"}, "pilot.benchmark: nowhere.yaml does not exist"),
        ({"model": "elsewhere"}, {"checker": CHECKER}, "trains elsewhere, and the advice is about"),
        ({"dataset": "other.jsonl"}, {"checker": CHECKER}, "trains on other.jsonl, and the advice is about"),
        ({"by": "group"}, {"checker": CHECKER}, "trains a model for each value of 'group'"),
        ({"eval": False}, {"checker": CHECKER}, "give pilot.prompts, or hold out pairs"),
        (
            {"trainer": {"use_cpu": True, "metric_for_best_model": "eval_rewards/accuracies"}},
            {"checker": CHECKER, "objectives": ["apo_zero", "sft"]},
            "pilot.objectives: sft: ",
        ),
    ],
)
def test_what_cannot_be_piloted_is_refused_before_any_work(monkeypatch, capsys, tmp_path, train, pilot, message):
    recipe = write_recipes(tmp_path, train, **pilot)
    assert call(monkeypatch, "advise", recipe, "--pilot", "--dry-run") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "advice").exists()


def test_a_dry_run_says_what_pilots_cost_in_the_share_of_a_full_run(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "advise", write_recipes(tmp_path, checker=CHECKER), "--pilot", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "# pilots: sft, apo_zero, each at 1 rates, on 1 in 3 pairs" in out
    assert "# at most 260 steps to match rates, and 2 runs of 15 steps" in out
    assert "of a full run's 39 steps" in out
    assert "# a gain that matters: 0.1 of the checker's score (difference)" in out
    assert not (tmp_path / "advice").exists()


def test_the_full_run_has_a_lower_rate_by_as_much_as_it_has_more_steps(tmp_path):
    planned = plan_pilots(load_recipe(AdviseConfig, write_recipes(tmp_path, checker=CHECKER)))
    assert (planned.steps, planned.full_steps) == (15, 39)
    assert planned.full_rate(1e-4) == pytest.approx(1e-4 * 15 / 39, rel=0.02)


def test_flags_without_a_pilot_are_refused(monkeypatch, capsys, tmp_path):
    recipe = write_recipes(tmp_path, checker=CHECKER)
    assert call(monkeypatch, "advise", recipe, "--then-train") == 2
    assert "--then-train is for --pilot" in capsys.readouterr().err
    assert call(monkeypatch, "advise", recipe, "--pilot", "--set", "pilot=null", "--dry-run") == 2
    assert "--pilot needs `pilot: {recipe: train.yaml}`" in capsys.readouterr().err


def begin_run(recipe: Path, *overrides: str) -> None:
    """Write the run.json of a run of a training recipe."""
    config = load_recipe(TrainConfig, recipe, overrides)
    write_new_run(Path(config.out), resolved(config), **run_facts(plan(config), "new"))


def test_a_full_run_that_could_not_be_trained_after_the_pilots_is_refused_before_them(monkeypatch, capsys, tmp_path):
    recipe = write_recipes(tmp_path, checker=CHECKER, objectives=["sft"])
    begin_run(tmp_path / "train.yaml")
    assert call(monkeypatch, "advise", recipe, "--pilot", "--then-train", "--dry-run") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(f"{tmp_path}/full, holds a run; --then-train needs another")
    config = load_recipe(AdviseConfig, recipe)
    assert plan_pilots(config).full_steps == 39

    recommended = ["objective=sft", "trainer.learning_rate=2e-05"]
    write_json(tmp_path / "advice/pilot.json", {"recommended": recommended})
    with pytest.raises(UserError, match="holds the run of another recipe"):
        plan_pilots(config, then_train=True)
    begin_run(tmp_path / "train.yaml", *recommended)
    assert plan_pilots(config, then_train=True).full_steps == 39


def test_new_displacements_keep_the_rates_and_continue_the_trials_of_earlier_ones(monkeypatch, tmp_path):
    calls = []

    def run_trials(config, targets, advance, earlier):
        calls.append((config.objective, list(targets), earlier))
        return [*earlier, *((target / 300, target * 1.02) for target in targets)]

    def match(*displacements: float, seed: int = 3):
        recipe = write_recipes(tmp_path, checker=CHECKER, objectives=["sft"], displacements=list(displacements))
        write_pairs(tmp_path / "pairs", seed)
        planned = plan_pilots(load_recipe(AdviseConfig, recipe))
        return match_rates(planned, ["sft"], 10**6, lambda _: None)

    monkeypatch.setattr("apo.pilot.run.run_trials", run_trials)
    (tmp_path / "advice").mkdir()
    trials, rates = match(0.03, 0.1)
    assert calls == [("sft", [0.03, 0.1], [])]
    lower_trials, lower_rates = match(0.01, 0.03)
    assert calls[1:] == [("sft", [0.01], [tuple(trial) for trial in trials["sft"]])]
    assert lower_trials["sft"] == [*calls[1][2], (pytest.approx(3.3e-5, rel=0.05), pytest.approx(0.0102))]
    assert lower_rates == {**rates, "sft-0.01": pytest.approx(3.3e-5, rel=0.05)}
    match(0.0105)  # an earlier trial matches it
    assert len(calls) == 2
    with pytest.raises(UserError, match=r"holds pilots of another recipe \(it differs in held_out, pairs\)"):
        match(0.03, seed=4)


def test_a_stop_is_final_for_the_limits_that_stopped_the_pilot_alone(monkeypatch, tmp_path):
    def pilot(max_kl: float):
        recipe = write_recipes(tmp_path, checker=CHECKER, objectives=["sft"], max_kl=max_kl)
        planned = plan_pilots(load_recipe(AdviseConfig, recipe))
        return planned, planned.run("sft", 0.1, 1e-5)

    def started(max_kl: float):
        """The pilots that would be trained under this limit."""
        names: list[str] = []
        monkeypatch.setattr("apo.pilot.run.train_runs", lambda runs, *_: names.extend(run.name for run in runs) or {})
        planned, run = pilot(max_kl)
        train_pilots([run], planned, lambda _: None)
        return names

    _, run = pilot(0.3)
    write_new_run(run.out, resolved(run.config))
    record_stop(run.out, 4, "step 4: own answers fell; lower the rate", by_guard=True)
    assert stop_reason(run) == "step 4: own answers fell"
    assert started(0.3) == []
    _, longer = pilot(5.0)
    assert stop_reason(longer) is None
    assert started(5.0) == ["sft-0.1"]
    write_json(run.out / "run.json", {**read_run(run.out), "recipe": resolved(longer.config)})
    assert started(5.0) == ["sft-0.1"]  # it was killed after it had gone on
    record_stop(run.out, 9, "step 9: own answers fell; lower the rate", by_guard=True)
    assert stop_reason(longer) == "step 9: own answers fell"
    assert started(5.0) == []


def test_pilots_have_a_third_of_the_pairs_and_a_whole_schedule_that_is_shorter_by_as_much():
    trainer = {"max_steps": 100, "warmup_steps": 7}
    full = TrainConfig(model="m", dataset=["a", {"path": "b", "weight": 2}], trainer=trainer, out="o")
    dataset, *steps = pilot_overrides(full, 3)
    sources = json.loads(dataset.removeprefix("dataset="))
    assert [source["weight"] for source in sources] == pytest.approx([1 / 3, 2 / 3])
    assert steps == ["trainer.max_steps=34", "trainer.warmup_steps=3"]
    epochs = TrainConfig(model="m", dataset=["a"], trainer={"num_train_epochs": 4}, out="o")
    assert len(pilot_overrides(epochs, 3)) == 1


def test_the_picture_has_a_row_for_a_pilot_that_was_stopped(tmp_path):
    gain = {"mean": 0.1, "se": 0.02, "ci95": [0.06, 0.14]}
    pilots = [
        {"name": "sft-0.1", "objective": "sft", "learning_rate": 1e-5, "gain": gain},
        {"name": "dpo-0.1", "objective": "dpo", "learning_rate": 1e-5, "gain": None},
    ]
    verdict = {"best": "sft-0.1", "corrected": 0.09, "ci95": [0.05, 0.13]}
    draw_pilots({"pilots": pilots, "verdict": verdict, "scale": 100}, tmp_path / "pilot.png")
    assert (tmp_path / "pilot.png").stat().st_size > 1000


# ---- the whole


def start(recipe: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "apo.cli", "advise", str(recipe), "--pilot", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


@pytest.mark.slow
def test_pilots_are_killed_resumed_chosen_by_a_checker_and_the_choice_is_trained(tmp_path):
    recipe, out = write_recipes(tmp_path, checker=CHECKER, max_kl=5.0), tmp_path / "advice"
    killed = start(recipe)
    while not list((out / "pilots").glob("*/run.json")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.05)
    children = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert psutil.wait_procs(children, timeout=300)[1] == []
    rates, answers = (out / "rates.json").read_bytes(), (out / "own_answers.jsonl").read_bytes()

    resumed = start(recipe, "--then-train")
    output = resumed.communicate(timeout=900)[0]
    assert resumed.returncode == 0, output
    assert (out / "rates.json").read_bytes() == rates
    assert (out / "own_answers.jsonl").read_bytes() == answers
    result = json.loads((out / "pilot.json").read_text())
    assert sorted(pilot["name"] for pilot in result["pilots"]) == ["apo_zero-0.1", "sft-0.1"]
    assert result["prompts"] == len(list(load_pairs(tmp_path / "pairs", "test")))
    assert result["cost"]["pilot_steps"] == 30
    assert (out / "pilot.png").stat().st_size > 1000
    assert not list((out / "pilots").glob("*/checkpoint-*"))
    best = next(pilot for pilot in result["pilots"] if pilot["name"] == result["verdict"]["best"])
    assert best["full_learning_rate"] == pytest.approx(best["learning_rate"] * 15 / 39, rel=0.05)
    assert result["best_guess"][1] == f"trainer.learning_rate={best['full_learning_rate']}"
    if result["recommended"]:
        assert result["recommended"] == result["best_guess"]
        assert json.loads((tmp_path / "full/run.json").read_text())["finished"]
    else:
        assert "nothing is recommended" in output

    lines: list[str] = []
    again = apo.advise(recipe, pilot=True, log=lines.append)
    assert any("2 pilots, 2 of them done" in line for line in lines)
    assert again.result is not None
    assert again.result["pilots"] == result["pilots"]
    assert repr(again) == f"<PilotOutcome {out}: {again.lines()[0]}>"
