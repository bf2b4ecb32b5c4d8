"""The pairs that a report shows: their columns, the user's filters, and a sample spread evenly."""

from __future__ import annotations

import math
import operator
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clair.core.errors import UserError, check_name, one_line
from clair.core.files import content_hash
from clair.data.contrast import split_words
from clair.data.records import message_text
from clair.reporting.html_page import json_text

_OPENING = 110
_MIN_OPENING = 40  # bytes of JSON; shorter openings are useless

METRICS = {
    "jaccard": "shared distinct words over all distinct words",
    "levenshtein": "single-character edits from rejected to chosen",
    "kept": "share of rejected's words that chosen keeps in order",
    "prefix": "share of chosen's words before the first difference",
    "length_ratio": "words of chosen over words of rejected",
    "chosen_words": "words of chosen",
    "rejected_words": "words of rejected",
    "more_words": "words of chosen less words of rejected",
}
"""The metrics to sort and filter by, with a description."""


@dataclass
class PairColumns:
    """The columns of all pairs of a dataset. `matching` are the indices of the pairs that match the filters."""

    ids: list[str] = field(default_factory=list)
    test: bytearray = field(default_factory=bytearray)
    openings: list[str] = field(default_factory=list)
    characters: array[int] = field(default_factory=lambda: array("q"))
    numbers: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in METRICS})
    matching: list[int] = field(default_factory=list)

    def add(self, row: Mapping[str, Any], split: str, is_match: Callable[[Mapping[str, Any]], bool]) -> None:
        """Append a pair. `is_match` decides whether it matches the filters."""
        chosen, rejected = (row[side][-1]["content"] for side in ("chosen", "rejected"))
        count = len(split_words(chosen)), len(split_words(rejected))
        values: dict[str, float] = dict(
            zip(("chosen_words", "rejected_words", "more_words"), (*count, count[0] - count[1]), strict=True)
        )
        values |= {
            name: math.nan if value is None else round(value, 4)
            for name, value in (row.get("contrast") or {}).items()
            if name in METRICS
        }
        for name, column in self.numbers.items():
            column.append(values.get(name, math.nan))
        if is_match({**values, "split": split, "id": row["id"], "text": row}):
            self.matching.append(len(self.ids))
        self.ids.append(row["id"])
        self.test.append(split == "test")
        self.openings.append(opening(row["prompt"]))
        self.characters.append(len(chosen) + len(rejected) + sum(len(message_text(turn)) for turn in row["prompt"]))


def opening(messages: Sequence[Mapping[str, str]]) -> str:
    """The first words of the last user turn, on one line; of the last turn if there is no user turn."""
    turns = [m for m in messages if m["role"] == "user"] or list(messages)
    return one_line(message_text(turns[-1])[: 4 * _OPENING], _OPENING) if turns else ""


_FILTER = re.compile(r"\s*(\w+)\s*(<=|>=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
}


def read_filters(filters: Iterable[str]) -> Callable[[Mapping[str, Any]], bool]:
    """A predicate that is true for pairs matching all `filters`.

    A filter is METRIC<NUMBER (or <= > >= =), split=test, id=... or text~words. Raises UserError with what is wrong and
    what is allowed.
    """
    tests = [_test(text) for text in filters]
    return lambda row: all(test(row) for test in tests)


def _test(text: str) -> Callable[[Mapping[str, Any]], bool]:
    match = _FILTER.fullmatch(text)
    if not match:
        raise UserError(f"--filter {text!r}: give NAME, one of < <= > >= = ~, and a value, such as 'jaccard<0.5'")
    name, sign, value = match.groups()
    text_filters = {"split": "=", "id": "=", "text": "~"}
    check_name("--filter: unknown name", name, [*METRICS, *text_filters])
    if name in text_filters:
        if sign != text_filters[name]:
            raise UserError(
                f"--filter {text!r}: {name} takes {text_filters[name]}, such as '{name}{text_filters[name]}{value}'"
            )
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


def stratified_order(rows: PairColumns, among: Sequence[int]) -> list[int]:
    """The indices `among` in an order of which each prefix is spread evenly over contrast and length.

    The strata are tenths of the Jaccard overlap, each by a shorter, similar or longer chosen answer. They take turns,
    so rare strata come early. Within a stratum the hash of the id decides, so the order is the same everywhere.
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


def fit_to_page(rows: PairColumns, free_bytes: int) -> list[int]:
    """The indices of the pairs whose id, numbers and opening fit into `free_bytes` of a page.

    These are all pairs, with shorter openings if necessary. If even that does not fit, they are a stratified sample,
    the pairs that match the filters first.
    """
    columns = rows.numbers.values()
    bare = [_bytes([id, *(compact_number(column[i]) for column in columns)]) for i, id in enumerate(rows.ids)]
    sizes = [_bytes(text) for text in rows.openings]
    max_bytes = max(_MIN_OPENING, (free_bytes - sum(bare)) // max(1, len(bare)))
    if sum(bare) + sum(sizes) > free_bytes:
        rows.openings = [cut(text, max_bytes) for text in rows.openings]
        sizes = [_bytes(text) for text in rows.openings]
    if sum(bare) + sum(sizes) <= free_bytes:
        return list(range(len(bare)))
    others = sorted(set(range(len(bare))) - set(rows.matching))
    listed = []
    for i in [*stratified_order(rows, rows.matching), *stratified_order(rows, others)]:
        free_bytes -= bare[i] + sizes[i]
        if free_bytes < 0:
            break
        listed.append(i)
    return sorted(listed)


def _bytes(value: Any) -> int:
    return len(json_text(value).encode()) + 3


def cut(text: str, max_bytes: int) -> str:
    """The longest prefix of a text that takes at most about `max_bytes` as JSON."""
    while (size := _bytes(text)) > max_bytes and text:
        text = text[: len(text) * max_bytes // size]
    return text


def compact_number(value: float) -> float | int:
    """A whole number as an int, which takes fewer bytes in JSON."""
    return int(value) if value.is_integer() else value
