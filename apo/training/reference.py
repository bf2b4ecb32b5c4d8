"""Reference log-probs: computed once per model and pair, stored in a cache that runs and sweeps share.

The key holds everything that the numbers depend on: the reference's weights, the token ids as trained on (after any
truncation or drop), the numeric type and the attention that computes them. Learning rate, beta and objective are not
in it. The cache stores chunks of `CHUNK` pairs, so that a killed run loses at most one, and runs that share pairs share
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.models import tensor_cache
from clair.core.files import content_hash
from clair.core.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

CHUNK = 256
"""Pairs per file of the cache, and per unit of work that processes divide among themselves."""
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
NO_CACHE_FOR_STREAMS = (
    "precompute_ref_log_probs=True is not supported with IterableDataset, whose rows are not known in advance; "
    "leave it out, or give a datasets.Dataset"
)
Advance = Callable[[int], None]
"""Reports a number of finished pairs."""
ComputeLogps = Callable[[Sequence[dict[str, Any]], Advance], "tuple[Tensor, Tensor] | Tensor"]
"""Log-probs of both responses of n pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`, and masks), [2, n] or two [n]."""


def chunk_key(identity: Sequence[Any], pairs: Sequence[dict[str, Any]]) -> str:
    """The key of a chunk: a hash of the model's `identity` (weights, type, attention) and of the ids of the pairs."""
    ids = [[pair[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] for pair in pairs]
    masks = [[pair.get(f"{name}_mask") or [] for name in ("chosen", "rejected")] for pair in pairs]
    masked = [masks] if any(mask for both in masks for mask in both) else []
    return content_hash(["reference log-probs 1", list(identity), ids, *masked])


def add_reference_logps(
    dataset: Dataset,
    identity: Sequence[Any],
    compute: ComputeLogps,
    folder: Path | None,
    log: Callable[[str], None],
    *,
    rank: int = 0,
    processes: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    show_progress: Callable[[int], AbstractContextManager[Progress]] = lambda total: nullcontext(Progress("")),
) -> tuple[Dataset, int]:
    """`dataset` with the reference's log-probs as two columns, and the number of pairs this process computed.

    Processes divide the chunks among themselves and `gather` the results, so that each chunk is computed and written
    once, even without a shared file system. Without a `folder` nothing is stored. `show_progress` receives the number
    of pairs that this process has to compute.
    """
    import torch

    def chunk_from(start: int) -> list[dict[str, Any]]:
        return [dict(row) for row in dataset.select(range(start, min(start + CHUNK, len(dataset))))]

    chunks: dict[int, dict[str, Tensor]] = {}
    missing: dict[int, str] = {}
    damaged = []
    for start in range(rank * CHUNK, len(dataset), processes * CHUNK):
        pairs = chunk_from(start)
        key = chunk_key(identity, pairs) if folder else ""
        cached = tensor_cache.load(folder, key, dict.fromkeys(COLUMNS, (len(pairs),))) if folder else None
        if cached is not None:
            chunks[start] = cached
            continue
        missing[start] = key
        if folder and (file := tensor_cache.file_path(folder, key)).exists():
            damaged.append(file)
    if damaged:
        others = f" and {len(damaged) - 1:,} more" if damaged[1:] else ""
        log(f"reference log-probs: damaged and computed again: {damaged[0]}{others}")
    computed = sum(min(CHUNK, len(dataset) - start) for start in missing)
    last_note = None
    with show_progress(computed) as bar:
        for start, key in missing.items():
            values = (column.to(torch.float64).cpu() for column in compute(chunk_from(start), bar.advance))
            chunks[start] = dict(zip(COLUMNS, values, strict=True))
            if folder and (note := tensor_cache.store(folder, key, chunks[start])) and note != last_note:
                last_note = note
                log(f"reference log-probs: {note}")
    gathered = {start: chunk for process in gather(chunks) for start, chunk in process.items()}
    for column in COLUMNS:
        values = torch.cat([gathered[start][column] for start in sorted(gathered)]).tolist()
        dataset = dataset.remove_columns(column) if column in dataset.column_names else dataset
        dataset = dataset.add_column(column, values)  # pyright: ignore[reportCallIssue]  # its decorator hides the rest
    return dataset, computed


@contextmanager
def without_weight_hash() -> Iterator[None]:
    """TRL's trainer is made without a hash of all weights, seconds for each GB: it names TRL's cache, not used here."""
    from trl.trainer import dpo_trainer

    module: Any = dpo_trainer
    hash_module, module.hash_module = module.hash_module, lambda module: ""
    try:
        yield
    finally:
        module.hash_module = hash_module
