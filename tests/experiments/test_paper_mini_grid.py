"""The mini grid: which runs are due, what the tuning rule takes, and that no finished run is done again or lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from clair.core.errors import UserError
from clair.core.files import write_json
from clair.data.contrast import contrast_of
from clair.data.dataset import DatasetWriter
from clair.data.records import Message, Pair
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.cells import Design, chosen, climb, due
from recipes.experiments.paper_mini.grid import PAIR_METRICS, GridPaths, grid, rhythm
from recipes.world.running import ROOT
from recipes.world.tasks import distinct_tasks

DESIGN = Design(data=("clair",), objectives=("sft", "dpo"), seeds=(0, 1))


def completed_runs(cells, accuracy=lambda cell: 0.5):
    """Runs as if these cells had been run, with this share of right answers to ten questions."""
    runs = {}
    for cell in cells:
        ones = round(10 * accuracy(cell))
        runs[cell.key("w")] = {"checkpoints": [{"right": "1" * ones + "0" * (10 - ones)}]}
    return runs


def all_rounds(design, accuracy):
    """Do what is due until nothing is; the cells of each round."""
    runs, rounds = {}, []
    while now := due(design, runs, "w"):
        rounds.append(now)
        runs |= completed_runs(now, accuracy)
    return rounds


def test_learning_rate_then_beta_then_all_seeds():
    rounds = all_rounds(DESIGN, lambda _: 0.5)
    assert [{cell.purpose for cell in cells} for cells in rounds] == [
        {"learning_rate"},
        {"beta", "grid"},  # SFT has no beta: its seeds are due at once
        {"grid"},
    ]
    assert sum(len(cells) for cells in rounds) == 12
    seeds = [cell for cells in rounds for cell in cells if cell.purpose == "grid"]
    assert {(cell.objective, cell.learning_rate, cell.beta) for cell in seeds} == {
        ("sft", 1.5e-4, 0.1),  # all alike: the middle
        ("dpo", 1.5e-4, 0.1),
    }
    assert {cell.seed for cell in seeds} == {0, 1}
    assert all(cell.seed == DESIGN.tuning_seed for cells in rounds for cell in cells if cell.purpose != "grid")


def test_the_best_rate_and_then_the_best_beta_at_that_rate_are_taken():
    rounds = all_rounds(DESIGN, lambda cell: 0.5 + 0.2 * (cell.learning_rate == 5e-5) + 0.1 * (cell.beta == 0.03))
    (seed, *_) = [cell for cell in rounds[-1] if cell.objective == "dpo"]
    assert (seed.learning_rate, seed.beta) == (5e-5, 0.03)
    assert {cell.learning_rate for cells in rounds for cell in cells if cell.purpose == "beta"} == {5e-5}


@pytest.mark.parametrize(
    ("better", "tried", "best"),
    [
        ({}, [3, 2, 4], 3),
        ({5: 0.4, 4: 0.3}, [3, 2, 4, 5], 5),
        ({0: 0.4, 1: 0.3, 2: 0.2}, [3, 2, 4, 1, 0], 0),
        ({0: 0.4, 2: 0.2}, [3, 2, 4, 1], 2),  # a better one beyond a worse one is not reached
    ],
)
def test_rates_are_climbed_from_the_middle_until_both_neighbours_of_the_best_were_run(better, tried, best):
    design = replace(DESIGN, objectives=("sft",), seeds=())
    gain = {design.learning_rates[index]: value for index, value in better.items()}
    rounds = all_rounds(design, lambda cell: 0.5 + gain.get(cell.learning_rate, 0.0))
    assert [cell.learning_rate for cells in rounds for cell in cells] == [
        design.learning_rates[index] for index in tried
    ]
    all_of_them = [replace(rounds[0][0], learning_rate=rate) for rate in design.learning_rates]
    runs = completed_runs(all_of_them, lambda cell: 0.5 + gain.get(cell.learning_rate, 0.0))
    winner = climb(all_of_them, runs, "w")[1]
    assert winner is not None
    assert winner.learning_rate == design.learning_rates[best]


@pytest.mark.parametrize(("pairs", "batch", "every"), [(512, 16, 8), (329, 11, 10), (58, 2, 29), (5, 1, 5)])
def test_each_epoch_ends_with_a_look_at_the_held_out_pairs(pairs, batch, every):
    assert rhythm(pairs) == (batch, every)
    assert math.ceil(pairs / batch) % every == 0


def test_a_run_that_broke_off_is_never_chosen():
    cells = due(DESIGN, {}, "w")[:3]
    runs = completed_runs(cells, lambda _: 0.0)
    runs[cells[0].key("w")] = {"checkpoints": [], "broke_off": "the loss is no number"}
    assert chosen(cells, runs, "w") == cells[1]


def test_the_small_grid_has_nothing_to_tune_and_is_due_at_once():
    from recipes.experiments.paper_mini.cells import SMALL

    assert len(due(SMALL, {}, "w")) == 20


def test_another_world_has_other_keys():
    cell = due(DESIGN, {}, "w")[0]
    assert cell.key("w") == replace(cell).key("w") != cell.key("v")
    assert cell.key("w") != replace(cell, seed=cell.seed + 1).key("w")


def test_a_line_cut_off_by_a_kill_is_taken_away_by_the_next(tmp_path):
    file = tmp_path / "deep" / "runs.jsonl"
    results.append(file, {"kind": "run", "n": 1})
    with open(file, "ab") as out:
        out.write(b'{"kind": "run", "n"')
    assert [line["n"] for line in results.read(file)] == [1]
    results.append(file, {"kind": "run", "n": 2})
    assert [line["n"] for line in results.read(file)] == [1, 2]


def test_a_damaged_line_is_named_and_an_empty_file_says_what_to_do(tmp_path):
    file = tmp_path / "runs.jsonl"
    assert results.read(file) == []
    with pytest.raises(UserError, match="holds no results"):
        results.world_of([], file)
    file.write_text('{"kind": "run"}\n{"ki\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        results.read(file)


def test_a_grid_without_data_sets_says_how_to_make_them(tmp_path):
    location = GridPaths(tmp_path, ROOT / "recipes/world/model", tmp_path / "runs.jsonl")
    with pytest.raises(UserError, match=r"data\.json is not there; make the data sets"):
        grid(location, DESIGN, 1)


# ---- the whole, with a kill in between

TINY = Design(
    data=("clair",),
    objectives=("sft", "apo_zero"),
    seeds=(0,),
    epochs=2,
    learning_rates=(5e-5,),
    betas=(0.1,),
    heldout=10,
)
SCRIPT = f"""
    import sys
    from pathlib import Path
    from recipes.experiments.paper_mini.cells import Design
    from recipes.experiments.paper_mini.grid import GridPaths, grid
    if __name__ == "__main__":
        run = Path(sys.argv[1])
        grid(GridPaths(run, Path("recipes/world/model"), run / "runs.jsonl"), {TINY!r}, 1, print)
"""


def write_pairs(run: Path) -> None:
    folder = run / "pairs/clair"
    writer = DatasetWriter(folder, seed=0, test_fraction=0.2)
    for task in distinct_tasks("train", 40, seed=0):
        prompt: list[Message] = [{"role": "user", "content": task.prompt}]
        contrast = contrast_of(task.right, task.wrong)._asdict()
        writer.add(Pair(task.id, prompt, task.right, task.wrong, "", {"chosen": "a", "rejected": "b"}, contrast).row())
    write_json(run / "data.json", {"clair": {"sha256": writer.close(keep=True)}})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(ready, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes in /proc")
def test_a_grid_killed_after_its_first_run_does_only_the_second_and_leaves_nothing_behind(tmp_path):
    write_pairs(tmp_path)
    file, script = tmp_path / "runs.jsonl", tmp_path / "tiny_grid.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, script, tmp_path], cwd=ROOT, env=environment) as process:
        try:
            until(lambda: process.poll() is None and file.exists() and file.read_bytes().count(b"\n") == 2)
            workers = children(process.pid)
        finally:
            process.send_signal(signal.SIGKILL)
    assert workers
    until(lambda: not any(alive(pid) for pid in workers), 10)
    looks = (tmp_path / "work/worker-0.log").read_text("utf-8").count("held-out")
    assert looks < 2 * (1 + TINY.epochs)  # the worker ended with its parent, and not when the second run was done
    original = file.read_bytes()
    messages: list[str] = []
    location = GridPaths(tmp_path, ROOT / "recipes/world/model", file)
    assert grid(location, TINY, 1, messages.append) == 0
    assert len(messages) == 1
    assert messages[0].startswith("2/2 clair apo_zero")
    assert file.read_bytes().startswith(original)
    world, *runs = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert (world["kind"], len(world["base"]["right"]), len(world["templates"])) == ("world", 10, 10)
    assert [run["objective"] for run in runs] == ["sft", "apo_zero"]
    for run in runs:
        assert [checkpoint["epoch"] for checkpoint in run["checkpoints"]] == [1, 2]
        for checkpoint in run["checkpoints"]:
            assert (len(checkpoint["right"]), len(checkpoint["wording"])) == (10, 10)
            assert checkpoint["pairs"]["logps/chosen"] != run["start"]["logps/chosen"]
        assert run["looks"]["step"][0] == 0
        assert run["looks"]["logps/chosen"][0] == run["start"]["logps/chosen"]
        assert run["looks"]["logps/chosen"][-1] == run["checkpoints"][-1]["pairs"]["logps/chosen"]
        assert len(run["looks"]["step"]) == len(run["looks"]["logps/rejected"]) >= 1 + TINY.epochs
        assert run["moved"].keys() == set(PAIR_METRICS)
        change = run["looks"]["logps/chosen"][-1] - run["start"]["logps/chosen"]
        assert sum(run["moved"]["chosen_logratio"]) / len(run["moved"]["chosen_kl"]) == pytest.approx(change, abs=2e-3)
    assert runs[1]["start"]["rewards/margins"] == 0
    assert runs[1]["checkpoints"][-1]["pairs"]["rewards/margins"] > 0
    assert not [entry for entry in (tmp_path / "work").iterdir() if entry.is_dir()]
    assert grid(location, TINY, 1, messages.append) == 0
    assert messages[-1].endswith("nothing to do")
    assert file.read_text("utf-8").count("\n") == 3
