"""The score that a judge's reply gives: the right one, a named reason, or upstream's random one, marked."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apo.evaluation.answers import RowAnswer
from apo.evaluation.config import is_transient
from apo.evaluation.mixeval import judging
from apo.evaluation.mixeval.benchmark import BenchmarkRow
from apo.evaluation.mixeval.judging import (
    JudgeResult,
    Verdict,
    make_item,
    read_verdict,
    request_options,
    with_fallbacks,
    with_profile,
)
from clair.data.records import Dropped, Reply
from clair.inference.config import ModelConfig
from tests.house.pages import tables

FREE = BenchmarkRow("free-form", 0, "DROP", None, "How many?", (), ("3",))
CHOICE = BenchmarkRow("multiple-choice", 0, "ARC", None, "Hot?", ("ice", "fire", "sun"), (1,))
HTML = "<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>"
REFUSAL = "I'm sorry, but I can't help with that."
((PAGE, _, (_, *ROWS)),) = tables("unresolved")
REASONS = {row[0].strip("`") for row in ROWS}
"""The reasons that the docs explain."""


def read(text: str, row: BenchmarkRow = FREE, profile: str = "faithful", finish: str = "stop") -> Verdict:
    return read_verdict(Reply(text, finish_reason=finish), row, profile)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The correctness score: [[0.5]].", 0.5),
        ("[[1]]", 1.0),
        ("[[1.]]", 1.0),
        ("[[0]]", 0.0),
        ("[[00]]", 0.0),
        ("first [[0.2]], then [[0.9]]", 0.2),
        ("[0.3] but [[0.4]]", 0.4),  # double brackets come first
        ("only [0.3]", 0.3),
        ("La puntuación: [[0.7]]", 0.7),
        ("正确性得分：[[1.0]]", 1.0),
        ("[[A]] [[0.1]]", 0.1),
        ("[[ 0.5 ]] is [0.25]", 0.25),
    ],
)
def test_scores_that_can_be_read(text, score):
    assert read(text).score == score
    assert read(text).unresolved is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("I would say 0.5", "no_brackets"),
        ("[[half]]", "no_brackets"),
        ("[[-0.5]]", "no_brackets"),
        ("[[.5]]", "no_brackets"),
        ("[[1/2]]", "no_brackets"),
        (HTML, "no_brackets"),
        (REFUSAL, "no_brackets"),
        ("Richtig ist es zur Hälfte.", "no_brackets"),
        ("[[5]]", "out_of_range"),
        ("[[1.01]]", "out_of_range"),
        ("[[10]] or [[0.5]]", "out_of_range"),  # the first one counts
        ("[[05]]", "malformed_number"),
        ("[[01]]", "malformed_number"),
        ("[[٠.٥]]", "malformed_number"),
    ],
)
def test_scores_that_cannot_are_named(text, reason):
    assert read(text).unresolved == reason
    assert read(text).score == 0
    assert reason in REASONS


def test_a_reply_that_ends_at_the_limit_is_named_unless_its_verdict_stands():
    assert read("Let me think about", finish="length").unresolved == "cut_off"
    assert read("[[0.5]] because of", finish="length").score == 0.5


@pytest.mark.parametrize(
    ("text", "letter", "score"),
    [
        ("The option: [[B]].", "B", 1.0),
        ("[[A]] and [[B]]", "A", 0.0),
        ("[A] and [[B]]", "B", 1.0),
        ("only [B]", "B", 1.0),
        ("选项是 [[B]]", "B", 1.0),
    ],
)
def test_letters_that_can_be_read(text, letter, score):
    assert read(text, CHOICE) == Verdict(letter, score)


@pytest.mark.parametrize(
    ("text", "row", "verdict"),
    [
        ("As the passage [1] states, the answer is", FREE, Verdict(None, 0.0, "no_brackets")),
        ("Wrong. Score: 0.0. See [1].", FREE, Verdict(None, 0.0, "no_brackets")),
        ("Footnote [1]: the score is [[0]].", FREE, Verdict("0", 0.0)),
        ("Score: [[0.5]]. To repeat, [[0.50]].", FREE, Verdict("0.50", 0.5)),
        ("[[0]] would be harsh, so [[1]]", FREE, Verdict(None, 0.0, "two_verdicts")),
        ("Between [[0]] and [[5]]", FREE, Verdict(None, 0.0, "two_verdicts")),
        ("[[5]]", FREE, Verdict("5", 0.0, "out_of_range")),
        ("[[05]]", FREE, Verdict(None, 0.0, "malformed_number")),
        ("[A] is not, [[B]] is", CHOICE, Verdict("B", 1.0)),
        ("[[B]], that is [[B]]", CHOICE, Verdict("B", 1.0)),
        ("[[A]] or [[C]]", CHOICE, Verdict(None, 0.0, "two_verdicts")),  # both wrong, and still two
        ("only [B]", CHOICE, Verdict(None, 0.0, "no_brackets")),
    ],
)
def test_strict_reads_one_verdict_in_double_brackets(text, row, verdict):
    assert read(text, row, "strict") == verdict


@pytest.mark.parametrize(
    ("finish", "reason"),
    [("length", "cut_off"), ("content_filter", "not_ended"), ("whatever", "not_ended"), ("stop", None), (None, None)],
)
def test_strict_reads_only_a_reply_that_ended(finish, reason):
    assert read("[[1]] because", profile="strict", finish=finish).unresolved == reason
    assert read("[[1]] because", finish=finish).score == 1


def test_a_reply_of_digits_is_read_in_linear_time():
    many = "8" * 300_000  # squared, that is a quarter of an hour
    assert [read(f"[[{many}", FREE, profile).unresolved for profile in ("faithful", "strict")] == ["no_brackets"] * 2
    assert read(f"[[0{many}.5]]").unresolved == "out_of_range"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "empty"), ("B", "no_brackets"), ("[[b]]", "lower_case"), ("[[0.5]]", "no_brackets"), (HTML, "no_brackets")],
)
def test_letters_that_cannot_are_named(text, reason):
    assert read(text, CHOICE).unresolved == reason


def test_a_letter_past_the_options_is_wrong_upstream_and_unresolved_where_strict():
    assert read("[[D]]", CHOICE) == Verdict("D", 0.0)
    assert read("[[D]]", CHOICE, "strict") == Verdict("D", 0.0, "past_options")


@given(st.text(), st.sampled_from([FREE, CHOICE]), st.sampled_from(["faithful", "strict"]))
def test_any_text_is_a_score_or_a_known_reason(text, row, profile):
    verdict = read(text, row, profile)
    assert 0 <= verdict.score <= 1
    assert verdict.unresolved is None or verdict.unresolved in REASONS


def test_the_request_is_upstreams_or_repeatable():
    assert request_options("faithful", 42) == {"max_tokens": 999, "response_format": {"type": "text"}}
    assert request_options("strict", 7) == request_options("faithful", 7) | {"temperature": 0.0, "seed": 7}


def test_a_temperature_and_a_limit_that_the_recipe_sets_are_the_requests():
    def options(**keys):
        judge = with_profile(ModelConfig(url="http://127.0.0.1:9/v1", model="m", **keys), "strict", 7)
        return judge.temperature, judge.max_tokens, judge.extra

    common = {"response_format": {"type": "text"}, "seed": 7}
    assert options() == (0.0, 999, common)
    thinking = {"max_completion_tokens": 8000}
    assert options(temperature=0.7, max_tokens=None, extra=thinking) == (0.7, None, thinking | common)


# ---- upstream's random scores


def an_item(row: BenchmarkRow, unresolved: str | None = None, score: float = 0.0):
    return make_item(RowAnswer(row, "r"), JudgeResult(Verdict(None, score, unresolved)))


def test_random_scores_are_drawn_as_upstream_draws_and_marked():
    rows = {(row.split, row.row): row for row in (FREE, CHOICE)}
    items = [an_item(FREE, "empty"), an_item(FREE, None, 1.0), an_item(CHOICE, "lower_case"), an_item(FREE, "empty")]
    random.seed(42)
    expected = [round(random.random(), 1), 1.0, float(random.choice("ABC") == "B"), round(random.random(), 1)]
    drawn = with_fallbacks(items, rows, 42)
    assert [item.score for item in drawn] == expected
    assert [item.fallback for item in drawn] == [True, False, True, True]
    assert [item.unresolved for item in drawn] == ["empty", None, "lower_case", "empty"]
    assert with_fallbacks(items, rows, 42) == drawn != with_fallbacks(items, rows, 43)


def test_unanswered_questions_get_no_random_score():
    rows = {(FREE.split, FREE.row): FREE}
    (item,) = with_fallbacks([an_item(FREE, "answer_http_400")], rows, 42)
    assert (item.score, item.fallback) == (0.0, False)


def test_answers_that_the_judge_refuses_get_no_random_score():
    rows = {(row.split, row.row): row for row in (FREE, CHOICE)}
    items = [an_item(row, "judge_http_400") for row in (FREE, CHOICE)]
    assert [item.unanswered for item in items] == [True, True]
    assert with_fallbacks(items, rows, 42) == items


@pytest.mark.parametrize(
    ("reason", "passing"),
    [(f"http_{status}", status not in (400, 403, 413, 422, 451)) for status in (*range(400, 430), 451, 499)]
    + [("unreachable", True), ("generation_failed", True), ("malformed_reply", True), ("prompt_too_long", False)],
)
def test_only_what_a_server_says_about_the_row_itself_is_worth_no_other_run(reason, passing):
    assert is_transient(Dropped("judge", reason, failed=True)) is passing
    assert not is_transient(Dropped("judge", reason))


def test_every_reason_on_the_page_is_given_by_the_code():
    sources = "".join(file.read_text("utf-8") for file in Path(judging.__file__).parents[1].rglob("*.py"))
    assert [reason for reason in REASONS if f'"{reason.rstrip("*")}' not in sources] == [], PAGE
