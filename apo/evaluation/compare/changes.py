"""The answers whose score differs between the base and a tuned model."""

from __future__ import annotations

from collections.abc import Sequence

from apo.evaluation.results import AnyItem, Results

RIGHT = 0.5
"""The lowest score that counts as right."""


def changed_answers(results: Sequence[Results]) -> list[tuple[int, AnyItem, AnyItem]]:
    """Return (index of the tuned model, the base's item, its item) of each changed score, largest change first."""
    base_items = {item.key: item for item in results[0].items}
    changed = [
        (index, base_items[item.key], item)
        for index, tuned in enumerate(results[1:])
        for item in tuned.items
        if item.key in base_items and item.score != base_items[item.key].score
    ]
    order = {key: number for number, key in enumerate(base_items)}
    return sorted(
        changed, key=lambda change: (-abs(change[2].score - change[1].score), change[0], order[change[1].key])
    )


def change_kind(base: float, tuned: float) -> str:
    """Name the change from the base's score to the tuned model's."""
    if (base >= RIGHT) != (tuned >= RIGHT):
        return "wrong to right" if tuned > base else "right to wrong"
    return "better" if tuned > base else "worse"
