"""Contrast numbers that one can count with a pencil."""

from __future__ import annotations

import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clair.data import contrast
from clair.data.contrast import contrast_of, split_pieces, split_words, word_diff

TEXTS = st.text(alphabet="ab \n.é\U0001f600光合を\u3000\u0e01\u0e31", max_size=40)


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


def test_a_diff_shows_removed_and_added_words():
    diff = word_diff(rejected="the dog sat", chosen="the cat sat down")
    assert [(kind, text.strip()) for kind, text in diff] == [
        ("same", "the"),
        ("gone", "dog"),
        ("new", "cat"),
        ("same", "sat"),
        ("new", "down"),
    ]


@given(TEXTS, TEXTS)
def test_a_diff_holds_both_texts_word_by_word(rejected, chosen):
    diff = word_diff(rejected, chosen)
    new_text = "".join(text for kind, text in diff if kind != "gone")
    old_text = " ".join(text for kind, text in diff if kind != "new")
    assert split_words(old_text) == split_words(rejected)
    assert new_text == chosen


@pytest.mark.parametrize("text", ["a\n\n  b\n", "  a b  ", "\n", ""])
def test_the_diff_of_a_text_with_itself_is_the_text(text):
    diff = word_diff(text, text)
    assert "".join(piece for _, piece in diff) == text
    assert {kind for kind, _ in diff} <= {"same"}


# ---- scripts without spaces


@pytest.mark.parametrize(
    ("rejected", "chosen", "gone", "new"),
    [
        ("光合作用是植物吃土的过程。", "光合作用是植物用光的过程。", ["吃土"], ["用光"]),
        ("猫は床にいます", "猫は机の上にいます", ["床"], ["机の上"]),
        ("ﾃｽﾄは悪い", "ﾃｽﾄは良い", ["悪"], ["良"]),
        ("แมวกินปลา", "แมวกินไก่", ["ปลา"], ["ไก่"]),
        ("ກິນເຂົ້າ", "ກິນໄກ່", ["ເຂົ້າ"], ["ໄກ່"]),
        ("Use Python 用于数据分析。", "Use Python 用于数据科学。", ["分析"], ["科学"]),
    ],
)
def test_scripts_without_spaces_are_compared_by_character(rejected, chosen, gone, new):
    diff = word_diff(rejected, chosen)
    assert [text.strip() for kind, text in diff if kind == "gone"] == gone
    assert [text.strip() for kind, text in diff if kind == "new"] == new
    assert 0 < contrast_of(chosen, rejected).kept < 1


def test_contrast_of_chinese_by_hand():
    contrast = contrast_of(chosen="植物用光。", rejected="植物吃土。")
    assert contrast == (3 / 7, 2, 3 / 5, 2 / 5, 1)  # 植 物 。 of 植 物 吃 土 用 光 。


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("don't stop", ["don't", "stop"]),
        ("光合作用", list("光合作用")),
        ("第1章、GPT-4です。", ["第", "1", "章", "、", "GPT-4", "で", "す", "。"]),
        ("全角\u3000空白", ["全", "角", "空", "白"]),
        ("กี่ครั้ง", ["กี่", "ค", "รั้", "ง"]),  # marks stay with their consonant
        ("ខ្មែរ", ["ខ្មែ", "រ"]),  # and so does a consonant below
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("か\u3099く", ["か\u3099", "く"]),
        ("葛\U000e0100城", ["葛\U000e0100", "城"]),
        ("한국어 문장", ["한국어", "문장"]),  # Korean has spaces
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
    ],
)
def test_a_word_is_what_spaces_separate_or_a_character_where_there_are_none(text, split):
    assert split_words(text) == split


@given(TEXTS)
def test_pieces_put_together_are_the_text_and_hold_its_words(text):
    assert "".join(split_pieces(text)) == text
    assert [piece.strip() for piece in split_pieces(text) if piece.strip()] == split_words(text)


# ---- very long texts


def test_texts_of_very_many_words_are_compared_by_lines_and_beyond_that_as_wholes(monkeypatch):
    rejected, chosen = "a b\n\nc d \ne f", "a b\n\nc x \ne f"
    monkeypatch.setattr(contrast, "_MAX_DIFF_CELLS", 35)
    diff = word_diff(rejected, chosen)
    assert diff == [("same", "a b"), ("gone", "\n\nc d"), ("new", "\n\nc x"), ("same", " \ne f")]
    monkeypatch.setattr(contrast, "_MAX_DIFF_CELLS", 8)
    assert word_diff(rejected, chosen) == [("gone", rejected), ("new", chosen)]


def test_a_diff_of_a_hundred_thousand_characters_without_spaces_fills_no_gigabyte():
    lines = ["".join(chr(0x4E00 + (n * m) % 5000) for m in range(100)) for n in range(1, 1001)]
    changed = [*lines[:500], "全新的一行", *lines[501:]]
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    diff = word_diff("\n".join(lines), "\n".join(changed))
    assert [text.strip() for kind, text in diff if kind == "new"] == ["全新的一行"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 200_000  # kilobytes
