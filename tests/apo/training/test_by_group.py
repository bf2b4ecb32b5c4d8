"""`by` in a training recipe: a run for each value of a column; `where` in a source: the rows with a value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from typer.testing import CliRunner

from apo.cli import app
from apo.data.sources import Source, load_eval, load_train
from apo.training import train as training
from apo.training.by_group import expand_runs, value_folder
from apo.training.config import TrainConfig
from apo.training.train import train
from clair.core.errors import UserError
from tests.apo.conftest import make_pairs

TRAINER = {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none"}


def write_jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def grouped(n: int, seed: int = 0) -> list[dict]:
    """Two in three pairs are of `the many`, the third of `../few`."""
    return [
        {**row, "group": "../few" if index % 3 == 2 else "the many"} for index, row in enumerate(make_pairs(n, seed))
    ]


@pytest.fixture
def recipe(tmp_path, model_dir):
    for split, rows in (("train", grouped(24)), ("test", grouped(6, 5))):
        (tmp_path / "pairs/data").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / f"pairs/data/{split}-00000-of-00001.parquet")
    return {
        "model": str(model_dir), "dataset": str(tmp_path / "pairs"), "by": "group", "trainer": dict(TRAINER),
        "out": str(tmp_path / "runs"), "probe": 0,
    }  # fmt: skip


def config(recipe, **changes) -> TrainConfig:
    return TrainConfig(**{**recipe, **changes})


def failure(recipe, **changes) -> str:
    with pytest.raises(UserError) as caught:
        train(config(recipe, **changes))
    assert "\n" not in str(caught.value)
    assert not any(Path(recipe["out"]).glob("*/run.json"))
    return str(caught.value)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_each_group_gets_the_run_that_its_own_pairs_alone_give(recipe, tmp_path):
    messages: list[str] = []
    runs = train(config(recipe), log=messages.append)
    out = Path(recipe["out"])
    assert [line for line in messages if line.startswith("run: ")] == [
        f"run: {out / 'few'}",
        f"run: {out / 'the-many'}",
    ]
    assert list(runs) == [str(out / "few"), str(out / "the-many")]
    assert sorted(file.name for file in out.iterdir()) == ["few", "the-many"]
    for name, group, pairs in (("few", "../few", 8), ("the-many", "the many", 16)):
        run = json.loads((out / name / "run.json").read_text())
        assert run == runs[str(out / name)]
        assert run["recipe"]["dataset"][0]["where"] == {"group": group}
        assert (run["data"]["train"]["pairs"], run["data"]["eval"]["pairs"]) == (pairs, pairs // 4)
    alone = write_jsonl(tmp_path / "alone.jsonl", [row for row in grouped(24) if row["group"] == "../few"])
    train(config(recipe, dataset=alone, by=None, out=str(tmp_path / "alone")))
    few, single, many = (weights(folder) for folder in (out / "few", tmp_path / "alone", out / "the-many"))
    assert all(torch.equal(few[name], single[name]) for name in single)
    assert not all(torch.equal(few[name], many[name]) for name in single)


@pytest.mark.slow
def test_finished_runs_stay_and_stopped_ones_resume(recipe, monkeypatch):
    real, calls = training._run, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt("stopped")
        real(*args)

    monkeypatch.setattr(training, "_run", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config(recipe))
    first = (Path(recipe["out"]) / "few/model.safetensors").stat().st_mtime_ns
    messages: list[str] = []
    runs = train(config(recipe), log=messages.append)
    assert len(calls) == 3
    assert f"{recipe['out']}/few is finished; nothing to do" in messages
    assert (Path(recipe["out"]) / "few/model.safetensors").stat().st_mtime_ns == first
    assert all(run["finished"] for run in runs.values())


def test_a_dry_run_shows_every_plan_and_writes_nothing(recipe, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["train", str(file), "--dry-run"])
    assert result.exit_code == 0, result.output
    plans = result.output.split("\n---\n")
    assert [f"# train: {n} pairs" in plan for n, plan in zip((8, 16), plans, strict=True)] == [True, True]
    assert not Path(recipe["out"]).exists()


def test_rows_without_a_group_are_in_no_run_and_reported(recipe, tmp_path):
    rows = [{**row, "group": None} if index < 3 else row for index, row in enumerate(grouped(24))]
    messages: list[str] = []
    runs = expand_runs(config(recipe, dataset=write_jsonl(tmp_path / "p.jsonl", rows)), messages.append)
    assert messages == ["note: 3 rows have no group and are in no run"]
    assert [len(load_train(group_run.dataset, 0)) for group_run in runs] == [7, 14]


def test_groups_that_cannot_each_have_a_run_are_refused_before_any_begins(recipe, tmp_path):
    def of(*groups) -> str:
        rows = [{**row, "group": groups[index % len(groups)]} for index, row in enumerate(make_pairs(12))]
        return write_jsonl(tmp_path / "p.jsonl", rows)

    assert "has no column 'groop' (did you mean 'group'?)" in failure(recipe, by="groop")
    assert "has a value for 'group'" in failure(recipe, dataset=of(None))
    assert "text or an integer needed" in failure(recipe, dataset=of(0.5))
    message = failure(recipe, dataset=of("a b", "a-b"))
    assert "'a b' and 'a-b' would share the folder" in message
    assert "where {'group': 'z'} has 1 row(s)" in failure(recipe, dataset=of(*"aaaaaaaaaaaz"))
    Path(recipe["out"]).mkdir()
    (Path(recipe["out"]) / "run.json").write_text("{}")
    assert "is a file or one run" in failure(recipe)


def test_where_selects_rows_by_value_and_type_and_lists_the_values(tmp_path):
    rows = [
        {**row, "group": index % 2, "user": "ann" if index < 6 else "bob"} for index, row in enumerate(make_pairs(12))
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    both = Source(path=path, where={"group": 1, "user": "ann"}, weight=2)
    assert sorted(load_train([both], 0)["id"][:]) == ["p1", "p1", "p3", "p3", "p5", "p5"]
    assert len(load_eval([Source(path=path, where={"user": "bob"})], "train")) == 6
    assert load_eval([Source(path=path, where={"user": "eve"})], "train") is None
    with pytest.raises(UserError, match=r"no row where \{'group': '1'\}; found: group: 0, 1"):
        load_train([Source(path=path, where={"group": "1"})], 0)
    with pytest.raises(UserError, match="no row where"):
        load_train([Source(path=path, where={"group": True})], 0)
    with pytest.raises(UserError, match=r"no column 'usr' \(did you mean 'user'\?\)"):
        load_train([Source(path=path, where={"usr": "ann"})], 0)


@pytest.mark.parametrize(
    ("value", "name"),
    [("group 1", "group-1"), ("../x", "x"), (".ssh", "ssh"), ("/", "-"), (True, "True"), (7, "7"), ("ä/ö", "ä-ö")],
)
def test_a_value_is_a_folder_inside_out(value, name):
    assert value_folder(value) == name


def test_long_values_that_differ_at_the_end_have_folders_of_their_own():
    names = {value_folder(f"{'/long' * 20}/{end}") for end in ("pairs", "other")}
    assert [len(name) for name in names] == [80, 80]
