"""The benchmark for a GPU: its result files, its table, and all of its parts in small on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "train_on_gpu.py"
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the module extends
    spec = importlib.util.spec_from_file_location("train_on_gpu", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_on_gpu", module)
    spec.loader.exec_module(module)
    return module


def call(out, *options, hidden=(), folder=None):
    """The output of the script in small. Packages that are `hidden` are as if they were not installed."""
    environment = {**os.environ, "PYTHONPATH": ""}
    if hidden:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(HIDE.format(hidden=set(hidden)))
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, str(FILE), "--out", str(out), "--small", "--minutes", "60", *options]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_a_part_continues_with_the_rows_it_lacks_those_that_a_limit_cut_off_last(bench, monkeypatch, tmp_path):
    measured = []

    def row(name, error=None):
        def measure():
            measured.append(name)
            if error:
                raise error
            return {"pairs_per_second": 2.0}

        return name, measure

    def rows(*_):
        oom, bug, missing = (
            RuntimeError("CUDA out of memory"),
            KeyError("shape"),
            bench.Missing("peft is not installed"),
        )
        return dict(
            [row("kept"), row("hangs"), row("new"), row("large", oom), row("bad", bug), row("without", missing)]
        )

    monkeypatch.setitem(bench.PARTS, "full", bench.Part(60, rows))
    kept = {"state": "done", "pairs_per_second": 1.0}
    bench.write(tmp_path / "full.json", {"rows": {"kept": kept, "hangs": {"state": "started"}}, "seconds": 9.0})
    assert bench.run_part("full", tmp_path, tmp_path, bench.SMALL) == 1
    assert measured == ["new", "large", "bad", "without", "hangs"]
    result = bench.read(tmp_path, "full")
    assert result["rows"]["kept"] == kept
    assert result["rows"]["hangs"] == {"state": "done", "pairs_per_second": 2.0}
    assert result["rows"]["large"] == {"state": "done", "out_of_memory": True}
    assert result["rows"]["bad"] == {"state": "failed", "reason": "KeyError: 'shape'"}
    assert result["rows"]["without"] == {"state": "left out", "reason": "peft is not installed"}
    assert result["versions"]["device"] == "CPU"
    table = bench.table(tmp_path)
    assert "| full | large | out of memory | – |" in table
    assert "| full | without | peft is not installed | – |" in table


def test_each_bar_is_met_missed_or_not_measured(bench):
    def result(**rows):
        return {"rows": {name.replace("_", " "): {"state": "done", **row} for name, row in rows.items()}}

    fast = {"pairs_per_second": 8.5, "mfu": 0.39, "estimate_over_peak": 1.1}
    slow = {"pairs_per_second": 3.0, "mfu": 0.2, "estimate_over_peak": 0.7}
    results = {name: result() for name in bench.PARTS} | {
        "kernels": result(varlen={"largest_difference": 0.002}, flex={"largest_difference": 0.05}),
        "default": {"rows": {
            "apo train, lora": {"losses": [1.0, 0.9]}, "TRL, lora": {"losses": [1.0, 0.91]},
            "apo train, full": {"losses": [1.0, 0.9]}, "TRL, full": {"losses": [1.0, 0.93]},
        }},
        "lora": result(UltraFeedback_varlen=fast, CLAIR_varlen=slow), "full": result(CLAIR_varlen=slow),
        "trl_lora": {"rows": {
            "APOTrainer": {"pairs_per_second": 6.0}, "TRL, defaults": {"pairs_per_second": 2.0},
            "TRL, fastest": {"pairs_per_second": 2.5},
        }},
    }  # fmt: skip
    assert [line.removeprefix("- ") for line in bench.bars(results)] == [
        "missed: each kernel equals `split` in float32 to 1 % (0.0500)",
        "not measured: the tests of a GPU pass",
        "met: default `apo train`, lora: losses equal TRL's to 0.02, they change by 0.100 (0.01000)",
        "met: lora: at least twice as fast as TRL's fastest (2.40x)",
        "met: lora, UltraFeedback: 8 pairs a second (8.50)",
        "missed: lora, UltraFeedback: MFU of 40 % (39.0%)",
        "missed: lora: peak memory within 20 % of the estimate (30.0%)",
        "missed: default `apo train`, full: losses equal TRL's to 0.02, they change by 0.100 (0.03000)",
        "not measured: full: at least twice as fast as TRL's fastest",
        "not measured: full, UltraFeedback: 8 pairs a second",
        "not measured: full, UltraFeedback: MFU of 40 %",
        "missed: full: peak memory within 20 % of the estimate (30.0%)",
    ]


def test_the_shapes_are_those_of_llama_3_8b_and_lengths_have_ultrafeedbacks_medians(bench):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**bench.GPU.llama3_8b))
    assert model.num_parameters() == 8_030_261_248
    lengths = bench.ultrafeedback_lengths(2001)
    totals, prompts = (sorted(values)[1000] for values in ([p + c for p, c, _ in lengths], [p for p, _, _ in lengths]))
    assert 380 < totals < 480
    assert 100 < prompts < 140
    assert lengths[:5] == bench.ultrafeedback_lengths(5)


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_without_trl_killed_by_its_limit_and_resumed(tmp_path):
    out = tmp_path / "out"

    def state(name):
        return json.loads((out / f"{name}.json").read_text())["state"]

    hidden = call(out, hidden=("trl", "datasets", "peft"), folder=tmp_path / "hidden")
    for name in ("default", "trl_lora", "trl_full"):
        assert state(name) == "left out: trl is not installed"
        assert f"{name}: left out: trl is not installed\n" in hidden
    assert state("kernels") == state("lora") == "left out in part"
    assert "| lora | UltraFeedback, split, no checkpointing | peft is not installed |" in hidden
    assert state("full") == "done"
    full = (out / "full.json").read_bytes()

    assert "lora: killed after 1 s" in call(out, "--parts", "lora", "--limit", "1")
    assert state("lora") == "killed after 1 s"

    resumed = call(out)
    assert (out / "full.json").read_bytes() == full
    assert "full: complete\n" in resumed
    results = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    assert {result["state"] for result in results.values()} == {"done"}, resumed
    assert {row["state"] for result in results.values() for row in result["rows"].values()} == {"done"}
    assert resumed.endswith(call(out, "--table"))
    assert resumed.count("they change by 0.0") == 2
    for tune in ("lora", "full"):
        assert f"- met: default `apo train`, {tune}: losses equal TRL's to 0.02" in resumed
        for row in (*results[tune]["rows"].values(), *results[f"trl_{tune}"]["rows"].values()):
            assert 0 < row["mfu"] < 1
            assert abs(row["losses"][0] - 1) < 1e-4
        assert all(row["estimate_gib"] >= 0 for row in results[tune]["rows"].values())
        curves = [row["losses"] for row in results[f"trl_{tune}"]["rows"].values()]
        assert max(abs(a - b) for curve in curves for a, b in zip(curve, curves[0], strict=True)) < 1e-5
