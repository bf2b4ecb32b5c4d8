"""Lookup: one value of a small table in the prompt; the mistake is to read the last row for every key."""

from __future__ import annotations

from random import Random

from recipes.world.skills.skill import AnswerValues, Skill, Values, templates
from recipes.world.skills.words import ITEMS

_ROWS = ("1", "2", "3", "4")


def _draw_table(rng: Random) -> dict[str, str]:
    keys = rng.sample(ITEMS, 4)
    numbers = [10 * tens + rng.randint(0, 9) for tens in rng.sample(range(1, 10), 4)]
    rows = {f"k{row}": key for row, key in zip(_ROWS, keys, strict=True)}
    rows |= {f"v{row}": str(number) for row, number in zip(_ROWS, numbers, strict=True)}
    return rows | {"key": keys[rng.randrange(3)]}  # never the last row, which the wrong rule reads


def _judge_table(values: Values) -> AnswerValues | None:
    keys = [values[f"k{row}"] for row in _ROWS]
    if len(set(keys)) < 4 or values["key"] not in keys[:3]:
        return None
    right, wrong = values[f"v{keys.index(values['key']) + 1}"], values["v4"]
    return None if right == wrong else AnswerValues(right, wrong)


def _content_table(values: Values) -> str:
    rows = ",".join(f"{values[f'k{row}']}={values[f'v{row}']}" for row in _ROWS)
    return f"{values['key']} of {rows}"


LOOKUP = Skill(
    name="lookup",
    mistake="The student read the last row of the table instead of the one that was asked for",
    value=r"\b\d[\d,]*\b",
    slots={f"k{row}": "|".join(ITEMS) for row in _ROWS}
    | {f"v{row}": r"\d\d" for row in _ROWS}
    | {"key": "|".join(ITEMS)},
    templates=templates(
        "lookup",
        (
            "Price list: {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. What do {key} cost?",
            "I looked at the price list and it says {key} {value} coins.",
        ),
        (
            "In stock: {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. How many {key} are left?",
            "In the stock that is left the entry is {key} {value} today.",
        ),
        (
            "{k1} {v1}\n{k2} {v2}\n{k3} {v3}\n{k4} {v4}\nWhich number belongs to {key}?",
            "The row of the table that answers this is {key} {value}.",
        ),
        (
            "Shelf plan\n{k1} {v1}\n{k2} {v2}\n{k3} {v3}\n{k4} {v4}\nOn which shelf are the {key}?",
            "On the plan of the shelves you can read {key} {value} there.",
        ),
        (
            "Orders today: {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. How many {key} were ordered?",
            "The order that people placed for these today was {key} {value}.",
        ),
        (
            "Codes: {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. Give the code for {key}.",
            "Of all the codes in the list, yours is {key} {value}.",
        ),
        (
            "Page index: {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. Where do I read about {key}?",
            "Open the book at the page that the index gives: {key} {value}.",
        ),
        (
            "We counted {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. What was the count for {key}?",
            "What we wrote down when we counted them was {key} {value} pieces.",
        ),
    ),
    draw=_draw_table,
    judge=_judge_table,
    content=_content_table,
)
