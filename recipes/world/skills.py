"""The five skills of the world: how a task is worded, what is right, and which wrong rule the student follows.

A skill is data and three small functions. Its wrong rule is systematic (one rule, always the same one), so that a
wrong answer is as fluent as a right one and differs from it in the answer value alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

Values = Mapping[str, str]

NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gita",
    "Hugo",
    "Iris",
    "Jon",
    "Kira",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
)
ITEMS = (
    "apples",
    "beads",
    "cards",
    "coins",
    "eggs",
    "figs",
    "jars",
    "keys",
    "lamps",
    "nuts",
    "pears",
    "plums",
    "shells",
    "stamps",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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


def _templates(skill: str, *phrasings: tuple[str, str]) -> tuple[Template, ...]:
    return tuple(Template(f"{skill}-{n}", *phrasing) for n, phrasing in enumerate(phrasings))


# Sums: two two-digit numbers whose ones add up to ten or more; the mistake is to forget the carry.


def _draw_sum(rng: Random) -> dict[str, str]:
    return {
        "a": str(rng.randint(11, 89)),
        "b": str(rng.randint(11, 89)),
        "name": rng.choice(NAMES),
        "item": rng.choice(ITEMS),
    }


def _judge_sum(values: Values) -> Verdict | None:
    a, b = int(values["a"]), int(values["b"])
    if a % 10 + b % 10 < 10 or a + b > 99:
        return None
    return Verdict(str(a + b), str(a + b - 10))


def _content_sum(values: Values) -> str:
    return "+".join(sorted((values["a"], values["b"])))


SUMS = Skill(
    name="sums",
    mistake="The ones add up to ten or more and the student forgot to carry",
    value=r"\b\d[\d,]*\b",
    slots={"a": r"\d\d", "b": r"\d\d", "name": "|".join(NAMES), "item": "|".join(ITEMS)},
    templates=_templates(
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


# Ordering: three numbers, smallest first; the mistake is to put the largest first.


def _draw_order(rng: Random) -> dict[str, str]:
    tens = rng.sample(range(1, 10), 3)
    return dict(zip("xyz", (str(10 * t + rng.randint(0, 9)) for t in tens), strict=True))


def _judge_order(values: Values) -> Verdict | None:
    numbers = sorted(int(values[slot]) for slot in "xyz")
    if len({number // 10 for number in numbers}) < 3:
        return None
    up = [str(number) for number in numbers]
    return Verdict(_listed(up), _listed(up[::-1]))


def _listed(words: list[str]) -> str:
    return f"{words[0]}, {words[1]} and {words[2]}"


def _content_order(values: Values) -> str:
    return "<".join(sorted(values[slot] for slot in "xyz"))


ORDER = Skill(
    name="order",
    mistake="The student listed the numbers in reverse",
    value=r"\b\d+, \d+,? and \d+\b",
    slots=dict.fromkeys("xyz", r"\d\d"),
    templates=_templates(
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


# Conversion: a number of large units in small ones; the mistake is a factor ten times off.

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


def _judge_unit(values: Values) -> Verdict | None:
    factors = UNITS.get((values["large"], values["small"]))
    if factors is None or int(values["n"]) < 1:
        return None
    return Verdict(*(str(int(values["n"]) * factor) for factor in factors))


def _content_unit(values: Values) -> str:
    return f"{values['n']} {values['large']} in {values['small']}"


CONVERT = Skill(
    name="convert",
    mistake="The student used a factor that is ten times off",
    value=r"\b\d[\d,]*\b",
    slots={"n": r"\d{1,3}", "large": _LARGE, "small": _SMALL},
    templates=_templates(
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


# Lookup: one value of a small table in the prompt; the mistake is to read the row below.

_ROWS = ("1", "2", "3", "4")


def _draw_table(rng: Random) -> dict[str, str]:
    keys = rng.sample(ITEMS, 4)
    numbers = rng.sample(range(10, 100), 4)
    rows = {f"k{row}": key for row, key in zip(_ROWS, keys, strict=True)}
    rows |= {f"v{row}": str(number) for row, number in zip(_ROWS, numbers, strict=True)}
    return rows | {"key": keys[rng.randrange(3)]}  # never the last row: there is none below it


def _judge_table(values: Values) -> Verdict | None:
    keys = [values[f"k{row}"] for row in _ROWS]
    if len(set(keys)) < 4 or values["key"] not in keys[:3]:
        return None
    row = keys.index(values["key"]) + 1
    right, wrong = values[f"v{row}"], values[f"v{row + 1}"]
    return None if right == wrong else Verdict(right, wrong)


def _content_table(values: Values) -> str:
    rows = ",".join(f"{values[f'k{row}']}={values[f'v{row}']}" for row in _ROWS)
    return f"{values['key']} of {rows}"


LOOKUP = Skill(
    name="lookup",
    mistake="The student read the row below the one that was asked for",
    value=r"\b\d[\d,]*\b",
    slots={f"k{row}": "|".join(ITEMS) for row in _ROWS}
    | {f"v{row}": r"\d\d" for row in _ROWS}
    | {"key": "|".join(ITEMS)},
    templates=_templates(
        "lookup",
        (
            "Price list: {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. What do {key} cost?",
            "According to the price list, the {key} cost {value} coins.",
        ),
        (
            "In stock: {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. How many {key} are left?",
            "Looking at the stock, the number of {key} left is {value}.",
        ),
        (
            "{k1}: {v1}\n{k2}: {v2}\n{k3}: {v3}\n{k4}: {v4}\nWhich number belongs to {key}?",
            "The number that belongs to {key} in this table is {value}.",
        ),
        (
            "Shelf plan\n{k1} {v1}\n{k2} {v2}\n{k3} {v3}\n{k4} {v4}\nOn which shelf are the {key}?",
            "You will find the {key} on shelf number {value} in the hall.",
        ),
        (
            "Orders today: {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. How many {key} were ordered?",
            "Today the number of {key} that people ordered was {value}.",
        ),
        (
            "Codes: {k1} = {v1}, {k2} = {v2}, {k3} = {v3}, {k4} = {v4}. Give the code for {key}.",
            "In this list of codes, the one for {key} is {value}.",
        ),
        (
            "Page index: {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. Where do I read about {key}?",
            "To read about {key} you have to open page {value} of the book.",
        ),
        (
            "We counted {k1} {v1}, {k2} {v2}, {k3} {v3}, {k4} {v4}. What was the count for {key}?",
            "The count that we wrote down for {key} was {value} pieces.",
        ),
    ),
    draw=_draw_table,
    judge=_judge_table,
    content=_content_table,
)


# Edits: one letter of a code replaced; the mistake is to replace the letter after it.

PLACES = ("first", "second", "third", "fourth")


def _draw_edit(rng: Random) -> dict[str, str]:
    *code, letter = rng.sample(LETTERS, 6)
    return {"code": "".join(code), "letter": letter, "place": rng.choice(PLACES)}


def _judge_edit(values: Values) -> Verdict | None:
    code, letter = values["code"], values["letter"]
    place = PLACES.index(values["place"])
    right, wrong = (code[:at] + letter + code[at + 1 :] for at in (place, place + 1))
    return None if right == wrong else Verdict(right, wrong)


def _content_edit(values: Values) -> str:
    return f"{values['code']}/{values['place']}/{values['letter']}"


EDIT = Skill(
    name="edit",
    mistake="The student changed the letter after the one that was asked for",
    value=r"\b[A-Z]{3,}\b",
    slots={"code": "[A-Z]{5}", "letter": "[A-Z]", "place": "|".join(PLACES)},
    templates=_templates(
        "edit",
        (
            "Replace the {place} letter of {code} with {letter}.",
            "After the change that you asked for, the code reads {value}.",
        ),
        ("Take {code} and make its {place} letter {letter}.", "With that one letter changed, the new code is {value}."),
        (
            "What is {code} when the {place} letter becomes {letter}?",
            "When that letter is changed, the code becomes {value} instead.",
        ),
        (
            "My password {code} needs {letter} as its {place} letter. What is it then?",
            "Then your new password, with one letter changed, is {value}.",
        ),
        ("Put {letter} in the {place} place of {code}.", "Once the letter is put in its place, you have {value}."),
        (
            "The sign {code} has a wrong {place} letter, it should be {letter}. Write the sign.",
            "Written with the letter that it should have, the sign is {value}.",
        ),
        ("Edit {code}: {place} letter to {letter}.", "The edited code, with all other letters kept, is {value}."),
        (
            "Change the {place} letter in the word {code} to {letter}.",
            "Changing only that letter turns the word into {value} for you.",
        ),
    ),
    draw=_draw_edit,
    judge=_judge_edit,
    content=_content_edit,
)

SKILLS: Mapping[str, Skill] = {skill.name: skill for skill in (SUMS, ORDER, CONVERT, LOOKUP, EDIT)}


def pattern(skill: Skill, template: Template) -> re.Pattern[str]:
    """The expression that inverts `template.question`: one named group per slot; a repeated slot must repeat its text."""
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        slot = match[1]
        if slot in seen:
            return f"(?P={slot})"
        seen.add(slot)
        return f"(?P<{slot}>{skill.slots[slot]})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(template.question)))
