"""Which pairs the page shows: what it knows of every pair, the filters of a user, and a sample spread evenly."""

from __future__ import annotations

import math
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clair.core.errors import UserError, near_miss, one_line
from clair.core.files import content_hash
from clair.data.contrast import split_words
from clair.data.dataset import CONTRAST
from clair.data.records import message_text
from clair.reporting.html_page import json_text

_OPENING = 110
_LEAST_OPENING = 40  # bytes of JSON; less tells nothing

METRICS = {
    **dict.fromkeys(CONTRAST, ""),
    "jaccard": "shared distinct words over all distinct words",
    "levenshtein": "single-character edits from rejected to chosen",
    "kept": "share of rejected's words that chosen keeps in order",
    "prefix": "share of chosen's words before the first difference",
    "length_ratio": "words of chosen over words of rejected",
    "chosen_words": "words of chosen",
    "rejected_words": "words of rejected",
    "more_words": "words of chosen less words of rejected",
}
"""What can be sorted and filtered by, with what it is."""


@dataclass
class Rows:
    """What the page knows of every pair, a column each; `wanted` are those that a --filter leaves, by position."""

    ids: list[str] = field(default_factory=list)
    test: bytearray = field(default_factory=bytearray)
    openings: list[str] = field(default_factory=list)
    characters: array[int] = field(default_factory=lambda: array("q"))
    numbers: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in METRICS})
    wanted: list[int] = field(default_factory=list)

    def add(self, row: Mapping[str, Any], split: str, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """One more pair."""
        chosen, rejected = (row[side][-1]["content"] for side in ("chosen", "rejected"))
        count = len(split_words(chosen)), len(split_words(rejected))
        values = dict(zip(("chosen_words", "rejected_words", "more_words"), (*count, count[0] - count[1]), strict=True))
        values |= {name: _rounded(value) for name, value in (row.get("contrast") or {}).items() if name in METRICS}
        for name, column in self.numbers.items():
            column.append(values.get(name, math.nan))
        if wanted({**values, "split": split, "id": row["id"], "text": row}):
            self.wanted.append(len(self.ids))
        self.ids.append(row["id"])
        self.test.append(split == "test")
        self.openings.append(opening(row["prompt"]))
        self.characters.append(len(chosen) + len(rejected) + sum(len(message_text(turn)) for turn in row["prompt"]))


def _rounded(value: float | None) -> float:
    return math.nan if value is None else round(value, 4)


def opening(messages: Sequence[Mapping[str, str]]) -> str:
    """The first words of the last user turn, or of the last turn where no user speaks, on one line."""
    turns = [m for m in messages if m["role"] == "user"] or list(messages)
    return one_line(message_text(turns[-1])[: 4 * _OPENING], _OPENING) if turns else ""


_FILTER = re.compile(r"\s*(\w+)\s*(<=|>=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "=": lambda a, b: a == b,
}


def read_filters(filters: Iterable[str]) -> Callable[[Mapping[str, Any]], bool]:
    """A test of one pair that holds where all `filters` do: METRIC<NUMBER (<= > >= =), split=test, id=..., text~words.

    Raises UserError naming what is wrong and what is allowed.
    """
    tests = [_test(text) for text in filters]
    return lambda row: all(test(row) for test in tests)


def _test(text: str) -> Callable[[Mapping[str, Any]], bool]:
    match = _FILTER.fullmatch(text)
    if not match:
        raise UserError(f"--filter {text!r}: give NAME, one of < <= > >= = ~, and a value, such as 'jaccard<0.5'")
    name, sign, value = match.groups()
    named = {"split": "=", "id": "=", "text": "~"}
    if name not in {**METRICS, **named}:
        allowed = [*METRICS, *named]
        raise UserError(f"--filter: unknown name {name!r}{near_miss(name, allowed)}; allowed: {', '.join(allowed)}")
    if name in named:
        if sign != named[name]:
            raise UserError(f"--filter {text!r}: {name} takes {named[name]}, such as '{name}{named[name]}{value}'")
        if name == "text":
            return lambda row: value.casefold() in _searched(row["text"])
        return lambda row: row[name] == value
    try:
        number = float(value)
        compare = _COMPARE[sign]
    except (ValueError, KeyError):
        raise UserError(f"--filter {text!r}: {name} takes < <= > >= = and a number, such as '{name}<0.5'") from None
    return lambda row: compare(row.get(name, math.nan), number)


def _searched(row: Mapping[str, Any]) -> str:
    turns = [message_text(turn) for side in ("prompt", "chosen", "rejected") for turn in row[side]]
    return "\n".join([*turns, row.get("reasoning") or ""]).casefold()


def stratified_order(rows: Rows, among: Sequence[int]) -> list[int]:
    """`among` in an order whose every beginning is spread evenly over contrast and length.

    Strata are the tenths of Jaccard overlap, each by shorter, alike and longer winner; they take turns, and inside
    of one the hash of the id decides, so that the order is the same on every machine. Rare kinds come early.
    """
    strata: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in among:
        jaccard, ratio = rows.numbers["jaccard"][i], rows.numbers["length_ratio"][i]
        tenth = -1 if math.isnan(jaccard) else min(int(jaccard * 10), 9)
        strata[tenth, (ratio > 0.95) + (ratio > 1.05)].append(i)
    turns = []
    for name, members in sorted(strata.items()):
        members.sort(key=lambda i: (content_hash(rows.ids[i]), i))
        turns += [(turn, name, i) for turn, i in enumerate(members)]
    return [i for _, _, i in sorted(turns)]


def fit(rows: Rows, room: int) -> list[int]:
    """The pairs that fit into `room` bytes of a page with their id, numbers and opening, by position.

    All, with shorter openings where need be; where not even that fits, a spread sample, the wanted ones first.
    """
    columns = rows.numbers.values()
    bare = [_bytes([id, *(short(column[i]) for column in columns)]) for i, id in enumerate(rows.ids)]
    sizes = [_bytes(text) for text in rows.openings]
    most = max(_LEAST_OPENING, (room - sum(bare)) // max(1, len(bare)))
    if sum(bare) + sum(sizes) > room:
        rows.openings = [cut(text, most) for text in rows.openings]
        sizes = [_bytes(text) for text in rows.openings]
    if sum(bare) + sum(sizes) <= room:
        return list(range(len(bare)))
    others = sorted(set(range(len(bare))) - set(rows.wanted))
    listed = []
    for i in [*stratified_order(rows, rows.wanted), *stratified_order(rows, others)]:
        room -= bare[i] + sizes[i]
        if room < 0:
            break
        listed.append(i)
    return sorted(listed)


def _bytes(value: Any) -> int:
    return len(json_text(value).encode()) + 3


def cut(text: str, most: int) -> str:
    """The beginning of a text that takes at most about `most` bytes as JSON."""
    while (size := _bytes(text)) > most and text:
        text = text[: len(text) * most // size]
    return text


def short(value: float) -> float | int:
    """A whole number without its fraction, which takes fewer bytes."""
    return int(value) if value.is_integer() else value
