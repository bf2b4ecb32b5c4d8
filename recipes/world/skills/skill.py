"""What a skill is: how its tasks are worded, what is right, and which wrong rule the student follows.

A skill is data and three small functions. Its wrong rule is systematic (one rule, always the same one), so that a
wrong answer is as fluent as a right one and differs from it in the answer value alone.
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
class Verdict:
    """The right answer value and the one that the wrong rule gives; they always differ."""

    right: str
    wrong: str


@dataclass(frozen=True)
class Skill:
    """A family of tasks.

    `slots` gives the regular expression of each slot of a question; `value` that of an answer value in running text.
    `draw` fills the slots at random. `judge` gives both answer values, or None where the slots make no task of this
    skill (also where the wrong rule happens to be right). `content` names what the task is about, without its
    phrasing, names and things: two tasks with the same content have the same answer.
    """

    name: str
    mistake: str
    value: str
    slots: Mapping[str, str]
    templates: tuple[Template, ...]
    draw: Callable[[Random], dict[str, str]]
    judge: Callable[[Values], Verdict | None]
    content: Callable[[Values], str]


def templates(skill: str, *phrasings: tuple[str, str]) -> tuple[Template, ...]:
    return tuple(Template(f"{skill}-{n}", *phrasing) for n, phrasing in enumerate(phrasings))


def pattern(skill: Skill, template: Template) -> re.Pattern[str]:
    """The expression that inverts a question: one named group per slot; a repeated slot must repeat its text."""
    named_slots: set[str] = set()

    def group(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in named_slots:
            return f"(?P={slot})"
        named_slots.add(slot)
        return f"(?P<{slot}>{skill.slots[slot]})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(template.question)))
