"""A stopped run goes on as if it had not been stopped: after a crash at any point of a save, kill -9, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from apo.monitoring.failures import TrainingStopped
from apo.run_dir import checkpoints
from apo.run_dir import files as runs
from apo.training.config import TrainConfig
from apo.training.plan import plan
from apo.training.train import train
from clair.core.errors import UserError
from clair.pipeline.output_dir import lock_output
from clair.storage.object_store import InUse
from tests.apo.conftest import TEMPLATE, make_pairs, make_tokenizer
from tests.apo.training.crashes import CRASHES, Crash, crash_in
from tests.apo.training.families import tiny

STEPS, EVERY = 18, 4
TRAINER = {
    "learning_rate": 1e-2, "num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "logging_steps": 3, "save_steps": EVERY, "lr_scheduler_type": "cosine",
}  # fmt: skip
# 22 pairs in windows of 4: 6 steps an epoch, the last one smaller; checkpoints at 4, 8, 12, 16, 18 of 18 steps.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(22)))
    return path


def recipe(model_dir, data, out, lora):
    more = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}} if lora else {}
    return {"model": str(model_dir), "dataset": str(data), "trainer": dict(TRAINER), "out": str(out), **more}


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def uninterrupted(request, model_dir, data, tmp_path_factory):
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(TrainConfig(**recipe(model_dir, data, out, request.param)), log=lambda _: None)
    return out, request.param


def weights(out):
    return load_file(next(Path(out).glob("*model.safetensors")))


def metrics(out):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    measured = ("per_second", "mfu", "runtime")
    return [{key: row[key] for key in row if not any(word in key for word in measured)} for row in rows]


def assert_same_result(out, expected):
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(out)[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert metrics(out) == [pytest.approx(row, abs=1e-5, rel=1e-5) for row in metrics(expected)]


@pytest.mark.parametrize("point", CRASHES)
def test_a_crash_inside_a_save_costs_at_most_the_steps_since_the_last(point, uninterrupted, model_dir, data, tmp_path):
    expected, lora = uninterrupted
    config = TrainConfig(**recipe(model_dir, data, tmp_path / "run", lora))
    with pytest.MonkeyPatch.context() as patch:
        crash_in(CRASHES[point], 12, patch)
        with pytest.raises(Crash):
            train(config, log=lambda _: None)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == (3 if "in place" in point else 2)
    messages: list[str] = []
    record = train(config, log=messages.append)
    begun = 12 if "in place" in point else 8
    assert record["resumed_from"] == [begun]
    assert f"going on from step {begun} of {STEPS}" in messages
    if "optimizer" in point or "random" in point or "declared" in point:
        assert "removed checkpoint-12, which was being written when the run was stopped" in messages
    assert_same_result(config.out, expected)


def test_a_truncated_newest_checkpoint_is_set_aside(uninterrupted, model_dir, data, tmp_path):
    expected, lora = uninterrupted
    config = TrainConfig(**recipe(model_dir, data, tmp_path / "run", lora))
    with pytest.MonkeyPatch.context() as patch:
        crash_in(CRASHES["after the checkpoint is in place"], 8, patch)
        with pytest.raises(Crash):
            train(config, log=lambda _: None)
    optimizer = tmp_path / "run" / "checkpoint-8" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    messages: list[str] = []
    assert train(config, log=messages.append)["resumed_from"] == [4]
    assert any(
        line.startswith("set aside checkpoint-8 as incomplete-checkpoint-8: optimizer.pt has") for line in messages
    )
    assert_same_result(config.out, expected)


@pytest.fixture
def stopped_run(request, model_dir, data, tmp_path):
    """The recipe of a run that ended after its checkpoint of step 8; there is one of step 4, too."""
    lora = request.getfixturevalue("uninterrupted")[1] if "uninterrupted" in request.fixturenames else False
    config = TrainConfig(**recipe(model_dir, data, tmp_path / "run", lora))
    with pytest.MonkeyPatch.context() as patch:
        crash_in(CRASHES["after the checkpoint is in place"], 8, patch)
        with pytest.raises(Crash):
            train(config, log=lambda _: None)
    return config


@pytest.mark.parametrize("name", ["*model.safetensors", "optimizer.pt"])
def test_a_checkpoint_of_its_old_size_and_other_content_is_set_aside(name, uninterrupted, stopped_run):
    (file,) = (Path(stopped_run.out) / "checkpoint-8").glob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x01
    file.write_bytes(content)
    messages: list[str] = []
    assert train(stopped_run, log=messages.append)["resumed_from"] == [4]
    prefix = f"set aside checkpoint-8 as incomplete-checkpoint-8: {file.name} is damaged: its content is not what was "
    assert f"{prefix}written" in messages
    assert_same_result(stopped_run.out, uninterrupted[0])


def test_a_model_that_changed_between_stop_and_resume_is_refused_before_it_is_loaded(stopped_run, model_dir, tmp_path):
    moved = tmp_path / "model"
    shutil.copytree(model_dir, moved)
    config = stopped_run.model_copy(update={"model": str(moved)})
    run = Path(config.out) / "run.json"
    run.write_text(run.read_text().replace(str(model_dir), str(moved)))
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apo.training.train.load_model", lambda *_, **__: pytest.fail("loaded"))
        with pytest.raises(UserError, match=r"holds a run on another model: the files of .* have changed since"):
            train(config, log=lambda _: None)
    shutil.copy(model_dir / "model.safetensors", moved)
    assert train(config, log=lambda _: None)["resumed_from"] == [8]


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_loses_nothing(stopped_run):
    with lock_output(stopped_run.out):
        files = sorted(Path(stopped_run.out).rglob("*"))
        with pytest.raises(InUse, match=rf"is in use by process {os.getpid()}; wait for it"):
            train(stopped_run, log=lambda _: None)
        assert sorted(Path(stopped_run.out).rglob("*")) == files
    assert train(stopped_run, log=lambda _: None)["resumed_from"] == [8]


def test_a_run_that_another_process_ended_meanwhile_is_not_begun_again(model_dir, data, tmp_path):
    config, messages = TrainConfig(**recipe(model_dir, data, tmp_path / "run", lora=False)), []
    config.trainer.update(num_train_epochs=1)
    with pytest.MonkeyPatch.context() as patch:

        @contextlib.contextmanager
        def late(out):
            patch.undo()
            train(config, log=lambda _: None)
            with lock_output(out):
                yield

        patch.setattr("apo.training.train.lock_output", late)
        assert train(config, log=messages.append)["resumed_from"] == []
    assert messages == [f"{config.out} was finished by another process just now; nothing to do"]


@contextlib.contextmanager
def no_file_above(size):
    """A disk that takes no larger file: what a full one does, without one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("size", "written"), [(20_000, "torch or safetensors"), (100_000, "torch")])
def test_a_full_disk_ends_the_run_in_a_line_and_it_resumes(size, written, uninterrupted, stopped_run):
    """Below the size of the weights their writer fails, below that of the optimizer's states torch does."""
    if uninterrupted[1] and written == "torch":
        pytest.skip("an adapter's states are smaller")
    end = "make room or give permission, then run the same command again; the last good checkpoint is .*/checkpoint-8$"
    with (
        no_file_above(size),
        pytest.raises(TrainingStopped, match=f"step 12: the checkpoint cannot be written to .*; {end}"),
    ):
        train(stopped_run, log=lambda _: None)
    assert not (Path(stopped_run.out) / checkpoints.UNFINISHED).exists()
    assert train(stopped_run, log=lambda _: None)["resumed_from"] == [8, 8]
    assert_same_result(stopped_run.out, uninterrupted[0])


def test_without_any_checkpoint_the_run_starts_over(uninterrupted, model_dir, data, tmp_path):
    expected, lora = uninterrupted
    config = TrainConfig(**recipe(model_dir, data, tmp_path / "run", lora))
    with pytest.MonkeyPatch.context() as patch:
        crash_in(CRASHES["before the model is written"], 4, patch)
        with pytest.raises(Crash):
            train(config, log=lambda _: None)
    messages: list[str] = []
    assert train(config, log=messages.append)["resumed_from"] == [0]
    assert "starting over: there is no complete checkpoint" in messages
    assert_same_result(config.out, expected)


def test_a_crash_after_training_and_before_the_end_trains_nothing_again(uninterrupted, model_dir, data, tmp_path):
    expected, lora = uninterrupted
    config = TrainConfig(**recipe(model_dir, data, tmp_path / "run", lora))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apo.monitoring.plots.draw_dynamics", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            train(config, log=lambda _: None)
    record = train(config, log=lambda _: None)
    assert record["resumed_from"] == [STEPS]
    assert_same_result(config.out, expected)


# The real thing, in processes of their own


def start(path, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "apo.cli", "train", str(path)],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path,
    )  # fmt: skip


def wait_until(condition, process, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def one_thread():
    """As many threads as `start` gives a process: another number sums in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_kill_9_while_saving_then_ctrl_c_change_nothing(data, tmp_path):
    """On another family than above, with windows and soft caps."""
    tiny("gemma2, soft caps, window of 12").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    keys = recipe(tmp_path / "model", data, tmp_path / "run", lora=False)
    keys["trainer"] |= {"save_steps": 1, "num_train_epochs": 12, "save_total_limit": 3}  # most of its time it saves
    keys["trainer"] |= {"learning_rate": 1e-3, "logging_steps": 1}
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(keys))

    process = start(path, tmp_path)
    step = random.Random(time.time_ns()).randrange(3, 20)
    wait_until(lambda: any(checkpoints.checkpoint_step(c) >= step for c in checkpoints.checkpoints(out)), process)
    wait_until(lambda: any((out / checkpoints.UNFINISHED).glob("*/*")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    process = start(path, tmp_path)
    wait_until(lambda: json.loads((out / "run.json").read_text())["resumed_from"], process)
    wait_until(lambda: any(checkpoints.checkpoint_step(c) >= step + 8 for c in checkpoints.checkpoints(out)), process)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "stopping after this step, with a checkpoint" in output
    assert output.splitlines()[-1].startswith("stopped at step ")
    assert output.splitlines()[-1].endswith("of 72; the same command goes on from the last checkpoint")
    newest = checkpoints.find_newest_checkpoint(out).newest
    assert f"stopped at step {checkpoints.checkpoint_step(newest)} of 72" in output

    record = train(TrainConfig(**keys), log=lambda _: None)
    assert record["resumed_from"][0] >= step
    assert record["resumed_from"][1] == checkpoints.checkpoint_step(newest)
    assert [row["step"] for row in metrics(out) if "loss" in row] == list(range(1, 73))
    assert [row["step"] for row in metrics(out) if "probe/kl" in row] == list(range(8, 73, 8))
    keys["out"], keys["trainer"]["save_strategy"] = str(tmp_path / "whole"), "no"
    train(TrainConfig(**keys), log=lambda _: None)
    assert_same_result(out, tmp_path / "whole")


def test_a_run_resumes_the_next_day_with_the_date_of_its_first(model_dir, data, tmp_path, monkeypatch):
    dated = shutil.copytree(model_dir, tmp_path / "dated")
    word = "{{ ['one', 'two', 'three'][strftime_now('%d') | int % 3] }}"
    template = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}<|start|>system\n" + word + "<|end|>")
    make_tokenizer(template).save_pretrained(dated)
    tasks = tmp_path / "tasks.jsonl"
    task = {"prompt": "what is one", "options": ["one", "two"], "answer": "one"}
    tasks.write_text(f"{json.dumps(task)}\n{json.dumps(task)}\n")

    def config(name):
        more = {"eval": str(data), "guard": {"tasks": str(tasks)}}
        trainer = TRAINER | {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4}
        return TrainConfig(**recipe(dated, data, tmp_path / name, False) | more | {"trainer": trainer})

    def begin_day(day):
        monkeypatch.setattr(runs, "today", lambda: day)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"cache of {day}")

    begin_day("2026-11-30")
    full = train(config("whole"), log=lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        crash_in(CRASHES["after the checkpoint is in place"], 4, patch)
        with pytest.raises(Crash):
            train(config("stopped"), log=lambda _: None)
    begin_day("2026-12-01")
    record = train(config("stopped"), log=lambda _: None)
    assert record["resumed_from"] == [4]
    assert record["day"] == full["day"] == "2026-11-30"
    assert_same_result(tmp_path / "stopped", tmp_path / "whole")
    first, second = (plan(config(name)) for name in ("whole", "another"))  # what starts anew writes today's date
    assert first.train.dataset["prompt_ids"][:] != second.train.dataset["prompt_ids"][:]
    assert first.eval.dataset["prompt_ids"][:] != second.eval.dataset["prompt_ids"][:]
    assert first.guard_set.options != second.guard_set.options


def test_a_run_that_resumes_reads_each_file_of_its_checkpoint_once_to_check_it(model_dir, data, tmp_path, monkeypatch):
    config = TrainConfig(**recipe(model_dir, data, tmp_path / "run", False))
    with pytest.MonkeyPatch.context() as patch:
        crash_in(CRASHES["after the checkpoint is in place"], 16, patch)
        with pytest.raises(Crash):
            train(config, log=lambda _: None)
    hashed, sha256 = [], checkpoints.file_sha256
    monkeypatch.setattr(checkpoints, "file_sha256", lambda path: hashed.append(path) or sha256(path))
    assert train(config, log=lambda _: None)["resumed_from"] == [16]
    marker = json.loads((tmp_path / "run" / "checkpoint-16" / checkpoints.MARKER).read_text())
    assert sorted(path.name for path in hashed if "checkpoint-16" in path.parts) == sorted(marker["files"])
