"""`clair iterate`: rounds run to the stop rule, and go on from wherever they were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from clair.core.recipe import resolve
from clair.pipeline.export import next_round
from clair.rounds.config import IterateConfig
from clair.rounds.results import RoundResult, best_model, stop_reason
from clair.rounds.run import open_rounds
from recipes.world.running import Running, running
from recipes.world.server import ServerOptions
from recipes.world.tasks import distinct_tasks, write_prompts
from tests.clair.building import ROOT, CommandResult, clair, error_line, finished, start_clair
from tests.clair.rounds import commands

MODEL = str(ROOT / "recipes" / "world" / "model")
ENDPOINT = {"url": "http://127.0.0.1:9/v1", "model": "m"}
DELTA = {"pipeline": "delta", "prompts": {"path": "p.jsonl"}, "weaker": ENDPOINT, "stronger": ENDPOINT, "out": "o"}
STAND_IN = """
import sys
from clair.rounds import phases
phases.CLAIR, phases.APO = ((sys.executable, "-mtests.clair.rounds.commands", name) for name in ("clair", "apo"))
from clair.cli import main
main()
"""


def write_yaml(path: Path, values: Mapping[str, Any]) -> str:
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), "utf-8")
    return str(path)


def build_values(tmp_path: Path, url: str = "http://127.0.0.1:9/v1", **changes: Any) -> dict[str, Any]:
    return {
        "pipeline": "revised",
        "prompts": {"path": str(tmp_path / "prompts.jsonl")},
        "target": {"path": MODEL, "temperature": 1.0, "max_tokens": 64},
        "reviser": {"url": url, "model": "world-reviser", "id": "r", "price": {"input": 1, "output": 2}},
        "out": str(tmp_path / "pairs"),
    } | changes


def write_recipes(tmp_path: Path, **changes: Any) -> Path:
    """The recipe of the rounds and those that it names, in one folder; `changes` are of the recipe of the rounds."""
    write_prompts(tmp_path / "prompts.jsonl", distinct_tasks("train", 6, 0))
    values = {
        "rounds": 2,
        "build": write_yaml(tmp_path / "build.yaml", build_values(tmp_path)),
        "train": write_yaml(tmp_path / "train.yaml", {"model": MODEL, "out": "unused"}),
        "evaluate": {"winrate": write_yaml(tmp_path / "winrate.yaml", {"prompts": {"path": "unused"}})},
        "out": str(tmp_path / "out"),
    }
    return Path(write_yaml(tmp_path / "iterate.yaml", values | changes))


def start_with_stand_in(tmp_path: Path, recipe: Path, *arguments: str, seconds: float = 0.0, **environment: str) -> Any:
    settings = {
        "COMMAND_LOG": str(tmp_path / "log"),
        "COMMAND_SECONDS": str(seconds),
        "BUILD_RECIPE": json.dumps(build_values(tmp_path)),
    }
    return subprocess.Popen(
        [sys.executable, "-c", STAND_IN, "iterate", str(recipe), *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200", **settings, **environment},
    )


def run_with_stand_in(tmp_path: Path, recipe: Path, *arguments: str, **environment: str) -> CommandResult:
    return finished(start_with_stand_in(tmp_path, recipe, *arguments, **environment), 400)


def log_of(tmp_path: Path) -> list[str]:
    file = tmp_path / "log"
    return file.read_text("utf-8").splitlines() if file.exists() else []


def rounds_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "rounds.json").read_text("utf-8"))


def test_rounds_run_in_order_each_on_the_model_before_until_a_gain_may_be_none(tmp_path):
    recipe = write_recipes(tmp_path, rounds=3)
    result = run_with_stand_in(tmp_path, recipe)
    assert result.code == 0, result.err
    names = [f"{number} {name}" for number in (1, 2) for name in ("pairs", "model", "winrate")]
    assert log_of(tmp_path) == [f"{when} {name}" for name in names for when in ("start", "end")]
    rounds = rounds_of(tmp_path)
    assert [row["gain"] for row in rounds["rounds"]] == pytest.approx([0.1, 0.02])
    assert (
        rounds["ended"] == "the gain of round 2, +2.0 [-4.0, +8.0] points, does not count: its interval is not above 0"
    )
    assert rounds["best"] == str(tmp_path / "out" / "round-1" / "model")
    assert (tmp_path / "out" / "rounds.png").read_bytes().startswith(b"\x89PNG")
    assert "+10.0 [+5.0, +15.0]" in result.out
    assert "reviser 0.5" in result.out
    assert f"the best model is {rounds['best']}" in result.out
    lines = [line for line in result.err.splitlines() if line.startswith("round ")]
    assert [line.split(":")[0] for line in lines[3:]] == [
        f"round 2 of 3, {name} ({took} in the previous round)"
        for name, took in (("build", "2 s"), ("train", "3 s"), ("evaluate", "1 s"))
    ]
    assert f"""--set 'model="{rounds["best"]}"'""" in lines[4]
    second = yaml.safe_load((tmp_path / "out" / "round-2" / "pairs.yaml").read_text("utf-8"))
    assert second["target"]["path"] == rounds["best"]


def test_a_finished_run_does_nothing_again_and_more_rounds_go_on(tmp_path):
    recipe = write_recipes(tmp_path, stop="never")
    assert run_with_stand_in(tmp_path, recipe).code == 0
    log = log_of(tmp_path)
    again = run_with_stand_in(tmp_path, recipe)
    assert again.code == 0, again.err
    assert log_of(tmp_path) == log
    more = run_with_stand_in(tmp_path, recipe, "--set", "rounds=3")
    assert more.code == 0, more.err
    assert log_of(tmp_path)[: len(log)] == log
    assert log_of(tmp_path)[len(log)] == "start 3 pairs"
    assert rounds_of(tmp_path)["ended"] == "all 3 rounds are complete"


@pytest.mark.parametrize(
    "name",
    [
        "1 pairs",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("1 model", "1 winrate", "2 pairs", "2 model", "2 winrate")),
    ],
)
def test_after_kill_9_in_a_phase_only_that_phase_runs_again(tmp_path, name):
    recipe = write_recipes(tmp_path)
    process = start_with_stand_in(tmp_path, recipe, seconds=1.5)
    until = time.monotonic() + 300
    while f"start {name}" not in log_of(tmp_path):
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    result = run_with_stand_in(tmp_path, recipe)
    assert result.code == 0, result.err
    log = log_of(tmp_path)
    names = [f"{number} {name}" for number in (1, 2) for name in ("pairs", "model", "winrate")]
    assert [entry for entry in log if entry.startswith("end")] == [f"end {each}" for each in names]
    assert {each: log.count(f"start {each}") for each in names} == {each: 1 + (each == name) for each in names}
    assert len(rounds_of(tmp_path)["rounds"]) == 2


def test_ctrl_c_reaches_the_command_and_the_rounds_say_how_to_go_on(tmp_path):
    process = start_with_stand_in(tmp_path, write_recipes(tmp_path), seconds=60)
    until = time.monotonic() + 300
    while not log_of(tmp_path):
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    result = finished(process)
    assert result.code == 130, result.err
    assert "round 1, build was interrupted; run the same command to continue" in result.err


def test_a_crossed_guard_ends_the_rounds_with_the_model_before_it(tmp_path):
    result = run_with_stand_in(tmp_path, write_recipes(tmp_path), GUARD_ROUND="2")
    assert result.code == 5, result.err
    rounds = rounds_of(tmp_path)
    assert rounds["ended"] == "round 2, train stopped because a check failed: step 3: held-out text got worse"
    assert rounds["best"] == str(tmp_path / "out" / "round-1" / "model")
    assert "held-out text got worse; the best model is" in result.out


def test_a_benchmark_scores_the_first_model_and_an_adapter_is_merged(tmp_path):
    evaluate = {"ifeval": write_yaml(tmp_path / "ifeval.yaml", {"prompts": "unused"})}
    recipe = write_recipes(tmp_path, evaluate=evaluate)
    write_yaml(tmp_path / "train.yaml", {"model": MODEL, "lora": {"r": 4}, "out": "unused"})
    rounds = open_rounds(resolve(IterateConfig, yaml.safe_load(recipe.read_text("utf-8"))))
    names = [(phase.round, phase.name) for number in range(3) for phase in rounds.phases(number)]
    each = ("build", "train", "merge", "evaluate", "compare")
    assert names == [(0, "evaluate"), *((number, name) for number in (1, 2) for name in each)]
    assert rounds.model(1) == str(tmp_path / "out" / "round-1" / "merged")
    shown = {phase.name: phase.shown for phase in rounds.phases(2)}
    out = tmp_path / "out"
    assert shown["merge"] == f"apo merge {out}/round-2/model --out {out}/round-2/merged"
    assert shown["compare"] == f"apo compare {out}/round-1/ifeval {out}/round-2/ifeval --out {out}/round-2/compare"
    assert f"""--set 'model="{out}/round-1/merged"'""" in shown["train"]


def test_a_benchmark_gives_the_rounds_scores_and_gains(tmp_path):
    evaluate = {"ifeval": write_yaml(tmp_path / "ifeval.yaml", {"prompts": "unused"})}
    result = run_with_stand_in(tmp_path, write_recipes(tmp_path, evaluate=evaluate))
    assert result.code == 0, result.err
    assert log_of(tmp_path)[0] == "start 0 ifeval"
    assert [row["score"] for row in rounds_of(tmp_path)["rounds"]] == pytest.approx([0.6, 0.7])
    assert "score, %" in result.out


def test_a_dry_run_prints_the_commands_and_the_cost_of_each_round_and_writes_nothing(tmp_path):
    recipe = write_recipes(tmp_path)
    result = run_with_stand_in(tmp_path, recipe, "--dry-run")
    assert result.code == 0, result.err
    assert f"# round 1, build: clair build {tmp_path}/build.yaml --out {tmp_path}/out/round-1/pairs" in result.out
    assert result.out.count("#   calls at most: target 6, reviser 12") == 2
    assert result.out.count("#   7 steps") == 2
    assert not (tmp_path / "out").exists()
    assert run_with_stand_in(tmp_path, recipe, "--set", "rounds=1").code == 0
    after = run_with_stand_in(tmp_path, recipe, "--dry-run")
    assert "# round 1, build (complete): " in after.out
    assert "#   was 1 pairs, 6 s, cost: reviser 0.5" in after.out


def test_a_recipe_that_a_finished_phase_has_used_must_stay(tmp_path):
    recipe = write_recipes(tmp_path)
    assert run_with_stand_in(tmp_path, recipe, "--set", "rounds=1").code == 0
    write_yaml(tmp_path / "train.yaml", {"model": MODEL, "beta": 0.5, "out": "unused"})
    message = error_line(clair("iterate", recipe))
    assert "holds rounds with another recipe (it differs in train.beta)" in message
    write_yaml(tmp_path / "train.yaml", {"model": MODEL, "out": "unused"})
    write_yaml(tmp_path / "build.yaml", build_values(tmp_path, concurrency=2, budget={"tokens": 10**6}))
    assert run_with_stand_in(tmp_path, recipe).code == 0
    second = next(
        line for line in (run_with_stand_in(tmp_path, recipe, "--dry-run").out).splitlines() if "round 2, build" in line
    )
    assert "--set 'budget={" in second
    assert "--set concurrency=2" in second


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("train", {"model": MODEL, "by": "user", "out": "o"}, "by trains a model for each group"),
        ("train", {"model": MODEL, "dataset": ["a", "b"], "out": "o"}, "dataset has 2 sources"),
        ("train", {"model": "another", "out": "o"}, "the model that answers is the one that is trained"),
        ("train", {"out": "o"}, "the key 'model' is missing"),
        ("build", {"pipeline": "revised"}, "is missing"),
        ("build", DELTA, "in the pipeline 'delta' the trained model gives no answers"),
    ],
)
def test_recipes_that_rounds_cannot_use_are_one_line(tmp_path, file, values, message):
    recipe = write_recipes(tmp_path)
    write_yaml(tmp_path / f"{file}.yaml", values)
    assert message in error_line(clair("iterate", recipe))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {}}, "give one evaluation and its recipe"),
        ({"evaluate": {"winrate": "a", "ifeval": "b"}}, "give one evaluation and its recipe"),
        ({"evaluate": {"winrates": "a"}}, "did you mean 'winrate'"),
        ({"rounds": 0}, "rounds"),
        ({"out": "s3://bucket/rounds"}, "written to local files only"),
    ],
)
def test_mistakes_in_the_recipe_of_the_rounds_are_one_line(tmp_path, changes, message):
    assert message in error_line(clair("iterate", write_recipes(tmp_path, **changes)))


def test_a_target_that_a_command_serves_is_served_in_the_next_round_with_the_new_weights(tmp_path):
    write_recipes(tmp_path)
    served = {"serve": "srv {model} --port {port}", "patience": 900.0, "temperature": 0.5}
    values = build_values(tmp_path, target={"path": "old", "id": "old weights", **served})
    commands.build(tmp_path / "pairs", values)
    recipe, _, _ = next_round(tmp_path / "pairs", "new", tmp_path / "again")
    assert yaml.safe_load(recipe.read_text("utf-8"))["target"] == {"path": "new", **served}


def test_the_stop_rule_needs_an_interval_above_zero():
    def result(number: int, interval: list[float] | None) -> RoundResult:
        return RoundResult(number, f"m{number}", 1, 0, 0, {}, 1, 0.1, interval, None, None, {})

    assert stop_reason(result(1, [0.01, 0.2]), "no_gain") is None
    assert "is not above 0" in (stop_reason(result(1, [0.0, 0.2]), "no_gain") or "")
    assert "no interval" in (stop_reason(result(1, None), "no_gain") or "")
    assert stop_reason(result(1, [-0.1, 0.2]), "never") is None
    gained, lost = result(1, [0.1, 0.2]), result(2, [-0.1, 0.1])
    assert best_model([gained, lost], "base") == "m1"
    assert best_model([lost], "base") == "base"


def test_the_best_model_is_no_round_that_regains_less_than_was_lost():
    def results(*gains: float) -> list[RoundResult]:
        return [
            RoundResult(n, f"m{n}", 1, 0, 0, {}, 1, gain, [gain - 0.05, gain + 0.05], None, None, {})
            for n, gain in enumerate(gains, 1)
        ]

    assert best_model(results(0.2, -0.3, 0.1), "base") == "m1"
    assert best_model(results(0.2, -0.1, 0.2), "base") == "m3"
    assert best_model(results(-0.3, 0.2), "base") == "base"


# ---- the commands themselves


@pytest.fixture
def world() -> Any:
    with running(ServerOptions(latency=0.2)) as server:
        yield server


def real_recipes(tmp_path: Path, server: Running) -> Path:
    recipe = write_recipes(tmp_path, stop="never")
    write_prompts(tmp_path / "prompts.jsonl", distinct_tasks("train", 48, 0))
    write_prompts(tmp_path / "heldout.jsonl", distinct_tasks("heldout", 12, 0))
    write_yaml(tmp_path / "build.yaml", build_values(tmp_path, server.url, concurrency=4, test_fraction=0))
    trainer = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 1, "learning_rate": 1e-5}
    write_yaml(tmp_path / "train.yaml", {"model": MODEL, "trainer": trainer, "samples": 0, "probe": 0, "out": "unused"})
    side = {"temperature": 0, "max_tokens": 32}
    winrate = {
        "prompts": {"path": str(tmp_path / "heldout.jsonl")},
        "base": {"path": MODEL, **side},
        "tuned": {"path": "unused", **side},
        "judge": {"url": server.url, "model": "world-judge", "id": "j"},
        "concurrency": 4,
        "out": "unused",
    }
    write_yaml(tmp_path / "winrate.yaml", winrate)
    return recipe


@pytest.mark.slow
def test_real_rounds_killed_in_every_phase_pay_and_train_nothing_twice(tmp_path, world):
    recipe = real_recipes(tmp_path, world)
    signs = [
        f"round-{number}/{name}"
        for number in (1, 2)
        for name in ("pairs", "model/checkpoint-2", "winrate/settings.json")
    ]
    for sign in signs:
        process = start_clair("iterate", recipe)
        until = time.monotonic() + 600
        while not (tmp_path / "out" / sign).exists():
            assert time.monotonic() < until
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.kill()
        process.communicate()
    last = finished(start_clair("iterate", recipe), 600)
    assert last.code == 0, last.err
    assert [row["round"] for row in rounds_of(tmp_path)["rounds"]] == [1, 2]
    # At most the requests in flight are sent again, at each of four kills with requests to a server.
    assert world.stats()["paid_more_than_once"] <= 4 * 4
    for number in (1, 2):
        run = json.loads((tmp_path / "out" / f"round-{number}" / "model" / "run.json").read_text("utf-8"))
        assert len(run["resumed_from"]) == 1
        assert run["resumed_from"][0] >= 1
