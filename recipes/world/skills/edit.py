"""Edits: one letter of a code replaced; the mistake is to replace the letter after it."""

from __future__ import annotations

from random import Random

from recipes.world.skills.skill import AnswerValues, Skill, Values, templates
from recipes.world.skills.words import LETTERS

LETTER_POSITIONS = ("first", "second", "third", "fourth")


def _draw_edit(rng: Random) -> dict[str, str]:
    *code, letter = rng.sample(LETTERS, 6)
    return {"code": "".join(code), "letter": letter, "place": rng.choice(LETTER_POSITIONS)}


def _judge_edit(values: Values) -> AnswerValues | None:
    code, letter = values["code"], values["letter"]
    position = LETTER_POSITIONS.index(values["place"])
    right, wrong = (code[:index] + letter + code[index + 1 :] for index in (position, position + 1))
    return None if right == wrong else AnswerValues(right, wrong)


def _content_edit(values: Values) -> str:
    return f"{values['code']}/{values['place']}/{values['letter']}"


EDIT = Skill(
    name="edit",
    mistake="The student changed the letter after the one that was asked for",
    value=r"\b[A-Z]{3,}\b",
    slots={"code": "[A-Z]{5}", "letter": "[A-Z]", "place": "|".join(LETTER_POSITIONS)},
    templates=templates(
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
