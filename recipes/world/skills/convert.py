"""Conversion: a number of large units in small ones; the mistake is a factor ten times off."""

from __future__ import annotations

from random import Random

from recipes.world.skills.skill import AnswerValues, Skill, Values, templates

UNITS = {  # (large, small): (factor, the student's factor)
    ("kilometres", "metres"): (1000, 100),
    ("metres", "centimetres"): (100, 10),
    ("metres", "millimetres"): (1000, 100),
    ("centimetres", "millimetres"): (10, 100),
    ("kilograms", "grams"): (1000, 100),
    ("tonnes", "kilograms"): (1000, 100),
    ("litres", "millilitres"): (1000, 100),
    ("litres", "decilitres"): (10, 100),
    ("euros", "cents"): (100, 10),
    ("centuries", "years"): (100, 10),
}
_LARGE = "|".join(sorted({large for large, _ in UNITS}))
_SMALL = "|".join(sorted({small for _, small in UNITS}))


def _draw_unit(rng: Random) -> dict[str, str]:
    large, small = rng.choice(list(UNITS))
    return {"n": str(rng.randint(2, 99)), "large": large, "small": small}


def _judge_unit(values: Values) -> AnswerValues | None:
    factors = UNITS.get((values["large"], values["small"]))
    if factors is None or int(values["n"]) < 1:
        return None
    right, wrong = (str(int(values["n"]) * factor) for factor in factors)
    return AnswerValues(right, wrong)


def _content_unit(values: Values) -> str:
    return f"{values['n']} {values['large']} in {values['small']}"


CONVERT = Skill(
    name="convert",
    mistake="The student used a factor that is ten times off",
    value=r"\b\d[\d,]*\b",
    slots={"n": r"\d{1,3}", "large": _LARGE, "small": _SMALL},
    templates=templates(
        "convert",
        ("How many {small} are {n} {large}?", "If you convert {large} to {small}, you get {value} {small}."),
        ("Convert {n} {large} to {small}.", "Converted to the smaller unit, that makes {value} {small}."),
        ("I have {n} {large}. What is that in {small}?", "What you have is the same as {value} {small}."),
        ("Express {n} {large} in {small}, please.", "Expressed in the unit you asked for, it is {value} {small}."),
        ("Write {n} {large} as {small}.", "Written as {small}, the same amount is {value} {small}."),
        (
            "A label says {n} {large}. How much is it in {small}?",
            "The amount on the label is equal to {value} {small}.",
        ),
        ("Tell me the number of {small} in {n} {large}.", "The number of {small} in that amount is {value}."),
        (
            "My form wants {small}, but I only know it is {n} {large}. What do I enter?",
            "In the form you should enter {value} as the number of {small}.",
        ),
    ),
    draw=_draw_unit,
    judge=_judge_unit,
    content=_content_unit,
)
