"""`accelerate launch` with the ZeRO configs of recipes/accelerate, on two processes of a CPU, where DeepSpeed is there.

That its steps are those of one process is shown in test_processes.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from importlib.util import find_spec

import pytest
import yaml
from safetensors.torch import load_file

from tests.apo.conftest import apart, make_pairs
from tests.apo.distributed.processes import PAIRS, ROOT, TRAINER, launched, outcome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: the extra `deepspeed`"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepspeed") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(PAIRS)))
    return path


def start(stage, folder, out, model_dir, data, precision="no", lora=False, **trainer):
    """`accelerate launch` of a run: the config as it is, but for the number of processes and their numbers' type."""
    recipe = out.with_suffix(".yaml")
    keys = {"model": str(model_dir), "dataset": str(data), "trainer": {**TRAINER, **trainer}, "out": str(out)}
    recipe.write_text(yaml.safe_dump(keys | ({"lora": {"r": 4}} if lora else {})))
    config = ROOT / "recipes" / "accelerate" / f"zero{stage}.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    launch += ["--main_process_port", 0, "--mixed_precision", precision, "-m", "tests.apo.deepspeed_on_cpus"]
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return launched(folder, *launch, "train", recipe, PYTHONPATH=python_path, DS_ACCELERATOR="cpu")


def run(*arguments, **options):
    code, output = outcome(start(*arguments, **options))
    assert "batches padded" not in output
    return code, output


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_killed_and_started_again_ends_as_one_that_was_not(stage, model_dir, data, tmp_path):
    unbroken, stopped = tmp_path / "whole", tmp_path / "stopped"
    code, output = run(stage, tmp_path, unbroken, model_dir, data)
    assert code == 0, output
    assert {"config.json", "model.safetensors", "run.json", "tokenizer.json"} <= {f.name for f in unbroken.iterdir()}
    trained, base = load_file(unbroken / "model.safetensors"), load_file(model_dir / "model.safetensors")
    assert {name: tensor.shape for name, tensor in trained.items()} == {name: t.shape for name, t in base.items()}
    process = start(stage, tmp_path, stopped, model_dir, data)
    give_up = time.monotonic() + 240
    while not (stopped / "checkpoint-4" / "complete.json").exists() and time.monotonic() < give_up:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    for child in map(int, children.stdout.split()):
        os.kill(child, signal.SIGKILL)
    process.communicate(timeout=240)
    assert "finished" not in json.loads((stopped / "run.json").read_text())
    code, output = run(stage, tmp_path, stopped, model_dir, data)
    assert code == 0, output
    assert re.search(r"going on from step [48] of 9", output), output
    assert apart(*(load_file(out / "model.safetensors") for out in (unbroken, stopped))) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_an_adapter_is_saved_whole(stage, model_dir, data, tmp_path):
    from peft import AutoPeftModelForCausalLM

    out = tmp_path / "run"
    code, output = run(stage, tmp_path, out, model_dir, data, lora=True)
    assert code == 0, output
    model = AutoPeftModelForCausalLM.from_pretrained(out)
    adapter = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    assert len(adapter) == 14
    assert all(weight.abs().max() > 0 for weight in adapter.values())
    assert metrics(out)[-1]["rewards/margins"] > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_in_bfloat16_the_reference_is_the_model_that_is_trained(stage, model_dir, data, tmp_path):
    out = tmp_path / "run"
    code, output = run(stage, tmp_path, out, model_dir, data, precision="bf16", bf16=True, use_cpu=True, max_steps=2)
    assert code == 0, output
    first = metrics(out)[0]
    rewards = {key: first[key] for key in first if re.fullmatch(r"rewards/(chosen|rejected)_p\d\d", key)}
    assert len(rewards) == 6
    assert rewards == pytest.approx(dict.fromkeys(rewards, 0), abs=1e-4), "rounding to bfloat16 makes 7e-3 of them"
