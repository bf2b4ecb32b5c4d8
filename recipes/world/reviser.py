"""What the embedded models say: the reviser's minimal correction, the target's answer, and their bad habits.

Everything here is a pure function of the request body and a seed; `server` puts it behind HTTP.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from recipes.world.skills import SKILLS
from recipes.world.tasks import Task, answer_span, is_right, solve

REASONING = "{teacher_reasoning}"
SOLUTION = "{corrected_student_solution}"

# How real replies label their two parts: with colon and without, bold, as a heading, on the same line or the next.
STYLES = (
    f"{REASONING}: %s\n\n{SOLUTION}: %s",
    f"{REASONING}:\n%s\n\n{SOLUTION}:\n%s",
    f"{REASONING}\n%s\n\n{SOLUTION}\n%s",
    f"{REASONING} %s\n\n{SOLUTION} %s",
    f"**{REASONING}**\n%s\n\n**{SOLUTION}**\n%s",
    f"**{REASONING}:** %s\n\n**{SOLUTION}:** %s",
    f"### {REASONING}\n\n%s\n\n### {SOLUTION}\n\n%s",
)
REFUSAL = "I'm sorry, but I can't help with that request."
ALLUSION = "Here is the corrected version of your solution: "
MENTION = f"The right answer stands under {SOLUTION} below. "

_TASK = re.compile(r"^<task>[ \t]*\n(.*?)\n?^</task>[ \t]*$", re.DOTALL | re.MULTILINE)
_STUDENT = re.compile(r"^<student_solution>[ \t]*\n(.*?)\n?^</student_solution>[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Misbehaviour:
    """How often the endpoint misbehaves: shares of distinct requests, each between 0 and 1.

    The first two hit the request before it is answered, one to three times in a row for the same body, then it is
    served. `slow` delays a good answer. The last four spoil the reply's text; a request has at most one of them.
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
class Plan:
    """What happens to one request body: `failures` errors of kind `transport`, then an answer spoilt by `text`."""

    transport: str | None
    failures: int
    slow: bool
    text: str | None
    style: int


@dataclass(frozen=True)
class Reply:
    """An assistant turn and why it ended ("stop" or "length")."""

    text: str
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Request:
    """A revision request, read back from the user message."""

    task: str
    student: str


def share(*parts: object) -> float:
    """A number in [0, 1) that depends on these parts only."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def _drawn(at: float, rates: Misbehaviour, names: tuple[str, ...]) -> str | None:
    for name in names:
        at -= getattr(rates, name)
        if at < 0:
            return name
    return None


def plan(seed: int, body: str, rates: Misbehaviour) -> Plan:
    """What happens to the request whose body has this hash."""
    return Plan(
        transport=_drawn(share(seed, body, "transport"), rates, TRANSPORT),
        failures=1 + int(3 * share(seed, body, "failures")),
        slow=share(seed, body, "slow") < rates.slow,
        text=_drawn(share(seed, body, "text"), rates, TEXT),
        style=int(len(STYLES) * share(seed, body, "style")),
    )


def read_request(message: str) -> Request | None:
    """The task and the student's solution in a revision request, or None where the tags are not there."""
    task, student = _TASK.search(message), _STUDENT.search(message)
    return Request(task[1], student[1]) if task and student else None


def corrected(task: Task, student: str) -> str:
    """The student's text with the wrong value replaced and nothing else touched; unchanged where it is right.

    A text without any answer value cannot be mended and becomes the right sentence.
    """
    if is_right(task, student):
        return student
    span = answer_span(task.skill, student)
    if span is None:
        return task.right
    return student[: span[0]] + task.right_value + student[span[1] :]


def reasoning(task: Task, student: str) -> str:
    """Why the student's text is changed, in two or three sentences."""
    if is_right(task, student):
        return f"I checked the answer step by step. The answer {task.right_value} is right, so I copy every word."
    return (
        f"I solve the task first: the answer is {task.right_value}. {SKILLS[task.skill].mistake}, "
        "so one value must change. Every other word can stay as it is."
    )


def revise(message: str, planned: Plan) -> Reply:
    """The reviser's reply to a user message, misbehaving as planned."""
    if planned.text == "refusal":
        return Reply(REFUSAL)
    request = read_request(message)
    if request is None:
        return Reply("Please give me a task and a student solution between their tags.")
    task = solve(request.task)
    if task is None:
        return _written("This task is not one that I know, so I leave it as it is.", request.student, planned)
    return _written(reasoning(task, request.student), corrected(task, request.student), planned)


def _written(thoughts: str, solution: str, planned: Plan) -> Reply:
    if planned.text == "label_in_reasoning":
        thoughts = MENTION + thoughts
    if planned.text == "allusion":
        solution = ALLUSION + solution
    text = STYLES[planned.style] % (thoughts, solution)
    if planned.text == "truncation":
        # Where a length limit strikes varies: inside the reasoning, or inside the solution, never after its end.
        return Reply(text[: int(len(text) * (0.5 + 0.07 * planned.style))].rstrip(), "length")
    return Reply(text)


def answer(message: str, seed: int, body: str) -> Reply:
    """The target's reply to a bare task: right or by the wrong rule, with equal probability over requests."""
    task = solve(message)
    if task is None:
        return Reply("I am a small model and I do not know how to answer that.")
    return Reply(task.right if share(seed, body, "target") < 0.5 else task.wrong)


def cut(reply: Reply, max_tokens: int | None) -> Reply:
    """The reply within a token limit, counting four characters as a token."""
    if max_tokens is None or len(reply.text) <= 4 * max_tokens:
        return reply
    return Reply(reply.text[: 4 * max_tokens], "length")


def last_user_text(messages: list[Mapping[str, Any]]) -> str:
    """The text of the last user turn, a string or a list of text parts. ValueError where there is none."""
    for message in reversed(messages):
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            if isinstance(content, list):
                return "".join(part.get("text", "") for part in content)
    raise ValueError("messages holds no user turn with text")
