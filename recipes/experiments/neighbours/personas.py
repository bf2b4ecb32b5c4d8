"""Users who are personas: comparisons of statements, half-synthetic in the manner of PAL's Personas set.

A persona is a sign for each of the Big Five traits. A user with that persona says a statement if its key for its trait
is the persona's sign, and prefers such a statement to one of the other kind. The statements are the 120 items of the
IPIP-NEO-120 (International Personality Item Pool, public domain; Johnson 2014), in statements.tsv. No pair of
statements is in both splits.
"""

from __future__ import annotations

import csv
from pathlib import Path
from random import Random
from typing import Any

STATEMENTS = Path(__file__).with_name("statements.tsv")
TRAITS = "NEOAC"
"""Neuroticism, extraversion, openness, agreeableness, conscientiousness."""
PERSONAS = ("-+++-", "++--+", "--+-+")
"""The signs of each persona's traits; every two agree in some."""
PROMPT = "Which of these would you say of yourself?"
COUNTS = {"train": 100, "test": 40}
"""Comparisons of each user in each split."""


def read_statements() -> list[tuple[str, str, str]]:
    """Return the trait, the key (+ or -) and the text of each statement."""
    with STATEMENTS.open(encoding="utf-8", newline="") as file:
        return [(row["trait"], row["key"], row["statement"]) for row in csv.DictReader(file, delimiter="\t")]


def comparisons(users: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of both splits. User i has persona i mod 3."""
    rng = Random(f"personas-{len(PERSONAS)}-{seed}")
    statements = read_statements()
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in COUNTS}
    in_split: dict[frozenset[str], str] = {}
    for user in range(users):
        signs = dict(zip(TRAITS, PERSONAS[user % len(PERSONAS)], strict=True))
        agreeing = [text for trait, key, text in statements if key == signs[trait]]
        other = [text for trait, key, text in statements if key != signs[trait]]
        for split, count in COUNTS.items():
            number = 0
            while number < count:
                chosen, rejected = rng.choice(agreeing), rng.choice(other)
                if in_split.setdefault(frozenset((chosen, rejected)), split) != split:
                    continue
                pair = {"chosen": chosen, "rejected": rejected, "user": f"u{user}"}
                splits[split].append({"id": f"{split}-{user}-{number}", "prompt": PROMPT, **pair})
                number += 1
    return splits
