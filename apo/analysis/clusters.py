"""Clusters of pairs: by a label of the dataset, or by k-means of the prompts' features."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError, near_miss
from clair.core.files import content_hash
from clair.data.records import LABELS

if TYPE_CHECKING:
    from torch import Tensor


def clusters_of(rows: Sequence[Mapping[str, Any]], by: str, prompts: Tensor, seed: int = 0) -> list[str]:
    """Return the cluster of each pair: a label, or the nearest of K centres of the prompts' features."""
    match = re.fullmatch(r"kmeans:(\d+)", by)
    names = [f"cluster {index + 1}" for index in kmeans(prompts, int(match[1]), seed)] if match else _labels(rows, by)
    if single := next((name for name in names if names.count(name) < 2), None):
        raise UserError(f"cluster {single!r} has one pair, too few to measure: take it out, or choose another `by`")
    return names


def check_labels(rows: Sequence[Mapping[str, Any]], by: str) -> None:
    """Raise UserError if `by` is a label that a pair lacks, or one of whose values has no two pairs to measure."""
    if by.startswith("kmeans:"):
        return
    counts = Counter[str]()
    for name, row in zip(_labels(rows, by), rows, strict=True):
        counts[name] += row["chosen"] != row["rejected"]
    if few := next((name for name, count in counts.items() if count < 2), None):
        raise UserError(
            f"{by} {few!r} has {counts[few]} pair(s) with different answers, too few to measure: at least 2 are "
            "needed; add some, or take it out"
        )


def _labels(rows: Sequence[Mapping[str, Any]], by: str) -> list[str]:
    if by not in LABELS:
        allowed = ", ".join([*LABELS, "kmeans:K"])
        raise UserError(f"unknown by {by!r}{near_miss(by, [*LABELS, 'kmeans:8'])}; allowed: {allowed}")
    if missing := sum(row.get(by) is None for row in rows):
        complete = ", ".join(name for name in LABELS if all(row.get(name) is not None for row in rows)) or "none"
        raise UserError(f"{missing:,} of {len(rows):,} pairs have no {by!r}; all have: {complete}; or take kmeans:8")
    return [str(row[by]) for row in rows]


def indices_of_shared_prompts(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the indices of the pairs whose prompt occurs in every source, to compare sources on equal prompts."""
    prompts = [content_hash(row["prompt"]) for row in rows]
    sources: dict[str, set[str]] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        sources.setdefault(prompt, set()).add(row["source"])
    all_sources = {row["source"] for row in rows}
    return [index for index, prompt in enumerate(prompts) if sources[prompt] == all_sources]


def kmeans(points: Tensor, k: int, seed: int = 0, *, rounds: int = 50, starts: int = 5) -> list[int]:
    """Return the cluster of each point [n, D], 0 to k - 1: Lloyd's algorithm from k-means++ seeds, best of `starts`."""
    import torch

    if not 1 <= k <= len(points) // 2:
        raise UserError(f"kmeans:{k} of {len(points)} pairs; K is at least 1 and leaves two pairs a cluster")
    random = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor] | None = None
    for _ in range(starts):
        centres = points[torch.randint(len(points), (1,), generator=random)]
        while len(centres) < k:
            distance = torch.cdist(points, centres).min(1).values ** 2 + 1e-12
            centres = torch.cat([centres, points[torch.multinomial(distance, 1, generator=random)]])
        nearest = torch.cdist(points, centres).argmin(1)
        for _ in range(rounds):
            nearest = torch.cdist(points, centres).argmin(1)
            moved = torch.stack(
                [points[nearest == c].mean(0) if (nearest == c).any() else centres[c] for c in range(k)]
            )
            if torch.equal(moved, centres):
                break
            centres = moved
        spread = float((torch.cdist(points, centres).min(1).values ** 2).sum())
        if best is None or spread < best[0]:
            best = spread, nearest
    assert best is not None
    return best[1].tolist()
