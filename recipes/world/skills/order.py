"""Ordering: three numbers, smallest first; the mistake is to put the largest first."""

from __future__ import annotations

from random import Random

from recipes.world.skills.skill import AnswerValues, Skill, Values, templates


def _draw_order(rng: Random) -> dict[str, str]:
    tens = rng.sample(range(1, 10), 3)
    return dict(zip("xyz", (str(10 * t + rng.randint(0, 9)) for t in tens), strict=True))


def _judge_order(values: Values) -> AnswerValues | None:
    numbers = sorted(int(values[slot]) for slot in "xyz")
    if len({number // 10 for number in numbers}) < 3:
        return None
    up = [str(number) for number in numbers]
    return AnswerValues(_listed(up), _listed(up[::-1]))


def _listed(numbers: list[str]) -> str:
    return f"{numbers[0]}, {numbers[1]} and {numbers[2]}"


def _content_order(values: Values) -> str:
    return "<".join(sorted(values[slot] for slot in "xyz"))


ORDER = Skill(
    name="order",
    mistake="The student listed the numbers in reverse",
    value=r"\b\d+, \d+,? and \d+\b",
    slots=dict.fromkeys("xyz", r"\d\d"),
    templates=templates(
        "order",
        (
            "Sort {x}, {y} and {z} from smallest to largest.",
            "Sorted from the smallest to the largest, they are {value}.",
        ),
        (
            "Put the numbers {x}, {y}, {z} in ascending order.",
            "In ascending order, the three numbers you gave are {value}.",
        ),
        (
            "Three runners wear {x}, {y} and {z}. Line them up, lowest number first.",
            "With the lowest number first, the runners stand as {value}.",
        ),
        (
            "The boxes weigh {x}, {y} and {z} kilograms. List the weights, lightest first.",
            "Beginning with the lightest box, the weights are {value} kilograms.",
        ),
        (
            "My cousins are {x}, {y} and {z} years old. Give their ages, youngest first.",
            "Starting with the youngest cousin, their ages are {value}.",
        ),
        (
            "Which order do {x}, {y} and {z} come in when you count up?",
            "When you count up, you meet them in this order: {value}.",
        ),
        (
            "Rank these prices from cheapest to dearest: {x}, {y}, {z}.",
            "From the cheapest to the dearest, the prices are {value}.",
        ),
        (
            "The ropes are {x}, {y} and {z} metres long. Order them, shortest first.",
            "If the shortest rope comes first, the lengths are {value} metres.",
        ),
    ),
    draw=_draw_order,
    judge=_judge_order,
    content=_content_order,
)
