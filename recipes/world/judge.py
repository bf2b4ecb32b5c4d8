"""The replies of the embedded judges: one compares two solutions by correctness and then by style; all give scores."""

from __future__ import annotations

import re
from dataclasses import dataclass

from recipes.world.reviser import REFUSAL, ReplyPlan, ServedReply, find_task, read_request, share, written
from recipes.world.style import RANK, style_of
from recipes.world.tasks import is_right

VERDICT = "{best_student_solution}"
SCORE = "{student_solution_score}"
SECOND_JUDGE_ERROR = 0.15
_TAGGED = r"^<{0}>[ \t]*\n(.*?)\n?^</{0}>[ \t]*$"
_SECTIONS = tuple(
    re.compile(_TAGGED.format(tag), re.DOTALL | re.MULTILINE)
    for tag in ("task", "student_solution_1", "student_solution_2")
)


@dataclass(frozen=True)
class Leanings:
    """The judge's biases: shares of requests between 0 and 1, and whether style counts."""

    position_bias: float = 0.0  # prefers the first solution regardless of its content
    length_bias: float = 0.0  # prefers the longer solution regardless of its content
    judge_error: float = 0.0  # reverses its verdict
    style: bool = False  # of two right or two wrong solutions, prefers the better style


def judge(
    turns: list[str], planned: ReplyPlan, *, seed: int, body: str, leanings: Leanings = Leanings()
) -> ServedReply:
    """The judge's reply to a conversation with the user turns `turns`."""
    if planned.text == "refusal":
        return ServedReply(REFUSAL, spoilt=planned.text)
    request = next(filter(None, map(read_sections, reversed(turns))), None)
    if request is None:
        return ServedReply("Please give me a task and two student solutions between their tags.")
    task, first, second = request
    if share(seed, body, "bias") < leanings.position_bias:
        thoughts, better = "The first solution reads well, and I like it better.", 1
    elif len(first) != len(second) and share(seed, body, "length") < leanings.length_bias:
        thoughts, better = "The longer solution says more, and I like it better.", 1 if len(first) > len(second) else 2
    else:
        thoughts, better = compare_solutions(task, first, second, style=leanings.style)
        if better and share(seed, body, "judge error") < leanings.judge_error:
            better = 3 - better
    return written(thoughts, VERDICT, f"[{better}]" if better else "[tie]", planned)


def score(turns: list[str], planned: ReplyPlan, *, seed: int, body: str, second: bool) -> ServedReply:
    """A judge's score of one solution, 1 to 10: 7 if it is right and 2 if not, and 1 more for each step of its style.

    The `second` judge does not look at style, and is wrong about `SECOND_JUDGE_ERROR` of the solutions.
    """
    request = next(filter(None, map(read_request, reversed(turns))), None)
    if request is None:
        return ServedReply("Please give me a task and a student solution between their tags.")
    task = find_task(request.task)
    right = task is not None and is_right(task, request.student)
    if second and share(seed, body, "second judge") < SECOND_JUDGE_ERROR:
        right = not right
    points = (7 if right else 2) + (0 if second else RANK[style_of(request.student)])
    return written(f"I solved the task; the solution is {'right' if right else 'wrong'}.", SCORE, str(points), planned)


def read_sections(message: str) -> list[str] | None:
    """The task and the two solutions in a request to the judge; None if a tag is missing."""
    matches = [section.search(message) for section in _SECTIONS]
    return None if None in matches else [match[1] for match in matches if match]


def compare_solutions(task_text: str, first: str, second: str, *, style: bool) -> tuple[str, int]:
    """The reasoning and the number of the better solution, by correctness and then by style; 0 for a tie."""
    task = find_task(task_text)
    right = [task is not None and is_right(task, text) for text in (first, second)]
    if right[0] != right[1]:
        number = 1 if right[0] else 2
        return f"I solved the task, and solution [{number}] alone has the right answer.", number
    alike = f"I checked both solutions; {'both are' if right[0] else 'neither is'} right."
    ranks = [RANK[style_of(text)] for text in (first, second)]
    if not style or ranks[0] == ranks[1]:
        return alike, 0
    number = 1 if ranks[0] > ranks[1] else 2
    return f"{alike} Solution [{number}] is better worded.", number
