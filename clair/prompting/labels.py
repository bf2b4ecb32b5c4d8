"""Find the labels of a reply's parts, such as `{teacher_reasoning}` and `{corrected_student_solution}`.

Real replies vary: with and without a colon, bold, as headings, in another case or spelling, all in a code fence, or
with the label mentioned inside the reasoning. A label counts only if it is at the start of a line, outside of code
fences, and is followed by a colon or by the end of the line. A label with text straight after it (a bare label) counts
only if both identifiers open a paragraph in this form and are named nowhere else.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from clair.data.records import fold_case


class Label(NamedTuple):
    """A label in a reply: the kind of part that it opens (a key of `_KINDS`), and its span."""

    kind: str
    start: int
    end: int


# The words of a label, joined by underscores, spaces or hyphens, in any case, with misspellings of recorded replies.
# Prose begins lines with "Correct answer:", so the word "student" is required outside of braces.
_SEP = r"[ _\-]{0,3}"
_STUDENT = rf"(?:student|studnet)(?:'?s)?{_SEP}"
_CORRECTED = rf"(?:corrected|correct|correctd|corected|correted){_SEP}"
_ANSWER = r"(?:solution|soultion|soluton|answer|response)"
_KINDS = {
    "reasoning": rf"teacher(?:'?s)?{_SEP}(?:reasoning|reasoing|resoning|reasonning)",
    "solution": rf"(?:{_CORRECTED}{_STUDENT}{_ANSWER}|(?<=\{{){_CORRECTED}{_ANSWER}(?=\}}))",
    "worsened": rf"worsened?{_SEP}(?:{_STUDENT})?{_ANSWER}",
    "verdict": rf"(?:best|better|preferred){_SEP}{_STUDENT}{_ANSWER}",
    "score": rf"(?:student(?:'?s)?{_SEP})?{_ANSWER}{_SEP}(?:score|rating)",
    "edits": rf"(?:(?:minimal|teacher){_SEP}edits|(?<=\{{)edits(?=\}}))",
}
_KEYWORDS = {"reasoning": "teacher", "solution": "cor", "worsened": "worsen", "verdict": "stud", "edits": "edits"}
"""Letters that each label of a kind holds; only lines with them are compared with its pattern."""
IDENTIFIERS = {
    "solution": "{corrected_student_solution}",
    "verdict": "{best_student_solution}",
    "score": "{student_solution_score}",
    "edits": "{minimal_edits}",
}
"""The identifier of each part after the reasoning, as the templates write it."""


def names_part(kind: str, instructions: str) -> bool:
    """True if the instructions for a model name the part (a key of IDENTIFIERS) that is parsed from its reply."""
    return bool(re.search(_KINDS[kind], instructions, re.IGNORECASE))


_OPEN = r"(?P<mark>\*{1,3}|_{1,3})?(?P<code>`)?"
_CLOSE = r"(?(code)`)(?(mark)(?P=mark))"
_COLON = r"(?:[:：]|[ \t]+[:：](?![^\s*_`]))"
"""A colon that is separated from the label and joined to the next character (`{label} :0`) belongs to the text."""
_LABELS = {
    kind: re.compile(
        # At the start of a line: a heading or a number, emphasis, the words in braces or not, then a colon or the end
        # of the line. What opens before the words must close after them; otherwise it belongs to the text.
        rf"^[ \t]*(?:\#{{1,6}}[ \t]*)?(?:\d[.)][ \t]*)?"
        rf"{_OPEN}(?P<open>[{{\[<]{{1,2}})?(?:{pattern})(?(open)[}}\]>]{{1,2}})"
        rf"(?:{_COLON}[ \t]*{_CLOSE}|{_CLOSE}{_COLON}|{_CLOSE}[ \t]*$)",
        re.IGNORECASE | re.MULTILINE,
    )
    for kind, pattern in _KINDS.items()
}
# A label in a form that does not count: after a bullet or a quotation mark, or with its bracket closed after the text.
_LOOSE = {
    kind: re.compile(
        rf"^(?:[^\w\n]|_){{0,16}}(?:\d+[.)])?(?:[^\w\n]|_){{0,8}}(?:{pattern})(?:[^\w\n:：]|_){{0,8}}(?:[:：]|$)",
        re.IGNORECASE | re.MULTILINE,
    )
    for kind, pattern in _KINDS.items()
}
_NAMES = (*(identifier.strip("{}") for identifier in IDENTIFIERS.values()), "teacher_reasoning")
_MENTION = re.compile("|".join(_NAMES), re.IGNORECASE)
# A line that leads into the identifier below it: "I give the result under\n{corrected_student_solution}\nbelow."
_LEAD_IN = re.compile(
    r"\b(?:under|in|at|as|the|with|is|by|of|for|to|after|before|and|or|identifier|label|heading|called|named)"
    r"[ \t]*\n[ \t]*\Z",
    re.IGNORECASE,
)
# A possible identifier at the start of a line: misspelt, or in the reviser's own words.
LABEL_CANDIDATE = re.compile(
    r"^(?P<open>[ \t>#*_`{\[<\-]{0,24})(?P<words>[^\W\d_](?:[^\W\d_]|[ '’_\-]){2,48}[^\W\d_])[}\]>]{0,2}[*_`]{0,4}"
    r"(?P<end>[ \t]{0,4}[:：]|[ \t]{0,4}[*_`]{0,4}$|(?<=\})[ \t])",
    re.IGNORECASE | re.MULTILINE,
)
_INVENTED_LABEL = re.compile(r"(?:revised|improved|enhanced|worsened)(?:students?)?(?:solution|answer|response)")
FENCE = re.compile(r"^[ \t]*(`{3,}(?=[^`\n]*$)|~{3,})(.*)$", re.MULTILINE)


def merge_labels(body: str, labels: list[Label]) -> list[Label]:
    """Merge labels of one kind with nothing between them, such as a heading and the identifier below it."""
    joined: list[Label] = []
    for label in labels:
        if (
            joined
            and joined[-1].kind == label.kind
            and not body[joined[-1].end : label.start].strip()
            and not any(_lacks_student(body, member) for member in (joined[-1], label))
        ):
            joined[-1] = Label(label.kind, joined[-1].start, label.end)
        else:
            joined.append(label)
    return joined


def _lacks_student(body: str, label: Label) -> bool:
    """True if the words of a label lack "student", so that they may be a line of the answer."""
    return label.kind == "solution" and not re.search("student|studnet", body[label.start : label.end], re.IGNORECASE)


def occurs_again(kind: str, body: str, label: Label, fences: list[tuple[int, int]]) -> bool:
    """True if the label also occurs elsewhere in a form that does not count, so that `label` itself may be text.

    A label that lacks "student" is more likely text: then an occurrence inside a code fence counts too.
    """
    weak = _lacks_student(body, label)
    for match in _match_lines(_LOOSE[kind], _KEYWORDS.get(kind, ""), body, fold_case(body)):
        start = match.end() - len(match[0].lstrip())
        if not label.start <= start < label.end and (weak or not is_inside(match.start(), fences)):
            return not _LEAD_IN.search(body, max(0, match.start() - 40), match.start())
    return False


def find_labels(kind: str, body: str) -> tuple[list[Label], list[Label]]:
    """The labels that a colon or the end of the line follows, and the bare labels, each in reading order."""
    kinds, folded = ("reasoning", "worsened", kind), fold_case(body)
    labels = sorted((label for k in kinds for label in _labels(k, body, folded)), key=lambda label: label.start)
    return labels, [
        Label("reasoning" if m[1].lower() == "teacher_reasoning" else kind, m.start(1) - 1, m.end())
        for m in _match_lines(_BARE, "{", body, folded)
        if m[1].lower() in ("teacher_reasoning", IDENTIFIERS[kind].strip("{}"))
        and (m.start() == 0 or body[: m.start() - 1].rstrip(" \t").endswith("\n"))
    ]


def _labels(kind: str, body: str, folded: str) -> list[Label]:
    matches = _match_lines(_LABELS[kind], _KEYWORDS.get(kind, ""), body, folded)
    labels = (Label(kind, match.start(), match.end()) for match in matches)
    return [label for label in labels if not _LEAD_IN.search(body, max(0, label.start - 40), label.start)]


def _match_lines(pattern: re.Pattern[str], keyword: str, text: str, folded: str) -> Iterator[re.Match[str]]:
    """The matches of a pattern for the start of a line, in lines that hold the keyword; `folded` is `fold_case(text)`.

    The same as `pattern.finditer(text)`, which tries each character, where no match ends behind its line.
    """
    position = folded.find(keyword)
    while position >= 0:
        if match := pattern.match(text, text.rfind("\n", 0, position) + 1):
            yield match
        end = text.find("\n", position)
        position = folded.find(keyword, end + 1) if end >= 0 else -1


# A bare label: in braces at the start of a paragraph, with text straight after it.
_BARE = re.compile(
    r"^[ \t]*\{"
    r"(teacher_reasoning|corrected_student_solution|best_student_solution|student_solution_score)\}"
    r"[ \t]+(?=[^\s:：])",
    re.IGNORECASE | re.MULTILINE,
)


def mentions_identifier(text: str) -> bool:
    """True if a text names an identifier, with braces or without."""
    folded = fold_case(text)
    return any(name in folded for name in _NAMES)


def all_bare(kind: str, body: str, bare: list[Label]) -> bool:
    """True if both identifiers are bare labels, in order, and are named nowhere else in the reply."""
    return [label.kind for label in bare] == ["reasoning", kind] and len(_MENTION.findall(body)) == 2


# The topics of identifiers. Other words in braces are placeholders of the text: `{first_name}:`.
_LABEL_TOPIC = re.compile(
    r"student|teacher|solution|answer|response|reason|expla|feedback|correct|correg|corrig|korrig|revis|improv|worsen|edit|"
    r"final|original|soluci|soluca|solu[cç]|losung|l[oö]sung|antwort|respuesta|resposta|reponse|r[eé]ponse|begr[uü]ndung|schuler|sch[uü]ler|"
    r"eleve|él[eè]ve|estudiante|alumno|raisonnement|razonamiento|学生|教师|教師|老师|先生|答案|解答|回答|修正|更正|改正|理由|推理"
)


def resembles_label(match: re.Match[str], answer: str) -> bool:
    """True if a match of `LABEL_CANDIDATE` may be an identifier: misspelt, invented, or translated in braces.

    Words in braces that are in the revised `answer` are no identifier.
    """
    from rapidfuzz.fuzz import ratio

    letters = re.sub(r"[\W\d_]", "", match["words"].lower())
    in_braces = "{" in match["open"] and match["end"] != " "
    in_braces = in_braces and (re.search(r"[ _\-]", match["words"]) or not match["words"].isascii())
    in_braces = in_braces and _LABEL_TOPIC.search(letters) and f"{{{match['words']}}}" not in answer
    names = ("correctedstudentsolution", "beststudentsolution", "teacherreasoning", "worsenedstudentsolution")
    return bool(in_braces or _INVENTED_LABEL.fullmatch(letters) or any(ratio(letters, name) >= 80 for name in names))


def blank_labels(body: str, labels: list[Label]) -> str:
    """The text with its labels replaced by spaces, so that a fence after a label is at the start of its line."""
    pieces, position = [], 0
    for label in sorted(labels, key=lambda label: label.start):
        if label.start >= position:
            pieces += [body[position : label.start], " " * (label.end - label.start)]
            position = label.end
    return "".join([*pieces, body[position:]])


def fenced_spans(body: str) -> list[tuple[int, int]]:
    """The (start, end) of each code fence. A fence that is never closed runs to the end of the text."""
    spans: list[tuple[int, int]] = []
    fence, start = "", 0
    for match in FENCE.finditer(body):
        if not fence:
            fence, start = match[1], match.start(1)
        elif match[1][0] == fence[0] and len(match[1]) >= len(fence) and not match[2].strip():
            spans.append((start, match.end()))
            fence = ""
    if fence:
        spans.append((start, len(body)))
    return spans


def is_inside(position: int, spans: list[tuple[int, int]]) -> bool:
    """True if a position lies in one of the (start, end) spans, which are in order."""
    index = bisect_right(spans, position, key=lambda span: span[0]) - 1
    return index >= 0 and position < spans[index][1]
