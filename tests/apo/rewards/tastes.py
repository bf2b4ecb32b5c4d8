"""Comparisons of users of two opposite tastes."""

from __future__ import annotations

import json
import random

from tests.apo.conftest import NUMBERS

USERS = 8


def taste(rng: random.Random, user: str, likes_numbers: bool, n: int) -> list[dict]:
    """Comparisons of an answer in numbers with one in words, by a user who always prefers the same of the two."""
    rows = []
    for index in range(n):
        question = "what is the " + " ".join(rng.choices(NUMBERS, k=2))
        numbers, prose = " ".join(rng.choices(NUMBERS, k=4)), " ".join(rng.choices(["a", "the", "of", "is"], k=4))
        chosen, rejected = (numbers, prose) if likes_numbers else (prose, numbers)
        rows.append(
            {
                "id": f"{user}-{index}",
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "user": user,
            }
        )
    return rows


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
