"""The benchmark's rule parser, which scores without a judge; written from its description, not from its code.

It misses more right answers than a judge, so its scores are lower: compare them only with each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

_PUNCTUATION = ",.!?;:'"
_LETTER_FORMS = (
    *(f"{prefix}{{}}{suffix}" for prefix in (" ", "\n") for suffix in (" ", "\n", ". ", ".\n")),
    *("({})", "**{} ", " {}**", "**{}. ", " {}.**"),
)
_MAX_WORDS_BY_LETTER = 5
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_LENIENT_NUMBERS = (re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[+-]?\d+)?|-?\.\d+(?:e[+-]?\d+)?"),)
_BENCHMARK_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?e[+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+(?:\.\d+|(?!\w))|\.\d+)(?!\d|,|e[+-]?\d)"),
)
"""Numbers as the benchmark matches them: none in "5kg" and "10th", and 1234 and 234.5 in "1,234.50"."""


def chosen_letter(response: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a response chooses, or None.

    It is the first match of a letter in one of 13 forms. If there is none and the response has more than five words,
    it is the first match of an option's text.
    """
    for mark in _PUNCTUATION:
        response = response.strip(mark)
    padded = f" {response} "
    letters = [chr(ord("A") + n) for n in range(len(options))]
    hits = [
        (index, name) for name in letters for form in _LETTER_FORMS for index in _occurrences(form.format(name), padded)
    ]
    if not hits and len(padded.split()) > _MAX_WORDS_BY_LETTER:
        lower = padded.lower()
        hits = [
            (index, name)
            for name, text in zip(letters, options, strict=True)
            for index in _occurrences(text.lower(), lower)
        ]
    return min(hits, key=lambda hit: hit[0])[1] if hits else None


def _occurrences(term: str, text: str) -> Iterator[int]:
    index = text.find(term)
    while term and index >= 0:
        yield index
        index = text.find(term, index + 1)


def is_right(response: str, answers: Sequence[str], *, faithful: bool = False) -> bool:
    """True if a free-form response gives one of the gold answers: it contains its text or has its number.

    Only the text after the last cue word ("is ", "answer " ...) of each line counts, or the whole response if no line
    has one. Empty gold answers are ignored, since every text contains them. With `faithful`, numbers are matched as by
    the benchmark, which misses "5kg"; otherwise everywhere.
    """
    numbers = _BENCHMARK_NUMBERS if faithful else _LENIENT_NUMBERS
    texts = _answer_texts(response)
    candidates = [
        candidate for text in texts for candidate in (text, *(n for pattern in numbers for n in pattern.findall(text)))
    ]
    values = {value for candidate in candidates for value in _normalised(candidate)}
    gold = {value for answer in answers if answer.strip() for value in _normalised(answer)}
    strings = [value for value in values if isinstance(value, str)]
    return any(answer in text for answer in gold if isinstance(answer, str) for text in strings) or not gold.isdisjoint(
        value for value in values if isinstance(value, float)
    )


def _answer_texts(response: str) -> list[str]:
    """The possible answers in a response: the shortest text after a cue of each line."""
    stripped = response.strip().strip(".").lower()
    lines = stripped.split("\n")
    answers = []
    for number, line in enumerate(lines):
        cues = (*_CUES, "=") if number == len(lines) - 1 else _CUES
        tails = [tail for cue in cues if cue in line and (tail := line.rpartition(cue)[2].strip())]
        shortest = min(tails, key=len, default="")
        if shortest and shortest not in _PUNCTUATION:
            answers.append(shortest)
    return answers or [stripped]


def _normalised(text: str) -> list[str | float]:
    """A number rounded to 2 decimals, or the text in lower case; a single character must have a space beside it."""
    text = text.strip().lower()
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return [round(number, 2)]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
