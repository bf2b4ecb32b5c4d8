"""Revisions as edits: the reviser names what changes, the program applies it, so that the rest is copied exactly."""

from __future__ import annotations

import re
from itertools import pairwise

from clair.data.records import Revision, written_like
from clair.prompting.parse import IDENTIFIERS, ParseFailure, check_own_words, two_parts

_FIND = re.compile(r"<{5,9} ?FIND[ \t]*")
_MIDDLE = re.compile(r"={5,9}[ \t]*")
_END = re.compile(r">{5,9} ?REPLACE[ \t]*")
_NOTHING = re.compile(r"[\[(*_`]*(?:none|no edits?)[\])*_`]*\.?", re.IGNORECASE)
_FENCE_LINE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})\w*[ \t]*$", re.MULTILINE)


def parse_edits(text: str, finish_reason: str | None, answer: str, template: str = "") -> Revision:
    """The answer with a reply's find/replace blocks applied to it. Raises ParseFailure by name.

    Each text to find must stand in the answer exactly once, and no two may overlap: what could be applied in two
    ways is not applied. A reply of "none" leaves the answer as it is. Words of the `template` are no edit.
    """
    reasoning, part = two_parts("edits", text, finish_reason, answer)
    check_own_words("edits", part, answer, template)
    blocks, outside = _blocks(part)
    rest = _FENCE_LINE.sub("", outside).strip()
    if not blocks and _NOTHING.fullmatch(rest):
        return Revision(reasoning, answer)
    if not blocks or rest or not all(find.strip() for find, _ in blocks):
        raise ParseFailure("no_edits", IDENTIFIERS["edits"])
    return Revision(reasoning, _applied(answer, blocks))


def _applied(answer: str, blocks: list[tuple[str, str]]) -> str:
    """The edited answer. Replies have the line ends `\\n`; the answer keeps its own."""
    if "\r\n" not in answer:
        return apply_edits(answer, blocks)
    return written_like(apply_edits(answer.replace("\r\n", "\n"), blocks), answer)


def _blocks(part: str) -> tuple[list[tuple[str, str]], str]:
    """The find/replace blocks of a text, and what stands outside of them. Raises ParseFailure.

    A passage may hold a line of equals signs itself (a heading's underline): such a block can be read in two ways.
    """
    blocks: list[tuple[str, str]] = []
    outside: list[str] = []
    block: list[list[str]] = []  # the lines to find, then the lines to put in; empty outside of a block
    for line in part.split("\n"):
        if not block:
            if _FIND.fullmatch(line):
                block = [[]]
            else:
                outside.append(line)
        elif _FIND.fullmatch(line) or (_MIDDLE.fullmatch(line) and len(block) == 2):
            raise ParseFailure("no_edits", IDENTIFIERS["edits"])
        elif _MIDDLE.fullmatch(line):
            block.append([])
        elif _END.fullmatch(line) and len(block) == 2:
            blocks.append(("\n".join(block[0]), "\n".join(block[1])))
            block = []
        else:
            block[-1].append(line)
    if block:
        raise ParseFailure("no_edits", IDENTIFIERS["edits"])
    return blocks, "\n".join(outside)


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
