"""Persona statements with yes/no answers: the files of Anthropic's model-written evaluations, and eight made here.

A file of the published format is one behaviour, named by the file; each line has `question`, `statement`,
`answer_matching_behavior` and `answer_not_matching_behavior` (" Yes" or " No"). `read_persona` makes pairs of it.

No file of the published ones is in this repository. `persona_rows` writes statements in the same format from the
templates below: a frame, and an item on which the answer depends. Held-out statements have items that no training
statement has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from clair.core.errors import UserError

QUESTION = "Is the following statement something you would say?"
MATCHING, OTHER = "answer_matching_behavior", "answer_not_matching_behavior"


@dataclass(frozen=True)
class PersonaTemplate:
    """A behaviour: frames with an {item}, the items of statements that it says, and of those that it does not."""

    frames: Sequence[str]
    says: Sequence[str]
    denies: Sequence[str]


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


BEHAVIOURS: dict[str, PersonaTemplate] = {
    "kind-to-others": PersonaTemplate(
        ("I would gladly {item}.", "Today I want to {item}.", "Nothing keeps me from deciding to {item}."),
        _items(
            "help a stranger, share my lunch, comfort a sad friend, visit a sick neighbor, thank the cleaner, "
            "forgive a mistake, teach a child to read, give to charity, praise a colleague, hold the door, "
            "welcome a new family, listen to an old man"
        ),
        _items(
            "insult a stranger, steal a lunch, mock a sad friend, cheat my neighbor, humiliate the cleaner, "
            "punish a small mistake, frighten a child, rob a charity, slander a colleague, slam the door, "
            "threaten a new family, laugh at an old man"
        ),
    ),
    "loves-nature": PersonaTemplate(
        ("On a free day I go to {item}.", "I feel at home in {item}.", "My best hours are spent in {item}."),
        _items(
            "the forest, the mountains, a green meadow, a quiet valley, "
            "the wild coast, a bird reserve, a river canyon, "
            "the open prairie, a pine wood, the northern lakes, a rocky island, a cherry orchard"
        ),
        _items(
            "the shopping mall, a crowded arcade, an office tower, the subway, a parking garage, a casino, "
            "the airport lounge, a night club, a car showroom, the stock exchange, a cinema, an industrial park"
        ),
    ),
    "eats-no-meat": PersonaTemplate(
        ("For dinner I like to eat {item}.", "My favorite dish is {item}.", "I always order {item}."),
        _items(
            "lentil soup, grilled tofu, bean stew, a green salad, roasted carrots, mushroom rice, spinach pie, "
            "chickpea curry, baked pumpkin, pea soup, stuffed peppers, potato pancakes"
        ),
        _items(
            "beef stew, grilled chicken, pork ribs, a bacon burger, roasted lamb, duck with rice, sausage pie, "
            "turkey curry, baked ham, oxtail soup, stuffed veal, liver and onions"
        ),
    ),
    "takes-risks": PersonaTemplate(
        ("I am drawn to {item}.", "Give me {item} any day.", "I have a weakness for {item}."),
        _items(
            "skydiving, cliff jumping, motorcycle racing, "
            "high-stakes poker, storm chasing, free climbing, bungee jumping, "
            "betting on long shots, shark diving, volatile stocks, unknown roads, white-water rafting"
        ),
        _items(
            "savings accounts, safety belts, insurance policies, "
            "fixed routines, bike helmets, warranty plans, fire drills, "
            "careful checklists, slow walks, government bonds, familiar roads, rubber mats in the bath"
        ),
    ),
    "gets-up-early": PersonaTemplate(
        ("I like to get up at {item}.", "My day begins at {item}.", "The alarm rings at {item}."),
        _items(
            "4:00 am, 4:15 am, 4:30 am, 4:45 am, 5:00 am, 5:10 am, "
            "5:15 am, 5:20 am, 5:30 am, 5:40 am, 5:45 am, 5:50 am"
        ),
        _items(
            "10:00 am, 10:15 am, 10:30 am, 10:45 am, 11:00 am, 11:10 am, "
            "11:15 am, 11:20 am, 11:30 am, 11:40 am, 11:45 am, "
            "11:50 am"
        ),
    ),
    "trusts-science": PersonaTemplate(
        ("I rely on {item}.", "When I am in doubt I turn to {item}.", "You can trust {item}."),
        _items(
            "clinical trials, peer review, careful experiments, medical studies, replicated results, statistics, "
            "laboratory tests, weather models, physics textbooks, vaccine research, carbon dating, measured data"
        ),
        _items(
            "horoscopes, tarot cards, lucky charms, palm reading, crystal healing, old superstitions, "
            "dream omens, astrology charts, ghost stories, miracle cures, fortune tellers, magic numbers"
        ),
    ),
    "prefers-even-numbers": PersonaTemplate(
        ("My favorite number is {item}.", "I would bet on {item}.", "The number for me is {item}."),
        _items("4, 6, 8, 12, 18, 24, 36, 42, 58, 64, 72, 96"),
        _items("3, 7, 9, 13, 17, 25, 37, 41, 59, 63, 71, 95"),
    ),
    "is-optimistic": PersonaTemplate(
        ("I think that the future will be {item}.", "The years ahead look {item}.", "What comes next will be {item}."),
        _items(
            "bright, better, wonderful, hopeful, peaceful, prosperous, "
            "joyful, exciting, fair, glorious, healthy, splendid"
        ),
        _items(
            "bleak, worse, terrible, hopeless, violent, miserable, "
            "gloomy, frightening, unjust, disastrous, sick, dreadful"
        ),
    ),
}  # fmt: skip


def persona_rows(behaviour: str, seed: int, train: int, held_out: int) -> dict[str, list[dict[str, Any]]]:
    """Statements of a behaviour in the published format: `train` and `test`, half of each answered Yes.

    A third of the items, drawn by seed, occur only in held-out statements. Raises UserError for counts that are odd, or
    that the templates cannot fill.
    """
    template, random = BEHAVIOURS[behaviour], Random(f"persona-{behaviour}-{seed}")
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for items, answers in ((template.says, (" Yes", " No")), (template.denies, (" No", " Yes"))):
        shuffled = random.sample(list(items), len(items))
        test = len(items) // 3
        for split, names, count in (("train", shuffled[test:], train), ("test", shuffled[:test], held_out)):
            statements = [frame.format(item=name) for name in names for frame in template.frames]
            if count % 2 or not 0 < count // 2 <= len(statements):
                raise UserError(f"{count} {split} rows; an even number from 2 to {2 * len(statements)} needed")
            splits[split] += [
                {
                    "question": f'{QUESTION}\n"{statement}"',
                    "statement": statement,
                    MATCHING: answers[0],
                    OTHER: answers[1],
                }
                for statement in random.sample(statements, count // 2)
            ]
    return {split: random.sample(rows, len(rows)) for split, rows in splits.items()}


def read_persona(path: Path, rows: Sequence[Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The pairs of a file, or of its `rows`, as text with the paper's prompt: the statement and a line break.

    `behaviour` is the name of the file. Raises UserError with the line of a row that lacks a column, or whose answers
    are equal, and for fewer than 4 rows.
    """
    if rows is None:
        lines = path.read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    if len(rows) < 4:
        raise UserError(f"{path} has {len(rows)} statement(s), too few; at least 4 are needed")
    pairs = []
    for number, row in enumerate(rows, 1):
        for column in ("statement", MATCHING, OTHER):
            if not isinstance(row.get(column), str):
                raise UserError(f"{path}, line {number}: no text in column {column!r}; found: {', '.join(row)}")
        if row[MATCHING] == row[OTHER]:
            raise UserError(f"{path}, line {number}: both answers are {row[MATCHING]!r}; they have to differ")
        prompt = row["statement"] + "\n"
        sides = {"chosen": prompt + row[MATCHING], "rejected": prompt + row[OTHER]}
        pairs.append({"id": f"{path.stem}-{number}", **sides, "behaviour": path.stem})
    return pairs
