"""Contrast: measures of the difference between the two answers of a pair, from their texts alone, without a model.

A word is a run of characters without white space. Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without
spaces; there each character is a word, with the marks that belong to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    "\u2e80-\u2fdf\u3001-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han, kana
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff9f"  # full-width punctuation, half-width kana
)
_MARKS = (  # vowels and tones above, below and behind; a consonant under another; variants of a character
    "(?:[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u1038\u103a-\u103e\u1056-\u1059"
    "\u17b4-\u17d1\u17d3\u3099\u309a\uff9e\uff9f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
    "|\u1039[\u1000-\u1021]|\u17d2[\u1780-\u17b3])*"
)
_WORD_REGEX = f"(?:[{_UNSPACED}]{_MARKS}|[^\\s{_UNSPACED}]+)"
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_WORD_PATTERN = re.compile(_WORD_REGEX)
_PIECE_PATTERN = re.compile(rf"\s*{_WORD_REGEX}|\s+$")
_LINE_PATTERN = re.compile(r"\s*\S(?:[^\n]*\S)?|\s+$")
_MAX_DIFF_CELLS = 400_000_000
"""The largest table that a diff may fill, at a bit per cell: 20,000 times 20,000 words take 50 MB."""


class Contrast(NamedTuple):
    """The contrast of a pair.

    jaccard      shared distinct words over all distinct words, 0 to 1
    levenshtein  single-character edits that turn rejected into chosen, a count
    kept         share of rejected's words that chosen keeps in order, 0 to 1 (longest common subsequence)
    prefix       share of chosen's words before the first difference, 0 to 1
    length_ratio words of chosen over words of rejected
    """

    jaccard: float
    levenshtein: int
    kept: float
    prefix: float
    length_ratio: float


def split_words(text: str) -> list[str]:
    """The words of a text in order, without white space."""
    return _WORD_PATTERN.findall(text) if _HAS_UNSPACED.search(text) else text.split()


def split_pieces(text: str) -> list[str]:
    """The words of a text, each with the white space before it. Joined, they are the text."""
    return _PIECE_PATTERN.findall(text)


def shared_tokens(chosen: Sequence[int], rejected: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """Mark the tokens of each answer that belong to the longest common subsequence of both.

    If there are several, it is the one by which rapidfuzz turns rejected into chosen.
    """
    from rapidfuzz.distance import LCSseq

    marks = [False] * len(chosen), [False] * len(rejected)
    for step in LCSseq.opcodes(list(rejected), list(chosen)):
        if step.tag == "equal":
            count = step.src_end - step.src_start
            marks[0][step.dest_start : step.dest_end] = marks[1][step.src_start : step.src_end] = [True] * count
    return marks


def contrast_of(chosen: str, rejected: str) -> Contrast:
    """The contrast of a chosen and a rejected answer. Source of the first two measures: arXiv 2408.06266, section 4."""
    from rapidfuzz.distance import LCSseq, Levenshtein, Prefix

    winner, loser = split_words(chosen), split_words(rejected)
    distinct_winner, distinct_loser = set(winner), set(loser)
    union = len(distinct_winner | distinct_loser)
    return Contrast(
        jaccard=len(distinct_winner & distinct_loser) / union if union else 1.0,
        levenshtein=Levenshtein.distance(rejected, chosen),
        kept=LCSseq.similarity(loser, winner) / len(loser) if loser else 0.0,
        prefix=Prefix.similarity(winner, loser) / len(winner) if winner else 0.0,
        length_ratio=len(winner) / len(loser) if loser else float(len(winner)),
    )


def word_diff(rejected: str, chosen: str) -> list[tuple[str, str]]:
    """The word diff from rejected to chosen: ("same" | "gone" | "new", text) in reading order.

    Between two equal passages, removed text comes before added text. White space is kept. Very long texts are compared
    line by line, or as a whole if they have too many lines as well.
    """
    from rapidfuzz.distance import LCSseq

    old, new = split_pieces(rejected), split_pieces(chosen)
    if len(old) * len(new) > _MAX_DIFF_CELLS:
        old, new = _LINE_PATTERN.findall(rejected), _LINE_PATTERN.findall(chosen)
    if len(old) * len(new) > _MAX_DIFF_CELLS:
        return [("gone", rejected), ("new", chosen)]
    diff: list[tuple[str, str]] = []
    removed = added = ""
    for step in LCSseq.opcodes([w.strip() for w in old], [w.strip() for w in new]):
        if step.tag == "equal":
            diff += [(kind, text) for kind, text in (("gone", removed), ("new", added)) if text]
            diff.append(("same", "".join(new[step.dest_start : step.dest_end])))
            removed = added = ""
        else:
            removed += "".join(old[step.src_start : step.src_end])
            added += "".join(new[step.dest_start : step.dest_end])
    return diff + [(kind, text) for kind, text in (("gone", removed), ("new", added)) if text]
