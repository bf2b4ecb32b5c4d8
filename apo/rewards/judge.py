"""Apply a reward to pairs: score columns, one row per group, and a filter by the least favourable group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from apo.analysis.features import EncodedPairs
from apo.guarantees.calibrate import Filter
from apo.rewards.reward_dir import Reward
from clair.data.records import SCORES


def score_pairs(reward: Reward, pairs: EncodedPairs, states: Tensor) -> list[dict[str, Any]]:
    """Return the pairs' rows with these columns added:

    score_chosen, score_rejected   win rates against the reference answers for the pair's state, in [0, 1]
    preferred                      the probability that a group prefers chosen, by group
    worst                          the lowest of these probabilities
    group                          the user's group, if the reward has groups and the user is in one
    state                          the user's state, if the reward has states and the pair has a user
    """
    chosen, rejected = (values.tolist() for values in reward.win_rates(pairs, states))
    wins = {name: values.tolist() for name, values in reward.preferred(pairs).items()}
    groups = reward.groups() if len(wins) > 1 else {}
    rows = []
    for index, row in enumerate(pairs.rows):
        preferred = {name: values[index] for name, values in wins.items()}
        rows.append(
            {
                **row,
                "score_chosen": chosen[index],
                "score_rejected": rejected[index],
                "preferred": preferred,
                "worst": min(preferred.values()),
                "group": groups.get(row["user"], row["group"]),
                **({"state": states[index].tolist()} if states.shape[1] and row["user"] is not None else {}),
            }
        )
    return rows


def rows_by_group(rows: Sequence[Mapping[str, Any]], min_probability: float = 0.5) -> list[dict[str, Any]]:
    """Return one row per pair and group, with the answer that the group prefers as chosen.

    A group whose preference is below `min_probability` has no row. `id` is the pair's id and the group.
    """
    group_rows = []
    for row in rows:
        for name, probability in row["preferred"].items():
            if max(probability, 1 - probability) < min_probability:
                continue
            group_row = {**row, "group": name, "id": f"{row['id']} {name}", "pair": row["id"]}
            if probability < 0.5:
                for first, second in (("chosen", "rejected"), SCORES):
                    group_row |= {first: row[second], second: row[first]}
            group_rows.append(group_row)
    return group_rows


def worst_group_filter(rows: Sequence[Mapping[str, Any]], min_probability: float = 0.5) -> Filter:
    """Return a filter that keeps a pair only if every group prefers chosen with at least `min_probability`."""
    promise = f"kept only if every group prefers chosen with a probability of {min_probability:g} or more"
    return Filter.from_decisions(min_probability, promise, {row["id"]: row["worst"] >= min_probability for row in rows})


def pad_chosen(rows: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the pairs with `text` appended to the chosen answer. It should not change a score."""
    return [
        {**row, "chosen": [*row["chosen"][:-1], {**row["chosen"][-1], "content": row["chosen"][-1]["content"] + text}]}
        for row in rows
    ]
