"""What the embedded judge says: which of two students' solutions is better, by whether they are right."""

from __future__ import annotations

import re

from recipes.world.reviser import REFUSAL, Plan, Reply, find_task, share, written
from recipes.world.tasks import is_right

VERDICT = "{best_student_solution}"
_TAGGED = r"^<{0}>[ \t]*\n(.*?)\n?^</{0}>[ \t]*$"
_PARTS = tuple(
    re.compile(_TAGGED.format(tag), re.DOTALL | re.MULTILINE)
    for tag in ("task", "student_solution_1", "student_solution_2")
)


def judge(turns: list[str], planned: Plan, *, seed: int, body: str, position_bias: float = 0.0) -> Reply:
    """The judge's reply to a conversation, of which `turns` are the user's.

    `position_bias` is the share of requests in which it prefers the first solution whatever they say.
    """
    if planned.text == "refusal":
        return Reply(REFUSAL, spoilt=planned.text)
    asked = next((turn for turn in reversed(turns) if all(part.search(turn) for part in _PARTS)), None)
    if asked is None:
        return Reply("Please give me a task and two student solutions between their tags.")
    task, first, second = (part.search(asked)[1] for part in _PARTS)
    biased = share(seed, body, "bias") < position_bias
    return written(*_verdict(task, first, second, biased=biased), planned)


def _verdict(task_text: str, first: str, second: str, *, biased: bool) -> tuple[str, str, str]:
    """Reasoning, label and verdict; right beats wrong, and two of a kind tie."""
    task = find_task(task_text)
    if biased:
        return "The first solution reads well, and I like it better.", VERDICT, "[1]"
    right = [task is not None and is_right(task, text) for text in (first, second)]
    if right[0] == right[1]:
        return f"I checked both solutions; {'both are' if right[0] else 'neither is'} right.", VERDICT, "[tie]"
    number = 1 if right[0] else 2
    return f"I solved the task, and solution [{number}] alone has the right answer.", VERDICT, f"[{number}]"
