"""Reference log-probs: computed once per model and pair, kept in the cache, shared by runs and sweeps.

The key holds everything the numbers depend on: the reference's weights, the token ids as trained on (after any
truncation or drop), the numeric type and the attention that computes them. Learning rate, beta and objective are not
in it. Kept in parts of `PART` pairs, so that a killed run loses one part at most, and runs that share pairs share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo import cache
from clair.recipe import content_hash

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

PART = 2048
"""Pairs in one file."""
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
Compute = Callable[[Sequence[dict[str, Any]]], "tuple[Tensor, Tensor]"]
"""Log-probs of both responses of some pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`), [n] each."""


def part_key(identity: Sequence[Any], pairs: Sequence[dict[str, Any]]) -> str:
    """The key of a part: what computes (`identity`: weights, type, attention) and the ids it is computed on."""
    ids = [[pair[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] for pair in pairs]
    return content_hash(["reference log-probs 1", list(identity), ids])


def with_reference(
    dataset: Dataset,
    identity: Sequence[Any],
    compute: Compute,
    folder: Path,
    tell: Callable[[str], None],
    *,
    rank: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> tuple[Dataset, int]:
    """`dataset` with the reference's log-probs as two columns, and how many pairs this process had to compute.

    Processes share the parts out, `wait` for each other, and read what the others computed.
    """
    import torch

    starts = range(0, len(dataset), PART)
    parts = {start: [dict(row) for row in dataset.select(range(start, min(start + PART, len(dataset))))]
             for start in starts}  # fmt: skip
    keys = {start: part_key(identity, pairs) for start, pairs in parts.items()}
    found: dict[int, dict[str, Tensor]] = {}
    computed = 0

    def obtain(start: int) -> None:
        nonlocal computed
        pairs, file = parts[start], cache.file_of(folder, keys[start])
        kept = cache.load(folder, keys[start], dict.fromkeys(COLUMNS, (len(pairs),)))
        if kept is None:
            if file.exists():
                tell(f"reference log-probs: {file} is damaged, computed anew")
            logps = compute(pairs)
            kept = dict(zip(COLUMNS, (part.to(torch.float64).cpu() for part in logps), strict=True))
            computed += len(pairs)
            note = cache.store(folder, keys[start], kept)
            if note:
                tell(f"reference log-probs: {note}")
        found[start] = kept

    for number, start in enumerate(starts):
        if number % processes == rank:
            obtain(start)
    wait()
    for start in starts:
        if start not in found:
            obtain(start)
    for column in COLUMNS:
        values = torch.cat([found[start][column] for start in starts]).tolist()
        dataset = dataset.remove_columns(column) if column in dataset.column_names else dataset
        dataset = dataset.add_column(column, values)
    return dataset, computed
