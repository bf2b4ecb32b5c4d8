"""The reviser as a program: it mends the broken constraints of an answer and leaves everything else as it is.

It mends only where that needs no new content: case, commas, endings, counts of marked parts, cutting to a length. It
knows nothing of the task, and it never judges whether an answer is true or good. Everything else is `Unmendable`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import Any

from recipes.experiments.real_model.constraints import LESS, Constraint, held, holds

_SENTENCE = re.compile(r"[^\n]*?[.!?][\"')*]*(?=\s|$)|[^\n]+")
"""A sentence, or the rest of a line that ends without a mark."""
TITLE_WORDS = 5
"""Words of a heading that is made of the answer's first words."""
_ITEM = re.compile(r"^[ \t]*(?:\*(?!\*)|-|•|\d+[.)])[ \t]*", re.MULTILINE)


class Unmendable(Exception):
    """An answer that the program cannot mend; `reason` is a short name that counts can be made of."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def mend(constraints: Sequence[Constraint], answer: str) -> str:
    """The answer with its broken constraints mended, one after another, in the first order in which all hold at last.

    Raises Unmendable: `holds_all` if nothing is broken, `new_content` if it would take words that the answer lacks,
    `too_little_text` if the answer has too few parts, and `breaks_another` if a change breaks what held.
    """
    broken = [
        constraint for constraint, holding in zip(constraints, held(constraints, answer), strict=True) if not holding
    ]
    if not broken:
        raise Unmendable("holds_all")
    if not all(constraint.type in MENDERS for constraint in broken):
        raise Unmendable("new_content")
    problem = Unmendable("breaks_another")
    for order in permutations(broken):
        mended = answer
        try:
            for constraint in order:
                mended = MENDERS[constraint.type](mended, constraint.kwargs)
                if not holds(constraint, mended):
                    raise Unmendable("too_little_text")
        except Unmendable as reason:
            problem = reason
            continue
        if all(held(constraints, mended)):
            return mended
    raise problem


def _sentences(text: str) -> list[tuple[int, int]]:
    """Where each sentence starts and ends, without white space around it."""
    spans = [match.span() for match in _SENTENCE.finditer(text) if match.group().strip()]
    return [(end - len(text[start:end].lstrip()), end) for start, end in spans]


def _blocks(text: str, count: int) -> list[str]:
    """The text in `count` consecutive segments: at empty lines if there are enough, else at lines, else at sentences.

    A segment's white space at both ends is removed. Raises Unmendable if there are too few.
    """
    for ends in (
        [match.start() for match in re.finditer(r"\n[ \t]*\n", text)],
        [match.start() for match in re.finditer(r"\n", text)],
        [end for _, end in _sentences(text)],
    ):
        pieces = [text[start:end].strip() for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
        starts = [0, *ends]
        if sum(map(bool, pieces)) >= count:
            used = [start for start, piece in zip(starts, pieces, strict=True) if piece]
            cuts = [used[round(index * len(used) / count)] for index in range(1, count)]
            return [text[start:end].strip() for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    raise Unmendable("too_little_text")


def _cut_words(answer: str, kwargs: Mapping[str, Any]) -> str:
    """Leave out the last sentences until the answer is short enough."""
    if kwargs["relation"] != LESS:
        raise Unmendable("new_content")
    for _, end in reversed(_sentences(answer)[:-1]):
        if len(re.findall(r"\w+", answer[:end])) < kwargs["num_words"]:
            return answer[:end].rstrip()
    raise Unmendable("too_little_text")


def _cut_sentences(answer: str, kwargs: Mapping[str, Any]) -> str:
    if kwargs["relation"] != LESS:
        raise Unmendable("new_content")
    constraint = Constraint("length_constraints:number_sentences", kwargs, "")
    shorter = (answer[:end].rstrip() for _, end in reversed(_sentences(answer)[:-1]))
    return next((text for text in shorter if holds(constraint, text)), answer)


def _paragraphs(answer: str, kwargs: Mapping[str, Any]) -> str:
    return "\n***\n".join(_blocks(re.sub(r"\s*\*\*\*\s*", "\n\n", answer).strip(), kwargs["num_paragraphs"]))


def _sections(answer: str, kwargs: Mapping[str, Any]) -> str:
    pattern = rf"(?m)^\W*{kwargs['section_spliter']}\s?\d+\W*?$\n?"
    blocks = _blocks(re.sub(pattern, "", answer).strip(), kwargs["num_sections"])
    return "\n\n".join(f"{kwargs['section_spliter']} {index}\n{block}" for index, block in enumerate(blocks, 1))


def _bullets(answer: str, kwargs: Mapping[str, Any]) -> str:
    """Leave out the list items that are too many, or make items of a numbered list or of the last sentences."""
    count, lines = kwargs["num_bullets"], answer.split("\n")
    items = [index for index, line in enumerate(lines) if _ITEM.match(line)]
    if len(items) >= count:
        for index in items[:count]:
            lines[index] = "* " + _ITEM.sub("", lines[index], count=1)
        surplus = set(items[count:])
        return "\n".join(line for index, line in enumerate(lines) if index not in surplus).strip()
    sentences = _sentences(answer)
    if items or len(sentences) < count:
        raise Unmendable("too_little_text")
    start = sentences[-count][0]
    bullets = [f"* {answer[first:last]}" for first, last in sentences[-count:]]
    return "\n".join([*filter(None, [answer[:start].rstrip()]), *bullets])


def _highlights(answer: str, kwargs: Mapping[str, Any]) -> str:
    """Put asterisks around the first words of the first sentences."""
    count, result = kwargs["num_highlights"], answer
    phrases = [re.search(r"\w[\w'’-]*(?: \w[\w'’-]*){0,2}", answer[start:end]) for start, end in _sentences(answer)]
    spans = [
        (start + phrase.start(), start + phrase.end())
        for (start, _), phrase in zip(_sentences(answer), phrases, strict=True)
        if phrase and "*" not in answer[start : start + phrase.end() + 1]
    ]
    for start, end in reversed(spans[:count]):
        result = f"{result[:start]}*{result[start:end]}*{result[end:]}"
    return result


def _placeholders(answer: str, kwargs: Mapping[str, Any]) -> str:
    """Put square brackets around names and numbers, else around long words, from the end of the answer."""
    lacking = kwargs["num_placeholders"] - len(re.findall(r"\[.*?\]", answer))
    names = r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*|(?<![\w\[])\d[\d,.]*\d|(?<![\w\[])\d(?![\w.)])"
    matches = list(re.finditer(names, answer))
    if len(matches) < lacking:
        matches = list(re.finditer(r"(?<![\w\[])[A-Za-z]{6,}(?![\w\]])", answer))
    for match in reversed(matches[-lacking:]):
        answer = f"{answer[: match.start()]}[{match.group()}]{answer[match.end() :]}"
    return answer


def _postscript(answer: str, kwargs: Mapping[str, Any]) -> str:
    """Make a note of the last sentence."""
    sentences = _sentences(answer)
    if len(sentences) < 2:
        raise Unmendable("too_little_text")
    start = sentences[-1][0]
    return f"{answer[:start].rstrip()}\n\n{kwargs['postscript_marker']} {answer[start:]}"


def _title(answer: str, kwargs: Mapping[str, Any]) -> str:
    """Put angle brackets around the heading that the answer has, or make one of its first words."""
    first, _, remainder = answer.lstrip().partition("\n")
    heading = re.sub(r"^(?:title|subject)\s*:\s*", "", first.strip("#*_ \t"), flags=re.IGNORECASE).strip('#*_" \t:')
    if heading and len(heading.split()) <= 10 and heading[-1] not in ".!?," and remainder.strip():
        return f"<<{heading}>>\n{remainder}"
    words = re.findall(r"\w[\w'’-]*", answer)[:TITLE_WORDS]
    if len(words) < 2:
        raise Unmendable("too_little_text")
    return f"<<{' '.join(words).title()}>>\n\n{answer.lstrip()}"


def _capital_words(answer: str, kwargs: Mapping[str, Any]) -> str:
    """Write the longest words in capitals, or words in capitals as others, one after another until it holds."""
    constraint = Constraint("change_case:capital_word_frequency", kwargs, "")
    words = {match.group(): None for match in re.finditer(r"\b[A-Za-z]{4,}\b", answer)}
    if kwargs["capital_relation"] == LESS:
        words = {match.group(): None for match in re.finditer(r"\b[A-Z]{2,}\b", answer)}
        changes = [(word, word.capitalize()) for word in words]
    else:
        changes = [(word, word.upper()) for word in sorted(words, key=len, reverse=True) if not word.isupper()]
    for word, changed in changes:
        answer = re.sub(rf"\b{word}\b", changed, answer, count=1)
        if holds(constraint, answer):
            break
    return answer


def _no_comma(answer: str, kwargs: Mapping[str, Any]) -> str:
    return answer.replace(",", "")


def _ending(answer: str, kwargs: Mapping[str, Any]) -> str:
    return f"{answer.rstrip()}\n\n{kwargs['end_phrase']}"


def _repeat(answer: str, kwargs: Mapping[str, Any]) -> str:
    return f"{kwargs['prompt_to_repeat'].strip()}\n\n{answer.lstrip()}"


MENDERS: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
    "length_constraints:number_sentences": _cut_sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _cut_words,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": lambda answer, kwargs: json.dumps({"answer": answer.strip()}, ensure_ascii=False),
    "detectable_format:title": _title,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _ending,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda answer, kwargs: answer.upper(),
    "change_case:english_lowercase": lambda answer, kwargs: answer.lower(),
    "punctuation:no_comma": _no_comma,
    "startend:quotation": lambda answer, kwargs: f'"{answer.strip()}"',
}
