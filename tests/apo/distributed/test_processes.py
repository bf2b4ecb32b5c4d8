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


ZERO = tuple(backend for backend in OF if backend.startswith("zero"))
INSTALLED = ("one", "ddp", "fsdp", "raw", *(ZERO if find_spec("deepspeed") else ()))
WITHOUT = pytest.mark.skipif("zero2" not in INSTALLED, reason="DeepSpeed is not installed: the extra `deepspeed`")


def launcher(backend):
    """The module that starts two processes on CPUs: torchrun, or accelerate with this project's config."""
    if backend not in ZERO:
        return ["torch.distributed.run", "--standalone", "--nproc_per_node", 1 if backend == "one" else 2]
    config = ROOT / "recipes" / "accelerate" / f"{backend}.yaml"
    changes = ["--num_processes", 2, "--main_process_port", 0, "--mixed_precision", "no"]
    return ["accelerate.commands.launch", "--config_file", config, *changes]


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """The steps that train_together.py recorded, by backend."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "TORCH_CPP_LOG_LEVEL": "ERROR", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    for backend in INSTALLED:
        arguments = ["ddp" if backend == "one" else backend, *([folder / "one"] if backend == "raw" else [])]
        command = [
            sys.executable,
            "-m",
            *launcher(backend),
            "-m",
            "tests.apo.train_together",
            folder / backend,
            *arguments,
        ]
        result = subprocess.run(
            list(map(str, command)), env=environment, cwd=folder, capture_output=True, text=True, check=False,
            timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    return {
        backend: (folder / backend, json.loads((folder / backend / "steps.json").read_text())) for backend in INSTALLED
    }


CASES = [
    pytest.param(backend, case, marks=WITHOUT if backend in ZERO else ())
    for backend, cases in OF.items()
    for case in cases
]


@pytest.mark.parametrize(("backend", "case"), CASES)
def test_every_step_is_that_of_one_process(backend, case, arms):
    expected, actual = arms["one"][1][case]["rows"], arms[backend][1][case]["rows"]
    assert len(expected) == len(actual) == STEPS
    keys = {"loss", "grad_norm", "logps/chosen", "logps/rejected", "kl/mismatched"} & set(expected[0])
    for key in keys:
        residuals = [a[key] - b[key] for a, b in zip(expected, actual, strict=True)]
        norm = sum(row[key] ** 2 for row in expected) ** 0.5
        assert sum(residual**2 for residual in residuals) ** 0.5 <= 1e-5 * norm, key
    if "kl/mismatched" in keys:
        assert max(row["kl/mismatched"] for row in expected) > 1e-3, "there is an anchor to agree on"
    residuals = [a["loss"] - b["loss"] for a, b in zip(expected, actual, strict=True)]
    error = statistics.stdev(residuals) / STEPS**0.5
    assert abs(statistics.mean(residuals)) <= 3 * error + 1e-8, "the losses drift"


@pytest.mark.parametrize(("backend", "case"), CASES)
def test_the_model_is_that_of_one_process(backend, case, arms):
    expected, actual = (load_file(next((arms[name][0] / case).glob("*.safetensors"))) for name in ("one", backend))
    actual = {name: tensor for name, tensor in actual.items() if backend != "raw" or name in expected}
    assert set(expected) == set(actual)
    apart = sum(float((expected[name] - actual[name]).norm() ** 2) for name in expected) ** 0.5
    assert apart <= 1e-5 * sum(float(tensor.norm() ** 2) for tensor in expected.values()) ** 0.5


@pytest.mark.parametrize("backend", ["ddp", "fsdp", *(pytest.param(backend, marks=WITHOUT) for backend in ZERO)])
def test_every_step_has_the_pairs_of_one_process_in_their_order(backend, arms):
    for case in OF[backend]:
        assert arms[backend][1][case]["pairs"] == arms["one"][1][case]["pairs"]
        sizes = [len(step) for step in arms[backend][1][case]["pairs"]]
        assert sizes[:6] == [SIZE, SIZE, 6, SIZE, SIZE, 6]


@pytest.mark.parametrize("backend", ["ddp", "fsdp", *(pytest.param(backend, marks=WITHOUT) for backend in ZERO)])
def test_a_micro_batch_is_cut_into_more_passes_by_one_process_than_by_the_other(backend, arms):
    passes = list(zip(*arms[backend][1]["tied"]["passes"], strict=True))
    assert {2, 1} in map(set, passes)
    assert len(passes) == 2 * STEPS


def test_the_references_parts_are_shared_out(arms):
    counts = {backend: arms[backend][1]["llama"]["computed"] for backend in ("one", "ddp", "fsdp")}
    assert counts == {"one": 22, "ddp": 12, "fsdp": 12}  # the first process has parts 0, 2 and 4, of 4 pairs each
