"""The benchmark's rule parser, for scoring without a judge: written from its description, not from its code.

It reads much less well than a judge, and its scores are lower: compare them only with each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

_STRIPPED = ",.!?;:'"
_LETTER_FORMS = (
    *(f"{before}{{}}{after}" for before in (" ", "\n") for after in (" ", "\n", ". ", ".\n")),
    *("({})", "**{} ", " {}**", "**{}. ", " {}.**"),
)
_WORDS_BEFORE_OPTION_TEXTS = 5
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_OUR_NUMBERS = (re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[+-]?\d+)?|-?\.\d+(?:e[+-]?\d+)?"),)
_BENCHMARKS_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?e[+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+(?:\.\d+|(?!\w))|\.\d+)(?!\d|,|e[+-]?\d)"),
)
"""Numbers as the benchmark finds them: none in "5kg" and "10th", and 1234 and 234.5 in "1,234.50"."""


def chosen_letter(response: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a response chooses, or None where it names none.

    The earliest hit of a letter in one of 13 forms; without any, and with more than five words, the earliest hit of
    an option's text.
    """
    for mark in _STRIPPED:
        response = response.strip(mark)
    padded = f" {response} "
    letters = [chr(ord("A") + n) for n in range(len(options))]
    hits = [(place, name) for name in letters for form in _LETTER_FORMS for place in _places(form.format(name), padded)]
    if not hits and len(padded.split()) > _WORDS_BEFORE_OPTION_TEXTS:
        lower = padded.lower()
        hits = [(p, name) for name, text in zip(letters, options, strict=True) for p in _places(text.lower(), lower)]
    return min(hits, key=lambda hit: hit[0])[1] if hits else None


def _places(part: str, text: str) -> Iterator[int]:
    place = text.find(part)
    while part and place >= 0:
        yield place
        place = text.find(part, place + 1)


def is_right(response: str, answers: Sequence[str], *, faithful: bool = False) -> bool:
    """Whether a free-form response gives one of the golden answers: contains its text, or equals its number.

    Only what follows the last cue word ("is ", "answer " ...) of each line counts, or all of it where there is none.
    An empty golden answer is in every text, so it counts for nothing. `faithful`: numbers are found where the benchmark
    finds them, which misses "5kg"; else wherever they stand.
    """
    numbers = _BENCHMARKS_NUMBERS if faithful else _OUR_NUMBERS
    said = _said(response)
    parts = [part for text in said for part in (text, *(n for pattern in numbers for n in pattern.findall(text)))]
    found = {value for part in parts for value in _normalised(part)}
    gold = {value for answer in answers if answer.strip() for value in _normalised(answer)}
    texts = [value for value in found if isinstance(value, str)]
    return any(answer in text for answer in gold if isinstance(answer, str) for text in texts) or not gold.isdisjoint(
        value for value in found if isinstance(value, float)
    )


def _said(response: str) -> list[str]:
    """What of a response is taken for its answers: of each line, the shortest text after a cue."""
    whole = response.strip().strip(".").lower()
    lines = whole.split("\n")
    said = []
    for number, line in enumerate(lines):
        cues = (*_CUES, "=") if number == len(lines) - 1 else _CUES
        tails = [tail for cue in cues if cue in line and (tail := line.rpartition(cue)[2].strip())]
        shortest = min(tails, key=len, default="")
        if shortest and shortest not in _STRIPPED:
            said.append(shortest)
    return said or [whole]


def _normalised(text: str) -> list[str | float]:
    """A number rounded to 2 decimals, or the text in lower case; a single character needs a space beside it."""
    text = text.strip().lower()
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return [round(number, 2)]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
