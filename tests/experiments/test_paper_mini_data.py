"""The four data sets of the mini grid: the same prompts, the same budget, other folders than the recipes' on demand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from clair.core.errors import UserError
from clair.core.files import read_json, write_json
from clair.data.contrast import contrast_of
from clair.data.dataset import DatasetWriter, read_rows
from clair.data.records import Message, Pair
from clair.pipeline.config import BuildConfig
from recipes.experiments.paper_mini import data
from recipes.experiments.paper_mini.answers import scored
from recipes.world.running import ROOT
from recipes.world.style import add_style
from recipes.world.tasks import distinct_tasks

BASE = ROOT / "recipes/world/model"


@pytest.mark.parametrize(
    ("counts", "budget", "taken"), [([3, 4, 5], 7, 2), ([3, 4, 5], 6, 1), ([3], 2, 0), ([3], 9, 1)]
)
def test_pairs_are_taken_in_order_while_they_stay_within_the_budget(counts, budget, taken):
    assert data.within(counts, budget) == taken


def test_the_recipes_share_sampling_split_and_ledger_and_the_settings_name_their_keys():
    configs = {n: yaml.safe_load((ROOT / data.RECIPES / f"{n}.yaml").read_text("utf-8")) for n in data.DATA}
    for key in ("seed", "test_fraction", "ledger", "concurrency"):
        assert len({str(config[key]) for config in configs.values()}) == 1
    targets = [config["target"] for config in configs.values() if "target" in config]
    assert len(targets) == 3
    assert all(target == targets[0] for target in targets)
    for name, config in configs.items():
        BuildConfig.model_validate(config)
        local = data.settings(name, data.run_folder(False), data.MODELS, "http://127.0.0.1:8399/v1")
        for key, value in local.items():  # what the run sets is, at home, what the recipe says
            setting = config
            for segment in key.split("."):
                setting = setting[segment]
            assert setting == value, f"{name}: {key}"


def write_set(folder: Path, lengths: dict[str, int]) -> None:
    writer = DatasetWriter(folder, seed=0, test_fraction=0.5)
    for id, length in lengths.items():
        prompt: list[Message] = [{"role": "user", "content": f"prompt {id}"}]
        chosen, rejected = "five " * length, "four " * length
        contrast = contrast_of(chosen, rejected)._asdict()
        writer.add(Pair(id, prompt, chosen, rejected, "", {"chosen": "a", "rejected": "b"}, contrast).row())
    hashes = writer.close(keep=True)
    write_json(folder / "manifest.json", {"counts": writer.all_counts(), "files": hashes})


def test_all_sets_are_cut_to_the_smallest_and_the_contrast_is_of_what_is_left(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / "target").symlink_to(BASE)
    ids = [f"row {n}" for n in range(24)]
    for name in data.DATA:
        length = 2 if name == "clair" else 6
        write_set(tmp_path / "built" / name, dict.fromkeys(ids, length))
    counts = data.cut_all(tmp_path, models)
    assert read_json(tmp_path / "data.json") == counts
    small, large = counts["clair"], counts["stronger"]
    assert small["train"] + small["test"] == 24
    for split in ("train", "test"):
        assert 2 <= large[split] < small[split]
        assert large[f"{split}_tokens"] <= small[f"{split}_tokens"]
        rows = list(read_rows(tmp_path / "pairs/stronger", [split]))
        built_rows = list(read_rows(tmp_path / "built/stronger", [split]))
        assert rows == built_rows[: large[split]]
    assert large["contrast"]["levenshtein"] == contrast_of("five " * 6, "four " * 6).levenshtein


def test_a_set_without_pairs_is_an_error_that_says_which(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / "target").symlink_to(BASE)
    for name in data.DATA:
        write_set(tmp_path / "built" / name, dict.fromkeys([] if name == "off_policy" else ["a", "b", "c", "d"], 2))
    with pytest.raises(UserError, match=r"0 train pairs are within the budget of 0 tokens .* ask for more prompts"):
        data.cut_all(tmp_path, models)


def test_a_missing_model_is_named_before_any_work(tmp_path):
    with pytest.raises(UserError, match=r"target is not there; make it with: .*\.paper_mini\.models"):
        data.prepare(tmp_path / "run", tmp_path / "models", 4)
    assert not (tmp_path / "run").exists()


def test_the_other_models_answers_are_sampled_once_and_again_for_other_tasks(tmp_path, monkeypatch):
    from recipes.experiments.paper_mini import answers

    calls = []

    def say(folder, tasks, *, temperature, seed):
        calls.append((folder.name, temperature, seed))
        return [f"{folder.name} {task.id}" for task in tasks]

    monkeypatch.setattr(answers, "answers", say)
    for name in data.OTHERS:
        (tmp_path / "models" / name).mkdir(parents=True)
    tasks = distinct_tasks("train", 6, seed=0)
    for _ in range(2):
        data.write_prompt_files(tmp_path, tmp_path / "models", tasks)
    assert calls == [("wordy", 1.0, 0), ("terse", 1.0, 1)]
    rows = [json.loads(line) for line in (tmp_path / "answered.jsonl").read_text("utf-8").splitlines()]
    assert [row["answers"] for row in rows] == [[f"wordy {task.id}", f"terse {task.id}"] for task in tasks]
    data.write_prompt_files(tmp_path, tmp_path / "models", tasks[:5])
    assert len(calls) == 4


def test_answers_are_recorded_as_a_digit_and_a_letter_a_question():
    import random

    tasks, rng = distinct_tasks("heldout", 3, seed=0), random.Random(0)
    texts = [add_style(tasks[0].right, "padded", rng), add_style(tasks[1].wrong, "engaging", rng), tasks[2].right]
    scores = scored(tasks, texts)
    assert (scores["right"], scores["wording"]) == ("101", "dep")
    assert scores["words"] == pytest.approx(sum(len(text.split()) for text in texts) / 3, abs=1e-3)
