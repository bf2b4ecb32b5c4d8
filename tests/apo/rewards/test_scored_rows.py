"""The rows that `apo reward score` writes: of a group, with decisions, padded, and with the columns of the pairs."""

from __future__ import annotations

import json
import random

import pytest

from apo.rewards.judge import group_row, pad_chosen
from apo.rewards.reward_dir import Reward
from tests.apo.recipe_command import failure, run
from tests.apo.rewards.tastes import read, taste, write


def nobodys(n: int = 10) -> list[dict]:
    return [{**row, "user": None} for row in taste(random.Random(4), "nobody", True, n)]


def test_all_columns_of_the_pairs_are_kept_but_those_of_an_earlier_scoring(world, tmp_path):
    tools = [{"name": "one", "parameters": {"x": None}}]
    extra = {"weight": 0.5, "tools": tools, "state": [9.0], "score_padded": 2.0}
    pairs = write(tmp_path / "pairs.jsonl", [{**row, **extra} for row in nobodys(4)])
    result = run("reward score", dataset=pairs, reward=world / "pal", out=tmp_path / "s.jsonl")
    assert result.exit_code == 0, result.output
    for row in read(tmp_path / "s.jsonl"):
        assert (row["weight"], row["tools"]) == (0.5, tools)
        assert not {"state", "score_padded"} & set(row)


def test_a_row_of_a_group_has_the_scores_and_preferences_of_the_group(world, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", nobodys())
    recipe = {"dataset": pairs, "reward": world / "pal"}
    assert run("reward score", **recipe, by_group=True, out=tmp_path / "g.jsonl").exit_code == 0
    rows = read(tmp_path / "g.jsonl")
    assert len(rows) == 20
    for group in ("group 1", "group 2"):
        assert run("reward score", **recipe, user=group, out=tmp_path / "s.jsonl").exit_code == 0
        scored = {row["id"]: row for row in read(tmp_path / "s.jsonl")}
        for row in (row for row in rows if row["group"] == group):
            assert row["preferred"][group] >= 0.5
            assert row["worst"] == min(row["preferred"].values())
            same = row["chosen"] == scored[row["pair"]]["chosen"]
            columns = ("score_chosen", "score_rejected")
            of_group = [scored[row["pair"]][column] for column in (columns if same else columns[::-1])]
            assert [row[column] for column in columns] == of_group
            assert row["score_chosen"] >= row["score_rejected"]
    for key, value in {"padding": " one", "user": "group 1"}.items():
        message = failure("reward score", **recipe, by_group=True, out=tmp_path / "x.jsonl", **{key: value})
        assert f"{key} is for by_group: false" in message


def test_pairs_of_unknown_users_have_rows_of_groups(world, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", taste(random.Random(4), "stranger", True, 3))
    recipe = {"dataset": pairs, "reward": world / "pal", "by_group": True}
    result = run("reward score", **recipe, out=tmp_path / "g.jsonl")
    assert result.exit_code == 0, result.output
    assert run("reward score", **{**recipe, "dataset": tmp_path / "g.jsonl"}, out=tmp_path / "h.jsonl").exit_code == 0
    assert {row["pair"] for row in read(tmp_path / "h.jsonl")} == {f"stranger-{index}" for index in range(3)}


def test_a_swapped_row_swaps_whatever_belongs_to_an_answer():
    row = {
        **{"id": "p", "chosen": "A", "rejected": "B", "score_chosen": 0.2, "score_rejected": 0.7, "chosen_by": "x"},
        **{"models": {"chosen": "m", "rejected": "n"}, "contrast": {"length_ratio": 2.0}, "reasoning": "why", "w": 3},
        **{"preferred": {"one": 0.25, "two": 0.5}, "worst": 0.25, "state": [1.0]},
    }
    assert group_row(row, "one") == {
        **{"id": "p one", "pair": "p", "group": "one", "chosen": "B", "rejected": "A", "chosen_by": "x", "w": 3},
        **{"score_chosen": 0.7, "score_rejected": 0.2, "models": {"chosen": "n", "rejected": "m"}},
        **{"preferred": {"one": 0.75, "two": 0.5}, "worst": 0.5},
    }
    kept = group_row(row, "two")
    assert (kept["chosen"], kept["contrast"], kept["worst"]) == ("A", {"length_ratio": 2.0}, 0.25)


def test_decisions_drop_pairs_that_are_too_long_to_have_a_score(world, tmp_path):
    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig

    answers = {"short": ["one two three", "two one three"], "long": ["one " * 300, "two"]}
    prompts = [
        {"prompt": f"what is {id}", "id": id, "answers": texts, "scores": [2, 1]} for id, texts in answers.items()
    ]
    source = {"path": write(tmp_path / "p.jsonl", prompts)}
    build(BuildConfig.model_validate({"pipeline": "judged", "prompts": source, "out": str(tmp_path / "d")}))
    recipe = {"dataset": tmp_path / "d", "reward": world / "pal", "decisions": tmp_path / "decisions.json"}
    result = run("reward score", **recipe, min_worst=0, out=tmp_path / "s.jsonl")
    assert result.exit_code == 0, result.output
    marks = json.loads((tmp_path / "decisions.json").read_text())["decisions"]
    assert marks == {"short": "keep", "long": "drop"}
    assert "1 of 2 kept, 1 dropped without a score" in result.output


@pytest.mark.parametrize(
    ("answer", "padded"),
    [
        ("A", "A x"),
        ([{"role": "assistant", "tool_calls": []}], [{"role": "assistant", "tool_calls": [], "content": " x"}]),
    ],
)
def test_padding_takes_plain_text_and_turns_without_text(answer, padded):
    assert pad_chosen([{"chosen": answer, "id": "p"}], " x") == [{"chosen": padded, "id": "p"}]


def test_pairs_of_plain_text_are_padded(world, tmp_path):
    rows = [{key: row[key][0]["content"] for key in ("prompt", "chosen", "rejected")} for row in nobodys(3)]
    texts = [{side: f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected")} for row in rows]
    pairs = write(tmp_path / "pairs.jsonl", texts)
    result = run("reward score", dataset=pairs, reward=world / "pal", padding=" one one", out=tmp_path / "s.jsonl")
    assert result.exit_code == 0, result.output
    assert all(row["score_padded"] != row["score_chosen"] for row in read(tmp_path / "s.jsonl"))


def test_a_reward_fitted_on_rows_of_groups_was_trained_on_their_pairs(world, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", nobodys())
    recipe = {"dataset": pairs, "reward": world / "pal", "by_group": True, "out": tmp_path / "g.jsonl"}
    assert run("reward score", **recipe).exit_code == 0
    fitting = {"dataset": tmp_path / "g.jsonl", "model": world / "model", "out": tmp_path / "r"}
    assert run("reward fit", **fitting).exit_code == 0
    assert Reward.load(tmp_path / "r").facts["trained_on"] == sorted(f"nobody-{index}" for index in range(10))
