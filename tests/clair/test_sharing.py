"""A dataset handed on: rows for others, the hub (shown, not sent), a further round."""

from __future__ import annotations

import json

import pytest

from clair.build import build
from clair.config import BuildConfig
from clair.recipe import UserError, load_recipe
from clair.sharing import export, files_to_push, next_round, push
from tests.clair.scripted import Scripted, endpoint, install, recipe, revision


@pytest.fixture
def folder(tmp_path, monkeypatch):
    install(monkeypatch, reviser=Scripted("reviser", revision))
    answers = ["a bad answer"] * 4 + ["a fine answer"] * 2 + ["another bad one"] * 3
    rows = [{"id": f"r{i}", "prompt": f"question {i}", "answer": text} for i, text in enumerate(answers)]
    config = recipe(tmp_path / "round-1", rows, pipeline="revised", reviser=endpoint(), limit=6, test_fraction=0)
    build(config)
    return tmp_path / "round-1"


def lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_rows_for_other_trainers_by_form(folder, tmp_path):
    assert export("preference", folder, "train", tmp_path / "p.jsonl") == 4
    assert lines(tmp_path / "p.jsonl")[0] == {
        "id": "r0",
        "prompt": [{"role": "user", "content": "question 0"}],
        "chosen": [{"role": "assistant", "content": "a good answer"}],
        "rejected": [{"role": "assistant", "content": "a bad answer"}],
    }
    assert export("unpaired", folder, "train", tmp_path / "u.jsonl") == 8
    assert [row["label"] for row in lines(tmp_path / "u.jsonl")] == [True, False] * 4
    export("text", folder, "train", tmp_path / "t.jsonl")
    assert lines(tmp_path / "t.jsonl")[0] == {
        "id": "r0", "prompt": "question 0", "chosen": "a good answer", "rejected": "a bad answer",
    }  # fmt: skip


def test_a_push_would_send_the_pairs_and_their_papers_but_never_the_ledger(folder):
    names = [file.name for file in files_to_push(folder)]
    assert names == ["README.md", "manifest.json", "dropped.jsonl", "test-00000-of-00001.parquet",
                     "train-00000-of-00001.parquet"]  # fmt: skip
    assert (folder / "ledger.sqlite").exists()


def test_a_push_that_cannot_be_made_is_one_line(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot push to org/name"):
        push(folder, "org/name", private=True)


def test_a_further_round_asks_the_tuned_model_what_it_got_wrong_and_what_it_has_not_seen(folder, tmp_path):
    made, again, fresh = next_round(folder, "runs/tuned", tmp_path / "round-2")
    assert (again, fresh) == (4, 3)
    config = load_recipe(BuildConfig, made)
    assert config.target.path == "runs/tuned"
    assert config.reviser.model == "scripted"
    assert config.limit is None
    rows = lines(tmp_path / "round-2-prompts.jsonl")
    assert [row["id"] for row in rows] == ["r0", "r1", "r2", "r3", "r6", "r7", "r8"]
    assert not any("answer" in row for row in rows)
    with pytest.raises(UserError, match="exists already"):
        next_round(folder, "runs/tuned", tmp_path / "round-2")
