"""The designs: which runs are due, what selection takes, when a regime is tested, and that no finished run is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from clair.core.errors import UserError
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.design import (
    FULL,
    SMALL,
    Design,
    Run,
    Setting,
    accuracy,
    due,
    gain,
    is_regime,
    select,
    worlds_needed,
)
from recipes.experiments.paper_mini.run import collect, run_designs
from recipes.world.running import ROOT
from tests.experiments.synthetic_runs import PASSED, finished, row_of

TUNING = FULL.tuning


def test_the_designs_have_the_sizes_that_were_written_down():
    assert len(due("D0", FULL, PASSED, {})) == 84
    first = due("D1", FULL, PASSED, {})
    assert len(first) == 156
    assert [run.world for run in first[:36]] == [world for world in TUNING for _ in range(12)]
    assert len(due("D2", FULL, PASSED, {})) == 72  # tuning alone
    assert due("D3", FULL, PASSED, {}) == []
    assert worlds_needed("D1", FULL) == TUNING + [f"regions-{seed}" for seed in range(10)]


def test_the_small_look_runs_every_design():
    rows = {}
    for name in ("D0", "D1", "D2", "D3", "D4"):
        while runs := due(name, SMALL, PASSED, rows):
            rows |= finished(runs)
    assert len(rows) < 70
    assert {row["pairs"] for row in rows.values()} == {"clair", "delta", "dose-1", "dose-2", "dose-3", "weak", "strong"}


def test_the_second_design_tests_a_regime_after_its_gate_and_at_the_selected_rate():
    rows = finished(due("D2", FULL, PASSED, {}))
    assert (is_regime(FULL, "weak", TUNING, rows), is_regime(FULL, "strong", TUNING, rows)) == (True, True)
    tests = due("D2", FULL, PASSED, rows)
    assert len(tests) == 48
    assert not {run.world for run in tests} & set(TUNING)
    for run in tests:
        setting = select(FULL, run.pairs, run.objective, TUNING, rows)
        assert setting
        assert run.learning_rate == setting.learning_rate


def test_the_first_design_runs_what_its_claims_take_before_other_rates():
    rows = finished(run for run in due("D1", FULL, PASSED, {}) if run.world in TUNING)
    rates = {o: select(FULL, "clair", o, TUNING, rows).learning_rate for o in ("sft", "dpo", "apo_zero", "apo_down")}
    shared = [rates["apo_zero"]] * 3
    claims = {*rates.items(), *zip(("dpo", "apo_zero", "apo_down"), shared, strict=True)}
    claimed = [(run.objective, run.learning_rate) in claims for run in due("D1", FULL, PASSED, rows)]
    assert len(claimed) == 120
    assert sum(claimed) == 10 * len(claims)
    assert claimed == sorted(claimed, reverse=True)


def test_a_regime_whose_gate_is_missed_in_one_tuning_world_has_no_test_runs():
    rows = finished(due("D2", FULL, PASSED, {}))
    run = FULL.run(TUNING[1], "weak", "sft", 5e-5)
    rows[run.key] = row_of(run, lambda _, epoch: 0.7 + 0.01 * (epoch == 18))
    assert is_regime(FULL, "weak", TUNING, rows) is False
    assert {run.pairs for run in due("D2", FULL, PASSED, rows)} == {"strong"}
    assert is_regime(FULL, "weak", [], rows) is None


def test_a_world_that_misses_a_gate_has_no_runs():
    passed = PASSED | {"regions-4": False, "quickstart-1": False}
    assert len(due("D0", FULL, passed, {})) == 56
    assert not [run for run in due("D1", FULL, passed, {}) if run.world == "regions-4"]


def test_doses_use_the_runs_of_the_first_design_for_the_correction_alone():
    rows = finished(due("D1", FULL, PASSED, {}))
    runs = due("D3", FULL, PASSED, rows)
    assert len(runs) == 3 * 6 * 3
    assert {run.pairs for run in runs} == {"dose-1", "dose-2", "dose-3"}


def test_delta_pairs_are_held_against_the_runs_of_the_first_design():
    rows = finished(due("D1", FULL, PASSED, {}))
    tuning = due("D4", FULL, PASSED, rows)
    assert len([run for run in tuning if run.pairs == "delta"]) == 27
    rows |= finished(tuning)
    runs = due("D4", FULL, PASSED, rows)
    assert {(run.pairs, run.objective) for run in runs} == {("delta", name) for name in ("sft", "dpo", "apo_zero")}
    assert len(runs) == 18


def test_tuning_sees_other_contents_than_the_test():
    assert FULL.run("regions-101", "clair", "dpo", 5e-5).split == "validation"
    assert FULL.run("regions-1", "clair", "dpo", 5e-5).split == "heldout"


# ---- selection


def tuned(values):
    """Tuning rows of DPO on CLAIR: the gain by rate, world and epoch."""
    rows = {}
    for rate in FULL.shared_rates:
        for index, world in enumerate(TUNING):
            run = FULL.run(world, "clair", "dpo", rate)
            rows[run.key] = row_of(run, lambda _, epoch, r=rate, i=index: 0.4 + (values(r, i, epoch) if epoch else 0))
    return rows


def test_the_smallest_rate_within_one_standard_error_of_the_best_is_selected():
    # At 1.5e-4 the worlds gain 0.1, 0.2, 0.3: mean 0.2, standard error 0.0577. At 5e-5 the mean is 0.16, within it.
    gains = {1.5e-5: 0.1, 5e-5: 0.16, 1.5e-4: 0.0}
    rows = tuned(
        lambda rate, index, epoch: 0.1 * (index + 1) if rate == 1.5e-4 else gains[rate] - 0.005 * (epoch != 10)
    )
    assert select(FULL, "clair", "dpo", TUNING, rows) == Setting(5e-5, 10)
    clear = tuned(lambda rate, index, epoch: {1.5e-5: 0.1, 5e-5: 0.12, 1.5e-4: 0.2}[rate] + 0.002 * index)
    setting = select(FULL, "clair", "dpo", TUNING, clear)
    assert setting
    assert setting.learning_rate == 1.5e-4


def test_nothing_is_selected_before_all_tuning_runs_are_there():
    rows = tuned(lambda *_: 0.1)
    assert select(FULL, "clair", "dpo", TUNING[:1], rows) is None
    rows.popitem()
    assert select(FULL, "clair", "dpo", TUNING, rows) is None


def test_a_stopped_run_keeps_its_last_value():
    run = FULL.run("regions-0", "clair", "dpo", 5e-5)
    row = row_of(run, lambda _, epoch: 0.7 if epoch == 0 else 0.5)
    row["checkpoints"] = [c for c in row["checkpoints"] if c["epoch"] <= 4]
    assert gain(row, 18) == gain(row, 4) == pytest.approx(-0.2, abs=1e-3)
    assert accuracy({"right": "f" * 40}) == 1.0


def test_a_key_changes_with_every_setting():
    run = Run("regions-0", "clair", "dpo", 5e-5, 0.1, 18, 2)
    others = [Run("regions-1", "clair", "dpo", 5e-5, 0.1, 18, 2), Run("regions-0", "clair", "dpo", 5e-5, 0.1, 18, 3)]
    assert len({run.key, *(other.key for other in others)}) == 3


# ---- the file


def test_a_line_cut_off_by_a_kill_is_taken_away_by_the_next(tmp_path):
    file = tmp_path / "deep" / "runs.jsonl"
    results.append(file, {"kind": "run", "n": 1})
    with open(file, "ab") as out:
        out.write(b'{"kind": "run", "n"')
    assert [line["n"] for line in results.read(file)] == [1]
    results.append(file, {"kind": "run", "n": 2})
    assert [line["n"] for line in results.read(file)] == [1, 2]


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "runs.jsonl"
    assert results.read(file) == []
    file.write_text('{"kind": "run"}\n{"ki\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        results.read(file)


def test_collecting_adds_each_line_once(tmp_path):
    committed = tmp_path / "committed.jsonl"
    for line in ({"kind": "world", "name": "a"}, {"kind": "run", "key": "k"}):
        results.append(tmp_path / "results.jsonl", line)
    assert (collect(tmp_path, committed), collect(tmp_path, committed)) == (2, 0)
    assert len(results.read(committed)) == 2


# ---- the whole, with a kill in between

TINY = Design(draws=1, rates=(5e-5,), betas=(0.1,), short=1)
SCRIPT = f"""
    import sys
    from pathlib import Path
    from recipes.experiments.paper_mini.design import Design
    from recipes.experiments.paper_mini.run import run_designs
    if __name__ == "__main__":
        folder = Path(sys.argv[1])
        run_designs(["D0"], {TINY!r}, folder, 1, committed=folder / "none.jsonl")
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(ready, seconds=600.0):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes in /proc")
def test_a_design_killed_after_its_first_run_does_only_the_others_and_leaves_nothing_behind(tmp_path):
    file, script = tmp_path / "results.jsonl", tmp_path / "tiny.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, script, tmp_path], cwd=ROOT, env=environment) as process:
        try:
            until(lambda: process.poll() is None and file.exists() and file.read_bytes().count(b"\n") == 2)
            workers = children(process.pid)
        finally:
            process.send_signal(signal.SIGKILL)
    assert workers
    until(lambda: not any(alive(pid) for pid in workers), 60)
    original, messages = file.read_bytes(), []
    run_designs(["D0"], TINY, tmp_path, 1, committed=tmp_path / "none.jsonl", log=messages.append)
    assert file.read_bytes().startswith(original)
    world, *runs = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert (world["kind"], world["name"], all(world["gates"].values())) == ("world", "quickstart-0", True)
    assert sorted(run["objective"] for run in runs) == ["apo_down", "apo_zero", "dpo", "sft"]
    assert len({run["key"] for run in runs}) == 4
    for run in runs:
        assert run["commit"]
        assert [checkpoint["epoch"] for checkpoint in run["checkpoints"]] == [0, 1]
        first, last = run["checkpoints"]
        assert len(last["right"]) == 40
        assert last["pairs"]["logps/chosen"] != first["pairs"]["logps/chosen"]
        assert accuracy(first) == pytest.approx(world["right"], abs=1e-4)
    assert messages[-1] == "D0: complete"
    assert sum("runs left" in message for message in messages) == 3
    run_designs(["D0"], TINY, tmp_path, 1, committed=tmp_path / "none.jsonl", log=messages.append)
    assert file.read_text("utf-8").count("\n") == 5
