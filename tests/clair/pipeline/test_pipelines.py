"""The four data sets of the paper, with models that answer by a script."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from clair.core.errors import UserError
from clair.core.recipe import resolve
from clair.data.dataset import read_rows
from clair.pipeline.build import build
from clair.pipeline.config import BuildConfig
from tests.clair.scripted import Scripted, between, endpoint, install, oracle_verdict, recipe, revision, verdict


def drops(out):
    return [json.loads(line) for line in (out / "dropped.jsonl").read_text("utf-8").splitlines()]


def pairs(out):
    return {row["id"]: row for row in read_rows(out)}


def text(row, side):
    return row[side][0]["content"]


def answers(n, start=0):
    """Rows with the good answer first or second in turn."""
    rows = []
    for i in range(start, start + n):
        both = [f"a good answer to {i}", f"a bad answer to {i}"]
        rows.append({"id": f"r{i}", "prompt": f"question {i}", "answers": both[:: 1 if i % 3 else -1]})
    return rows


@pytest.mark.parametrize("order", ["both", "random"])
def test_an_oracle_judge_is_followed_in_every_pair_and_shows_no_position_bias(tmp_path, monkeypatch, order):
    install(monkeypatch, judge=Scripted("oracle", oracle_verdict))
    built = build(recipe(tmp_path / "out", answers(200), pipeline="judged", judge=endpoint(order=order)))
    rows = pairs(tmp_path / "out")
    assert len(rows) == 200
    assert all("good" in text(r, "chosen") and "bad" in text(r, "rejected") for r in rows.values())
    assert not built.manifest["position"]["biased"]


def test_an_always_first_judge_yields_no_label_in_both_orders_and_is_flagged_in_one(tmp_path, monkeypatch):
    install(monkeypatch, judge=Scripted("first", lambda messages, sample: verdict("[1]")))
    both = build(recipe(tmp_path / "both", answers(60), pipeline="judged", judge=endpoint()))
    assert both.manifest["counts"]["pairs"] == 0
    assert both.manifest["drop_reasons"] == {"judge.contradiction": 60}
    single_order = build(recipe(tmp_path / "one", answers(60), pipeline="judged", judge=endpoint(order="random")))
    for built in (both, single_order):
        assert built.manifest["position"]["share_first"] == 1.0
        assert built.manifest["position"]["biased"]
        assert "biased by position" in (built.out / "README.md").read_text("utf-8")


def test_ties_are_dropped_by_reason(tmp_path, monkeypatch):
    install(monkeypatch, judge=Scripted("tie", lambda messages, sample: verdict("[tie]")))
    built = build(recipe(tmp_path / "out", answers(9), pipeline="judged", judge=endpoint()))
    assert built.manifest["drop_reasons"] == {"judge.tie": 9}


def test_on_policy_samples_differ_and_are_each_requested_once(tmp_path, monkeypatch):
    target = Scripted("target", lambda m, n: f"{'good' if n == 1 else 'bad'} sample {n}: {m[0]['content']}")
    judge = Scripted("oracle", oracle_verdict)
    install(monkeypatch, target=target, judge=judge)
    rows = [{"prompt": f"question {i}"} for i in range(10)]
    config = recipe(tmp_path / "out", rows, pipeline="judged", samples=3, target=endpoint(), judge=endpoint())
    build(config)
    by_id = pairs(tmp_path / "out")
    assert len(by_id) == 10
    assert all(text(r, "chosen").startswith("good sample 1") for r in by_id.values())
    assert all(text(r, "rejected").startswith("bad sample") for r in by_id.values())
    assert len(target.requests) == 30
    # Three comparisons in both orders; the two bad samples tie in either.
    assert len(judge.requests) == 10 * 3 * 2


@pytest.mark.parametrize(
    ("wins", "chosen", "rejected", "reasoning"),
    [
        ({"ab": "a", "ac": "a", "bc": "b"}, "a", "c", "a c"),  # the last comparison is that of two others
        ({"ab": "a", "ac": None, "bc": "b"}, "a", "c", ""),  # a draw of the two
        # a and b have three wins, d and e one, and the first of equals counts, although d is better than a
        ({"ab": "a", "ac": "a", "ad": "d", "bc": "b", "bd": "b", "cd": "c", "ae": "a", "be": "b", "ce": "c", "de": "e"},
         "a", "d", ""),
    ],
)  # fmt: skip
def test_the_reasoning_of_several_answers_is_that_of_the_comparison_of_winner_and_loser(
    tmp_path, monkeypatch, wins, chosen, rejected, reasoning
):
    def compare(messages, sample):
        shown = [between(messages[0]["content"], f"student_solution_{n}") for n in (1, 2)]
        winner = wins["".join(sorted(shown))]
        choice = "[tie]" if winner is None else f"[{shown.index(winner) + 1}]"
        return verdict(choice).replace("because", " ".join(sorted(shown)))

    install(monkeypatch, judge=Scripted("judge", compare))
    rows = [{"id": "r", "prompt": "question", "answers": sorted(set("".join(wins)))}]
    build(recipe(tmp_path / "out", rows, pipeline="judged", judge=endpoint(), filters={}))
    row = pairs(tmp_path / "out")["r"]
    assert (text(row, "chosen"), text(row, "rejected"), row["reasoning"]) == (chosen, rejected, reasoning)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_score_that_is_missing_ends_the_row_in_whatever_order_it_comes(tmp_path, missing):
    orders = list(itertools.permutations([1, missing, 3]))
    rows = [
        {"id": f"list {n}", "prompt": f"a{n}", "answers": ["x", "y", "z"], "scores": s} for n, s in enumerate(orders)
    ]
    rows += [
        {"id": f"entries {n}", "prompt": f"b{n}", "completions": [
            {"response": text, "overall_score": score} for text, score in zip("xyz", scores, strict=True)]}
        for n, scores in enumerate(orders)
    ]  # fmt: skip
    rows.append({"id": "whole", "prompt": "c", "answers": ["low", "high"], "scores": [1, 2]})
    build(recipe(tmp_path / "out", rows, pipeline="judged"))
    assert list(pairs(tmp_path / "out")) == ["whole"]
    assert {(d["stage"], d["reason"]) for d in drops(tmp_path / "out")} == {("scores", "missing")}
    assert len(drops(tmp_path / "out")) == 12


def test_given_scores_decide_without_a_judge_and_ties_never_become_a_pair(tmp_path):
    rows = [
        {"id": "clear", "prompt": "a", "answers": ["low", "high", "middle"], "scores": [1, 5, 3]},
        {"id": "tied", "prompt": "b", "answers": ["one", "other"], "scores": [4, 4]},
        {"id": "ultrafeedback", "prompt": "c", "completions": [
            {"response": "worse", "overall_score": 2.5}, {"response": "better", "overall_score": 7}]},
    ]  # fmt: skip
    build(recipe(tmp_path / "out", rows, pipeline="judged"))
    by_id = pairs(tmp_path / "out")
    assert {id: (text(r, "chosen"), text(r, "rejected")) for id, r in by_id.items()} == {
        "clear": ("high", "low"),
        "ultrafeedback": ("better", "worse"),
    }
    assert [(d["id"], d["stage"], d["reason"]) for d in drops(tmp_path / "out")] == [("tied", "scores", "tie")]
    assert {id: (r["score_chosen"], r["score_rejected"]) for id, r in by_id.items()} == {
        "clear": (5.0, 1.0),
        "ultrafeedback": (7.0, 2.5),
    }


def test_a_calibrated_gap_filters_by_the_scores_and_labels_reach_the_pair(tmp_path):
    rows = [
        {"id": "far", "prompt": "a", "answers": ["low", "high"], "scores": [1, 5], "user": 7, "group": "brief"},
        {"id": "near", "prompt": "b", "answers": ["low", "high"], "scores": [1, 3]},
    ]
    build(recipe(tmp_path / "out", rows, pipeline="judged", filters={"gap": {"above": 2}}))
    (row,) = pairs(tmp_path / "out").values()
    assert [row[name] for name in ("id", "user", "group", "behaviour", "source")] == [
        "far",
        "7",
        "brief",
        None,
        "judged",
    ]
    assert [(d["id"], d["reason"], d["detail"]) for d in drops(tmp_path / "out")] == [("near", "gap", "score gap 2")]


def test_stronger_preferred_takes_the_stronger_models_answer_unseen(tmp_path, monkeypatch):
    install(
        monkeypatch,
        target=Scripted("weak", lambda m, s: f"weak answer to {m[0]['content']}"),
        stronger=Scripted("strong", lambda m, s: f"strong answer to {m[0]['content']}"),
    )
    rows = [{"prompt": f"question {i}"} for i in range(5)]
    build(recipe(tmp_path / "out", rows, pipeline="stronger", target=endpoint(), stronger=endpoint()))
    for row in pairs(tmp_path / "out").values():
        question = row["prompt"][0]["content"]
        assert (text(row, "chosen"), text(row, "rejected")) == (
            f"strong answer to {question}",
            f"weak answer to {question}",
        )
        assert row["models"] == {"chosen": "strong", "rejected": "weak"}


def scored_rows(n):
    return [{"id": f"r{i}", "prompt": f"question {i}", "answer": f"a bad answer to {i}"} for i in range(n)]


def test_a_reply_that_cannot_be_read_is_requested_once_more_with_the_error(tmp_path, monkeypatch):
    def forgetful(messages, sample):
        return revision(messages) if len(messages) == 3 else "The answer is good."

    reviser = Scripted("forgetful", forgetful)
    install(monkeypatch, reviser=reviser)
    build(recipe(tmp_path / "out", scored_rows(3), pipeline="revised", reviser=endpoint()))
    assert len(pairs(tmp_path / "out")) == 3
    again = [r["messages"] for r in reviser.requests if len(r["messages"]) == 3]
    assert len(again) == 3
    assert all("{corrected_student_solution} does not stand at the start" in m[2]["content"] for m in again)
    install(monkeypatch, reviser=Scripted("silent", forgetful))
    quiet = recipe(tmp_path / "no", scored_rows(3), pipeline="revised", reviser=endpoint(ask_again=False))
    assert build(quiet).manifest["drop_reasons"] == {"reviser.no_label": 3}


def edits(find, replace):
    return (
        "{teacher_reasoning}\nbecause\n\n{minimal_edits}\n"
        f"<<<<<<< FIND\n{find}\n=======\n{replace}\n>>>>>>> REPLACE"
    )


def test_edit_mode_copies_what_is_not_corrected(tmp_path, monkeypatch):
    install(monkeypatch, reviser=Scripted("editor", lambda m, s: edits("bad", "good")))
    build(recipe(tmp_path / "out", scored_rows(4), pipeline="revised", reviser=endpoint(mode="edits")))
    for row in pairs(tmp_path / "out").values():
        assert text(row, "chosen") == text(row, "rejected").replace("bad", "good")


def test_edits_that_do_not_apply_are_requested_again_and_then_rewritten(tmp_path, monkeypatch):
    def hopeless(messages, sample):
        return revision(messages) if "minimal_edits" not in messages[0]["content"] else edits("not there", "x")

    reviser = Scripted("hopeless", hopeless)
    install(monkeypatch, reviser=reviser)
    build(recipe(tmp_path / "out", scored_rows(1), pipeline="revised", reviser=endpoint(mode="edits")))
    assert [len(r["messages"]) for r in reviser.requests] == [1, 3, 1]
    assert [text(r, "chosen") for r in pairs(tmp_path / "out").values()] == ["a good answer to 0"]


def test_accept_gives_exactly_the_first_pairs_in_the_order_of_the_prompts(tmp_path, monkeypatch):
    def some(messages, sample):
        number = int(between(messages[0]["content"], "student_solution").split()[-1])
        return revision(messages) if number % 3 else "no label here"

    install(monkeypatch, reviser=Scripted("some", some, latency=0.02))
    config = recipe(
        tmp_path / "out", scored_rows(300), pipeline="revised", reviser=endpoint(), accept=20, concurrency=8
    )
    built = build(config)
    expected = [f"r{i}" for i in range(300) if i % 3][:20]
    assert sorted(pairs(tmp_path / "out")) == sorted(expected)
    assert built.manifest["counts"]["prompts"] == int(expected[-1][1:]) + 1
    assert built.manifest["counts"]["dropped"] == built.manifest["counts"]["prompts"] - 20


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"pipeline": "revised"}, "needs reviser"),
        ({"pipeline": "revised", "reviser": endpoint(), "judge": endpoint()}, "judge is not used"),
        ({"pipeline": "stronger", "target": endpoint()}, "needs stronger"),
        ({"pipeline": "revised", "reviser": endpoint(), "samples": 3}, "samples is not used"),
        ({"pipeline": "revised", "reviser": endpoint(), "filters": {"gap": True}}, "filter gap needs scores"),
        ({"pipeline": "judge"}, "'revised', 'judged', 'stronger' or 'delta'"),
    ],
)
def test_roles_that_are_missing_or_would_be_ignored_are_refused(tmp_path, keys, match):
    with pytest.raises(UserError, match=match):
        recipe(tmp_path / "out", scored_rows(1), **keys)


def test_a_stronger_answer_can_come_from_a_column_and_its_length_is_no_fault(tmp_path):
    rows = [{"id": "r", "prompt": "q", "answer": "a wrong answer of very many words " * 4, "gold": "Right."}]
    config = {
        "pipeline": "stronger",
        "prompts": {"path": str(tmp_path / "rows.jsonl"), "columns": {"stronger": "gold"}},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    built = build(resolve(BuildConfig, config | {"out": str(tmp_path / "out")}))
    (row,) = pairs(tmp_path / "out").values()
    assert text(row, "chosen") == "Right."
    assert built.manifest["models"] == {}
    bounded = config | {"out": str(tmp_path / "bounded"), "filters": {"length": True}}
    assert build(resolve(BuildConfig, bounded)).manifest["drop_reasons"] == {"filter.length": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**rows[0], "gold": None}) + "\n")
    with pytest.raises(UserError, match="1 of 1 prompts have no stronger answer and the recipe has no stronger model"):
        build(resolve(BuildConfig, config | {"out": str(tmp_path / "none")}))


def test_a_right_answer_among_given_ones_may_be_much_shorter(tmp_path):
    rows = [{"id": "r", "prompt": "q", "answers": ["It is 4.", "a wrong answer of many words " * 9], "scores": [1, 0]}]
    assert build(recipe(tmp_path / "out", rows, pipeline="judged")).manifest["counts"]["pairs"] == 1


def test_a_judged_recipe_without_answers_or_judge_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no answer and the recipe has no target"):
        build(recipe(tmp_path / "a", [{"prompt": "a"}], pipeline="judged", judge=endpoint()))
    with pytest.raises(UserError, match="no scores and the recipe has no judge"):
        build(recipe(tmp_path / "b", answers(2), pipeline="judged"))
