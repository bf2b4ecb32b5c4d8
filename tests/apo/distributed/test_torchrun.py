"""`torchrun -m apo.cli train`, with real processes: one run, one message, one checkpoint, one order of the pairs."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from apo.run_dir import checkpoints
from tests.apo.conftest import apart, make_pairs
from tests.apo.distributed.processes import PAIRS, TRAINER, launched, outcome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("torchrun") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(PAIRS)))
    return path


def recipe(model_dir, data, out, **trainer):
    path = out.with_suffix(".yaml")
    keys = {"model": str(model_dir), "dataset": str(data), "trainer": {**TRAINER, **trainer}, "out": str(out)}
    path.write_text(yaml.safe_dump(keys))
    return path


def start(processes, tmp_path, *command, launch=("-m", "apo.cli"), more=()):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *more)
    return launched(tmp_path, *torchrun, *launch, *command)


def run(processes, tmp_path, *command, **options):
    return outcome(start(processes, tmp_path, *command, **options))


def ours(output):
    """The lines that the run itself prints, without torchrun's report."""
    return [
        line for line in output.splitlines() if re.match(r"error: |step |note: |stopped |going on |\d+ pairs,", line)
    ]


def weights(out):
    return load_file(Path(out) / "model.safetensors")


def metrics(out):
    """The metrics of each step, except for speed and the epoch, which counts whole micro-batches."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if "per_second" not in key and key not in ("mfu", "epoch")} for row in rows]


def assert_same_result(actual, expected):
    assert metrics(actual) == [pytest.approx(row, abs=2e-4, rel=1e-5) for row in metrics(expected)]
    assert apart(weights(expected), weights(actual)) <= 1e-5


@pytest.fixture(scope="module")
def alone(model_dir, data, tmp_path_factory):
    """The run in one process that nothing happened to: 4 pairs twice a step."""
    out = tmp_path_factory.mktemp("alone") / "run"
    code, output = run(1, out.parent, "train", recipe(model_dir, data, out, per_device_train_batch_size=4))
    assert code == 0, output
    return out


def test_two_processes_leave_what_one_leaves(alone, model_dir, data, tmp_path):
    out = tmp_path / "run"
    code, output = run(2, tmp_path, "train", recipe(model_dir, data, out))
    assert code == 0, output
    assert_same_result(out, alone)
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in alone.iterdir())
    steps = [line.split()[1] for line in ours(output) if line.startswith("step ")]
    assert steps == [f"{n}/9" for n in range(1, 10)]
    assert [line for line in ours(output) if "pairs, 9 steps" in line] == [ours(output)[-1]]
    assert not list(out.rglob(".*"))
    code, output = run(2, tmp_path, "train", out.with_suffix(".yaml"))
    assert (code, output.count("is finished; nothing to do")) == (0, 1)


ELSEWHERE = """
import os, sys
if os.environ["RANK"] == sys.argv.pop(1):
    os.chdir("elsewhere")
from apo.cli import main
main()
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_the_mistake_of_one_process_ends_all_with_one_message(rank, model_dir, data, tmp_path):
    """As on a machine without the model."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").symlink_to(model_dir)
    (tmp_path / "script.py").write_text(ELSEWHERE)
    path = recipe("./model", data, tmp_path / "run")
    code, output = run(2, tmp_path, rank, "train", path, launch=["script.py"])
    assert code != 0
    assert len(ours(output)) == 1, output
    assert ours(output)[0].startswith("error: model folder ./model does not exist")
    assert re.findall(r"exitcode\s*: (\S+)", output)[-1] == "2"
    assert "Traceback" not in output.partition("elastic")[0]
    assert not (tmp_path / "run").exists()


def test_one_ctrl_c_saves_one_checkpoint_and_the_same_command_resumes(alone, model_dir, data, tmp_path):
    out = tmp_path / "run"
    path = recipe(model_dir, data, out, save_steps=1)
    process = start(2, tmp_path, "train", path)
    for line in process.stderr:
        if line.startswith("step 1/9"):
            process.send_signal(signal.SIGINT)
            break
    _, output = process.communicate(timeout=120)
    saved = checkpoints.checkpoints(out)
    stopped = [line for line in ours(output) if line.startswith("stopped")]
    step = checkpoints.checkpoint_step(saved[-1])
    assert stopped == [f"stopped at step {step} of 9; the same command goes on from the last checkpoint"], output
    assert all(checkpoints.resume_problem(folder) is None for folder in saved)
    assert not (out / checkpoints.UNFINISHED).exists()
    assert step < 9
    code, output = run(2, tmp_path, "train", path)
    assert code == 0, output
    assert [line for line in ours(output) if line.startswith("going on")] == [f"going on from step {step} of 9"]
    assert_same_result(out, alone)


def test_a_process_killed_is_started_again_from_the_last_checkpoint(alone, model_dir, data, tmp_path):
    out = tmp_path / "run"
    process = start(2, tmp_path, "train", recipe(model_dir, data, out, save_steps=1), more=["--max-restarts", "1"])
    end = time.monotonic() + 120
    while not any(checkpoints.checkpoints(out)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    last = [pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(last[0]), signal.SIGKILL)
    _, output = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert [line for line in ours(output) if line.startswith("going on from step")], output
    assert_same_result(out, alone)


@pytest.mark.parametrize(("first_count", "second_count"), [(2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(first_count, second_count, alone, model_dir, data, tmp_path):
    """`pairs_per_step` says what a step holds, and the same recipe leads to the same model."""
    path = recipe(model_dir, data, tmp_path / "run", save_steps=1)
    keys = yaml.safe_load(path.read_text())
    del keys["trainer"]["gradient_accumulation_steps"]
    path.write_text(yaml.safe_dump({**keys, "pairs_per_step": 8}))
    process = start(first_count, tmp_path, "train", path)
    for line in process.stderr:
        if line.startswith("step 1/9"):
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=120)
    run_file = tmp_path / "run" / "run.json"
    first = json.loads(run_file.read_text())
    assert (first["processes"], first["pairs_per_step"]) == (first_count, 8)
    assert "finished" not in first
    code, output = run(second_count, tmp_path, "train", path)
    assert code == 0, output
    assert any(line.startswith("going on from step") for line in ours(output))
    assert json.loads(run_file.read_text())["processes"] == second_count
    assert_same_result(tmp_path / "run", alone)


def test_processes_that_a_launcher_did_not_start_are_missed_in_a_line(model_dir, data, tmp_path):
    """`accelerate launch --cpu` starts one process, whatever number is requested."""
    path = recipe(model_dir, data, tmp_path / "run")
    arguments = ["launch", "--cpu", "--num_processes", 2, "-m", "apo.cli", "train", path]
    code, output = outcome(launched(tmp_path, "-m", "accelerate.commands.accelerate_cli", *arguments))
    assert code != 0
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: accelerate launch was asked for several processes and started one")
    assert "torchrun" in error
    assert not (tmp_path / "run").exists()
