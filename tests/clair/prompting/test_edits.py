"""Edits: what is not named is copied exactly, and what could be applied in two ways is not applied."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clair.data.records import Revision
from clair.prompting.edits import apply_edits, parse_edits
from clair.prompting.parse import ParseFailure
from clair.prompting.templates import load_template
from tests.growth import growth

ANSWER = "Ada has 37 apples.\nShe gets 45 more.\n\nThe answer is 72."


def block(find: str, replace: str) -> str:
    return f"<<<<<<< FIND\n{find}\n=======\n{replace}\n>>>>>>> REPLACE"


def reply(*blocks: str) -> str:
    return "{teacher_reasoning}:\nwhy\n\n{minimal_edits}:\n" + "\n\n".join(blocks)


def failure(text: str, answer: str = ANSWER, finish_reason: str = "stop") -> str:
    with pytest.raises(ParseFailure) as caught:
        parse_edits(text, finish_reason, answer)
    return caught.value.name


@pytest.mark.parametrize(
    ("blocks", "answer"),
    [
        ([("72", "82")], ANSWER.replace("72", "82")),
        ([("The answer is 72.", "So 82."), ("Ada", "Eve")], "Eve has 37 apples.\nShe gets 45 more.\n\nSo 82."),
        ([("She gets 45 more.\n\nThe", "She gets 45 more. The")], ANSWER.replace("more.\n\nThe", "more. The")),
        ([(" apples", "")], ANSWER.replace(" apples", "")),
        ([("72.", "72.\n\nNo: 82.")], ANSWER + "\n\nNo: 82."),
        ([("37", "45"), ("45", "37")], "Ada has 45 apples.\nShe gets 37 more.\n\nThe answer is 72."),
    ],
)
def test_edits_are_applied_at_once_and_the_rest_is_copied(blocks, answer):
    assert parse_edits(reply(*(block(*b) for b in blocks)), "stop", ANSWER) == Revision("why", answer)


@pytest.mark.parametrize("none", ["none", "None.", "[none]", "**none**", "no edits", "```\nnone\n```"])
def test_no_edits_leave_the_answer_as_it_is(none):
    assert parse_edits(reply(none), "stop", ANSWER).answer == ANSWER


def test_a_fence_around_the_blocks_is_no_part_of_them():
    assert parse_edits(reply("```", block("72", "82"), "```"), "stop", ANSWER).answer == ANSWER.replace("72", "82")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (reply(block("73", "82")), "edit_unmatched"),
        (reply(block("Ada  has", "Eve has")), "edit_unmatched"),
        (reply(block("7", "8")), "edit_ambiguous"),
        (reply(block("is 72", "a"), block("answer is", "b")), "edits_overlap"),
        (reply(block("72", "82"), block("72", "83")), "edits_overlap"),
        (reply("The answer should be 82."), "no_edits"),
        (reply(block("72", "82"), "That is all."), "no_edits"),
        (reply(block("", "82")), "no_edits"),
        (reply("<<<<<<< FIND\n72\n=======\n82"), "no_edits"),
        (reply("<<<<<<< FIND\n72\n<<<<<<< FIND\n72\n=======\n82\n>>>>>>> REPLACE"), "no_edits"),
        (reply("<<<<<<< FIND\n72\n>>>>>>> REPLACE"), "no_edits"),
        (reply("<<<<<<< FIND\n72\n=======\n8\n=======\n2\n>>>>>>> REPLACE"), "no_edits"),
        (reply(), "empty_answer"),
        ("{corrected_student_solution}: 82", "no_label"),
        ("", "empty_reply"),
        ("I'm sorry, but I can't help with that.", "refusal"),
    ],
)
def test_edits_that_cannot_be_applied_with_certainty_are_named(text, name):
    assert failure(text) == name


def test_a_heading_underlined_with_equals_signs_is_never_taken_for_the_middle_of_a_block():
    answer = "Title\n=======\n\nThe answer is 72."
    assert failure(reply(block("Title\n=======\n\nThe", "Name\n=======\n\nThe")), answer) == "no_edits"


def test_a_passage_that_overlaps_itself_stands_more_than_once():
    assert failure(reply(block("haha", "ho")), "hahaha") == "edit_ambiguous"


def test_edits_that_were_cut_off_are_not_applied():
    assert failure(reply(block("72", "82")), finish_reason="length") == "truncated"


# A carriage return beside a line break is read as that line break, so that it alone does not come back.
TEXT = st.characters(codec="utf-8", exclude_characters="\r")


@given(st.text(TEXT, max_size=200), st.data())
def test_any_edit_of_a_passage_that_stands_once_gives_exactly_that_text(answer, data):
    start = data.draw(st.integers(0, len(answer)))
    end = data.draw(st.integers(start, len(answer)))
    replace = data.draw(st.text(TEXT, max_size=20))
    find = answer[start:end]
    expected = answer[:start] + replace + answer[end:]
    with suppress(ParseFailure):
        assert parse_edits(reply(block(find, replace)), "stop", answer).answer == expected


@given(st.lists(st.sampled_from(["one ", "two ", "three\n", "four.", "é"]), min_size=1, max_size=8), st.data())
def test_several_edits_touch_nothing_else(words, data):
    answer = "".join(f"{n}{word}" for n, word in enumerate(words))
    picked = data.draw(st.sets(st.integers(0, len(words) - 1)))
    blocks = [(f"{n}{words[n]}", f"<{n}>") for n in picked]
    expected = "".join(f"<{n}>" if n in picked else f"{n}{word}" for n, word in enumerate(words))
    assert apply_edits(answer, blocks) == expected


@pytest.mark.parametrize(
    "unit", ["<<<<<<< FIND\n", "<<<<<<< FIND\na\n=======\n", "<<<<<<< FIND\na\n=======\nb\n>>>>>>> REPLACE\n"]
)
def test_the_time_grows_linearly_with_the_reply(unit):
    assert growth(lambda text: failure(reply(text)), unit) < 24


@pytest.mark.parametrize(
    "replacement", ["what takes its place", "  What takes its place.  ", "So: what takes its place!"]
)
def test_the_templates_own_example_is_never_applied(replacement):
    template = load_template(None, "reviser_edits.j2", ("task", "answer"))
    assert "what takes its place" in template
    text = reply(block("72", "82"), block("45", replacement))
    with pytest.raises(ParseFailure) as failed:
        parse_edits(text, "stop", ANSWER, template)
    assert failed.value.name == "template_words"
    answer = ANSWER + " This is what takes its place."
    assert parse_edits(text, "stop", answer, template).answer.startswith("Ada has 37")
