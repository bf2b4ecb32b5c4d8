"""D4: pairs with a large delta and controlled length, to hold against CLAIR's minimal contrast at equal tokens.

Two writers answer the prompts, both right in fewer regions than the target. As in delta learning (arXiv 2507.06187),
the better writer's answer is chosen without a look at it. The better writer also writes more, so pairs are left out by
the `balance` of a build until winners are not longer on average. Then pairs are taken in order until their answers have
as many tokens as those of the world's CLAIR pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, islice
from pathlib import Path
from random import Random
from typing import Any

from clair.core.errors import UserError
from clair.core.files import read_json, write_json
from recipes.experiments.paper_mini.worlds import (
    TEST_PAIRS,
    Region,
    Sides,
    difficulties,
    prompts,
    region,
    world_of,
)
from recipes.world.style import STYLES, add_style
from recipes.world.tasks import Task, is_right

WRITERS_RIGHT = (0.55, 0.25)
"""The shares of regions in which the two writers are right; the target is right in 0.70."""
WRITERS_WORDING = ((0.3, 0.3, 0.4), (0.3, 0.4, 0.3))
"""The better writer is padded more often."""
MAX_TOKENS_APART = 40
CANDIDATES = 1200
BATCH = 8


def delta_sides(task: Task, difficulty: Mapping[Region, float], rng: Random) -> Sides | None:
    """The answers of the better and the worse writer; None if they are the same."""
    better, worse = (
        add_style(task.right if difficulty[region(task)] < right else task.wrong, rng.choices(STYLES, wording)[0], rng)
        for right, wording in zip(WRITERS_RIGHT, WRITERS_WORDING, strict=True)
    )
    return None if better == worse else (better, worse)


def build_delta(name: str, run: Path, candidates: int = CANDIDATES) -> dict[str, Any]:
    """Write the set `delta` of a world whose CLAIR pairs are there, or read its measurements. Returns them.

    Raises UserError if the balanced candidates have fewer tokens than the CLAIR pairs.
    """
    from clair.data.contrast import contrast_of
    from clair.data.dataset import DatasetWriter, assign_split, read_rows
    from clair.data.records import Pair
    from clair.pipeline.balance import LengthBalance
    from recipes.experiments.paper_mini.models import BASE
    from recipes.world.evaluate import load

    world, folder = world_of(name), run / "worlds" / name
    if (folder / "delta.json").exists():
        return read_json(folder / "delta.json")
    _, tokenizer = load(BASE)

    def tokens(rows: list[dict[str, Any]]) -> int:
        texts = [row[side][-1]["content"] for row in rows for side in ("chosen", "rejected")]
        return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else 0

    difficulty, rng = difficulties(world.seed, "writers"), Random(f"delta-{world.seed}")
    pairs: dict[str, tuple[Task, Sides, dict[str, Any]]] = {}
    balance = LengthBalance(MAX_TOKENS_APART, tokenizer)
    for task in islice(prompts(world), candidates):
        if sides := delta_sides(task, difficulty, rng):
            contrast = contrast_of(*sides)._asdict()
            row = Pair(task.id, [{"role": "user", "content": task.prompt}], *sides, "", {}, contrast).row()
            pairs[task.id] = task, sides, row
            balance.add(row)
    surplus = balance.surplus()
    remaining = {id: pair for id, pair in pairs.items() if id not in surplus}
    clair = list(read_rows(folder / "clair", ["train"]))
    budget = tokens(clair)
    by_split: dict[str, list[str]] = {"train": [], "test": []}
    fraction = TEST_PAIRS / (len(clair) + TEST_PAIRS)
    for id in remaining:
        by_split[assign_split(id, world.seed, fraction)].append(id)
    train = _up_to(by_split["train"], [tokens([remaining[id][2]]) for id in by_split["train"]], budget)
    if len(train) < BATCH or len(by_split["test"]) < TEST_PAIRS:
        raise UserError(f"{name}: {candidates} prompts give too few delta pairs for {budget} tokens; draw more")
    taken = [*train, *by_split["test"][:TEST_PAIRS]]
    writer = DatasetWriter(folder / "delta", seed=world.seed, test_fraction=fraction)
    for id in taken:
        writer.add(remaining[id][2])
    writer.close(keep=True)
    final = LengthBalance(MAX_TOKENS_APART, tokenizer)
    for id in train:
        final.add(remaining[id][2])
    right = [[is_right(remaining[id][0], remaining[id][1][side]) for id in taken] for side in (0, 1)]
    measured = {
        "pairs": len(train),
        "tokens": tokens([remaining[id][2] for id in train]),
        "clair_tokens": budget,
        "left_out": len(surplus) / len(pairs),
        "longer_before": balance.summary()["before"]["mean"],
        "longer": final.summary()["before"]["mean"],
        "winners_right": round(sum(right[0]) / len(taken), 4),
        "losers_right": round(sum(right[1]) / len(taken), 4),
    }
    write_json(folder / "delta.json", measured)
    return measured


def _up_to(ids: list[str], tokens: list[int], budget: int) -> list[str]:
    """The first ids, in whole batches, whose tokens come nearest to the budget from below; none if all have fewer."""
    count = sum(total <= budget for total in accumulate(tokens))
    return ids[: count - count % BATCH] if sum(tokens) >= budget else []
