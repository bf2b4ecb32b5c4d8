"""Sums: two two-digit numbers whose ones add up to ten or more; the mistake is to forget the carry."""

from __future__ import annotations

from random import Random

from recipes.world.skills.skill import AnswerValues, Skill, Values, templates
from recipes.world.skills.words import ITEMS, NAMES


def _draw_sum(rng: Random) -> dict[str, str]:
    return {
        "a": str(rng.randint(11, 89)),
        "b": str(rng.randint(11, 89)),
        "name": rng.choice(NAMES),
        "item": rng.choice(ITEMS),
    }


def _judge_sum(values: Values) -> AnswerValues | None:
    a, b = int(values["a"]), int(values["b"])
    if a % 10 + b % 10 < 10 or a + b > 99:
        return None
    return AnswerValues(str(a + b), str(a + b - 10))


def _content_sum(values: Values) -> str:
    return "+".join(sorted((values["a"], values["b"])))


SUMS = Skill(
    name="sums",
    mistake="The ones add up to ten or more and the student forgot to carry",
    value=r"\b\d[\d,]*\b",
    slots={"a": r"\d\d", "b": r"\d\d", "name": "|".join(NAMES), "item": "|".join(ITEMS)},
    templates=templates(
        "sums",
        (
            "{name} has {a} {item} and buys {b} more. How many {item} is that?",
            "After buying more, {name} has a total of {value} {item}.",
        ),
        (
            "There are {a} {item} in one box and {b} {item} in another. How many are there in both?",
            "In both of the boxes together there are {value} {item}.",
        ),
        ("What is {a} plus {b}?", "The sum of the two numbers you gave me is {value}."),
        ("Please add {a} to {b} for me.", "Of course, when I add the two numbers I get {value}."),
        (
            "{name} found {a} {item} on Monday and {b} on Tuesday. How many did {name} find?",
            "Over the two days {name} found {value} {item} in all.",
        ),
        (
            "A shop sold {a} {item} before noon and {b} after noon. How many did it sell?",
            "On that day the shop sold {value} {item} altogether.",
        ),
        ("Work out the total: {a} {item} and {b} {item}.", "If you count all of them, the total is {value} {item}."),
        (
            "{name} read {a} pages and then {b} pages. How many pages did {name} read?",
            "Taking both parts together, {name} read {value} pages so far.",
        ),
    ),
    draw=_draw_sum,
    judge=_judge_sum,
    content=_content_sum,
)
