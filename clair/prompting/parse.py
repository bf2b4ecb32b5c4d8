"""Parse the replies of reviser and judge: a revision or a judgement, or a named failure, never wrong text.

A reviser is asked for its reasoning under `{teacher_reasoning}` and for the answer under
`{corrected_student_solution}`; labels.py finds these labels. A reply that can be read in two ways is a failure with a
name, which is worth a second call, because a wrong winner costs more.
"""

from __future__ import annotations

import re
from functools import lru_cache

from clair.data.records import Judgement, Revision, incomplete_reason, trimmed, written_like
from clair.prompting.labels import (
    FENCE,
    IDENTIFIERS,
    LABEL_CANDIDATE,
    Label,
    all_bare,
    blank_labels,
    fenced_spans,
    find_labels,
    is_inside,
    mentions_identifier,
    merge_labels,
    occurs_again,
    resembles_label,
)

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
    "no_score": "what follows {identifier} is not exactly one number of the scale",
    "no_edits": "what follows {identifier} is not a list of find/replace blocks",
    "edit_unmatched": "the text to find in an edit does not stand in the student's solution",
    "edit_ambiguous": "the text to find in an edit stands in the student's solution more than once",
    "edits_overlap": "two edits change the same text",
    "calls_changed": "the tool calls are not the same in number, order and name, each as one line of JSON",
    "arguments_invalid": "the arguments of a tool call do not fit the tool's schema",
}
"""The explanation of each failure by name, for a person and for the model when the request is repeated."""


class ParseFailure(Exception):
    """A reply that cannot be read with certainty. `name` is a key of FAILURES; `explanation` is for the model."""

    def __init__(self, name: str, identifier: str = "{corrected_student_solution}", detail: str = "") -> None:
        """`detail` is appended to the explanation: what the model or the server said."""
        self.name = name
        self.explanation = FAILURES[name].replace("{identifier}", identifier) + (f": {detail}" if detail else "")
        super().__init__(self.explanation)


_REFUSAL = re.compile(
    r"\s*(?:i(?:'|’)?m (?:really |very |so )?(?:sorry|afraid)|(?:i )?apologi[sz]e|sorry[,.]|i (?:can(?:not|'t|’t)|"
    r"am (?:unable|not able)|won(?:'|’)t|must decline)|as an ai\b|unfortunately,? i (?:can|am))",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """True if a text begins like a refusal ("I'm sorry, but ...", "I cannot ...")."""
    return bool(_REFUSAL.match(text))


def parse_revision(
    text: str, finish_reason: str | None = "stop", answer: str | None = None, template: str = ""
) -> Revision:
    """Parse a reviser's reply into reasoning and revised answer. Raises ParseFailure with the name of the problem.

    `finish_reason` is the server's; a reply without a good ending is never accepted. `answer` is the text that was
    revised: the revision gets its line ends and the indentation of its first line. Braces and words of the `template`
    that are in the answer are allowed in the revision.
    """
    reasoning, section = split_reply("solution", text, finish_reason, answer or "")
    check_no_template_words("solution", section, answer or "", template)
    return Revision(reasoning, written_like(_remove_answer_fence(section, answer), answer or ""))


def _remove_answer_fence(section: str, answer: str | None) -> str:
    """The content of an answer that is one fence without a language, if the revised answer has no such fence."""
    lines = section.split("\n")
    if _MULTILINE_QUOTE.match(section) and not (answer and _MULTILINE_QUOTE.match(answer)):
        raise ParseFailure("answer_in_fence")
    opening = _PLAIN_FENCE.fullmatch(lines[0])
    if not (opening and len(lines) > 2 and lines[-1].strip() == opening[1]):
        return section
    spans = fenced_spans(section)
    last = len(section) - len(lines[-1].lstrip())
    if len(spans) > 1 and spans[-1][0] < last:
        return section  # blocks with text between them
    if answer is None or len(spans) > 1:
        raise ParseFailure("answer_in_fence")
    return section if FENCE.match(trimmed(answer)) else "\n".join(lines[1:-1])


_MULTILINE_QUOTE = re.compile(r"\A(?:[|>][+-]?[ \t]*\n|(\"{3}|'{3})(?s:.*)\1\Z)")
"""A multi-line string as YAML and Python write it."""
_PLAIN_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*(?:text|txt|plaintext|markdown|md)?[ \t]*")


def check_no_template_words(kind: str, section: str, answer: str, template: str) -> None:
    """Raise ParseFailure if a part of the reply repeats tags or a sentence of the template.

    Those that are in the revised answer too are allowed.
    """
    phrases, tags = _template_words(template)
    lower = section.lower()
    possible = [phrase for phrase, parts in phrases.items() if all(part in lower for part in parts)]
    section_words, answer_words = (_normalize_words(text) if possible else "" for text in (section, answer))
    if (
        (_PLACEHOLDER.fullmatch(section) and section not in answer)
        or any(tag in section and tag not in answer for tag in tags)
        or any(f" {phrase} " in f" {section_words} " and phrase not in answer_words for phrase in possible)
    ):
        raise ParseFailure("template_words", IDENTIFIERS[kind])


@lru_cache(maxsize=16)
def _template_words(template: str) -> tuple[dict[str, list[str]], frozenset[str]]:
    """The phrases of a template (its sentences of five words and more, its examples of edits), and its tags.

    Each phrase comes with its words, the longest first: no text that lacks one of them holds the phrase.
    """
    sentences = re.split(r"(?<=[.:!?])\s+|\n|\{\{.*?\}\}", template)
    examples = [line for example in _EXAMPLE.findall(template) for line in example]
    phrases = {phrase for phrase in map(_normalize_words, sentences) if phrase.count(" ") >= 4}
    phrases |= {phrase for phrase in map(_normalize_words, examples) if phrase}
    by_phrase = {phrase: sorted(phrase.split(), key=len, reverse=True) for phrase in phrases}
    return by_phrase, frozenset(re.findall(r"^</?\w+>$", template, re.MULTILINE))


_PLACEHOLDER = re.compile(
    r"\.{3}|…|[<\[({][^<>\[\](){}\n]{0,60}\b(?:solution|answer|response|text|same|unchanged|above|here)\b[^<>\[\](){}\n]{0,40}[>\])}]",
    re.IGNORECASE,
)
"""A placeholder for the answer: `[your answer here]`, `(same as above)`."""
_EXAMPLE = re.compile(r"<{5,9} ?FIND\n(.*?)\n={5,9}\n(.*?)\n>{5,9} ?REPLACE", re.DOTALL)
"""The example of an edit in the template."""


def _normalize_words(text: str) -> str:
    """The words of a text, in lower case, with one space between them."""
    return " ".join(re.findall(r"[\w']+", text.lower()))


def parse_judgement(text: str, finish_reason: str | None = "stop") -> Judgement:
    """Parse a judge's reply into reasoning and verdict. Raises ParseFailure."""
    reasoning, verdict = split_reply("verdict", text, finish_reason)
    match = _VERDICT.fullmatch(verdict.strip("*_`. \t\n"))
    if not match:
        raise ParseFailure("no_verdict", IDENTIFIERS["verdict"])
    return Judgement(reasoning, {"1": 1, "2": 2}.get(match[1], 0))


def parse_score(text: str, finish_reason: str | None, lowest: int, highest: int) -> float:
    """Parse a judge's reply into a score of the scale, such as `7`, `7.5` or `7/10`. Raises ParseFailure."""
    _, section = split_reply("score", text, finish_reason)
    match = _SCORE.fullmatch(section.strip("*_`.[] \t\n"))
    if not match or int(match[2] or highest) != highest or not lowest <= float(match[1]) <= highest:
        raise ParseFailure("no_score", IDENTIFIERS["score"])
    return float(match[1])


_SCORE = re.compile(r"(-?\d{1,9}(?:\.\d{1,9})?)(?:[ \t]*(?:/|out of)[ \t]*(\d{1,9}))?")
_VERDICT = re.compile(r"\[?(?:solution |student )?(1|2|tie)\]?", re.IGNORECASE)


def split_reply(kind: str, text: str, finish_reason: str | None, answer: str = "") -> tuple[str, str]:
    """Split a reply into the text under {teacher_reasoning} and the part of `kind` (a key of IDENTIFIERS).

    Raises ParseFailure. All replies of reviser and judge are parsed by this function. Words in braces that are in the
    revised `answer` are no label.
    """
    identifier = IDENTIFIERS[kind]
    if reason := incomplete_reason(finish_reason):
        raise ParseFailure(reason)
    body = _remove_outer_fence(kind, text.replace("\r\n", "\n").strip())
    if not body:
        raise ParseFailure("empty_reply")
    labels, bare = find_labels(kind, body)
    fences = fenced_spans(blank_labels(body, [*labels, *bare]))
    outside = merge_labels(body, [label for label in labels if not is_inside(label.start, fences)])
    bare = [label for label in bare if not is_inside(label.start, fences)]
    matches = [label for label in outside if label.kind == kind]
    if not matches and all_bare(kind, body, bare):
        outside, matches = sorted([*outside, *bare], key=lambda label: label.start), bare[1:]
    elif matches and any(label.kind == kind for label in bare):
        raise ParseFailure("label_twice", identifier)
    if len(matches) != 1:
        raise ParseFailure(_label_problem(kind, body, labels, outside, matches), identifier)
    (label,) = matches
    if occurs_again(kind, body, label, fences):
        raise ParseFailure("label_twice", identifier)
    if any(later.kind != kind and later.start > label.start for later in outside):
        raise ParseFailure("labels_out_of_order", identifier)
    section = body[label.end :]
    if section.partition("\n")[0].strip():
        # The text begins on the line of the label: keep the space that is also the indentation of the answer.
        text, prefix = section.lstrip(" \t"), body[: label.end]
        space = prefix[len(prefix.rstrip(" \t")) :] + section[: len(section) - len(text)]
        indentation = trimmed(answer)[: len(trimmed(answer)) - len(trimmed(answer).lstrip(" \t"))]
        section = (indentation if space in (indentation, f" {indentation}") else "") + text
    section = trimmed(section)
    if not section:
        raise ParseFailure("empty_answer", identifier)
    if _closes_earlier_bracket(body[: label.end], section, answer):
        raise ParseFailure("unopened", identifier)
    candidates = LABEL_CANDIDATE.finditer(section)
    if mentions_identifier(section) or any(resembles_label(match, answer) for match in candidates):
        raise ParseFailure("label_in_answer", identifier)
    reasoning = next((later for later in outside if later.kind == "reasoning"), None)
    return body[reasoning.end if reasoning else 0 : label.start].strip(), section


def _closes_earlier_bracket(prefix: str, section: str, answer: str) -> bool:
    """True if the end of a part closes a bracket or a tag that was opened before the part."""
    line = section.rpartition("\n")[2].strip()
    if tag := re.fullmatch(r"</(\w[\w.-]*)>", line):
        return f"<{tag[1]}" not in section and line not in answer
    if line[-1] in _BRACKETS:
        opening, closing = _BRACKETS[line[-1]], line[-1]
        excess = section.count(closing) - section.count(opening)
        return excess > max(0, answer.count(closing) - answer.count(opening)) and prefix.lstrip().startswith(opening)
    return False


_BRACKETS = {"}": "{", "]": "[", ")": "(", "”": "“", "»": "«"}


def _label_problem(kind: str, body: str, labels: list[Label], outside: list[Label], matches: list[Label]) -> str:
    if matches:
        return "label_twice"
    if any(label.kind == "worsened" for label in outside):
        return "wrong_label"
    if any(label.kind == kind for label in labels):
        return "label_in_fence"
    if IDENTIFIERS[kind].strip("{}") in body.lower():
        return "label_inline"
    return "refusal" if is_refusal(body) else "no_label"


def _remove_outer_fence(kind: str, body: str) -> str:
    """The content of a reply that is one code fence; any other reply unchanged."""
    lines = body.split("\n")
    opening = FENCE.match(lines[0])
    if not opening or len(lines) < 3 or lines[-1].strip() != opening[1]:
        return body
    inside = "\n".join(lines[1:-1])
    labels, bare = find_labels(kind, inside)
    if not any(label.kind == kind for label in [*labels, *bare]):
        return body
    if len(FENCE.findall(blank_labels(inside, [*labels, *bare]))) % 2:
        raise ParseFailure("stray_fence")  # the first and the last mark may belong to different blocks
    return inside.strip()
