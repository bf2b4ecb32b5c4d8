"""Contrast numbers that one can count with a pencil."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clair.contrast import contrast_of, word_diff

TEXTS = st.text(alphabet="ab \n.é\U0001f600", max_size=40)


def test_one_word_of_three_changed():
    contrast = contrast_of(chosen="the cat sat", rejected="the dog sat")
    assert contrast.jaccard == 2 / 4  # the, sat of the, cat, dog, sat
    assert contrast.levenshtein == 3  # d>c, o>a, g>t
    assert contrast.kept == 2 / 3
    assert contrast.prefix == 1 / 3
    assert contrast.length_ratio == 1


def test_words_put_in_front_keep_everything_and_leave_no_prefix():
    contrast = contrast_of(chosen="now a b c", rejected="a b c")
    assert contrast == (3 / 4, 4, 1.0, 0.0, 4 / 3)


def test_words_cut_off_at_the_end():
    contrast = contrast_of(chosen="a b", rejected="a b c d")
    assert contrast == (2 / 4, 4, 2 / 4, 1.0, 2 / 4)


def test_order_counts_for_kept_but_not_for_jaccard():
    contrast = contrast_of(chosen="b a", rejected="a b")
    assert contrast.jaccard == 1
    assert contrast.kept == 1 / 2
    assert contrast.prefix == 0


def test_a_word_said_twice_counts_once_for_jaccard_and_twice_for_length():
    contrast = contrast_of(chosen="a a b", rejected="a b")
    assert contrast.jaccard == 1
    assert contrast.length_ratio == 3 / 2
    assert contrast.kept == 1


def test_levenshtein_counts_characters_and_not_bytes():
    assert contrast_of(chosen="\U0001f600", rejected="é").levenshtein == 1


def test_disjoint_answers_share_nothing():
    assert contrast_of(chosen="x y", rejected="a b") == (0, 2, 0, 0, 1)


def test_an_empty_side_gives_numbers_and_no_division_by_zero():
    assert contrast_of(chosen="", rejected="") == (1, 0, 0, 0, 0)
    assert contrast_of(chosen="a b", rejected="") == (0, 3, 0, 0, 2)
    assert contrast_of(chosen="", rejected="a b") == (0, 3, 0, 0, 0)


@given(TEXTS, TEXTS)
def test_every_share_lies_between_0_and_1_and_equal_texts_are_equal(chosen, rejected):
    contrast = contrast_of(chosen, rejected)
    assert all(0 <= share <= 1 for share in (contrast.jaccard, contrast.kept, contrast.prefix))
    assert 0 <= contrast.levenshtein <= max(len(chosen), len(rejected))
    assert (contrast.levenshtein == 0) == (chosen == rejected)
    back = contrast_of(rejected, chosen)
    assert (back.jaccard, back.levenshtein) == (contrast.jaccard, contrast.levenshtein)


@given(TEXTS, TEXTS)
def test_levenshtein_agrees_with_the_textbook_table(chosen, rejected):
    row = list(range(len(chosen) + 1))
    for i, a in enumerate(rejected, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(chosen, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    assert contrast_of(chosen, rejected).levenshtein == row[-1]


def test_a_diff_tells_what_went_and_what_came():
    parts = word_diff(rejected="the dog sat", chosen="the cat sat down")
    assert [(kind, text.strip()) for kind, text in parts] == [
        ("same", "the"),
        ("gone", "dog"),
        ("new", "cat"),
        ("same", "sat"),
        ("new", "down"),
    ]


@given(TEXTS, TEXTS)
def test_a_diff_holds_both_texts_word_by_word(rejected, chosen):
    parts = word_diff(rejected, chosen)
    kept_and_new = "".join(text for kind, text in parts if kind != "gone")
    kept_and_gone = " ".join(text for kind, text in parts if kind != "new")
    assert kept_and_new.split() == chosen.split()
    assert kept_and_gone.split() == rejected.split()
    assert kept_and_new == chosen


@pytest.mark.parametrize("text", ["a\n\n  b\n", "  a b  ", "\n", ""])
def test_the_diff_of_a_text_with_itself_is_the_text(text):
    parts = word_diff(text, text)
    assert "".join(part for _, part in parts) == text
    assert {kind for kind, _ in parts} <= {"same"}
