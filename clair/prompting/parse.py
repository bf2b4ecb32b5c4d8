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
from bisect import bisect_right
from typing import NamedTuple

from clair.data.records import Judgement, Revision, incomplete_reason, trimmed, written_like

FAILURES = {
    "empty_reply": "the reply has no text",
    "truncated": "the reply was cut off before its end",
    "content_filter": "the server's content filter stopped the reply",
    "incomplete": "the reply did not end well",
    "tool_call": "the reply calls a tool",
    "server_error": "the server broke the reply off",
    "refusal": "the reply refuses the task",
    "no_label": "{identifier} does not stand at the start of a line",
    "label_twice": "{identifier} stands at the start of more than one line",
    "label_inline": "{identifier} stands only inside a line, so it may be a mention",
    "label_in_fence": "{identifier} stands only inside a code fence",
    "labels_out_of_order": "{teacher_reasoning} comes after {identifier}",
    "wrong_label": "the reply gives a worsened solution, not a corrected one",
    "empty_answer": "nothing follows {identifier}",
    "label_in_answer": "an identifier stands inside what follows {identifier}",
    "stray_fence": "the code fence around the reply cannot be told from those inside it",
    "answer_in_fence": "all that follows {identifier} is in a code fence or quotes, which may or may not belong to it",
    "unopened": "what follows {identifier} ends with a bracket or tag that opens before it",
    "template_words": "what follows {identifier} repeats the words of the request",
    "no_verdict": "what follows {identifier} is not exactly one of [1], [2] and [tie]",
    "no_edits": "what follows {identifier} is not a list of find/replace blocks",
    "edit_unmatched": "the text to find in an edit does not stand in the student's solution",
    "edit_ambiguous": "the text to find in an edit stands in the student's solution more than once",
    "edits_overlap": "two edits change the same text",
}
"""Every failure by name, with what it says to a person (and to the model, when it is asked once more)."""


class ParseFailure(Exception):
    """A reply that cannot be read with certainty; `name` is a key of FAILURES, `told` says it to the model."""

    def __init__(self, name: str, identifier: str = "{corrected_student_solution}", words: str = "") -> None:
        """`words`: what the model or the server said about it."""
        self.name = name
        self.told = FAILURES[name].replace("{identifier}", identifier) + (f": {words}" if words else "")
        super().__init__(self.told)


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
    "verdict": rf"(?:best|better|preferred){_SEP}{_STUDENT}{_ANSWER}",
    "edits": rf"(?:(?:minimal|teacher){_SEP}edits|(?<=\{{)edits(?=\}}))",
}
IDENTIFIERS = {
    "solution": "{corrected_student_solution}",
    "verdict": "{best_student_solution}",
    "edits": "{minimal_edits}",
}
"""What the templates call the part after the reasoning."""


def asks_for(kind: str, words: str) -> bool:
    """Whether words that a model is sent name the part (a key of IDENTIFIERS) that is read from its reply."""
    return bool(re.search(_KINDS[kind], words, re.IGNORECASE))


_OPEN = r"(?P<mark>\*{1,3}|_{1,3})?(?P<code>`)?"
_CLOSE = r"(?(code)`)(?(mark)(?P=mark))"
_COLON = r"(?:[:：]|[ \t]+[:：](?![^\s*_`]))"
"""A colon apart from the words and glued to what follows (`{label} :0`) belongs to the text."""
_LABELS = {
    kind: re.compile(
        # At the start of a line: a heading or a number, emphasis, the words in braces or bare, then a colon or the end
        # of the line. What opens before the words must close behind them: else it belongs to the text.
        rf"^[ \t]*(?:\#{{1,6}}[ \t]*)?(?:\d[.)][ \t]*)?"
        rf"{_OPEN}(?P<open>[{{\[<]{{1,2}})?(?:{words})(?(open)[}}\]>]{{1,2}})"
        rf"(?:{_COLON}[ \t]*{_CLOSE}|{_CLOSE}{_COLON}|{_CLOSE}[ \t]*$)",
        re.IGNORECASE | re.MULTILINE,
    )
    for kind, words in _KINDS.items()
}
# A label as it should not stand: behind a bullet or a quote's mark, or with its bracket closed behind the text.
_LOOSE = {
    kind: re.compile(
        rf"^(?:[^\w\n]|_){{0,16}}(?:\d+[.)])?(?:[^\w\n]|_){{0,8}}(?:{words})(?:[^\w\n:：]|_){{0,8}}(?:[:：]|$)",
        re.IGNORECASE | re.MULTILINE,
    )
    for kind, words in _KINDS.items()
}
_MENTION = re.compile(
    r"corrected_student_solution|best_student_solution|minimal_edits|teacher_reasoning", re.IGNORECASE
)
# A line that leads into the identifier below it: "I give the result under\n{corrected_student_solution}\nbelow."
_LEADS_IN = re.compile(
    r"\b(?:under|in|at|as|the|with|is|by|of|for|to|after|before|and|or|identifier|label|heading|called|named)"
    r"[ \t]*\n[ \t]*\Z",
    re.IGNORECASE,
)
# What may be an identifier that we do not know, at the start of a line: misspelt, or in the reviser's own words.
_LIKE_A_LABEL = re.compile(
    r"^(?P<open>[ \t>#*_`{\[<\-]{0,24})(?P<words>[^\W\d_](?:[^\W\d_]|[ '’_\-]){2,48}[^\W\d_])[}\]>]{0,2}[*_`]{0,4}"
    r"(?P<end>[ \t]{0,4}[:：]|[ \t]{0,4}[*_`]{0,4}$|(?<=\})[ \t])",
    re.IGNORECASE | re.MULTILINE,
)
_OWN_WORDS = re.compile(r"(?:revised|improved|enhanced|worsened)(?:students?)?(?:solution|answer|response)")
_FENCE = re.compile(r"^[ \t]*(`{3,}(?=[^`\n]*$)|~{3,})(.*)$", re.MULTILINE)
_REFUSAL = re.compile(
    r"\s*(?:i(?:'|’)?m (?:really |very |so )?(?:sorry|afraid)|(?:i )?apologi[sz]e|sorry[,.]|i (?:can(?:not|'t|’t)|"
    r"am (?:unable|not able)|won(?:'|’)t|must decline)|as an ai\b|unfortunately,? i (?:can|am))",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Whether a text begins as a refusal does ("I'm sorry, but ...", "I cannot ...")."""
    return bool(_REFUSAL.match(text))


def parse_revision(
    text: str, finish_reason: str | None = "stop", answer: str | None = None, template: str = ""
) -> Revision:
    """The reasoning and the revised answer of a reviser's reply. Raises ParseFailure with the name of what is wrong.

    `finish_reason` is the server's; a reply without a good ending is never taken, however whole it looks.
    `answer` is what was revised: the revision has its line ends, and its first line's indentation where that has any;
    what stands in it (braces, words of the `template`) may stand in the revision too.
    """
    reasoning, part = two_parts("solution", text, finish_reason, answer or "")
    check_own_words("solution", part, answer or "", template)
    return Revision(reasoning, written_like(_without_own_fence(part, answer), answer or ""))


def _without_own_fence(part: str, answer: str | None) -> str:
    """The inside of a part that stands whole in one fence without a language, where what was revised has none."""
    lines = part.split("\n")
    if _BLOCK.match(part) and not (answer and _BLOCK.match(answer)):
        raise ParseFailure("answer_in_fence")
    opening = _PLAIN_FENCE.fullmatch(lines[0])
    if not (opening and len(lines) > 2 and lines[-1].strip() == opening[1]):
        return part
    spans = _fenced_spans(part)
    last = len(part) - len(lines[-1].lstrip())
    if len(spans) > 1 and spans[-1][0] < last:
        return part  # blocks with text between them
    if answer is None or len(spans) > 1:
        raise ParseFailure("answer_in_fence")
    return part if _FENCE.match(trimmed(answer)) else "\n".join(lines[1:-1])


_BLOCK = re.compile(r"\A(?:[|>][+-]?[ \t]*\n|(\"{3}|'{3})(?s:.*)\1\Z)")
"""How YAML and Python begin a text of several lines."""
_PLAIN_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*(?:text|txt|plaintext|markdown|md)?[ \t]*")


def check_own_words(kind: str, part: str, answer: str, template: str) -> None:
    """See that a part does not repeat the request: its tags, or a sentence of it. Raises ParseFailure.

    What stands in the answer that was revised is the answer's.
    """
    said, known = _plain_words(part), _plain_words(answer)
    sentences = re.split(r"(?<=[.:!?])\s+|\n|\{\{.*?\}\}", template)
    examples = [line for example in _EXAMPLE.findall(template) for line in example]
    phrases = {words for words in map(_plain_words, sentences) if words.count(" ") >= 4}
    phrases |= {words for words in map(_plain_words, examples) if words}
    if _STAND_IN.fullmatch(part) and part not in answer:
        raise ParseFailure("template_words", IDENTIFIERS[kind])
    tags = set(re.findall(r"^</?\w+>$", template, re.MULTILINE))
    if any(tag in part and tag not in answer for tag in tags) or any(
        f" {phrase} " in f" {said} " and phrase not in known for phrase in phrases
    ):
        raise ParseFailure("template_words", IDENTIFIERS[kind])


_STAND_IN = re.compile(
    r"\.{3}|…|[<\[({][^<>\[\](){}\n]{0,60}\b(?:solution|answer|response|text|same|unchanged|above|here)\b[^<>\[\](){}\n]{0,40}[>\])}]",
    re.IGNORECASE,
)
"""What says that the answer would stand here: `[your answer here]`, `(same as above)`."""
_EXAMPLE = re.compile(r"<{5,9} ?FIND\n(.*?)\n={5,9}\n(.*?)\n>{5,9} ?REPLACE", re.DOTALL)
"""What the template of the edits shows in the place of an edit."""


def _plain_words(text: str) -> str:
    """The words of a text, in lower case, with one space between them."""
    return " ".join(re.findall(r"[\w']+", text.lower()))


def parse_judgement(text: str, finish_reason: str | None = "stop") -> Judgement:
    """The reasoning and the verdict of a judge's reply. Raises ParseFailure."""
    reasoning, verdict = two_parts("verdict", text, finish_reason)
    found = _VERDICT.fullmatch(verdict.strip("*_`. \t\n"))
    if not found:
        raise ParseFailure("no_verdict", IDENTIFIERS["verdict"])
    return Judgement(reasoning, {"1": 1, "2": 2}.get(found[1], 0))


_VERDICT = re.compile(r"\[?(?:solution |student )?(1|2|tie)\]?", re.IGNORECASE)


def two_parts(kind: str, text: str, finish_reason: str | None, answer: str = "") -> tuple[str, str]:
    """What stands under {teacher_reasoning} and under the identifier of the part we want (a key of IDENTIFIERS).

    Raises ParseFailure. Everything that is read from a model's reply comes through here. What stands in braces in the
    `answer` that was revised is no label.
    """
    identifier = IDENTIFIERS[kind]
    if reason := incomplete_reason(finish_reason):
        raise ParseFailure(reason)
    body = _without_outer_fence(kind, text.replace("\r\n", "\n").strip())
    if not body:
        raise ParseFailure("empty_reply")
    found, bare = _all_labels(kind, body)
    fences = _fenced_spans(_blanked(body, [*found, *bare]))
    outside = _joined(body, [label for label in found if not _inside(label.start, fences)])
    bare = [label for label in bare if not _inside(label.start, fences)]
    wanted = [label for label in outside if label.kind == kind]
    if not wanted and _only_bare(kind, body, bare):
        outside, wanted = sorted([*outside, *bare], key=lambda label: label.start), bare[1:]
    elif wanted and any(label.kind == kind for label in bare):
        raise ParseFailure("label_twice", identifier)
    if len(wanted) != 1:
        raise ParseFailure(_why_not_one(kind, body, found, outside, wanted), identifier)
    (label,) = wanted
    if _is_another(kind, body, label, fences):
        raise ParseFailure("label_twice", identifier)
    if any(other.kind != kind and other.start > label.start for other in outside):
        raise ParseFailure("labels_out_of_order", identifier)
    part = body[label.end :]
    if part.partition("\n")[0].strip():  # on the label's line: what indents the answer too is the answer's
        text, before = part.lstrip(" \t"), body[: label.end]
        space = before[len(before.rstrip(" \t")) :] + part[: len(part) - len(text)]
        indentation = trimmed(answer)[: len(trimmed(answer)) - len(trimmed(answer).lstrip(" \t"))]
        part = (indentation if space in (indentation, f" {indentation}") else "") + text
    part = trimmed(part)
    if not part:
        raise ParseFailure("empty_answer", identifier)
    if _closes_more(body[: label.end], part, answer):
        raise ParseFailure("unopened", identifier)
    if _MENTION.search(part) or any(_is_like_a_label(match, answer) for match in _LIKE_A_LABEL.finditer(part)):
        raise ParseFailure("label_in_answer", identifier)
    first = next((other for other in outside if other.kind == "reasoning"), None)
    return body[first.end if first else 0 : label.start].strip(), part


def _closes_more(before: str, part: str, answer: str) -> bool:
    """Whether the part's end closes what was opened before it: a bracket or a tag around the reply, or the label."""
    line = part.rpartition("\n")[2].strip()
    if tag := re.fullmatch(r"</(\w[\w.-]*)>", line):
        return f"<{tag[1]}" not in part and line not in answer
    if line[-1] in _BRACKETS:
        opening, closing = _BRACKETS[line[-1]], line[-1]
        more = part.count(closing) - part.count(opening)
        return more > max(0, answer.count(closing) - answer.count(opening)) and before.lstrip().startswith(opening)
    return False


_BRACKETS = {"}": "{", "]": "[", ")": "(", "”": "“", "»": "«"}


def _joined(body: str, labels: list[_Label]) -> list[_Label]:
    """The labels, of which those of one kind with nothing between them are one: a heading and the identifier below."""
    joined: list[_Label] = []
    for label in labels:
        if (
            joined
            and joined[-1].kind == label.kind
            and not body[joined[-1].end : label.start].strip()
            and not any(_is_weak(body, one) for one in (joined[-1], label))
        ):
            joined[-1] = _Label(label.kind, joined[-1].start, label.end)
        else:
            joined.append(label)
    return joined


def _is_weak(body: str, label: _Label) -> bool:
    """Whether a label's words lack "student", so that they may be a line of the answer."""
    return label.kind == "solution" and not re.search("student|studnet", body[label.start : label.end], re.IGNORECASE)


def _is_another(kind: str, body: str, label: _Label, fences: list[tuple[int, int]]) -> bool:
    """Whether the label that we want stands elsewhere too, in a form that is none, so that the one read may be text.

    One whose words lack "student" may be text sooner: then the identifier may stand nowhere else, in no fence either.
    """
    weak = _is_weak(body, label)
    for other in _LOOSE[kind].finditer(body):
        start = other.end() - len(other[0].lstrip())
        if not label.start <= start < label.end and (weak or not _inside(other.start(), fences)):
            return not _LEADS_IN.search(body, max(0, other.start() - 40), other.start())
    return False


def _all_labels(kind: str, body: str) -> tuple[list[_Label], list[_Label]]:
    """The labels with a colon or the line's end behind them, and the bare ones, each in reading order."""
    kinds = ("reasoning", "worsened", kind)
    found = sorted((label for k in kinds for label in _labels(k, body)), key=lambda label: label.start)
    return found, [
        _Label("reasoning" if m[1].lower() == "teacher_reasoning" else kind, m.start(1) - 1, m.end())
        for m in _BARE.finditer(body)
        if m[1].lower() in ("teacher_reasoning", IDENTIFIERS[kind].strip("{}"))
    ]


def _labels(kind: str, body: str) -> list[_Label]:
    found = (_Label(kind, match.start(), match.end()) for match in _LABELS[kind].finditer(body))
    return [label for label in found if not _LEADS_IN.search(body, max(0, label.start - 40), label.start)]


# In braces at the start of a paragraph, with text straight behind it.
_BARE = re.compile(
    r"(?:\A|\n[ \t]*\n)[ \t]*\{(teacher_reasoning|corrected_student_solution|best_student_solution)\}"
    r"[ \t]+(?=[^\s:：])",
    re.IGNORECASE,
)


def _only_bare(kind: str, body: str, bare: list[_Label]) -> bool:
    """Whether both identifiers stand bare, in their order, and are named nowhere else in the whole reply."""
    return [label.kind for label in bare] == ["reasoning", kind] and len(_MENTION.findall(body)) == 2


# What identifiers are about. Other words in braces are placeholders of the text: `{first_name}:`.
_ABOUT = re.compile(
    r"student|teacher|solution|answer|response|reason|expla|feedback|correct|correg|corrig|korrig|revis|improv|worsen|edit|"
    r"final|original|soluci|soluca|solu[cç]|losung|l[oö]sung|antwort|respuesta|resposta|reponse|r[eé]ponse|begr[uü]ndung|schuler|sch[uü]ler|"
    r"eleve|él[eè]ve|estudiante|alumno|raisonnement|razonamiento|学生|教师|教師|老师|先生|答案|解答|回答|修正|更正|改正|理由|推理"
)


def _is_like_a_label(match: re.Match[str], answer: str) -> bool:
    from rapidfuzz.fuzz import ratio

    words = re.sub(r"[\W\d_]", "", match["words"].lower())
    in_braces = "{" in match["open"] and match["end"] != " "
    in_braces = in_braces and (re.search(r"[ _\-]", match["words"]) or not match["words"].isascii())
    in_braces = in_braces and _ABOUT.search(words) and f"{{{match['words']}}}" not in answer
    names = ("correctedstudentsolution", "beststudentsolution", "teacherreasoning", "worsenedstudentsolution")
    return bool(in_braces or _OWN_WORDS.fullmatch(words) or any(ratio(words, name) >= 80 for name in names))


def _blanked(body: str, labels: list[_Label]) -> str:
    """The text with spaces for its labels, so that what follows one on its line stands at the line's start."""
    pieces, at = [], 0
    for label in sorted(labels, key=lambda label: label.start):
        if label.start >= at:
            pieces += [body[at : label.start], " " * (label.end - label.start)]
            at = label.end
    return "".join([*pieces, body[at:]])


def _why_not_one(kind: str, body: str, found: list[_Label], outside: list[_Label], wanted: list[_Label]) -> str:
    if wanted:
        return "label_twice"
    if any(label.kind == "worsened" for label in outside):
        return "wrong_label"
    if any(label.kind == kind for label in found):
        return "label_in_fence"
    if IDENTIFIERS[kind].strip("{}") in body.lower():
        return "label_inline"
    return "refusal" if is_refusal(body) else "no_label"


def _without_outer_fence(kind: str, body: str) -> str:
    """The inside of a reply that is wrapped whole in one code fence; any other reply as it is."""
    lines = body.split("\n")
    opening = _FENCE.match(lines[0])
    if not opening or len(lines) < 3 or lines[-1].strip() != opening[1]:
        return body
    inside = "\n".join(lines[1:-1])
    found, bare = _all_labels(kind, inside)
    if not any(label.kind == kind for label in [*found, *bare]):
        return body
    if len(_FENCE.findall(_blanked(inside, [*found, *bare]))) % 2:
        raise ParseFailure("stray_fence")  # the first and the last fence may belong to different blocks
    return inside.strip()


def _fenced_spans(body: str) -> list[tuple[int, int]]:
    """Where code fences begin and end; one that is never closed runs to the end of the text."""
    spans: list[tuple[int, int]] = []
    fence, start = "", 0
    for match in _FENCE.finditer(body):
        if not fence:
            fence, start = match[1], match.start(1)
        elif match[1][0] == fence[0] and len(match[1]) >= len(fence) and not match[2].strip():
            spans.append((start, match.end()))
            fence = ""
    if fence:
        spans.append((start, len(body)))
    return spans


def _inside(position: int, spans: list[tuple[int, int]]) -> bool:
    before = bisect_right(spans, position, key=lambda span: span[0]) - 1
    return before >= 0 and position < spans[before][1]
