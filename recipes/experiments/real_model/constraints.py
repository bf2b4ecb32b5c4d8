"""Verifiable constraints: parameters drawn by seed, wording of our own, and the checkers of `if-verifiable`.

The 25 types are those of IFEval's registry. Texts and parameters are drawn here; whether an answer holds a constraint
is decided by the library alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from apo.evaluation.ifeval.checkers import follows, instruction_types

UNSEEN = 8
"""Constraint types that never occur in training."""
SEEN_WEIGHTS = {True: 8, False: 1}
"""How often a type is drawn, by whether the reviser program can mend it: it makes pairs of these alone."""


@dataclass(frozen=True)
class Constraint:
    """One constraint of a prompt: its type in the registry, the checker's parameters, and the sentence that asks it."""

    type: str
    kwargs: Mapping[str, Any]
    text: str


@dataclass(frozen=True)
class Kind:
    """A constraint type: its wordings, and how its parameters are drawn for a task.

    Every parameter stands in each wording as {name}; a list is written as `"a" and "b"`.
    """

    wordings: Sequence[str]
    draw: Callable[[Random, str], dict[str, Any]] = lambda random, task: {}
    mendable: bool = False
    """True if the reviser program can mend an answer without new content."""


_COMMON = ("people", "simple", "because", "always", "great", "useful", "different", "really", "start", "often")
_ENDINGS = ("That is all for now.", "Hope this helps!", "Over to you.", "Thanks for reading.")
_LANGUAGES = {"de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "pt": "Portuguese"}
_FIRST_WORDS = ("today", "first", "many", "however", "finally")


def _topic_words(task: str) -> list[str]:
    """Longer words of the task, in order, then common ones: they are likely to occur in an answer."""
    return list(dict.fromkeys([*re.findall(r"\b[a-z]{5,10}\b", task), *_COMMON]))


def _words(random: Random, task: str, count: int) -> list[str]:
    return sorted(random.sample(_topic_words(task)[:12], count))


def _limit(name: str, values: Sequence[int], relation: str, relations: Sequence[str]) -> Callable[..., dict[str, Any]]:
    return lambda random, task: {name: random.choice(values), relation: random.choice(relations)}


LESS, LEAST = "less than", "at least"
KINDS: dict[str, Kind] = {
    "keywords:existence": Kind(
        ("Work the words {keywords} into your text.", "The words {keywords} have to occur somewhere in it."),
        lambda random, task: {"keywords": _words(random, task, 2)},
    ),
    "keywords:frequency": Kind(
        ("Use the word {keyword} {relation} {frequency} times.", "{keyword} must occur {relation} {frequency} times."),
        lambda random, task: {
            "keyword": _words(random, task, 1)[0], "relation": random.choice((LESS, LEAST)),
            "frequency": random.randint(2, 3),
        },
    ),
    "keywords:forbidden_words": Kind(
        ("Stay away from the words {forbidden_words}.", "You may not use any of these words: {forbidden_words}."),
        lambda random, task: {"forbidden_words": _words(random, task, 2)},
    ),
    "keywords:letter_frequency": Kind(
        ("The letter {letter} has to show up {let_relation} {let_frequency} times.",),
        lambda random, task: {
            "letter": random.choice("bcdfghkmpvwy"), "let_relation": random.choice((LESS, LEAST)),
            "let_frequency": random.randint(4, 12),
        },
    ),
    "language:response_language": Kind(
        ("Reply in {language} from beginning to end.", "Every sentence of your reply has to be in {language}."),
        lambda random, task: {"language": random.choice(sorted(_LANGUAGES))},
    ),
    "length_constraints:number_sentences": Kind(
        ("Write {relation} {num_sentences} sentences.", "Its length: {relation} {num_sentences} sentences."),
        lambda random, task: {"num_sentences": random.randint(3, 6), "relation": random.choice((LESS, LESS, LEAST))},
        mendable=True,
    ),
    "length_constraints:number_paragraphs": Kind(
        ("Split it into {num_paragraphs} paragraphs with a line of three asterisks (***) between them.",),
        lambda random, task: {"num_paragraphs": random.randint(2, 3)},
        mendable=True,
    ),
    "length_constraints:number_words": Kind(
        ("Use {relation} {num_words} words.", "Its length has to be {relation} {num_words} words."),
        lambda random, task: {"num_words": random.choice((30, 40, 50, 60, 80)), "relation": LESS}
        if random.random() < 0.75
        else {"num_words": random.choice((60, 80, 100)), "relation": LEAST},
        mendable=True,
    ),
    "length_constraints:nth_paragraph_first_word": Kind(
        (
            "Make it {num_paragraphs} paragraphs, with an empty line between them and no other empty line, and let "
            "paragraph number {nth_paragraph} begin with the word {first_word}.",
        ),
        lambda random, task: {
            "num_paragraphs": 2, "nth_paragraph": random.randint(1, 2), "first_word": random.choice(_FIRST_WORDS),
        },
    ),
    "detectable_content:number_placeholders": Kind(
        (
            "Leave {num_placeholders} or more gaps to fill in, each named in square brackets, as in [city].",
            "Put {num_placeholders} or more fields in square brackets into the text, such as [date].",
        ),
        lambda random, task: {"num_placeholders": random.randint(1, 3)},
        mendable=True,
    ),
    "detectable_content:postscript": Kind(
        ("After the text, add a note that begins with {postscript_marker}", "Close with a {postscript_marker} note."),
        lambda random, task: {"postscript_marker": random.choice(("P.S.", "P.P.S"))},
        mendable=True,
    ),
    "detectable_format:number_bullet_lists": Kind(
        (
            "Give it a list of exactly {num_bullets} bullet points, each on a line that starts with *",
            "Exactly {num_bullets} lines must be bullet points that start with *",
        ),
        lambda random, task: {"num_bullets": random.randint(2, 4)},
        mendable=True,
    ),
    "detectable_format:constrained_response": Kind(
        ('Reply with one of these only: "My answer is yes.", "My answer is no.", "My answer is maybe."',),
    ),
    "detectable_format:number_highlighted_sections": Kind(
        (
            "Mark {num_highlights} or more phrases with asterisks, *like this*.",
            "Set {num_highlights} or more passages in *asterisks* so that they stand out.",
        ),
        lambda random, task: {"num_highlights": random.randint(1, 3)},
        mendable=True,
    ),
    "detectable_format:multiple_sections": Kind(
        ('Divide it into {num_sections} sections headed "{section_spliter} 1", "{section_spliter} 2" and so on.',),
        lambda random, task: {
            "num_sections": random.randint(2, 3), "section_spliter": random.choice(("Section", "SECTION")),
        },
        mendable=True,
    ),
    "detectable_format:json_format": Kind(
        ("Write nothing but one valid JSON value.", "Your whole reply has to parse as JSON."), mendable=True
    ),
    "detectable_format:title": Kind(
        ("Put a heading in double angle brackets, as in <<my heading>>.", "Add a title of the form <<title>>."),
        mendable=True,
    ),
    "combination:two_responses": Kind(
        ("Write two versions that differ, with a line of six asterisks (******) between them and nowhere else.",),
    ),
    "combination:repeat_prompt": Kind(
        (
            "Begin by copying the request above exactly as it stands, without this sentence; your reply comes after.",
        ),
        lambda random, task: {"prompt_to_repeat": task},
        mendable=True,
    ),
    "startend:end_checker": Kind(
        ('The last words have to be "{end_phrase}"', 'End with "{end_phrase}" and write nothing more.'),
        lambda random, task: {"end_phrase": random.choice(_ENDINGS)},
        mendable=True,
    ),
    "change_case:capital_word_frequency": Kind(
        ("Write {capital_relation} {capital_frequency} words in capitals only.",),
        lambda random, task: {
            "capital_frequency": random.randint(2, 5), "capital_relation": random.choice((LESS, LEAST, LEAST)),
        },
        mendable=True,
    ),
    "change_case:english_capital": Kind(
        ("Write it in English and in CAPITALS from start to end.", "Use capital letters only, and English."),
        mendable=True,
    ),
    "change_case:english_lowercase": Kind(
        ("Write it in English and never use a capital letter.", "Use small letters only, and English."),
        mendable=True,
    ),
    "punctuation:no_comma": Kind(
        ("Do without commas altogether.", "There may not be a single comma in it."), mendable=True
    ),
    "startend:quotation": Kind(
        ("Put double quotation marks around your reply as a whole.", "Open and close your reply with a \" mark."),
        mendable=True,
    ),
}  # fmt: skip
TYPES = tuple(sorted(KINDS))


def unseen_types(seed: int) -> frozenset[str]:
    """The constraint types that never occur in training."""
    return frozenset(Random(f"unseen-{seed}").sample(TYPES, UNSEEN))


def worded(value: Any) -> str:
    """A parameter as it stands in a sentence."""
    if isinstance(value, str):
        return _LANGUAGES.get(value, value)
    return " and ".join(f'"{item}"' for item in value) if isinstance(value, list) else str(value)


def draw_constraint(type: str, task: str, random: Random) -> Constraint:
    """A constraint of this type with parameters and wording drawn for the task."""
    kind = KINDS[type]
    kwargs = kind.draw(random, task)
    text = random.choice(kind.wordings)
    return Constraint(type, kwargs, text.format(**{name: worded(value) for name, value in kwargs.items()}))


def draw_constraints(task: str, allowed: Sequence[str], random: Random) -> list[Constraint]:
    """One or two constraints that do not exclude each other, in random order, of the allowed types."""
    count, drawn = 1 if random.random() < 0.75 else 2, []
    while len(drawn) < count:
        remaining = [type for type in allowed if all(compatible(type, other.type) for other in drawn)]
        if not remaining:
            break
        weights = [SEEN_WEIGHTS[KINDS[type].mendable] for type in remaining]
        drawn.append(draw_constraint(random.choices(remaining, weights)[0], task, random))
    return drawn


def compatible(first: str, second: str) -> bool:
    """True if one answer can hold both types, by the registry's table of conflicts."""
    conflicts = _conflicts()
    return second not in conflicts[first] and first not in conflicts[second]


@cache
def _conflicts() -> Mapping[str, Any]:
    """The types that each type excludes, by the library's registry."""
    types = instruction_types()
    assert set(types) == set(KINDS), "the library's registry has other types than this module"
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_CONFLICTS

    return INSTRUCTION_CONFLICTS


def held(constraints: Sequence[Constraint], answer: str) -> list[bool]:
    """For each constraint, whether the answer holds it strictly, by the library's checker."""
    types, kwargs = [constraint.type for constraint in constraints], [constraint.kwargs for constraint in constraints]
    return [strict for _, strict in follows("", types, kwargs, answer)]


def holds(constraint: Constraint, answer: str) -> bool:
    """True if the answer holds the constraint strictly."""
    return held([constraint], answer)[0]
