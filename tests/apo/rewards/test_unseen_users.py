"""The curve of users whom the fit has not seen: who is set aside, what locates and tests them, and how it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from apo.rewards import unseen_users
from apo.rewards.bradley_terry import BradleyTerry
from apo.rewards.config import CurveConfig
from apo.rewards.scorer import Comparisons
from apo.rewards.unseen_users import MIN_TEST, check_folder, measure, summarise
from clair.core.errors import UserError
from recipes.world import toy
from tests.apo.recipe_command import failure, run


def config(out: Path, **keys) -> CurveConfig:
    return CurveConfig.model_validate({"dataset": "d", "features": "f.npz", "out": str(out), "splits": 2, **keys})


class FirstCoordinate(BradleyTerry):
    """The state of a user is the sign of the first coordinate of what they preferred in their first comparison."""

    def reward(self, prompt, answer, state):
        return answer[:, 0] * (state[:, 0] if state.shape[1] else 1)

    def adapt(self, comparisons):
        return torch.sign(comparisons.chosen[:1, 0] - comparisons.rejected[:1, 0])


@pytest.fixture
def fits(monkeypatch):
    """The comparisons of every fit, which is not made: each scorer reads the first coordinate."""
    calls = []

    def fake_fit(kind, data, training, valid, **options):
        calls.append((kind, {int(user) for part in (training, valid) for user in part.user}))
        return FirstCoordinate((1, 2))

    monkeypatch.setattr(unseen_users, "fit_best", fake_fit)
    return calls


def opposite_users(users: int, each: int) -> Comparisons:
    """User u prefers 1 to 0 in the first coordinate if u is even, and 0 to 1 if odd; the second is its number."""
    user = torch.arange(users).repeat_interleave(each)
    number = torch.arange(float(users * each))
    first = (user % 2 == 0).float()
    sides = torch.stack([first, number], 1), torch.stack([1 - first, number], 1)
    return Comparisons(torch.zeros(len(user), 1), *sides, user, tuple(f"u{n}" for n in range(users)))


def test_each_split_sets_users_aside_whom_no_fit_sees(fits, tmp_path):
    data = opposite_users(10, 12)
    results = measure(config(tmp_path, shots=[1, 2, 5, 50]), data, [False] * 120)
    for split, seen in ((0, fits[:2]), (1, fits[2:])):
        rows = [row for row in results if row["split"] == split]
        unseen = {int(row["user"][1:]) for row in rows}
        assert len(unseen) == 2
        assert [kind for kind, _ in seen] == ["pal", "bradley_terry"]
        assert all(users == set(range(10)) - unseen for _, users in seen)
        assert [row["shots"] for row in rows] == [1, 2, 5] * 2  # nobody has 50
        assert {row["adapted"] for row in rows} == {1.0}
        assert all(row["bradley_terry"] == (int(row["user"][1:]) % 2 == 0) for row in rows)
        assert {row["alone"] for row in rows} == {1.0}


def test_the_test_split_tests_where_there_is_one_and_the_same_comparisons_test_every_point(fits, tmp_path, monkeypatch):
    data, tested = opposite_users(4, 20), []
    real = unseen_users.accuracy
    monkeypatch.setattr(unseen_users, "accuracy", lambda s, d, states: tested.append(d) or real(s, d, states))
    is_test = [number % 20 >= 12 for number in range(80)]
    measure(config(tmp_path, shots=[1, 12, 13], splits=1), data, is_test)
    numbers = [sorted(rows.chosen[:, 1].int().tolist()) for rows in tested]
    assert len(numbers) == 2 * 3  # Bradley-Terry, and 1 and 12 comparisons; nobody has 13
    for first, others in ((numbers[0], numbers[1:3]), (numbers[3], numbers[4:])):
        assert all(number % 20 >= 12 for number in first)
        assert len(first) == 8
        assert others == [first, first]


def test_a_finished_split_is_not_measured_again_and_another_recipe_is_refused(fits, tmp_path):
    data, settings = opposite_users(6, 12), config(tmp_path / "out", shots=[1])
    check_folder(settings)
    check_folder(settings, "data")
    first = measure(settings.model_copy(update={"splits": 1}), data, [False] * 72)
    (tmp_path / "out/splits/1.json.tmp").write_text("torn by a kill")
    both = measure(settings, data, [False] * 72)
    assert len(fits) == 4
    assert both[: len(first)] == first
    check_folder(settings.model_copy(update={"splits": 9}), "data")
    with pytest.raises(UserError, match="differs in seed"):
        check_folder(settings.model_copy(update={"seed": 1}))
    with pytest.raises(UserError, match="differs in data"):
        check_folder(settings, "other data")


def test_users_with_too_few_comparisons_are_never_set_aside(fits, tmp_path):
    single = opposite_users(10, MIN_TEST + 1)
    rows = torch.cat([(single.user < 7).nonzero().squeeze(1), torch.tensor([7 * (MIN_TEST + 1)])])
    data = single.select(rows)
    results = measure(config(tmp_path / "a", shots=[1], splits=8), data, [False] * len(data))
    assert {row["user"] for row in results} <= {f"u{n}" for n in range(7)}
    assert all({7} <= seen for _, seen in fits)
    few = data.select(range(2 * (MIN_TEST + 1)))
    with pytest.raises(UserError, match=r"2 of 10 users have one comparison to be located by and 5"):
        measure(config(tmp_path / "b"), few, [False] * len(few))


def test_the_summary_has_intervals_by_user_and_leaves_a_point_of_one_user_out(tmp_path):
    rows = [
        {"split": split, "user": user, "shots": shots, "adapted": 0.75, "bradley_terry": 0.5, "alone": alone}
        for split in (0, 1)
        for user, shots, alone in (("a", 1, 0.5), ("b", 1, 0.7), ("a", 2, 0.5))
    ]
    summary = summarise(rows, config(tmp_path, shots=[1, 2, 5]))
    (point,) = summary["points"]
    assert (point["shots"], point["users"], point["alone"]["clusters"]) == (1, 2, 2)
    assert point["over_bradley_terry"]["mean"] == 0.25
    assert point["over_alone"]["mean"] == pytest.approx(0.15)
    assert point["adapted"]["hi"] <= 1
    assert [note.split(";")[0] for note in summary["notes"]] == [
        "1 users have 2 comparisons and 5 more",
        "0 users have 5 comparisons and 5 more",
    ]


def test_the_command_measures_prints_and_draws(tmp_path):
    data = toy.bimodal(10, 20)
    rows = [
        {"id": f"p{i}", "prompt": "?", "chosen": "a", "rejected": "b", "user": f"u{u}"} for i, u in enumerate(data.user)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(tmp_path / "f.npz", chosen=data.chosen, rejected=data.rejected)
    recipe = {"dataset": tmp_path / "pairs.jsonl", "features": tmp_path / "f.npz", "out": tmp_path / "out"}
    result = run("reward curve", **recipe, splits=1, shots=[2, 10, 100])
    assert result.exit_code == 0, result.output
    assert "note: 0 users have 100 comparisons and 5 more; that point is left out" in result.output
    curve = json.loads((tmp_path / "out/curve.json").read_text())
    assert [point["shots"] for point in curve["points"]] == [2, 10]
    assert (tmp_path / "out/curve.png").read_bytes().startswith(b"\x89PNG")
    assert "differs in kind" in failure("reward curve", **recipe, kind="vpl")
    assert "learns nothing of one" in failure("reward curve", **recipe, kind="bradley_terry")
    assert "each larger than the one before" in failure("reward curve", **recipe, shots=[5, 2])
