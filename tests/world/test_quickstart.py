"""The quickstart's own steps, without training: what it writes, counts and refuses. `make quickstart` runs it all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from recipes.world import quickstart
from recipes.world.tasks import distinct_tasks, solve

TASKS = distinct_tasks("heldout", 10, seed=0)  # two of each skill


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quickstart, "RUN", tmp_path)
    return tmp_path


def test_the_training_prompts_carry_no_answers_and_no_heldout_task(tmp_path: Path) -> None:
    quickstart.make_prompts(tmp_path / "run/prompts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "run/prompts.jsonl").read_text("utf-8").splitlines()]
    heldout = {(task.skill, task.content) for task in distinct_tasks("heldout", quickstart.HELDOUT, seed=0)}
    print(f"{len(rows)} prompts looked at against {len(heldout)} held-out contents")
    assert len(rows) == quickstart.PROMPTS
    for row in rows:
        task = solve(row["prompt"])
        assert set(row) == {"id", "prompt"}
        assert task.right not in row["prompt"]
        assert (task.skill, task.content) not in heldout


def test_accuracies_are_means_and_swapped_is_the_mean_of_its_two_runs() -> None:
    every, none, half = [1.0] * 10, [0.0] * 10, [1.0] * 5 + [0.0] * 5
    scored = {"base": none, "tuned": every, "sft": half, "swapped": half, "mirrored": none}
    table = quickstart.accuracies(TASKS, scored)
    assert table["all"] == {"base": 0.0, "tuned": 1.0, "sft": 0.5, "swapped": 0.25}
    assert set(table) == {"all", "sums", "order", "convert", "lookup", "edit"}
    assert table["sums"] == {"base": 0.0, "tuned": 1.0, "sft": 0.5, "swapped": 0.25}


def test_the_summary_holds_every_number_and_the_interval_is_clustered_by_template(run: Path) -> None:
    (run / "pairs").mkdir()
    (run / "pairs/manifest.json").write_text(json.dumps({"counts": {"pairs": 7, "dropped": 5}}))
    (run / "seconds.json").write_text(json.dumps({"pairs": 2.0, "apo_zero": 1.5}))
    same = [0.0] * 10
    summary = quickstart.summarize(
        TASKS, {"base": same, "tuned": [1.0] * 5 + same[:5], "sft": same, "swapped": same, "mirrored": same}
    )
    # Ten templates of one task each, five up by one: mean 1/2, standard error sqrt(10/9 * 10/4) / 10, t(9) = 2.2622.
    assert (summary["delta"], summary["n"], summary["templates"]) == (0.5, 10, 10)
    assert summary["ci95"] == pytest.approx([0.5 - 0.37703, 0.5 + 0.37703], abs=1e-4)
    assert (summary["pairs"], summary["dropped"], summary["seconds"]) == (7, 5, 3.5)
    assert {"base", "tuned", "sft", "swapped", "swapped_runs", "by_skill", "by_step"} <= set(summary)


def test_a_step_done_again_at_once_keeps_the_time_of_the_work(run: Path) -> None:
    (run / "seconds.json").write_text(json.dumps({"pairs": 20.0}))
    for name in ("pairs", "sft"):
        with quickstart.step(name):
            pass
    assert json.loads((run / "seconds.json").read_text()) == {"pairs": 20.0, "sft": 0.0}


def test_a_command_that_fails_ends_the_quickstart_with_its_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        quickstart.command("clair", "build", "recipes/quickstart/nowhere.yaml")
    assert exit_info.value.code == 2
    assert "`clair build recipes/quickstart/nowhere.yaml` ended with exit code 2" in capfd.readouterr().err


def test_sft_has_the_budget_of_apo_zero() -> None:
    folder = quickstart.ROOT / quickstart.RECIPES
    apo_zero, sft = (yaml.safe_load((folder / f"{name}.yaml").read_text("utf-8")) for name in ("apo_zero", "sft"))
    for key in ("model", "dataset", "trainer"):
        assert apo_zero[key] == sft[key]
