"""A reply in; the revision, or a named failure, out. Never wrong text.

A reviser is asked for its reasoning under `{teacher_reasoning}` and the answer under `{corrected_student_solution}`.
Real replies vary: with and without a colon, bold, as headings, with other case or spelling, everything in a code
fence, the label mentioned inside the reasoning. The rule that keeps wrong text out: a label counts only where it
stands at the start of a line, outside of code fences, and is followed by a colon or by the end of the line; text
straight after it is taken only where both identifiers open a paragraph in just that way and are named nowhere else.
Anything that can be read in two ways is a failure with a name, worth a second call, because a wrong winner costs more.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from clair.records import Revision

FAILURES = {
    "empty_reply": "the reply has no text",
    "truncated": "the reply was cut off before its end",
    "refusal": "the reviser refused",
    "no_label": "the reply has no {corrected_student_solution} at the start of a line",
    "label_twice": "the reply has {corrected_student_solution} at the start of more than one line",
    "label_inline": "{corrected_student_solution} stands inside a line, so it may be a mention",
    "label_in_fence": "{corrected_student_solution} stands inside a code fence",
    "labels_out_of_order": "{teacher_reasoning} comes after {corrected_student_solution}",
    "wrong_label": "the reply gives a worsened solution, not a corrected one",
    "empty_answer": "nothing follows {corrected_student_solution}",
    "label_in_answer": "an identifier stands inside the corrected solution",
}
"""Every failure by name, with what it says to a person (and to the reviser, when it is asked once more)."""


class ParseFailure(Exception):
    """A reply that cannot be read with certainty; `name` is a key of FAILURES."""

    def __init__(self, name: str) -> None:
        super().__init__(FAILURES[name])
        self.name = name


class _Label(NamedTuple):
    kind: str
    start: int
    end: int


# Words of a label, joined by underscores, spaces or hyphens, in any case; some misspellings were seen. Prose begins
# lines with "Correct answer:", so outside of braces the word "student" must be there.
_SEP = r"[ _\-]{0,3}"
_STUDENT = rf"(?:student|studnet)(?:'?s)?{_SEP}"
_CORRECTED = rf"(?:corrected|correct|correctd|corected|correted){_SEP}"
_ANSWER = r"(?:solution|soultion|soluton|answer|response)"
_KINDS = {
    "reasoning": rf"teacher(?:'?s)?{_SEP}(?:reasoning|reasoing|resoning|reasonning)",
    "solution": rf"(?:{_CORRECTED}{_STUDENT}{_ANSWER}|(?<=\{{){_CORRECTED}{_ANSWER}(?=\}}))",
    "worsened": rf"worsened?{_SEP}(?:{_STUDENT})?{_ANSWER}",
}
_DECORATION = r"(?:\#{1,6}[ \t]*)?(?:>[ \t]*)?(?:\d[.)][ \t]*)?"
_LABELS = {
    kind: re.compile(
        # At the start of a line: decoration, the words in braces or bare, then a colon or the end of the line.
        rf"^[ \t]*{_DECORATION}[*_`]{{0,3}}[{{\[<]{{0,2}}(?:{words})[}}\]>]{{0,2}}"
        r"(?:[ \t]*[:：][ \t]*[*_`]{0,3}|[ \t]*[*_`]{1,3}[ \t]*[:：]|[ \t]*[*_`]{0,3}[ \t]*$)",
        re.IGNORECASE | re.MULTILINE,
    )
    for kind, words in _KINDS.items()
}
_MENTION = re.compile(r"(?:corrected_student_solution|teacher_reasoning)", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})(.*)$", re.MULTILINE)
_REFUSAL = re.compile(
    r"\s*(?:i(?:'|’)?m (?:really |very |so )?(?:sorry|afraid)|(?:i )?apologi[sz]e|sorry[,.]|i (?:can(?:not|'t|’t)|"
    r"am (?:unable|not able)|won(?:'|’)t|must decline)|as an ai\b|unfortunately,? i (?:can|am))",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Whether a text begins as a refusal does ("I'm sorry, but ...", "I cannot ...")."""
    return bool(_REFUSAL.match(text))


def parse_revision(text: str, finish_reason: str | None = "stop") -> Revision:
    """The reasoning and the revised answer of a reviser's reply. Raises ParseFailure with the name of what is wrong.

    `finish_reason` is the server's; a reply that ran into its token limit is never taken, however whole it looks.
    """
    if finish_reason == "length":
        raise ParseFailure("truncated")
    body = _without_outer_fence(text.replace("\r\n", "\n").strip())
    if not body:
        raise ParseFailure("empty_reply")
    fences = _fenced_spans(body)
    found = sorted(
        (label for kind in _KINDS for label in _labels(kind, body)), key=lambda label: (label.start, -label.end)
    )
    outside = [label for label in found if not _inside(label.start, fences)]
    solutions = [label for label in outside if label.kind == "solution"]
    if not solutions and (both := _without_colons(body, fences)):
        outside, solutions = both, both[1:]
    if len(solutions) != 1:
        raise ParseFailure(_why_not_one(body, found, outside, solutions))
    (solution,) = solutions
    if any(label.kind != "solution" and label.start > solution.start for label in outside):
        raise ParseFailure("labels_out_of_order")
    answer = body[solution.end :].strip()
    if not answer:
        raise ParseFailure("empty_answer")
    if _MENTION.search(answer):
        raise ParseFailure("label_in_answer")
    first = next((label for label in outside if label.kind == "reasoning"), None)
    return Revision(reasoning=body[first.end if first else 0 : solution.start].strip(), answer=answer)


def _labels(kind: str, body: str) -> list[_Label]:
    return [_Label(kind, match.start(), match.end()) for match in _LABELS[kind].finditer(body)]


_BARE = re.compile(
    r"(?:\A|\n[ \t]*\n)[ \t]*\{(teacher_reasoning|corrected_student_solution)\}[ \t]+(?=\S)", re.IGNORECASE
)


def _without_colons(body: str, fences: list[tuple[int, int]]) -> list[_Label]:
    """Both identifiers in braces with text straight after them, each named once in the whole reply; else nothing."""
    found = [m for m in _BARE.finditer(body) if not _inside(m.start(1), fences)]
    if [m[1].lower() for m in found] != ["teacher_reasoning", "corrected_student_solution"]:
        return []
    if len(_MENTION.findall(body)) != 2:
        return []
    return [_Label(kind, m.start(), m.end()) for kind, m in zip(("reasoning", "solution"), found, strict=True)]


def _why_not_one(body: str, found: list[_Label], outside: list[_Label], solutions: list[_Label]) -> str:
    if solutions:
        return "label_twice"
    if any(label.kind == "worsened" for label in outside):
        return "wrong_label"
    if any(label.kind == "solution" for label in found):
        return "label_in_fence"
    if _MENTION.search(body):
        return "label_inline"
    return "refusal" if is_refusal(body) else "no_label"


def _without_outer_fence(body: str) -> str:
    """The inside of a reply that is wrapped whole in one code fence; any other reply as it is."""
    lines = body.split("\n")
    opening = _FENCE.match(lines[0])
    if not opening or len(lines) < 3 or lines[-1].strip() != opening[1]:
        return body
    inside = "\n".join(lines[1:-1])
    # Where the fences inside do not pair up, the first and the last fence belong to different blocks.
    return inside.strip() if len(_FENCE.findall(inside)) % 2 == 0 and _labels("solution", inside) else body


def _fenced_spans(body: str) -> list[tuple[int, int]]:
    """Where code fences begin and end; one that is never closed runs to the end of the text."""
    spans: list[tuple[int, int]] = []
    fence, start = "", 0
    for match in _FENCE.finditer(body):
        if not fence:
            fence, start = match[1], match.start()
        elif match[1][0] == fence[0] and len(match[1]) >= len(fence) and not match[2].strip():
            spans.append((start, match.end()))
            fence = ""
    if fence:
        spans.append((start, len(body)))
    return spans


def _inside(position: int, spans: list[tuple[int, int]]) -> bool:
    return any(start <= position < end for start, end in spans)
