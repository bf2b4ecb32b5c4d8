"""`apo reward`: from pairs with users to a folder, scores, groups, a judge for the worst-off, and a new user."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from apo.cli import app
from apo.rewards.judge import pad_chosen, rows_by_group, worst_group_filter
from apo.rewards.reward_dir import Reward, save_user, user_file, user_notes
from apo.rewards.serve import AnswerScorer
from clair.core.errors import UserError
from tests.apo.conftest import NUMBERS, make_model, make_tokenizer
from tests.apo.recipe_command import failure, run
from tests.apo.rewards.tastes import USERS, read, taste, write


def test_the_folder_says_what_it_is_and_reads_back_as_it_was(world):
    facts = json.loads((world / "pal/reward.json").read_text())
    assert facts["kind"] == "pal"
    assert facts["measured"]["accuracy"] == 1.0
    assert facts["measured"]["held_out"] == 16
    assert facts["users"] == [f"u{n}" for n in range(USERS)]
    groups = [facts["groups"][f"u{n}"] for n in range(USERS)]
    assert groups == [groups[0], groups[1]] * 4
    assert groups[0] != groups[1]
    assert len(facts["trained_on"]) == 160
    assert json.loads((world / "bradley_terry/reward.json").read_text())["measured"]["accuracy"] < 0.8
    vpl = json.loads((world / "vpl/reward.json").read_text())
    assert vpl["measured"]["active_units"] > 0
    assert vpl["measured"]["swap"] < 0  # a taste turned round is another place in the latent
    assert vpl["warnings"] == []
    first, second = (Reward.load(world / "vpl") for _ in range(2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.scorer.state_dict().values(), second.scorer.state_dict().values(), strict=True)
    )
    assert first.scorer.spread.shape == (USERS, 8)


def test_scores_are_each_users_own_and_groups_are_written(world, tmp_path):
    result = run("reward score", dataset=world / "pairs.jsonl", reward=world / "pal", out=tmp_path / "scored.jsonl")
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "scored.jsonl")
    assert len(rows) == 160
    assert sum(row["score_chosen"] > row["score_rejected"] for row in rows) >= 158
    assert all(0 <= row["score_rejected"] <= 1 for row in rows)
    by_user = {row["user"]: row["group"] for row in rows}
    assert by_user == Reward.load(world / "pal").groups()
    for row in rows:
        assert sorted(row["preferred"]) == ["group 1", "group 2"]
        assert row["worst"] == min(row["preferred"].values()) < 0.5 < max(row["preferred"].values())


def test_scores_for_one_user_and_with_padding(world, tmp_path):
    recipe = {"dataset": world / "pairs.jsonl", "reward": world / "pal", "out": tmp_path / "s.jsonl"}
    assert run("reward score", **recipe, user="u0", padding=" the the").exit_code == 0
    rows = read(tmp_path / "s.jsonl")
    likes = [row["user"] in ("u0", "u2", "u4", "u6") for row in rows]
    ahead = [row["score_chosen"] > row["score_rejected"] for row in rows]
    assert sum(a == b for a, b in zip(likes, ahead, strict=True)) >= 158
    assert all(0 <= row["score_padded"] <= 1 for row in rows)
    assert sum(row["score_padded"] != row["score_chosen"] for row in rows) > 150
    assert rows[0]["chosen"][0]["content"].split()[-1] in NUMBERS  # the pairs themselves are not padded
    certified = run("certify", dataset=tmp_path / "s.jsonl", property="same", than="score_padded", alpha=0.2)
    assert "score_chosen equals score_padded" in certified.output
    assert "'u9' is neither a user nor a group of this reward" in failure("reward score", **recipe, user="u9")
    assert "did you mean 'group 1'" in failure("reward score", **recipe, user="groop 1")


def test_each_group_gets_the_pair_turned_to_its_taste(world, tmp_path):
    recipe = {"dataset": world / "pairs.jsonl", "reward": world / "pal", "out": tmp_path / "g.jsonl"}
    assert run("reward score", **recipe, by_group=True).exit_code == 0
    rows = read(tmp_path / "g.jsonl")
    assert len(rows) == 320
    of_u0 = Reward.load(world / "pal").groups()["u0"]
    for row in rows:
        in_numbers = row["chosen"][0]["content"].split()[0] in NUMBERS
        assert in_numbers == (row["group"] == of_u0)
    assert len({row["id"] for row in rows}) == 320
    audit = write(tmp_path / "a.jsonl", [{"id": row["id"], "bad": False} for row in rows[:40]])
    message = failure("calibrate", dataset=tmp_path / "g.jsonl", audit=audit, trained_on=[world / "pal"])
    assert message.startswith(f"the judge was trained on '{rows[0]['pair']}'")


def test_a_folder_keeps_train_and_test_apart_and_trains_a_run_for_each_group(world, tmp_path):
    from apo.data.sources import load_eval, load_train
    from apo.training.by_group import expand_runs
    from apo.training.config import TrainConfig

    rng = random.Random(3)
    (tmp_path / "in").mkdir()
    for split, pairs in (("train", 8), ("test", 3)):
        write(tmp_path / f"in/{split}.jsonl", [{**row, "user": None} for row in taste(rng, split, True, pairs)])
    scoring = {"dataset": tmp_path / "in", "reward": world / "pal", "by_group": True}
    assert run("reward score", **scoring, out=tmp_path / "out").exit_code == 0
    assert {row["split"] for row in read(tmp_path / "out/test.jsonl")} == {"test"}
    recipe = {
        "model": str(world / "model"),
        "dataset": str(tmp_path / "out"),
        "by": "group",
        "out": str(tmp_path / "r"),
    }
    runs = expand_runs(TrainConfig(**recipe))
    assert [run.out for run in runs] == [str(tmp_path / f"r/group-{n}") for n in (1, 2)]
    for group_run in runs:
        assert (len(load_train(group_run.dataset, 0)), len(load_eval(group_run.dataset, True))) == (8, 3)
    only = write(tmp_path / "only.jsonl", read(tmp_path / "in/train.jsonl"))
    assert run("reward score", **{**scoring, "dataset": only}, out=tmp_path / "out").exit_code == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["train.jsonl"]
    (tmp_path / "out/notes.txt").write_text("mine")
    assert "holds other files (notes.txt)" in failure("reward score", **scoring, out=tmp_path / "out")
    (tmp_path / "x.jsonl").mkdir()
    assert "is a folder; give a .jsonl file" in failure("reward score", **scoring, out=tmp_path / "x.jsonl")
    (tmp_path / "plain").write_text("")
    assert "is a file; give a .jsonl file" in failure("reward score", **scoring, out=tmp_path / "plain")
    undecided = write(
        tmp_path / "u.jsonl",
        [
            {
                **read(tmp_path / "in/test.jsonl")[0],
                "rejected": [{"role": "assistant", "content": "a question of"}],
                "chosen": [{"role": "assistant", "content": "a question of the"}],
            }
        ],
    )
    scoring |= {"dataset": undecided, "min_preference": 1}
    assert "lower min_preference" in failure("reward score", **scoring, out=tmp_path / "s.jsonl")


def test_by_group_and_worst_off_by_hand():
    row = {"id": "p", "chosen": "A", "rejected": "B", "score_chosen": 0.7, "score_rejected": 0.2, "worst": 0.1}
    row["preferred"] = {"one": 0.9, "two": 0.1, "three": 0.6}
    rows = rows_by_group({group: [row] for group in row["preferred"]}, 0.8)
    turned = {r["group"]: (r["chosen"], r["rejected"], r["score_chosen"], r["id"]) for r in rows}
    assert turned == {"one": ("A", "B", 0.7, "p one"), "two": ("B", "A", 0.2, "p two")}
    assert worst_group_filter([row], 0.5).dropped == ("p",)
    assert worst_group_filter([{**row, "worst": 0.5}], 0.5).accepted == ("p",)
    longer = pad_chosen([{"chosen": [{"role": "assistant", "content": "A"}]}], " x")[0]
    assert longer["chosen"][-1]["content"] == "A x"


def test_a_judge_for_the_worst_off_writes_decisions_that_clair_keep_takes(world, tmp_path):
    from clair.cli import app as clair
    from clair.data.dataset import read_rows
    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig

    prompts = [
        {"prompt": "what is one", "id": "agreed", "answers": ["one two three", "two one three"], "scores": [2, 1]},
        {"prompt": "what is two", "id": "disputed", "answers": ["one two three", "a the of"], "scores": [2, 1]},
    ]
    recipe = {
        "pipeline": "judged",
        "prompts": {"path": write(tmp_path / "p.jsonl", prompts)},
        "out": str(tmp_path / "d"),
    }
    build(BuildConfig.model_validate(recipe))
    scoring = {"dataset": tmp_path / "d", "reward": world / "pal", "out": tmp_path / "s.jsonl"}
    result = run("reward score", **scoring, decisions=tmp_path / "decisions.json", min_worst=0.2)
    assert result.exit_code == 0, result.output
    marks = json.loads((tmp_path / "decisions.json").read_text())["decisions"]
    assert marks["disputed"] == "drop"
    assert CliRunner().invoke(clair, ["keep", str(tmp_path / "d"), str(tmp_path / "decisions.json")]).exit_code == 0
    assert [row["id"] for row in read_rows(tmp_path / "d")] == [id for id, mark in marks.items() if mark == "keep"]
    assert "one unchanged dataset folder" in failure(
        "reward score", **scoring, decisions=tmp_path / "x.json", by_group=True
    )


def test_a_new_user_is_located_from_comparisons_and_kept(world, tmp_path):
    for kind in ("pal", "vpl"):
        shutil.copytree(world / kind, tmp_path / kind)
        new = write(tmp_path / "new.jsonl", taste(random.Random(9), "whoever", False, 5))
        result = run("reward adapt", reward=tmp_path / kind, user="ann", comparisons=new)
        assert result.exit_code == 0, result.output
        more = write(tmp_path / "more.jsonl", taste(random.Random(10), "ann", False, 20))
        out = tmp_path / f"{kind}.jsonl"
        assert run("reward score", dataset=more, reward=tmp_path / kind, out=out).exit_code == 0
        assert sum(row["score_chosen"] > row["score_rejected"] for row in read(out)) >= 19
    groups = Reward.load(tmp_path / "pal").groups()
    assert groups["ann"] == groups["u1"]
    assert "user 'u1' exists already" in failure("reward adapt", reward=tmp_path / "pal", user="u1", comparisons=new)


def test_a_new_user_gets_the_most_informative_questions_and_every_answer_is_saved(world, tmp_path):
    shutil.copytree(world / "vpl", tmp_path / "vpl")
    pool = write(tmp_path / "pool.jsonl", taste(random.Random(5), "pool", True, 12))
    recipe = {"reward": tmp_path / "vpl", "user": "../ann", "pool": pool}
    message = failure("reward adapt", **recipe, input="1\nneither\n2\n")
    assert message.startswith("the input ended; every answer so far is stored")
    stored = json.loads(user_file(tmp_path / "vpl", "../ann").read_text())
    assert len(stored["answers"]) == 2
    assert stored["state"] is None
    assert "'../ann'" not in str(Reward.load(tmp_path / "vpl").states)
    # Go on: always what is in numbers, which stands first or second by hash.
    rows = {row["id"]: row for row in read(tmp_path / "pool.jsonl")}
    from clair.core.files import content_hash

    def first_is_chosen(id: str) -> bool:
        return int(content_hash(["../ann", id])[0], 16) % 2 == 0

    assert [answer["chosen"] for answer in stored["answers"]] == [
        first_is_chosen(answer["id"]) == (choice == 1) for answer, choice in zip(stored["answers"], (1, 2), strict=True)
    ]
    result = run("reward adapt", **recipe, questions=3, input="1\n")
    assert result.exit_code == 0, result.output
    assert "Question 3 of 3" in result.output
    stored = json.loads(user_file(tmp_path / "vpl", "../ann").read_text())
    assert len({answer["id"] for answer in stored["answers"]}) == 3
    assert set(rows) >= {answer["id"] for answer in stored["answers"]}
    assert len(stored["state"]) == 8
    assert list((tmp_path / "vpl/users").iterdir()) == [user_file(tmp_path / "vpl", "../ann")]
    other_pool = write(tmp_path / "other.jsonl", taste(random.Random(5), "else", True, 12))
    assert "which is not in this pool" in failure("reward adapt", **{**recipe, "pool": other_pool})
    assert "13 questions but 12 pairs" in failure("reward adapt", **recipe, questions=13)


def test_only_a_reward_that_can_choose_questions_chooses_them(world, tmp_path):
    pool = write(tmp_path / "pool.jsonl", taste(random.Random(5), "pool", True, 12))
    message = failure("reward adapt", reward=world / "pal", user="ann", pool=pool)
    assert "a pal reward cannot choose questions" in message
    assert "either comparisons" in failure("reward adapt", reward=world / "pal", user="ann")


def test_select_recommends_several_tastes_here_and_says_why(world, tmp_path):
    recipe = {"dataset": world / "pairs.jsonl", "model": world / "model", "max_tastes": 2}
    result = run("reward select", **recipe, out=tmp_path / "s.json")
    assert result.exit_code == 0, result.output
    assert "several tastes: PAL with 2 prototypes" in result.output
    evidence = json.loads((tmp_path / "s.json").read_text())
    assert evidence["plural"]
    assert evidence["words"] in result.output.replace("\n", " ")
    assert evidence["gain"]["clusters"] == USERS
    assert [candidate["name"] for candidate in evidence["candidates"]] == ["bradley_terry", "pal 1", "pal 2"]


# ---- bad input


def test_a_call_with_the_former_options_is_answered_with_the_recipe_to_write():
    fit = ["reward", "fit", "a.jsonl", "b.jsonl", "--model", "m", "--by-prompt", "--out", "r"]
    message = str(CliRunner().invoke(app, fit).exception)
    assert "dataset: [a.jsonl, b.jsonl], model: m, by_prompt: true" in message
    adapt = ["reward", "adapt", "runs/taste", "--user", "ann", "--comparisons", "c.jsonl"]
    assert "reward: runs/taste" in str(CliRunner().invoke(app, adapt).exception)
    score = ["reward", "score", "a.jsonl", "--reward", "r", "--sure", "0.6", "--least", "0.7", "--pad", "x"]
    message = str(CliRunner().invoke(app, score).exception)
    assert "min_preference: 0.6, min_worst: 0.7, padding: x" in message


def test_features_of_another_model_are_refused(world, tmp_path):
    shutil.copytree(world / "pal", tmp_path / "pal")
    make_model(seed=7).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    facts = json.loads((tmp_path / "pal/reward.json").read_text())
    (tmp_path / "pal/reward.json").write_text(json.dumps({**facts, "model": str(tmp_path / "other")}))
    message = failure("reward score", dataset=world / "pairs.jsonl", reward=tmp_path / "pal", out=tmp_path / "s.jsonl")
    assert "this reward was fitted on features of model" in message
    assert not (tmp_path / "s.jsonl").exists()


def test_unknown_users_are_named_and_do_not_matter_to_one_reward_for_all(world, tmp_path):
    new = write(tmp_path / "new.jsonl", taste(random.Random(1), "stranger", True, 3))
    recipe = {"dataset": new, "out": tmp_path / "s.jsonl"}
    message = failure("reward score", **recipe, reward=world / "pal")
    assert "1 of 1 users are unknown to this reward: 'stranger'" in message
    assert run("reward score", **recipe, reward=world / "bradley_terry").exit_code == 0
    nobody = write(tmp_path / "nobody.jsonl", [{**row, "user": None} for row in read(tmp_path / "new.jsonl")])
    assert run("reward score", **{**recipe, "dataset": nobody}, reward=world / "pal").exit_code == 0


def test_rewards_without_users_or_with_one_are_refused_and_odd_users_reported(world, tmp_path):
    rows = taste(random.Random(1), "only", True, 6)
    single = write(tmp_path / "single.jsonl", rows)
    recipe = {"model": world / "model", "out": tmp_path / "r"}
    assert "all comparisons are of one user, 'only'" in failure("reward fit", **recipe, kind="pal", dataset=single)
    none = write(tmp_path / "none.jsonl", [{**row, "user": None} for row in rows])
    assert "no pair has a user" in failure("reward fit", **recipe, kind="vpl", dataset=none)
    assert "'vpl'" in failure("reward fit", **recipe, kind="vpll", dataset=single)
    assert "beta is for kind: vpl" in failure("reward fit", **recipe, kind="pal", beta=1, dataset=single)
    assert "loss is for kind: pal" in failure("reward fit", **recipe, kind="vpl", loss="hinge", dataset=single)
    by_prompt = {"kind": "pal", "by_prompt": True, "distance": "norm"}
    assert "distance is for by_prompt: false" in failure("reward fit", **recipe, **by_prompt, dataset=single)
    assert "holds a reward already" in failure("reward fit", **{**recipe, "out": world / "pal"}, dataset=single)
    turned = {**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"], "id": "t"}
    odd = [*rows, turned, {**rows[1], "user": "once"}, {**rows[2], "user": None}]
    result = run("reward fit", **recipe, kind="pal", dataset=write(tmp_path / "odd.jsonl", odd))
    assert result.exit_code == 0, result.output
    assert "1 of 2 users have one comparison only: 'once'" in result.output
    assert "1 of 2 users contradict themselves on the same two answers: 'only'" in result.output
    assert "1 of 9 pairs have no user and are left out" in result.output


def test_a_collapsed_latent_is_reported(world, tmp_path):
    recipe = {"dataset": world / "pairs.jsonl", "model": world / "model", "kind": "vpl", "beta": 50}
    result = run("reward fit", **recipe, out=tmp_path / "r")
    assert "warning: the latent has collapsed" in result.output
    assert json.loads((tmp_path / "r/reward.json").read_text())["warnings"]


def test_an_invalid_or_damaged_folder_is_one_line(world, tmp_path):
    assert "no finished reward" in failure("reward adapt", reward=tmp_path, user="a", comparisons="x")
    shutil.copytree(world / "pal", tmp_path / "pal")
    (tmp_path / "pal/reward.safetensors").write_bytes(b"torn")
    message = failure("reward adapt", reward=tmp_path / "pal", user="a", comparisons=world / "pairs.jsonl")
    assert "cannot be read" in message


def test_notes_are_by_user():
    assert user_notes([{"user": None}]) == []


def test_a_user_is_kept_whole_or_not_at_all(world, tmp_path, monkeypatch):
    shutil.copytree(world / "pal", tmp_path / "pal")
    reward = Reward.load(tmp_path / "pal")
    save_user(reward, "ann", torch.tensor([0.5, 0.5]), [])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        save_user(reward, "ann", torch.tensor([0.9, 0.1]), [])
    monkeypatch.undo()
    assert Reward.load(tmp_path / "pal").states["ann"].tolist() == [0.5, 0.5]


@pytest.mark.slow
def test_a_build_scores_answers_with_a_fitted_reward_as_its_checker(world, tmp_path):
    """`apo reward serve` in a process of its own gives the win rates that `apo reward score` gives."""
    import sys

    from clair.data.dataset import read_rows
    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig

    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()][:4]
    answers = [[pair[side][0]["content"] for side in ("rejected", "chosen")] for pair in pairs]
    prompts = [{"id": p["id"], "prompt": p["prompt"], "answers": a} for p, a in zip(pairs, answers, strict=True)]
    command = [sys.executable, "-m", "apo.cli", "reward", "serve", str(world / "pal"), "--user", "u0"]
    scores = {"checker": {"command": command, "seconds": 300, "processes": 1, "megabytes": 30_000}}
    prompts_file = write(tmp_path / "prompts.jsonl", prompts)
    recipe = {"pipeline": "judged", "prompts": {"path": prompts_file}, "scores": scores, "out": str(tmp_path / "out")}
    build(BuildConfig.model_validate(recipe))
    dataset = write(tmp_path / "pairs.jsonl", pairs)
    assert (
        run("reward score", dataset=dataset, reward=world / "pal", user="u0", out=tmp_path / "s.jsonl").exit_code == 0
    )
    expected = {row["id"]: row for row in map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines())}
    built = list(read_rows(tmp_path / "out"))
    assert len(built) == 4
    for row in built:
        wanted = [expected[row["id"]][name] for name in ("score_chosen", "score_rejected")]
        assert [row["score_chosen"], row["score_rejected"]] == pytest.approx(sorted(wanted, reverse=True), abs=1e-5)


# ---- features of a file


@pytest.fixture(scope="module")
def embedded(world):
    """The comparisons of `world` embedded by somebody else: the share of numbers, and noise that says nothing."""
    rows, rng = read(world / "pairs.jsonl"), np.random.default_rng(0)

    def embed(side: str) -> np.ndarray:
        shares = [np.mean([word in NUMBERS for word in row[side][0]["content"].split()]) for row in rows]
        return np.column_stack([shares, 0.1 * rng.standard_normal((len(rows), 3))])

    vectors = {side: embed(side) for side in ("chosen", "rejected")}
    np.savez(world / "features.npz", id=[row["id"] for row in rows], encoder="words", **vectors)
    np.savez(world / "wider.npz", id=[row["id"] for row in rows], chosen=np.ones((160, 5)), rejected=np.ones((160, 5)))
    recipe = {"dataset": world / "pairs.jsonl", "features": world / "features.npz", "kind": "pal"}
    result = run("reward fit", **recipe, out=world / "of_file")
    assert result.exit_code == 0, result.output
    return world


def test_every_command_takes_the_features_of_a_file(embedded, tmp_path):
    facts = json.loads((embedded / "of_file/reward.json").read_text())
    assert (facts["model"], facts["sizes"]) == (None, [1, 4])
    assert facts["measured"]["accuracy"] == 1.0
    features = {"dataset": embedded / "pairs.jsonl", "features": embedded / "features.npz"}
    selected = run("reward select", **features, max_tastes=2)
    assert "several tastes: PAL with 2 prototypes" in selected.output
    recipe = {**features, "reward": embedded / "of_file", "out": tmp_path / "s.jsonl"}
    assert run("reward score", **recipe).exit_code == 0
    assert sum(row["score_chosen"] > row["score_rejected"] for row in read(tmp_path / "s.jsonl")) == 160
    shutil.copytree(embedded / "of_file", tmp_path / "r")
    of_one = write(tmp_path / "one.jsonl", [row for row in read(embedded / "pairs.jsonl") if row["user"] == "u1"][:5])
    adapt = {"reward": tmp_path / "r", "comparisons": of_one, "features": embedded / "features.npz"}
    result = run("reward adapt", **adapt, user="ann")
    assert result.exit_code == 0, result.output
    groups = Reward.load(tmp_path / "r").groups()
    assert groups["ann"] == groups["u1"]
    certificate = run("certify", dataset=tmp_path / "s.jsonl", property="floor", bound=0.1, alpha=0.2)
    assert certificate.exit_code == 0, certificate.output


def test_features_of_a_file_and_of_a_model_are_never_mixed(embedded, tmp_path):
    scoring = {"dataset": embedded / "pairs.jsonl", "out": tmp_path / "s.jsonl"}
    of_file = {**scoring, "reward": embedded / "of_file"}
    assert "give `features`, of the same encoder" in failure("reward score", **of_file)
    message = failure("reward score", **of_file, features=embedded / "wider.npz")
    assert "fitted on features 4 wide, and these are 5 wide" in message
    assert "32 wide, and these are 4 wide" in failure(
        "reward score", **scoring, reward=embedded / "pal", features=embedded / "features.npz"
    )
    assert "padding makes new answers" in failure("reward score", **of_file, features="f.npz", padding="x")
    fit = {"dataset": embedded / "pairs.jsonl", "out": tmp_path / "r"}
    assert "either model" in failure("reward fit", **fit)
    assert "either model" in failure("reward fit", **fit, model="m", features="f.npz")
    assert "pooling is for features of a model" in failure("reward fit", **fit, features="f.npz", pooling="mean")
    by_prompt = {"kind": "pal", "by_prompt": True, "features": embedded / "features.npz"}
    assert "no column 'prompt'" in failure("reward fit", **fit, **by_prompt)
    with pytest.raises(UserError, match="fitted on features of a file"):
        AnswerScorer(Reward.load(embedded / "of_file"))


@pytest.mark.parametrize("pooling", ["mean", "cumulative"])
def test_an_average_over_tokens_represents_the_answers_in_every_command(world, tmp_path, pooling):
    recipe = {"dataset": world / "pairs.jsonl", "model": world / "model", "kind": "pal", "pooling": pooling}
    assert run("reward fit", **recipe, out=tmp_path / "r").exit_code == 0
    facts = json.loads((tmp_path / "r/reward.json").read_text())
    assert facts["pooling"] == pooling
    assert facts["measured"]["accuracy"] == 1.0
    scoring = {"dataset": world / "pairs.jsonl", "reward": tmp_path / "r", "out": tmp_path / "s.jsonl"}
    assert run("reward score", **scoring, padding=" the").exit_code == 0
    rows = read(tmp_path / "s.jsonl")
    assert sum(row["score_chosen"] > row["score_rejected"] for row in rows) >= 158
    if pooling == "cumulative":
        with pytest.raises(UserError, match="cumulative features are those of a pair"):
            AnswerScorer(Reward.load(tmp_path / "r"))
    else:
        scorer, state = Reward.load(tmp_path / "r"), AnswerScorer(Reward.load(tmp_path / "r"), rows[0]["user"])
        scores = state.scores(rows[0]["prompt"], [rows[0]["chosen"][0]["content"]])
        assert scores == pytest.approx([rows[0]["score_chosen"]], abs=1e-5)
        assert scorer.facts["features"] != json.loads((world / "pal/reward.json").read_text())["features"]


def test_distinguish_measures_clusters_on_the_features_of_a_file(embedded, tmp_path):
    rows, model = read(embedded / "pairs.jsonl")[:40], embedded / "model"
    pairs = write(tmp_path / "pairs.jsonl", rows)
    with np.load(embedded / "features.npz") as arrays:
        chosen, rejected = arrays["chosen"][:40], arrays["rejected"][:40]
    np.savez(tmp_path / "f.npz", chosen=chosen, rejected=rejected, prompt=np.ones((40, 2)))
    recipe = {"dataset": pairs, "model": model, "by": "user", "out": tmp_path / "out"}
    result = run("distinguish", **recipe, features=tmp_path / "f.npz")
    assert result.exit_code == 0, result.output
    clusters = {c["name"]: c for c in json.loads((tmp_path / "out/distinguish.json").read_text())["clusters"]}
    u = (chosen - rejected)[:20]  # u0 prefers numbers, u1 words: their mean differences are opposite
    assert clusters["u0"]["conflict"] < -0.9
    squares = ((u.sum(0) ** 2).sum() - (u**2).sum()) / (20 * 19)
    assert clusters["u0"]["delta"]["value"] == pytest.approx(squares**0.5, rel=1e-4)
