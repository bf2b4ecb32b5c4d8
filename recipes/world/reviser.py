"""The replies of the embedded reviser and target: minimal corrections, right and wrong answers, and misbehaviour.

Everything here is a pure function of the request body and a seed; `server` serves it over HTTP.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

from recipes.world.skills import SKILLS
from recipes.world.style import add_style, improve_style
from recipes.world.tasks import Task, answer_span, is_right, solve

REASONING = "{teacher_reasoning}"
SOLUTION = "{corrected_student_solution}"
EDITS = "{minimal_edits}"

# The ways in which real replies label their two parts: with or without a colon, bold, as a heading, on the same line or
# the next. The slots are: first label, reasoning, second label, the requested text.
STYLES = (
    "{0}: {1}\n\n{2}: {3}",
    "{0}:\n{1}\n\n{2}:\n{3}",
    "{0}\n{1}\n\n{2}\n{3}",
    "{0} {1}\n\n{2} {3}",
    "**{0}**\n{1}\n\n**{2}**\n{3}",
    "**{0}:** {1}\n\n**{2}:** {3}",
    "### {0}\n\n{1}\n\n### {2}\n\n{3}",
)
BLOCK_STYLES = tuple(index for index, style in enumerate(STYLES) if "\n{3}" in style)  # edits are blocks of lines
REFUSAL = "I'm sorry, but I can't help with that request."
ALLUSION = "Here is the corrected version of your solution: "
MENTION = "The right answer stands under {0} below. "

_TASK = re.compile(r"^<task>[ \t]*\n(.*?)\n?^</task>[ \t]*$", re.DOTALL | re.MULTILINE)
_STUDENT = re.compile(r"^<student_solution>[ \t]*\n(.*?)\n?^</student_solution>[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Misbehaviour:
    """The rates of misbehaviour: shares of distinct requests, each between 0 and 1.

    The first two refuse a request one to three times before it is answered. `slow` delays a good answer. The last four
    spoil the reply's text; a request has at most one of them.
    """

    too_many: float = 0.0  # 429 with Retry-After
    server_error: float = 0.0  # 500
    slow: float = 0.0
    refusal: float = 0.0
    label_in_reasoning: float = 0.0
    truncation: float = 0.0  # finish_reason "length"
    allusion: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; a rate lies between 0 and 1")
        for group in (TRANSPORT, TEXT):
            if (total := sum(getattr(self, name) for name in group)) > 1:
                raise ValueError(f"the rates of {', '.join(group)} add up to {total:.3g}; at most 1 is possible")


TRANSPORT = ("too_many", "server_error")
TEXT = ("refusal", "label_in_reasoning", "truncation", "allusion")


@dataclass(frozen=True)
class ReplyPlan:
    """The plan for one request body: `failures` errors of kind `transport`, then an answer spoilt by `text`."""

    transport: str | None
    failures: int
    slow: bool
    text: str | None
    style: int


@dataclass(frozen=True)
class ServedReply:
    """An assistant turn, its finish reason ("stop" or "length"), and the misbehaviour that spoilt it, if any.

    `refusal` is the message of a refusal in OpenAI's own field.
    """

    text: str
    finish_reason: str = "stop"
    spoilt: str | None = None
    refusal: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Request:
    """A revision request, parsed from a user message; `edits`: it requests edits instead of a whole solution."""

    task: str
    student: str
    edits: bool


def share(*values: object) -> float:
    """A number in [0, 1) by the hash of these values."""
    digest = hashlib.sha256("\x1f".join(map(str, values)).encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def _draw_misbehaviour(number: float, rates: Misbehaviour, names: tuple[str, ...]) -> str | None:
    for name in names:
        number -= getattr(rates, name)
        if number < 0:
            return name
    return None


def plan_reply(seed: int, body: str, rates: Misbehaviour) -> ReplyPlan:
    """The plan for the request whose body has this hash."""
    return ReplyPlan(
        transport=_draw_misbehaviour(share(seed, body, "transport"), rates, TRANSPORT),
        failures=1 + int(3 * share(seed, body, "failures")),
        slow=share(seed, body, "slow") < rates.slow,
        text=_draw_misbehaviour(share(seed, body, "text"), rates, TEXT),
        style=int(len(STYLES) * share(seed, body, "style")),
    )


def read_request(message: str) -> Request | None:
    """Parse a revision request; None if the tags are missing."""
    task, student = _TASK.search(message), _STUDENT.search(message)
    return Request(task[1], student[1], EDITS in message) if task and student else None


def find_task(text: str) -> Task | None:
    """The task in a text: the whole text, or the last user turn of a conversation."""
    return solve(text) or solve(text.rpartition("User:\n")[2])


def corrected(task: Task, student: str) -> str:
    """The student's text with the wrong value replaced and nothing else changed; a right text is unchanged.

    A text without an answer value cannot be corrected and becomes the right sentence.
    """
    if is_right(task, student):
        return student
    span = answer_span(task.skill, student)
    if span is None:
        return task.right
    return student[: span[0]] + task.right_value + student[span[1] :]


def reasoning(task: Task, student: str) -> str:
    """The reviser's reasoning about the student's text, in two or three sentences."""
    if is_right(task, student):
        return f"I checked the answer step by step. The answer {task.right_value} is right, so I copy every word."
    return (
        f"I solve the task first: the answer is {task.right_value}. {SKILLS[task.skill].mistake}, "
        "so one value must change. Every other word can stay as it is."
    )


def revise(turns: list[str], planned: ReplyPlan, *, polish: bool = False, mistaken: bool = False) -> ServedReply:
    """The reviser's reply to a conversation with the user turns `turns`, misbehaving as planned.

    With `polish` it also removes needless words and makes the text engaging; with `mistaken` it overlooks a wrong
    value. When its first reply could not be parsed and it is asked again, it does not misbehave.
    """
    request = next(filter(None, map(read_request, reversed(turns))), None)
    if request is None:
        return ServedReply("Please give me a task and a student solution between their tags.")
    if read_request(turns[-1]) is None:
        planned = replace(planned, text=None, style=0)
    if planned.text == "refusal":
        return ServedReply(REFUSAL, spoilt=planned.text)
    task = find_task(request.task)
    thoughts = reasoning(task, request.student) if task else "I do not know such tasks, so I leave it as it is."
    solution = corrected(task, request.student) if task and not mistaken else request.student
    if polish:
        solution = improve_style(solution)
    if planned.text == "allusion":
        solution = ALLUSION + solution
    if request.edits:
        block_plan = replace(planned, style=BLOCK_STYLES[planned.style % len(BLOCK_STYLES)])
        return written(thoughts, EDITS, edits(request.student, solution), block_plan)
    return written(thoughts, SOLUTION, solution, planned)


def edits(student: str, solution: str) -> str:
    """One find/replace block that turns the student's text into the solution, or `none` if they are equal.

    The block has the words that differ, with as many words before them as make it unique in the student's text.
    """
    if student == solution:
        return "none"
    old, new = student.split(" "), solution.split(" ")
    end = _common(old[::-1], new[::-1])
    start = min(_common(old, new), len(old) - end, len(new) - end)
    while start and (start == len(old) - end or student.count(" ".join(old[start : len(old) - end])) != 1):
        start -= 1
    find, replacement = (" ".join(side[start : len(side) - end]) for side in (old, new))
    return f"<<<<<<< FIND\n{find}\n=======\n{replacement}\n>>>>>>> REPLACE"


def _common(first: list[str], second: list[str]) -> int:
    """The number of first words that two lists share."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), min(len(first), len(second)))


def written(thoughts: str, label: str, result: str, planned: ReplyPlan) -> ServedReply:
    """A reply in the method's two parts, in the planned style, spoilt as planned."""
    if planned.text == "label_in_reasoning":
        thoughts = MENTION.format(label) + thoughts
    text = STYLES[planned.style].format(REASONING, thoughts, label, result)
    if planned.text == "truncation":
        # Where a length limit strikes varies: inside the reasoning, or inside the solution, never after its end.
        return ServedReply(text[: int(len(text) * (0.5 + 0.07 * planned.style))].rstrip(), "length", planned.text)
    return ServedReply(text, spoilt=planned.text)


STRONGER_RIGHT, STRONGER_PADDED = 0.95, 0.5


def answer(message: str, seed: int, body: str, *, stronger: bool = False) -> ServedReply:
    """The target's reply to a bare task: right or by the wrong rule, with equal probability over requests.

    The `stronger` model is right in `STRONGER_RIGHT` of its replies, and wordy in `STRONGER_PADDED` of them.
    """
    task = find_task(message)
    if task is None:
        return ServedReply("I am a small model and I do not know how to answer that.")
    text = task.right if share(seed, body, "target") < (STRONGER_RIGHT if stronger else 0.5) else task.wrong
    if stronger and share(seed, body, "wordy") < STRONGER_PADDED:
        text = add_style(text, "padded", Random(body))
    return ServedReply(text)


def truncate(reply: ServedReply, max_tokens: int | None) -> ServedReply:
    """The reply within a token limit, counting four characters as a token."""
    if max_tokens is None or len(reply.text) <= 4 * max_tokens:
        return reply
    return replace(reply, text=reply.text[: 4 * max_tokens], finish_reason="length")


def user_texts(messages: list[Mapping[str, Any]]) -> list[str]:
    """The texts of the user's turns, each a string or a list of text parts. Raises ValueError if there is none."""
    texts = []
    for message in messages:
        content = message.get("content")
        if message.get("role") == "user" and isinstance(content, str):
            texts.append(content)
        elif message.get("role") == "user" and isinstance(content, list):
            texts.append("".join(block.get("text", "") for block in content))
    if not texts:
        raise ValueError("messages holds no user turn with text")
    return texts
