"""A control from which nothing should be learned: pairs of which half have chosen and rejected exchanged.

python -m recipes.world.swapped runs/quickstart/pairs runs/quickstart/swapped_pairs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.world.tasks import solve


def swapped(rows: list[dict[str, Any]], seed: int, *, mirror: bool = False) -> list[dict[str, Any]]:
    """The rows in their order, with a random half of each task template swapped.

    `mirror` swaps the other half.

    Exactly half, and half of each skill: a fair coin for each pair leaves some skill with 60 % of its winners on one
    side by chance, and a preference for that side would be learned from it.
    """
    rng = Random(seed)
    drawn = sorted(range(len(rows)), key=lambda index: (_template(rows[index]), rng.random()))
    exchanged = set(drawn[(rng.randrange(2) + mirror) % 2 :: 2])
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if index in exchanged else row
        for index, row in enumerate(rows)
    ]


def _template(row: dict[str, Any]) -> str:
    task = solve(row["prompt"][-1]["content"])
    return task.template if task else ""


def write_swapped(source: Path, out: Path, seed: int, *, mirror: bool = False) -> None:
    """Write the swapped form of a dataset folder's Parquet splits, in the same layout. Deterministic."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    for file in sorted((source / "data").glob("*.parquet")):
        table = pq.read_table(file)
        rows = swapped(table.to_pylist(), seed, mirror=mirror)
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), out / "data" / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Swap chosen and rejected in half of a dataset's pairs.")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mirror", action="store_true", help="swap the other half")
    args = parser.parse_args()
    write_swapped(args.source, args.out, args.seed, mirror=args.mirror)


if __name__ == "__main__":
    main()
