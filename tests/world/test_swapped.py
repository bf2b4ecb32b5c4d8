"""The swapped control: the same pairs, half of them swapped, in every skill alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.world.swapped import swapped, write_swapped
from recipes.world.tasks import distinct_tasks, solve

ROWS = [
    {
        "id": task.id,
        "prompt": [{"role": "user", "content": task.prompt}],
        "chosen": [{"role": "assistant", "content": task.right}],
        "rejected": [{"role": "assistant", "content": task.wrong}],
    }
    for task in distinct_tasks("train", 401, seed=5)
]


def exchanged(rows: list[dict]) -> list[bool]:
    """Which rows are swapped. Asserts that each is a row of ROWS, swapped or not."""
    swapped = []
    for old, new in zip(ROWS, rows, strict=True):
        assert (old["id"], old["prompt"]) == (new["id"], new["prompt"])
        same = (new["chosen"], new["rejected"]) == (old["chosen"], old["rejected"])
        assert same or (new["chosen"], new["rejected"]) == (old["rejected"], old["chosen"])
        swapped.append(not same)
    return swapped


def test_half_of_the_pairs_are_swapped_in_every_skill() -> None:
    flags = exchanged(swapped(ROWS, seed=0))
    assert sum(flags) in (200, 201)
    per_skill: Counter[str] = Counter()
    for row, flag in zip(ROWS, flags, strict=True):
        per_skill[solve(row["prompt"][0]["content"]).skill] += 1 if flag else -1
    assert len(per_skill) == 5
    assert max(abs(difference) for difference in per_skill.values()) <= 1


def test_which_ones_depends_on_the_seed_alone() -> None:
    assert swapped(ROWS, seed=0) == swapped(ROWS, seed=0)
    assert exchanged(swapped(ROWS, seed=0)) != exchanged(swapped(ROWS, seed=1))


def test_the_mirror_image_swaps_the_other_half() -> None:
    flags, others = exchanged(swapped(ROWS, seed=0)), exchanged(swapped(ROWS, seed=0, mirror=True))
    assert [not flag for flag in flags] == others


def test_the_folder_has_the_layout_and_the_schema_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "pairs/data").mkdir(parents=True)
    for split, rows in (("train", ROWS[:300]), ("test", ROWS[300:])):
        table = pa.Table.from_pylist(rows)
        table = table.append_column("note", pa.nulls(len(rows), pa.string()))  # a type that the rows do not have
        pq.write_table(table, tmp_path / f"pairs/data/{split}-00000-of-00001.parquet")
    write_swapped(tmp_path / "pairs", tmp_path / "out", seed=0)
    for split, count in (("train", 300), ("test", 101)):
        name = f"data/{split}-00000-of-00001.parquet"
        written = pq.read_table(tmp_path / "out" / name)
        assert written.num_rows == count
        assert written.schema == pq.read_table(tmp_path / "pairs" / name).schema
