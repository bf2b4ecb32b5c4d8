"""Every filter by hand, on both sides of its line; and the two recorded replies that allude to a correction."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clair.core.errors import UserError
from clair.data.contrast import contrast_of
from clair.data.records import Pair
from clair.pipeline.filters import (
    _ALLUSION,
    _ALLUSION_KEYWORDS,
    _COMMENT,
    _COMMENT_KEYWORDS,
    FILTERS,
    OFF,
    _search,
    first_drop_reason,
    make_filters,
)
from clair.prompting.parse import parse_revision

CODE = "Here:\n```python\nx = 1\n```\ndone"
LONG = "A sentence that goes on. " * 20


def pair(chosen: str, rejected: str, prompt: str = "What is 37 + 45?", system: str | None = None) -> Pair:
    messages = [{"role": "system", "content": system}] if system else []
    contrast = contrast_of(chosen, rejected)._asdict()
    return Pair("p", (*messages, {"role": "user", "content": prompt}), chosen, rejected, contrast=contrast)


def drops(name: str, subject: Pair, **options: float) -> bool:
    return FILTERS[name](subject, **options) is not None


def recorded(shared) -> list[tuple[str, Pair]]:
    lines = (shared / "data/clair_gpt4/replies.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(r["id"], pair(parse_revision(r["reply"]).answer, r["rejected"], r["prompt"])) for r in rows]


def test_exactly_the_two_recorded_replies_that_allude_to_a_correction_are_flagged(shared):
    by_id = recorded(shared)
    assert len(by_id) == 12
    assert [id for id, p in by_id if drops("allusion", p)] == ["uf-00", "uf-09"]


def test_no_filter_that_is_on_drops_another_recorded_pair(shared):
    dropped = {id: reason[0] for id, p in recorded(shared) if (reason := first_drop_reason(p, make_filters({})))}
    assert dropped == {"uf-00": "allusion", "uf-09": "allusion"}


@pytest.mark.parametrize(
    ("name", "chosen", "rejected", "dropped"),
    [
        ("empty", "", "a", True),
        ("empty", " \n", "a", True),
        ("empty", "a", "\t", True),
        ("empty", "a", "b", False),
        ("identical", "The answer is 82.", "The answer\nis  82. ", True),
        ("identical", "The answer is 82.", "The answer is 72.", False),
        ("identical", "The Answer", "the answer", False),
        ("refusal", "I'm sorry, but I can't help.", "Sure: 72", True),
        ("refusal", "I'm sorry, but I can't help.", "I cannot help.", False),
        ("refusal", "Sure: 82", "I cannot help.", False),
        ("allusion", "In this corrected solution, 82.", "72", True),
        ("allusion", "Here is the revised text: 82", "72", True),
        ("allusion", "Here's an improved version: 82", "72", True),
        ("allusion", "Unlike the student's solution, 82", "72", True),
        ("allusion", "The original answer forgot the carry: 82", "72", True),
        ("allusion", "The enhanced code runs faster.", "The code runs.", False),
        ("allusion", "He corrected the compass.", "He corrected the map.", False),
        ("allusion", "The answer is 82.", "The corrected answer is 72.", False),
        ("comment", "The task asks for a sum: 82", "72", True),
        ("comment", "82. No changes were needed.", "72", True),
        ("comment", "The task asks for a sum: 82", "This task asks for a sum: 72", False),
        ("comment", "The task is done: 82", "72", False),
        ("fence", "Here:\nx = 1\ndone", CODE, True),
        ("fence", CODE.replace("1", "2"), CODE, False),
        ("fence", "Here:\n```python\nx = 1\ndone", "x = 1", True),
        ("fence", CODE, "x = 1", False),
        ("fence", "~~~\nx\n~~~", CODE, False),
        ("language", "Это довольно длинный ответ на вопрос.", "This is a rather long answer.", True),
        ("language", "This is a rather long answer.", "Das ist eine ziemlich lange Antwort, größer.", False),
        ("language", "Да", "This is a rather long answer.", False),
        ("language", "かんじよりかなのほうがおおいながいこたえ。", "東京大阪京都福岡札幌仙台広島神戸横浜奈", False),
        ("language", "12345 67890 12345 67890 12345", "This is a rather long answer.", False),
        ("cut_off", "x", "```python\nx = 1", True),
        ("cut_off", "x", CODE, False),
        ("cut_off", "x", LONG + "And this last sentence, which is rather long, ends in the middle of", True),
        ("cut_off", "x", LONG + "And this last sentence, which is rather long, ends as it should.", False),
        ("cut_off", "x", "A short answer that ends without a full stop", False),
        ("cut_off", "x", LONG + "\n- a list item", False),
        ("length", "a " * 51, "b " * 10, True),
        ("length", "a " * 50, "b " * 10, False),
        ("length", "a", "b " * 6, True),
        ("length", "a", "b " * 5, False),
        ("kept", "x y z", "a b c", True),
        ("kept", "a y z", "a b c", False),
    ],
)
def test_a_filter_drops_what_it_says_and_nothing_else(name, chosen, rejected, dropped):
    assert drops(name, pair(chosen, rejected)) is dropped


@pytest.mark.parametrize(("pattern", "words"), [(_ALLUSION, _ALLUSION_KEYWORDS), (_COMMENT, _COMMENT_KEYWORDS)])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_text_that_a_pattern_matches_is_left_out_for_its_words(pattern, words, data):
    text = data.draw(st.from_regex(pattern))
    assert _search(pattern, words, text).span() == pattern.search(text).span()


@pytest.mark.parametrize(
    "prompt",
    ["Correct the grammar: he go.", "Please fix my code.", "Proofread this text.", "Act as a teacher of this student."],
)
def test_a_task_that_asks_for_a_correction_may_be_answered_with_one(prompt):
    corrected = pair("Here is the corrected version: he goes.", "he goed", prompt)
    assert not drops("allusion", corrected)
    assert drops("allusion", pair(corrected.chosen, corrected.rejected, "How is he?"))


def test_the_system_prompt_may_ask_for_a_correction_too():
    assert not drops("allusion", pair("The corrected text: he goes.", "he goed", "he go", "You correct the grammar."))


def test_every_filter_is_tested_here():
    names = "empty identical refusal allusion comment fence language cut_off length kept gap"
    assert set(names.split()) == set(FILTERS)
    assert all(function.__doc__ for function in FILTERS.values())


# ---- what a recipe says about them


def test_all_filters_but_those_off_are_asked_in_their_order():
    assert [name for name, _ in make_filters({})] == [name for name in FILTERS if name not in OFF]


def test_a_filter_is_turned_off_and_on_by_name():
    names = [name for name, _ in make_filters({"allusion": False, "kept": True})]
    assert "allusion" not in names
    assert "kept" in names


def test_options_move_the_line():
    example = pair("a " * 30, "b " * 10)
    assert first_drop_reason(example, make_filters({})) is None
    assert first_drop_reason(example, make_filters({"length": {"most": 2}}))[0] == "length"


def test_the_first_filter_that_drops_gives_the_reason():
    assert first_drop_reason(pair("", ""), make_filters({})) == ("empty", "the chosen answer is empty")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"alusion": False}, "unknown filter 'alusion' (did you mean 'allusion'?); allowed: empty"),
        ({"length": {"mots": 2}}, "filter length: unknown option 'mots' (did you mean 'most'?); allowed: least, most"),
        ({"length": {"most": "2"}}, "filter length: most is '2', not a number"),
        ({"length": {"most": True}}, "filter length: most is True, not a number"),
        ({"empty": {"most": 2}}, "filter empty: unknown option 'most'; allowed: none"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, reason):
    with pytest.raises(UserError) as error:
        make_filters(settings)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gap_is_kept_strictly_above_its_bound_and_a_pair_without_scores_is_dropped():
    tied = Pair("p", (), "a", "b", scores=(5.0, 3.0))
    assert FILTERS["gap"](tied, above=2.0) == "score gap 2"
    assert FILTERS["gap"](tied, above=1.5) is None
    assert FILTERS["gap"](Pair("p", (), "a", "b")) == "the pair has no scores"
    assert "gap" not in [name for name, _ in make_filters({})]


@pytest.mark.parametrize("name", list(FILTERS))
@pytest.mark.parametrize(("chosen", "rejected"), [("", ""), ("\ud83d\x00", "x"), ("a" * 100_000, "\u202eb" * 50_000)])
def test_no_filter_fails_on_strange_text(name, chosen, rejected):
    FILTERS[name](Pair("p", (), chosen, rejected, contrast={"length_ratio": 1.0, "kept": 0.5}))
