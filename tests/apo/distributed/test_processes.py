"""One process, two with DDP, two that shard the model by accelerate's FSDP2, by torch's own `fully_shard`, and by
DeepSpeed's ZeRO, if it is there: the same pairs at every step, the same numbers, the same model.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.apo.train_together import OF, SIZE, STEPS

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


ZERO = tuple(way for way in OF if way.startswith("zero"))
INSTALLED = ("one", "ddp", "fsdp", "raw", *(ZERO if find_spec("deepspeed") else ()))
WITHOUT = pytest.mark.skipif("zero2" not in INSTALLED, reason="DeepSpeed is not installed: the extra `deepspeed`")


def launcher(way):
    """What starts the processes: torchrun, or accelerate with the config that comes with the project, on two CPUs."""
    if way not in ZERO:
        return ["torch.distributed.run", "--standalone", "--nproc_per_node", 1 if way == "one" else 2]
    config = ROOT / "recipes" / "accelerate" / f"{way}.yaml"
    changes = ["--num_processes", 2, "--main_process_port", 0, "--mixed_precision", "no"]
    return ["accelerate.commands.launch", "--config_file", config, *changes]


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """What train_together.py found, by way."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "TORCH_CPP_LOG_LEVEL": "ERROR", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    for way in INSTALLED:
        asked = ["ddp" if way == "one" else way, *([folder / "one"] if way == "raw" else [])]
        command = [sys.executable, "-m", *launcher(way), "-m", "tests.apo.train_together", folder / way, *asked]
        done = subprocess.run(
            list(map(str, command)), env=environment, cwd=folder, capture_output=True, text=True, check=False,
            timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return {way: (folder / way, json.loads((folder / way / "steps.json").read_text())) for way in INSTALLED}


WAYS = [
    pytest.param(way, case, marks=WITHOUT if way in ZERO else ()) for way, cases in OF.items() for case in cases
]  # fmt: skip


@pytest.mark.parametrize(("way", "case"), WAYS)
def test_every_step_is_that_of_one_process(way, case, arms):
    one, other = arms["one"][1][case]["rows"], arms[way][1][case]["rows"]
    assert len(one) == len(other) == STEPS
    keys = {"loss", "grad_norm", "logps/chosen", "logps/rejected", "kl/mismatched"} & set(one[0])
    for key in keys:
        residuals = [a[key] - b[key] for a, b in zip(one, other, strict=True)]
        norm = sum(row[key] ** 2 for row in one) ** 0.5
        assert sum(residual**2 for residual in residuals) ** 0.5 <= 1e-5 * norm, key
    if "kl/mismatched" in keys:
        assert max(row["kl/mismatched"] for row in one) > 1e-3, "there is an anchor to agree on"
    residuals = [a["loss"] - b["loss"] for a, b in zip(one, other, strict=True)]
    error = statistics.stdev(residuals) / STEPS**0.5
    assert abs(statistics.mean(residuals)) <= 3 * error + 1e-8, "the losses drift"


@pytest.mark.parametrize(("way", "case"), WAYS)
def test_the_model_is_that_of_one_process(way, case, arms):
    one, other = (load_file(next((arms[name][0] / case).glob("*.safetensors"))) for name in ("one", way))
    other = {name: tensor for name, tensor in other.items() if way != "raw" or name in one}
    assert set(one) == set(other)
    apart = sum(float((one[name] - other[name]).norm() ** 2) for name in one) ** 0.5
    assert apart <= 1e-5 * sum(float(tensor.norm() ** 2) for tensor in one.values()) ** 0.5


@pytest.mark.parametrize("way", ["ddp", "fsdp", *(pytest.param(way, marks=WITHOUT) for way in ZERO)])
def test_every_step_has_the_pairs_of_one_process_in_their_order(way, arms):
    for case in OF[way]:
        assert arms[way][1][case]["pairs"] == arms["one"][1][case]["pairs"]
        sizes = [len(step) for step in arms[way][1][case]["pairs"]]
        assert sizes[:6] == [SIZE, SIZE, 6, SIZE, SIZE, 6]


@pytest.mark.parametrize("way", ["ddp", "fsdp", *(pytest.param(way, marks=WITHOUT) for way in ZERO)])
def test_a_micro_batch_is_cut_into_more_passes_by_one_process_than_by_the_other(way, arms):
    passes = list(zip(*arms[way][1]["tied"]["passes"], strict=True))
    assert {2, 1} in map(set, passes)
    assert len(passes) == 2 * STEPS


def test_the_references_parts_are_shared_out(arms):
    counts = {way: arms[way][1]["llama"]["computed"] for way in ("one", "ddp", "fsdp")}
    assert counts == {"one": 22, "ddp": 12, "fsdp": 12}  # the first process has parts 0, 2 and 4, of 4 pairs each
