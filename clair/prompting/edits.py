"""Parse and apply revisions as edits: find/replace blocks that the reviser writes. All other text is copied exactly."""

from __future__ import annotations

import re
from itertools import pairwise

from clair.data.records import Revision, written_like
from clair.prompting.labels import IDENTIFIERS
from clair.prompting.parse import ParseFailure, check_no_template_words, split_reply

_FIND = re.compile(r"<{5,9} ?FIND[ \t]*")
_MIDDLE = re.compile(r"={5,9}[ \t]*")
_END = re.compile(r">{5,9} ?REPLACE[ \t]*")
_NOTHING = re.compile(r"[\[(*_`]*(?:none|no edits?)[\])*_`]*\.?", re.IGNORECASE)
_FENCE_LINE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})\w*[ \t]*$", re.MULTILINE)


def parse_edits(text: str, finish_reason: str | None, answer: str, template: str = "") -> Revision:
    """Apply the find/replace blocks of a reply to the answer. Raises ParseFailure with the name of the problem.

    Each text to find must occur in the answer exactly once, and no two may overlap, so that there is one way to apply
    them. A reply of "none" leaves the answer unchanged. Words of the `template` are no edit.
    """
    reasoning, section = split_reply("edits", text, finish_reason, answer)
    check_no_template_words("edits", section, answer, template)
    blocks, outside = _blocks(section)
    remainder = _FENCE_LINE.sub("", outside).strip()
    if not blocks and _NOTHING.fullmatch(remainder):
        return Revision(reasoning, answer)
    if not blocks or remainder or not all(find.strip() for find, _ in blocks):
        raise ParseFailure("no_edits", IDENTIFIERS["edits"])
    edited = apply_edits(answer.replace("\r\n", "\n"), blocks)  # a reply has the line ends \n
    return Revision(reasoning, written_like(edited, answer) if "\r\n" in answer else edited)


def _blocks(section: str) -> tuple[list[tuple[str, str]], str]:
    """The find/replace blocks of a text, and the text outside of them. Raises ParseFailure.

    A passage may contain a line of equals signs (the underline of a heading). Such a block is ambiguous.
    """
    blocks: list[tuple[str, str]] = []
    outside: list[str] = []
    block: list[list[str]] = []  # the lines to find, then the lines to put in; empty outside of a block
    for line in section.split("\n"):
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
    """`answer` with all (find, replace) applied at once. Raises ParseFailure if a text does not occur exactly once."""
    replacements = []
    for find, replace in blocks:
        start = answer.find(find)
        if start < 0:
            raise ParseFailure("edit_unmatched")
        if answer.find(find, start + 1) >= 0:
            raise ParseFailure("edit_ambiguous")
        replacements.append((start, start + len(find), replace))
    replacements.sort()
    if any(later[0] < earlier[1] for earlier, later in pairwise(replacements)):
        raise ParseFailure("edits_overlap")
    pieces, position = [], 0
    for start, end, replace in replacements:
        pieces += [answer[position:start], replace]
        position = end
    return "".join([*pieces, answer[position:]])
