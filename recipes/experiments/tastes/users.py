"""Users who compare two wordings of the same right answer: one group, or two groups with opposite tastes.

    group 0     engaging before plain before padded, as the world does
    group 1     the other way round

The groups' preferences are exact opposites. So the win rates of one policy for the two groups add up to 1; only their
distribution can differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from recipes.world.style import RANK, STYLES, add_style, style_of
from recipes.world.tasks import distinct_tasks


def liking(text: str, group: int) -> int:
    """A group's rating of the style of a text: 0, 1 or 2."""
    rank = RANK[style_of(text)]
    return rank if group == 0 else 2 - rank


def group_of(user: str, groups: int) -> int:
    """The true group of a user of `comparisons`."""
    return int(user.removeprefix("u")) % groups


def comparisons(users: int, each: int, seed: int, *, groups: int = 2, noise: float = 0.05) -> list[dict[str, Any]]:
    """Rows with id, prompt, chosen, rejected and user; a share `noise` of the choices are reversed."""
    rng = Random(f"tastes-{seed}")
    rows = []
    for index, task in enumerate(distinct_tasks("train", users * each, seed)):
        user = f"u{index % users}"
        group = group_of(user, groups)
        pair = [add_style(task.right, style, rng) for style in rng.sample(STYLES, 2)]
        pair.sort(key=lambda text: liking(text, group), reverse=rng.random() >= noise)
        rows.append({"id": task.id, "prompt": task.prompt, "chosen": pair[0], "rejected": pair[1], "user": user})
    return rows


def win_rate(answers: Sequence[str], base_answers: Sequence[str], group: int) -> float:
    """The share of answers that a group prefers to the base model's answers to the same tasks; ties count one half."""
    differences = [
        liking(answer, group) - liking(base_answer, group)
        for answer, base_answer in zip(answers, base_answers, strict=True)
    ]
    return sum((mark > 0) + (mark == 0) / 2 for mark in differences) / len(differences)


def mean_win_rates(groups_by_user: Mapping[str, str], rates: Mapping[str, Sequence[float]], groups: int) -> list[float]:
    """For each true group, the mean win rate of its users, each with the policy of the user's inferred group.

    `rates` are the win rates of each inferred group's policy, by true group.
    """
    totals: list[list[float]] = [[] for _ in range(groups)]
    for user, name in groups_by_user.items():
        true = group_of(user, groups)
        totals[true].append(rates[name][true])
    return [sum(values) / len(values) for values in totals]
