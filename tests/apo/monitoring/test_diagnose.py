"""Warnings in words: each rule on a log that provokes it and on one that does not, on real runs, in `apo diagnose`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from apo import cli
from apo.monitoring.diagnosis import MIN_LINES, RULES, diagnose, find_problems, training_log
from apo.monitoring.diagnosis_report import TABLE_METRICS, diagnosis_lines
from apo.monitoring.guard import GuardMeasurement, guard_metrics
from apo.monitoring.plots import _PANELS
from apo.training.config import TrainConfig
from apo.training.train import train
from clair.core.errors import UserError
from tests.apo.conftest import make_pairs


def rows(count=20, evals=(), **metrics):
    """A healthy log of apo_zero, with some metrics as functions of t from 0 to 1."""
    healthy = {
        "loss": lambda t: 1 - 0.2 * t, "rewards/chosen": lambda t: 0.5 * t, "rewards/rejected": lambda t: -0.5 * t,
        "rewards/margins": lambda t: t, "rewards/accuracies": lambda t: 0.5 + 0.4 * t, "rewards/ties": lambda t: 0.0,
        "chosen_falls": lambda t: 0.2, "saturation": lambda t: 0.0, "padding": lambda t: 0.0,
        "lengths/chosen": lambda t: 100.0, "lengths/rejected": lambda t: 90.0,
    }  # fmt: skip
    entries = []
    for index in range(count):
        t = index / (count - 1)
        entries.append({"step": 10 * index + 1, **{key: f(t) for key, f in (healthy | metrics).items()}})
    return entries + [{"step": step, "eval_loss": loss} for step, loss in evals]


def named(**metrics):
    """Metrics with names that cannot be keywords."""
    return {key.replace("__", "/"): value for key, value in metrics.items()}


def noisy(t):
    return 0.001 * (-1) ** round(t * 19)


PROVOKED = {
    "chosen_falls": ("apo_zero", named(rewards__chosen=lambda t: -0.1 * t, chosen_falls=lambda t: 0.7)),
    "both_fall": ("dpo", named(rewards__chosen=lambda t: -0.1 * t, rewards__rejected=lambda t: -t,
                               chosen_falls=lambda t: 0.7)),
    "both_rise": ("apo_zero", named(rewards__rejected=lambda t: 0.3 * t)),
    "stuck": ("apo_zero", named(loss=lambda t: 1 + noisy(t), rewards__chosen=noisy, rewards__rejected=noisy,
                                rewards__margins=noisy)),
    "saturated": ("apo_zero", named(saturation=lambda t: t)),
    "loss_zero": ("dpo", named(loss=lambda t: 0.7 * (1 - t) ** 8)),
    "wrong_way": ("dpo", named(rewards__accuracies=lambda t: 0.5 - 0.3 * t)),
    "runaway": ("apo_zero", named(rewards__chosen=lambda t: 0.05 * t, rewards__rejected=lambda t: -4 * t)),
    "by_heart": ("apo_zero", {"evals": [(50, 0.9), (100, 0.8), (150, 0.95)]}),
    "shared_text": ("dpo", named(probe__shared_chosen=lambda t: -0.1 * t, probe__edited_chosen=lambda t: 0.1 * t)),
    "longer": ("apo_zero", named(lengths__chosen=lambda t: 300.0)),
    "padding": ("apo_zero", named(padding=lambda t: 0.45)),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_each_rule_finds_what_it_is_for_and_nothing_in_a_healthy_log(name):
    objective, metrics = PROVOKED[name]
    findings = find_problems(training_log(rows(**metrics), objective))
    assert name in findings, findings
    assert all(text and "\n" not in text for text in findings[name])
    healthy = rows(
        evals=[(50, 0.9), (100, 0.85)], **named(probe__shared_chosen=lambda t: t, probe__edited_chosen=lambda t: t)
    )
    assert find_problems(training_log(healthy, objective)) == {}


def test_rewards_that_the_objective_lowers_may_fall():
    falling = named(rewards__chosen=lambda t: -0.1 * t, rewards__rejected=lambda t: -t, chosen_falls=lambda t: 0.9)
    assert find_problems(training_log(rows(**falling), "apo_down")) == {}
    finding, advice = find_problems(training_log(rows(**falling), {"apo_zero": 1.0, "sft": 0.1}))["chosen_falls"]
    assert (
        finding == "chosen rewards are falling under apo_zero + 0.1 sft: -0.089 on average, below 0 in 90% of the pairs"
    )
    assert "learning rate" in advice


def test_a_lone_noisy_line_is_no_reason_and_few_lines_are_none():
    spiky = named(rewards__chosen=lambda t: -5.0 if t == 1 else 0.5 * t, chosen_falls=lambda t: 0.9)
    assert find_problems(training_log(rows(**spiky), "apo_zero")) == {}
    objective, metrics = PROVOKED["saturated"]
    assert find_problems(training_log(rows(count=MIN_LINES - 1, **metrics), objective)) == {}


def test_a_small_run_of_six_lines_is_judged():
    objective, metrics = PROVOKED["saturated"]
    assert "saturated" in find_problems(training_log(rows(count=6, **metrics), objective))


@pytest.mark.parametrize("accuracy", [0.0, 0.01])
def test_saturated_pairs_in_the_wrong_order_are_no_reason_to_train_on(accuracy):
    metrics = named(saturation=lambda t: t, rewards__accuracies=lambda t: accuracy)
    _, advice = find_problems(training_log(rows(count=8, **metrics), "apo_zero"))["saturated"]
    assert "lower the learning rate" in advice


def test_lost_numbers_and_missing_metrics_are_borne():
    log = rows(loss=lambda t: None if t > 0.5 else 1.0)
    assert isinstance(find_problems(training_log(log, "apo_zero")), dict)
    assert find_problems(training_log([{"step": step, "loss": 2.0 - step / 50} for step in range(20)], "sft")) == {}


def test_verdicts_say_since_when_and_whether_they_still_hold():
    log = rows(count=40, **named(saturation=lambda t: 0.9 if 0.3 < t < 0.6 else 0.0, padding=lambda t: float(t > 0.7)))
    result = diagnose(log, "apo_zero")
    assert [(verdict.rule, verdict.holds) for verdict in result] == [("padding", True), ("saturated", False)]
    assert 121 < result[1].step < result[0].step
    assert diagnose([], "apo_zero") == []


# Real runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("diagnose") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(48)))
    return path


def run(model_dir, data, out, **changes):
    trainer = {"max_steps": 16, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    trainer |= {"save_strategy": "no", **changes.pop("trainer", {})}
    messages: list[str] = []
    train(
        TrainConfig(model=str(model_dir), dataset=str(data), out=str(out), trainer=trainer, **changes),
        log=messages.append,
    )
    return [line.split(". What helps: ") for line in messages if line.startswith("warning: ")]


def test_a_run_that_learns_is_not_warned_of(model_dir, data, tmp_path):
    assert run(model_dir, data, tmp_path / "run", probe=4) == []


def test_a_run_that_learns_nothing_is_reported_once(model_dir, data, tmp_path):
    (warning,) = run(model_dir, data, tmp_path / "run", trainer={"learning_rate": 0.0})
    step = MIN_LINES
    stuck = f"warning: step {step}: the loss is stuck at its start, 1, after {step} steps: no log-prob has changed"
    assert warning[0] == stuck
    assert warning[1].startswith("raise the learning rate")


def test_a_run_whose_loss_is_0_at_once_is_reported(model_dir, data, tmp_path):
    warnings = run(model_dir, data, tmp_path / "run", trainer={"learning_rate": 2e-2}, objective="dpo", beta=3.0)
    assert any("of the pairs are saturated: on them dpo has less" in finding for finding, _ in warnings)
    assert any("the loss is 0" in finding for finding, _ in warnings)


def test_the_command_draws_and_reports_also_during_a_run(model_dir, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    run(model_dir, data, out, trainer={"learning_rate": 0.0}, probe=2)

    def diagnose(*arguments):
        monkeypatch.setattr("sys.argv", ["apo", "diagnose", str(out), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out + captured.err

    code, output = diagnose()
    assert code == 0
    assert "finished: 16 steps" in output
    assert f"! since step {MIN_LINES}: the loss is stuck at its start" in output
    assert re.search(r"probe/kl +0 +0 +0", output)
    picture = imread(out / "diagnosis.png")
    assert picture.shape[1] > 1500
    about = json.loads((out / "run.json").read_text())
    del about["finished"], about["seconds"]
    (out / "run.json").write_text(json.dumps({**about, "stopped": [{"step": 9, "why": "because"}]}))
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "lo')
    code, output = diagnose("--out", str(tmp_path / "drawn" / "other.png"))
    assert code == 0
    assert "step 16 of 16; not finished: running, or stopped" in output
    assert "stopped at step 9: because" in output
    assert (tmp_path / "drawn" / "other.png").exists()
    (out / "metrics.jsonl").write_text("")
    code, output = diagnose()
    assert (code, "has logged nothing yet" in output) == (2, True)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no run of `apo train`"):
        diagnosis_lines(tmp_path)


def test_each_measure_of_the_guard_is_a_panel_and_a_line_of_the_table():
    full = GuardMeasurement((1.0, 2.0), (1, 2), (1.0, 0.0), (1.0, 2.0), (3, 4), (-1.0, -2.0))
    logged = {name for name in guard_metrics(full, full) if not name.endswith("_noise")}
    changes = {"guard/text_loss_rise", "guard/accuracy_drop", "guard/kl", "guard/winners_fall"}
    assert {key for panel in _PANELS for key in panel.lines if key.startswith("guard/")} == changes
    assert {key for key in TABLE_METRICS if key.startswith("guard/")} == logged - changes | {
        "guard/kl",
        "guard/winners_fall",
    }


def test_every_panel_draws_what_the_log_may_hold(tmp_path):
    from apo.monitoring.plots import draw_diagnosis

    keys = [key for panel in _PANELS for key in panel.lines]
    assert len(set(keys)) == len(keys) > 20
    for subset in (keys, keys[:1], []):
        log = [{"step": step, **{key: step / 10 + index for index, key in enumerate(subset)}} for step in range(1, 9)]
        log += [{"step": 4, "eval_loss": 0.5}, {"step": 5, "rewards/chosen": None}]
        path = Path(tmp_path) / f"{len(subset)}.png"
        draw_diagnosis(log, path, "a run")
        assert imread(path).shape[0] > 300
