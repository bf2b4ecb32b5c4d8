"""Revisions as edits: the reviser names what changes, the program applies it, so that the rest is copied exactly."""

from __future__ import annotations

import re
from itertools import pairwise

from clair.parse import IDENTIFIERS, ParseFailure, two_parts
from clair.records import Revision

_BLOCK = re.compile(
    r"^<{5,9} ?FIND[ \t]*\n(?P<find>.*?)\n?^={5,9}[ \t]*\n(?P<replace>.*?)\n?^>{5,9} ?REPLACE[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_NOTHING = re.compile(r"[\[(*_`]*(?:none|no edits?)[\])*_`]*\.?", re.IGNORECASE)
_FENCE_LINE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})\w*[ \t]*$", re.MULTILINE)


def parse_edits(text: str, finish_reason: str | None, answer: str) -> Revision:
    """The answer with a reply's find/replace blocks applied to it. Raises ParseFailure by name.

    Each text to find must stand in the answer exactly once, and no two may overlap: what could be applied in two
    ways is not applied. A reply of "none" leaves the answer as it is.
    """
    reasoning, part = two_parts("edits", text, finish_reason)
    blocks = [(m["find"], m["replace"]) for m in _BLOCK.finditer(part)]
    rest = _FENCE_LINE.sub("", _BLOCK.sub("", part)).strip()
    if not blocks and _NOTHING.fullmatch(rest):
        return Revision(reasoning, answer)
    if not blocks or rest or not all(find.strip() for find, _ in blocks):
        raise ParseFailure("no_edits", IDENTIFIERS["edits"])
    return Revision(reasoning, apply_edits(answer, blocks))


def apply_edits(answer: str, blocks: list[tuple[str, str]]) -> str:
    """`answer` with every (find, replace) applied at once. Raises ParseFailure where one does not apply just once."""
    places = []
    for find, replace in blocks:
        start = answer.find(find)
        if start < 0:
            raise ParseFailure("edit_unmatched")
        if answer.find(find, start + 1) >= 0:
            raise ParseFailure("edit_ambiguous")
        places.append((start, start + len(find), replace))
    places.sort()
    if any(later[0] < earlier[1] for earlier, later in pairwise(places)):
        raise ParseFailure("edits_overlap")
    pieces, at = [], 0
    for start, end, replace in places:
        pieces += [answer[at:start], replace]
        at = end
    return "".join([*pieces, answer[at:]])
