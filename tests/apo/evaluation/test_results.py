"""The result folder: written whole, read with checks, documented key by key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from apo.evaluation.records.benchmark import ModelUsed, ScoreInterval
from apo.evaluation.records.mixeval import JudgeUsed, MixEvalItem, MixEvalScore, SubsetScore
from apo.evaluation.results import read_results, write_results
from clair.core.errors import UserError
from tests.house.pages import tables


def an_item(**changes) -> MixEvalItem:
    values = {"split": "free-form", "row": 0, "question": "q0", "benchmark": "DROP", "prompt": "p", "target": ("1",)}
    return MixEvalItem(**{**values, "response": "r", "score": 1.0, **changes})


def a_score(n: int, **changes) -> MixEvalScore:
    interval = ScoreInterval(
        mean=0.5, n=n, questions=n, se_naive=0.1, se_clustered=0.1, ci95=(0.3, 0.7), unique_mean=0.5, bracket=(0.5, 0.5)
    )
    values = {
        "version": "2024-06-01",
        "split": "hard",
        "profile": "strict",
        "judge": JudgeUsed(kind="rule"),
        "model": ModelUsed(name="m", identity="weights:0"),
        "overall": 0.5,
        "free_form": 0.5,
        "multiple_choice": 0.5,
        "by_benchmark": {"free-form": {"DROP": SubsetScore(score=0.5, n=n, right=0.5 * n, unresolved=0)}},
        "intervals": dict.fromkeys(("overall", "free_form", "multiple_choice"), interval),
        "unresolved": 0,
        "fallbacks": 0,
        "truncated": 0,
        "shared_judgements": True,
        "data": {"free-form.json": "0" * 64},
        "items_sha256": "",
    }
    return MixEvalScore(**{**values, **changes})


@pytest.fixture
def folder(tmp_path) -> Path:
    items = [an_item(split="multiple-choice", response="ä\u2028\n"), an_item(row=1), an_item()]
    write_results(tmp_path / "out", a_score(3), items)
    return tmp_path / "out"


def test_written_results_are_read_in_order(folder):
    read = read_results(folder)
    assert [item.key for item in read.items] == [("free-form", 0, 0), ("free-form", 1, 0), ("multiple-choice", 0, 0)]
    assert read.items[2].response == "ä\u2028\n"
    assert read.score == a_score(3, items_sha256=read.score.items_sha256)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "score.json").unlink(), "holds no score.json"),
        (lambda f: (f / "items.jsonl").unlink(), "no items.jsonl"),
        (lambda f: (f / "items.jsonl").write_bytes((f / "items.jsonl").read_bytes()[:-9]), "is not what score.json"),
        (lambda f: changed(f, profile="loose"), "profile"),
        (lambda f: changed(f, more=1), "more"),
        (lambda f: write_results(f, a_score(3), [an_item(), an_item(), an_item(row=2)]), "rows twice"),
        (lambda f: write_results(f, a_score(3), [an_item()]), "too few"),
    ],
)
def test_a_damaged_folder_is_reported(folder, damage, match):
    damage(folder)
    with pytest.raises(UserError, match=match):
        read_results(folder)


def changed(folder: Path, **changes: object) -> None:
    file = folder / "score.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def test_a_random_score_is_always_marked_unresolved():
    with pytest.raises(ValueError, match="fallback without unresolved"):
        an_item(fallback=True)


def test_results_that_differ_in_judge_profile_version_or_system_are_not_comparable():
    comparable = a_score(1).comparable()
    others = [
        a_score(1, profile="faithful"),
        a_score(1, version="2024-08-11"),
        a_score(1, split="full"),
        a_score(1, system="Be brief."),
        a_score(1, judge=JudgeUsed(kind="model", model="m")),
        a_score(1, data={"free-form.json": "1" * 64}),
    ]
    assert all(different.comparable() != comparable for different in others)
    assert a_score(1, model=ModelUsed(name="n", identity="o"), seed=3).comparable() == comparable


@pytest.mark.parametrize(("table", "model"), [("score", MixEvalScore), ("items", MixEvalItem)])
def test_the_page_names_every_key(table, model):
    ((page, _, (_, *rows)),) = tables(table)
    keys = [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(keys) == sorted(model.model_fields), page
