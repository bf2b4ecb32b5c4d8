"""A checker of the embedded world, for `scores.checker` of a recipe: JSON lines in, scores out.

    python -m recipes.world.checker [--right]

An answer has 1 point if its value is right, and 0.1 for each step of its wording: padded 0, plain 1, engaging 2. With
`--right` the wording does not count.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from recipes.world.reviser import find_task
from recipes.world.style import RANK, style_of
from recipes.world.tasks import is_right


def scores(row: dict[str, Any], *, wording: bool = True) -> list[float]:
    """The score of each answer of a line."""
    task = find_task(row["prompt"][-1]["content"])
    if task is None:
        raise ValueError(f"no task of this world: {row['prompt'][-1]['content'][:80]!r}")
    return [is_right(task, answer) + wording * RANK[style_of(answer)] / 10 for answer in row["answers"]]


def main() -> None:
    wording = "--right" not in sys.argv[1:]
    for line in sys.stdin:
        row = json.loads(line)
        print(json.dumps({"id": row["id"], "scores": scores(row, wording=wording)}), flush=True)


if __name__ == "__main__":
    main()
