"""A user who is added to a reward: whose comparisons count, and which questions are asked."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from apo.rewards.reward_dir import Reward, user_file
from tests.apo.recipe_command import failure, run
from tests.apo.rewards.tastes import taste, write


@pytest.fixture
def pal(world, tmp_path):
    return shutil.copytree(world / "pal", tmp_path / "pal")


def stored(folder, user: str) -> list[dict]:
    return json.loads(user_file(folder, user).read_text())["answers"]


def test_only_the_users_own_comparisons_count(pal, tmp_path):
    rng = random.Random(9)
    rows = [*taste(rng, "ann", False, 3), *taste(rng, "bob", True, 17)]
    mixed = write(tmp_path / "mixed.jsonl", rows)
    result = run("reward adapt", reward=pal, user="ann", comparisons=mixed)
    assert result.exit_code == 0, result.output
    assert "note: 17 of 20 comparisons are of others and are left out" in result.output
    assert [answer["id"] for answer in stored(pal, "ann")] == ["ann-0", "ann-1", "ann-2"]
    groups = Reward.load(pal).groups()
    assert groups["ann"] == groups["u1"]
    message = failure("reward adapt", reward=pal, user="anne", comparisons=mixed)
    assert message.startswith("no comparison is of user 'anne' (did you mean 'ann'?)")
    assert "the column user has 'ann', 'bob'" in message


def test_comparisons_of_one_other_name_or_of_none_are_the_users(pal, tmp_path):
    named = write(tmp_path / "named.jsonl", taste(random.Random(9), "whoever", False, 3))
    output = run("reward adapt", reward=pal, user="ann", comparisons=named).output
    assert "the comparisons of user 'whoever' are taken as those of 'ann'" in output
    nameless = [{**row, "user": None} for row in taste(random.Random(9), "x", False, 3)]
    result = run("reward adapt", reward=pal, user="bob", comparisons=write(tmp_path / "n.jsonl", nameless))
    assert "note" not in result.output
    assert len(stored(pal, "bob")) == 3


def test_an_id_is_one_question_and_its_answer_is_of_the_pair_that_was_shown(world, tmp_path):
    vpl = shutil.copytree(world / "vpl", tmp_path / "vpl")
    rows = taste(random.Random(5), "pool", True, 3)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    pool = write(tmp_path / "pool.jsonl", [*rows, *swapped])
    recipe = {"reward": vpl, "user": "ann", "pool": pool}
    assert "4 questions but 3 pairs of different ids" in failure("reward adapt", **recipe, questions=4)
    result = run("reward adapt", **recipe, questions=3, input="1\n1\n1\n")
    assert result.exit_code == 0, result.output
    assert sorted(answer["id"] for answer in stored(vpl, "ann")) == ["pool-0", "pool-1", "pool-2"]
    once = {**recipe, "user": "bob", "pool": write(tmp_path / "once.jsonl", rows)}
    shown = [line for line in result.output.splitlines() if line.startswith("[1] ")]
    for answer, text in zip(stored(vpl, "ann"), shown, strict=True):
        row = next(row for row in rows if row["id"] == answer["id"])
        assert row["chosen" if answer["chosen"] else "rejected"][0]["content"] == text.removeprefix("[1] ")
    assert run("reward adapt", **once, questions=1, input="1\n").exit_code == 0


def test_questions_about_pairs_of_plain_text_are_asked(world, tmp_path):
    vpl = shutil.copytree(world / "vpl", tmp_path / "vpl")
    rows = [
        {key: row[key][0]["content"] for key in ("prompt", "chosen", "rejected")}
        for row in taste(random.Random(5), "p", True, 3)
    ]
    texts = [{side: f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected")} for row in rows]
    recipe = {"reward": vpl, "user": "ann", "pool": write(tmp_path / "pool.jsonl", texts)}
    result = run("reward adapt", **recipe, questions=1, input="1\n")
    assert result.exit_code == 0, result.output
    assert any(row["prompt"] in result.output for row in rows)
