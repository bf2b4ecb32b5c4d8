"""From items to a score, by hand."""

from __future__ import annotations

import math

import pytest

from apo.evaluation.mixeval.score import aggregate, interval
from apo.evaluation.records.mixeval import MixEvalItem


def items(split: str, scores: list[float], questions: str, **changes) -> list[MixEvalItem]:
    return [
        MixEvalItem(
            split=split, row=n, question=q, benchmark="DROP", prompt="", target=(), response="", score=s, **changes
        )
        for n, (s, q) in enumerate(zip(scores, questions, strict=True))
    ]


FREE = items("free-form", [1, 0, 0.5], "aab")
CHOICE = items("multiple-choice", [1, 0, 0, 0, 1, 0], "cdefgh")


def test_faithful_rounds_each_split_and_weighs_them_by_their_rows():
    scores = aggregate([*FREE, *CHOICE], "faithful")
    assert (scores["free_form"], scores["multiple_choice"]) == (0.5, 0.333)
    assert scores["overall"] == pytest.approx((3 * 0.5 + 6 * 0.333) / 9, abs=1e-12)
    assert scores["by_benchmark"]["multiple-choice"]["DROP"].score == 0.333
    assert scores["by_benchmark"]["multiple-choice"]["DROP"].right == 2


def test_strict_rounds_nothing():
    scores = aggregate([*FREE, *CHOICE], "strict")
    assert scores["multiple_choice"] == 2 / 6
    assert scores["overall"] == 3.5 / 9
    assert scores["intervals"]["overall"].mean == 3.5 / 9


def test_standard_errors_by_hand():
    estimate = interval(FREE)
    assert estimate.se_naive == pytest.approx(math.sqrt(0.25 / 3))
    # Sums of residuals 0 and 0 by question: no difference between questions is seen at all.
    assert estimate.se_clustered == 0
    assert (estimate.n, estimate.questions, estimate.mean, estimate.unique_mean) == (3, 2, 0.5, 0.5)
    twice = items("free-form", [1, 1, 0, 0], "aabb")
    # CR2: residuals sum to 1 and -1, each over 1 - 2/4, so sqrt(2 + 2) / 4.
    assert interval(twice).se_clustered == pytest.approx(0.5)
    assert interval(twice).se_naive == pytest.approx(math.sqrt(1 / 3 / 4))


def test_the_mean_over_questions_weighs_each_once():
    assert interval(items("free-form", [1, 1, 1, 0], "aaab")).unique_mean == 0.5


def test_unresolved_items_are_bracketed_and_counted():
    some = [*items("free-form", [1, 0], "ab"), *items("free-form", [0.7, 0], "cd", unresolved="empty")]
    estimate = interval(some)
    assert estimate.bracket == (0.25, 0.75)
    counted = aggregate([*some, *CHOICE], "strict")
    assert (counted["unresolved"], counted["unresolved_reasons"]) == (2, {"empty": 2})


def test_a_row_that_a_server_refused_leaves_a_bracket_and_no_score():
    some = [*items("free-form", [1, 0], "ab"), *items("free-form", [0], "c", unresolved="judge_http_400")]
    for profile in ("faithful", "strict"):
        scores = aggregate([*some, *CHOICE], profile)
        assert (scores["overall"], scores["free_form"], scores["unanswered"]) == (None, None, 1)
        assert scores["multiple_choice"] == pytest.approx(1 / 3, abs=1e-3)
        interval_ = scores["intervals"]["free_form"]
        assert (interval_.mean, interval_.ci95, interval_.unique_mean, interval_.se_naive) == (None,) * 4
        assert interval_.bracket == (1 / 3, 2 / 3)
        assert scores["by_benchmark"]["free-form"]["DROP"].score is None


def test_one_item_has_no_interval():
    estimate = interval(FREE[:1])
    assert (estimate.se_naive, estimate.se_clustered, estimate.ci95) == (None, None, None)
