"""Answers with four aspects that are known, in UltraFeedback's format, to read with a real encoder.

    python -m recipes.experiments.vpl.rated --out data/rated.jsonl

Each prompt is a task of the embedded world with four answers. An aspect is a mark that a reader sees: helpful answers
say how they came about, honest ones what they are unsure of, obedient ones end as told, truthful ones have the right
value. Each answer has each mark by a fair coin; its rating in that aspect is 5 or 2, and one less in a tenth of cases.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from clair.core.files import write_atomically
from recipes.world.tasks import Task, distinct_tasks

MARKS = {
    "helpfulness": " I read the question twice, and checked each step that leads there.",
    "honesty": " I may be mistaken, so please check it.",
    "instruction_following": " Done.",
}
ORDER = " End with the word: Done."


def completion(task: Task, random: Random) -> dict[str, Any]:
    """An answer with its marks and ratings, as UltraFeedback writes them."""
    has = {name: random.random() < 0.5 for name in (*MARKS, "truthfulness")}
    marks = "".join(mark for name, mark in MARKS.items() if has[name])
    text = (task.right if has["truthfulness"] else task.wrong) + marks
    ratings = {name: (5 if value else 2) - (random.random() < 0.1) for name, value in has.items()}
    return {"response": text, "annotations": {name: {"Rating": str(value)} for name, value in ratings.items()}}


def rated_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts with four rated answers each."""
    random = Random(f"rated-{seed}")
    return [
        {"instruction": task.prompt + ORDER, "completions": [completion(task, random) for _ in range(4)]}
        for task in distinct_tasks("train", count, seed)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prompts with rated answers whose aspects are known.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, "".join(json.dumps(row) + "\n" for row in rated_rows(args.count, args.seed)))


if __name__ == "__main__":
    main()
