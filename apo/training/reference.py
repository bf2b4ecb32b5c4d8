"""Reference log-probs: computed once per model and pair, kept in the cache, shared by runs and sweeps.

The key holds everything the numbers depend on: the reference's weights, the token ids as trained on (after any
truncation or drop), the numeric type and the attention that computes them. Learning rate, beta and objective are not
in it. Kept in parts of `PART` pairs, so that a killed run loses one part at most, and runs that share pairs share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.models import tensor_cache as cache
from clair.core.files import content_hash
from clair.core.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

PART = 256
"""Pairs in one file, and in one piece of work where processes share it out."""
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
Advance = Callable[[int], None]
Compute = Callable[[Sequence[dict[str, Any]], Advance], "tuple[Tensor, Tensor]"]
"""Log-probs of both responses of some pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`, and masks), [n] each."""
Watched = Callable[[int], AbstractContextManager[Progress]]


def chunk_key(identity: Sequence[Any], pairs: Sequence[dict[str, Any]]) -> str:
    """The key of a part: what computes (`identity`: weights, type, attention) and the ids it is computed on."""
    ids = [[pair[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] for pair in pairs]
    masks = [[pair.get(f"{name}_mask") or [] for name in ("chosen", "rejected")] for pair in pairs]
    masked = [masks] if any(mask for both in masks for mask in both) else []
    return content_hash(["reference log-probs 1", list(identity), ids, *masked])


def add_reference_logps(
    dataset: Dataset,
    identity: Sequence[Any],
    compute: Compute,
    folder: Path | None,
    tell: Callable[[str], None],
    *,
    rank: int = 0,
    processes: int = 1,
    exchange: Callable[[Any], list[Any]] = lambda mine: [mine],
    watched: Watched = lambda missing: nullcontext(Progress("")),
) -> tuple[Dataset, int]:
    """`dataset` with the reference's log-probs as two columns, and how many pairs this process had to compute.

    Processes share the parts out and `exchange` what they found, so that each part is computed and written once, also
    where they have no file system in common. Without a `folder` nothing is kept. `watched` is told how many pairs
    this process has to compute; `compute` is handed what to call with every few that are done.
    """
    import torch

    def pairs_from(start: int) -> list[dict[str, Any]]:
        return [dict(row) for row in dataset.select(range(start, min(start + PART, len(dataset))))]

    found: dict[int, dict[str, Tensor]] = {}
    missing: dict[int, str] = {}
    damaged = []
    for start in range(rank * PART, len(dataset), processes * PART):
        pairs = pairs_from(start)
        key = chunk_key(identity, pairs) if folder else ""
        kept = cache.load(folder, key, dict.fromkeys(COLUMNS, (len(pairs),))) if folder else None
        if kept is not None:
            found[start] = kept
            continue
        missing[start] = key
        if folder and (file := cache.file_of(folder, key)).exists():
            damaged.append(file)
    if damaged:
        others = f" and {len(damaged) - 1:,} more" if damaged[1:] else ""
        tell(f"reference log-probs: damaged and computed anew: {damaged[0]}{others}")
    computed = sum(min(PART, len(dataset) - start) for start in missing)
    unwritten = None
    with watched(computed) as work:
        for start, key in missing.items():
            values = (column.to(torch.float64).cpu() for column in compute(pairs_from(start), work.advance))
            found[start] = dict(zip(COLUMNS, values, strict=True))
            if folder and (note := cache.store(folder, key, found[start])) and note != unwritten:
                unwritten = note
                tell(f"reference log-probs: {note}")
    whole = {start: part for theirs in exchange(found) for start, part in theirs.items()}
    for column in COLUMNS:
        values = torch.cat([whole[start][column] for start in sorted(whole)]).tolist()
        dataset = dataset.remove_columns(column) if column in dataset.column_names else dataset
        dataset = dataset.add_column(column, values)
    return dataset, computed
