"""Clusters of pairs: by a label, or by k-means of their prompts' features."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clair.core.errors import UserError, near_miss
from clair.data.records import LABELS

if TYPE_CHECKING:
    from torch import Tensor


def clusters_of(rows: Sequence[Mapping[str, Any]], by: str, prompts: Tensor, seed: int = 0) -> list[str]:
    """Return the cluster of each pair: a label, or the nearest of K centres of the prompts' features."""
    if matched := re.fullmatch(r"kmeans:(\d+)", by):
        places = kmeans(prompts, int(matched[1]), seed)
        names = [f"cluster {place + 1}" for place in places]
    else:
        names = _labels(rows, by)
    small = [name for name in dict.fromkeys(names) if names.count(name) < 2]
    if small:
        raise UserError(f"cluster {small[0]!r} has one pair; nothing can be told of it: take it out, or choose another")
    return names


def _labels(rows: Sequence[Mapping[str, Any]], by: str) -> list[str]:
    if by not in LABELS:
        allowed = ", ".join([*LABELS, "kmeans:K"])
        raise UserError(f"unknown by {by!r}{near_miss(by, [*LABELS, 'kmeans:8'])}; allowed: {allowed}")
    without = sum(row.get(by) is None for row in rows)
    if without:
        complete = [name for name in LABELS if all(row.get(name) is not None for row in rows)]
        available = ", ".join(complete) or "none"
        raise UserError(f"{without:,} of {len(rows):,} pairs have no {by!r}; all have: {available}; or take kmeans:8")
    return [str(row[by]) for row in rows]


def indices_of_shared_prompts(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the indices of the pairs whose prompt every source has, to compare sources on equal prompts."""
    from clair.core.files import content_hash

    sources = {row["source"] for row in rows}
    prompts = [content_hash(row["prompt"]) for row in rows]
    have: dict[str, set[str]] = {}
    for row, prompt in zip(rows, prompts, strict=True):
        have.setdefault(prompt, set()).add(row["source"])
    return [index for index, prompt in enumerate(prompts) if have[prompt] == sources]


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
