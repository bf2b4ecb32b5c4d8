"""A skill: a family of tasks with its phrasings, its right answers, and the wrong rule that the student follows.

A skill is data and three small functions. Its wrong rule is systematic (always the same rule), so that a wrong answer
is as fluent as a right one and differs from it in the answer value alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

Values = Mapping[str, str]


@dataclass(frozen=True)
class Template:
    """One phrasing: a question, and the sentence that answers it with `{value}` as its last value."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class AnswerValues:
    """The right answer value and the value by the wrong rule; they always differ."""

    right: str
    wrong: str


@dataclass(frozen=True)
class Skill:
    """A family of tasks.

    `slots` has the regular expression of each slot of a question; `value` matches an answer value in running text.
    `draw` fills the slots at random. `judge` returns both answer values, or None if the slots make no task of this
    skill (also if the wrong rule happens to be right). `content` identifies a task without its phrasing, names and
    items: two tasks with the same content have the same answer.
    """

    name: str
    mistake: str
    value: str
    slots: Mapping[str, str]
    templates: tuple[Template, ...]
    draw: Callable[[Random], dict[str, str]]
    judge: Callable[[Values], AnswerValues | None]
    content: Callable[[Values], str]


def templates(skill: str, *phrasings: tuple[str, str]) -> tuple[Template, ...]:
    return tuple(Template(f"{skill}-{n}", *phrasing) for n, phrasing in enumerate(phrasings))


def pattern(skill: Skill, template: Template) -> re.Pattern[str]:
    """The regular expression that parses a question: one named group per slot; a repeated slot must repeat its text."""
    named_slots: set[str] = set()

    def group(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in named_slots:
            return f"(?P={slot})"
        named_slots.add(slot)
        return f"(?P<{slot}>{skill.slots[slot]})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(template.question)))
