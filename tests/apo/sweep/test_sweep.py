"""`apo sweep`: every combination trained once, one reference pass, and the best run corrected for its selection."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from datasets import Dataset

from apo.run_dir.files import write_new_run
from apo.sweep import processes
from apo.sweep.grid import check_runs, expand_grid, parse_grid
from apo.sweep.processes import train_runs, visible_devices
from apo.sweep.results import notes, summarize
from apo.training.plan import plan
from apo.training.run_json import run_facts
from clair.core.errors import UserError
from clair.core.progress import Progress
from clair.core.recipe import parse_yaml, resolved
from clair.core.statistics import best_of
from clair.core.watched_process import WatchedProcess
from tests.apo.command import call
from tests.apo.conftest import make_pairs

TRAINER = {
    "learning_rate": 1e-3, "max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 2, "save_steps": 2,
    "report_to": "none",
}  # fmt: skip


@pytest.fixture
def recipe_file(tmp_path, model_dir) -> Path:
    for split, rows in (("train", make_pairs(24)), ("test", make_pairs(12, seed=5))):
        (tmp_path / "pairs/data").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / f"pairs/data/{split}-00000-of-00001.parquet")
    keys = {"model": str(model_dir), "dataset": str(tmp_path / "pairs"), "trainer": TRAINER, "probe": 0, "samples": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**keys, "out": str(tmp_path / "sweep")}))
    return tmp_path / "recipe.yaml"


def start(recipe: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "apo.cli", "sweep", str(recipe), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_json(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def computed(out: Path) -> list[int]:
    """The number of reference log-probs that each process computed."""
    logs = sorted(out.glob("*.log"))
    return [int(number) for log in logs for number in re.findall(r"log-probs: (\d+) computed", log.read_text())]


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        (["beta"], "--grid takes key=value,value, got 'beta'"),
        (["beta="], "--grid takes key=value,value"),
        ([".beta=1,2"], "--grid takes key=value,value"),
        (["beta=0.1"], "is one value"),
        (["beta=0.1,0.10"], "has a value twice"),
        (["beta=0.1,0.2", "beta=0.3,0.4"], "is given twice"),
        (["beta=0.1,[0.2"], "is not a list of YAML values with commas"),
        (["out=a,b"], "each run has its own folder"),
        (["eval=true,false"], "the same held-out pairs"),
        ([], "a sweep needs a grid"),
    ],
)
def test_a_grid_that_is_none_is_refused_in_one_line(grid, problem):
    with pytest.raises(UserError, match=re.escape(problem)) as caught:
        parse_grid(grid)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        ("betta=0.1,0.2", "unknown key 'betta' (did you mean 'beta'?)"),
        ("beta=0.1,-1", "beta: Input should be greater than 0, found -1"),
        ("trainer.learning_rat=1,2", "beta-0.1"),
        ("trainer.learning_rate=0.1,fast", "trainer.learning_rate: "),
        ("objective=apo_zero,apo_one", "apo_one"),
        ("lora.r=8,16", "model"),
    ],
)
def test_a_bad_key_or_value_is_refused_before_any_run(monkeypatch, capsys, recipe_file, grid, problem):
    extra = ["--set", "model=nowhere"] if grid.startswith("lora") else []
    extra += ["--grid", "beta=0.1,0.2"] if "rat=" in grid else []
    assert call(monkeypatch, "sweep", recipe_file, "--grid", grid, *extra) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert problem in message
    assert not (recipe_file.parent / "sweep").exists()


def test_runs_of_other_held_out_pairs_or_a_folder_of_something_else_are_refused(monkeypatch, capsys, recipe_file):
    other = recipe_file.parent / "other"
    (other / "data").mkdir(parents=True)
    for split in ("train", "test"):
        Dataset.from_list(make_pairs(12, seed=9)).to_parquet(other / f"data/{split}-00000-of-00001.parquet")
    assert call(monkeypatch, "sweep", recipe_file, "--grid", "beta=0.1,0.2", "--set", "eval=false") == 2
    assert "eval_rows: there are no held-out pairs" in capsys.readouterr().err
    assert call(monkeypatch, "sweep", recipe_file, "--grid", f"dataset={recipe_file.parent / 'pairs'},{other}") == 2
    assert "has other held-out pairs than" in capsys.readouterr().err
    assert call(monkeypatch, "sweep", recipe_file, "--grid", "beta=0.1,0.2", "--out", recipe_file.parent) == 2
    assert "is not a sweep and not empty" in capsys.readouterr().err


@pytest.mark.parametrize("secret", ["trainer.hub_token=planted", "trainer={hub_token: planted, max_steps: 4}"])
def test_a_dry_run_prints_no_secret(monkeypatch, capsys, recipe_file, secret):
    arguments = ["--grid", "beta=0.1,0.2", "--set", "seed=3", "--set", secret, "--dry-run"]
    assert call(monkeypatch, "sweep", recipe_file, *arguments) == 0
    output = capsys.readouterr()
    assert "planted" not in output.out + output.err
    command = shlex.split(next(line for line in output.out.splitlines() if line.startswith("apo train")))
    key, _, text = secret.partition("=")
    value = {**parse_yaml(text), "hub_token": "[secret]"} if text.startswith("{") else "[secret]"
    assert command[3:7] == ["--set", "seed=3", "--set", f"{key}={json.dumps(value)}"]


def test_a_dry_run_prints_each_command_and_the_cost_and_writes_nothing(monkeypatch, capsys, recipe_file):
    arguments = ["--grid", "beta=0.1,0.2", "--grid", "trainer.learning_rate=1e-3,1e-2", "--set", "seed=3"]
    assert call(monkeypatch, "sweep", recipe_file, *arguments, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if line.startswith("apo train")]
    assert len(commands) == 4
    out = recipe_file.parent / "sweep/beta-0.2_learning_rate-0.01"
    assert commands[-1] == (
        f"apo train {recipe_file} --set seed=3 --set beta=0.2 --set trainer.learning_rate=0.01 --set eval_rows=true "
        f"--out {out}"
    )
    assert "# 4 runs to train; reference log-probs: 1 passes over the pairs, for all of them" in lines
    assert lines[-1].startswith("# work: ")
    assert not (recipe_file.parent / "sweep").exists()


@pytest.mark.parametrize("finished", [{}, {"finished": "2026-01-01"}], ids=["unfinished", "finished"])
def test_a_run_on_pairs_that_have_changed_since_is_refused_before_any_run(recipe_file, finished):
    runs = expand_grid(recipe_file, parse_grid(["beta=0.1,0.2"]), [])
    facts = run_facts(plan(runs[0].config), "new")
    runs[0].out.mkdir(parents=True)
    write_new_run(runs[0].out, resolved(runs[0].config), **facts, **finished)
    assert [run.status for run in check_runs(runs)] == ["finished" if finished else "unfinished", "new"]
    pairs = recipe_file.parent / "pairs/data/train-00000-of-00001.parquet"
    Dataset.from_list(make_pairs(24, seed=1)).to_parquet(pairs)
    with pytest.raises(UserError, match=r"^beta-0.1: out: .* holds a run on other pairs: the dataset has changed"):
        check_runs(runs)


@pytest.mark.slow
def test_after_kill_9_finished_runs_are_not_trained_again_and_stopped_ones_resume(recipe_file, tmp_path):
    grid = ["--grid", "beta=0.1,2.0", "--set", "trainer.max_steps=40", "--set", "trainer.save_steps=4"]
    out = tmp_path / "sweep"
    killed = start(recipe_file, *grid)
    second = out / "beta-2.0"
    while not list(second.glob("checkpoint-*")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.05)
    children = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert psutil.wait_procs(children, timeout=300)[1] == []  # they end with it
    assert "finished" not in run_json(second)
    first = {file: file.stat().st_mtime_ns for file in (out / "beta-0.1").iterdir() if file.is_file()}

    resumed = start(recipe_file, *grid)
    output = resumed.communicate(timeout=600)[0]
    assert resumed.returncode == 0, output
    assert "2 runs, 1 of them finished" in output
    assert first == {file: file.stat().st_mtime_ns for file in (out / "beta-0.1").iterdir() if file.is_file()}
    assert run_json(second)["resumed_from"][0] >= 4

    assert computed(out) == [36, 0, 0]  # the pairs of both splits, once for all runs
    result = json.loads((out / "sweep.json").read_text())
    assert [run["values"] for run in result["runs"]] == [{"beta": 0.1}, {"beta": 2.0}]
    assert result["best"]["of"] == 2
    assert (out / "sweep.png").stat().st_size > 1000

    again = start(recipe_file, *grid)
    assert "2 runs, 2 of them finished" in again.communicate(timeout=600)[0]
    assert computed(out) == [36, 0, 0]  # nothing was started


@pytest.mark.slow
def test_each_gpu_has_a_process_and_the_reference_is_still_computed_once(monkeypatch, recipe_file, tmp_path):
    runs = check_runs(expand_grid(recipe_file, parse_grid(["beta=0.1,0.5,2.0"]), ["trainer.max_steps=30"]))
    (tmp_path / "sweep").mkdir()
    started, running_before = [], []

    def record(command, output):
        running_before.append(sum(process.poll() is None for _, process in started))
        started.append((command[1], WatchedProcess(command, output)))
        return started[-1][1]

    monkeypatch.setattr(processes, "WatchedProcess", record)
    arguments = [str(recipe_file), "--set", "trainer.max_steps=30"]
    progress = Progress("runs", 3)
    assert train_runs(runs, arguments, ["0", "1"], progress) == {}
    assert [device for device, _ in started[:2]] == ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"]
    assert running_before[:2] == [0, 1]  # two at the same time
    assert len(started) == 3
    assert progress.completed == 3
    assert sorted(computed(tmp_path / "sweep")) == [0, 0, 36]
    result = summarize(runs, {})
    assert all(run["right"]["ci95"] for run in result["runs"])


RECORD = """
import json, os, sys, time
out, log = sys.argv[1:]
device = os.environ["CUDA_VISIBLE_DEVICES"]
def note(event):
    with open(log, "a") as file:
        file.write(json.dumps([event, device]) + chr(10))
note("start")
os.makedirs(out)
open(os.path.join(out, "run.json"), "w").close()
deadline = time.monotonic() + 60
while open(log).read().count("start") < 2 and time.monotonic() < deadline:
    time.sleep(0.05)
note("end")
"""
"""A stand-in of `apo train`: notes the GPU that it sees. The first run ends once a second one has begun beside it."""


def test_each_run_sees_a_gpu_of_its_own_and_all_gpus_are_used(monkeypatch, recipe_file, tmp_path):
    runs = expand_grid(recipe_file, parse_grid(["beta=0.1,0.2,0.3,0.4,0.5"]), [])
    log = tmp_path / "devices.jsonl"

    def start(command, output):
        assert command[:2] == ["env", command[1]]
        return WatchedProcess([*command[:2], sys.executable, "-c", RECORD, command[-1], str(log)], output)

    monkeypatch.setattr(processes, "WatchedProcess", start)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    (tmp_path / "sweep").mkdir()
    assert train_runs(runs, [str(recipe_file)], visible_devices(), Progress("runs", 5)) == {}
    busy, most_busy = set(), 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for event, device in events:
        assert (device in busy) == (event == "end")
        busy ^= {device}
        most_busy = max(most_busy, len(busy))
    assert most_busy == 2
    assert {device for _, device in events} == {"4", "7"}
    assert len(events) == 10


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_the_others_are_compared(recipe_file, tmp_path):
    process = start(recipe_file, "--grid", "trainer.learning_rate=1e-3,1e38", "--set", "trainer.max_grad_norm=0")
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 3, output
    assert "1 runs failed" in output
    result = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [run["name"] for run in result["runs"]] == ["learning_rate-0.001"]
    assert list(result["failed"]) == ["learning_rate-1e38"]


def test_the_best_run_is_corrected_by_the_function_that_corrects_checkpoints(recipe_file, tmp_path):
    runs = expand_grid(recipe_file, parse_grid(["beta=0.1,0.2,0.3"]), [])
    generator = torch.Generator().manual_seed(0)
    rights = (torch.rand(3, 200, generator=generator) < 0.7).double()
    for run, right in zip(runs, rights.tolist(), strict=True):
        run.out.mkdir(parents=True)
        (run.out / "run.json").write_text(json.dumps({"recipe": {}, "seconds": 1}))
        rows = [
            {"id": str(i), "prompt": f"p{i // 2}", "chosen": 0.1, "rejected": -0.2, "right": value}
            for i, value in enumerate(right)
        ]
        (run.out / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = summarize(runs, {})
    expected = best_of(rights.tolist(), [f"p{i // 2}" for i in range(200)])
    best = result["best"]
    assert best["name"] == runs[expected.candidate].name
    assert (best["right"], best["selection_bias"], best["corrected"]) == expected[1:4]
    assert best["selection_bias"] > 0
    assert result["runs"][expected.candidate]["behind"] is None
    assert any("do not distinguish it" in note for note in notes(result))


def test_a_process_per_visible_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,GPU-7")
    assert visible_devices() == ["2", "5", "GPU-7"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert visible_devices() == [None]
