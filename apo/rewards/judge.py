"""Rewards put to use on pairs: scores as columns, each group's own orientation, and a judge for the worst-off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from apo.analysis.features import Labelled
from apo.guarantees.calibrate import Filter
from apo.rewards.reward_dir import Reward


def scored(reward: Reward, found: Labelled, states: Tensor) -> list[dict[str, Any]]:
    """The pairs with these columns more:

    score_chosen, score_rejected   win rates against the reference answers for the pair's state, in [0, 1]
    preferred                      by group, the probability that it prefers chosen
    worst                          the lowest of these
    group                          the user's group, where the reward knows the user and has groups
    """
    chosen, rejected = (values.tolist() for values in reward.win_rates(found, states))
    wins = {name: values.tolist() for name, values in reward.preferred(found).items()}
    groups = reward.groups() if len(wins) > 1 else {}
    rows = []
    for place, row in enumerate(found.rows):
        preferred = {name: values[place] for name, values in wins.items()}
        rows.append(
            {
                **row,
                "score_chosen": chosen[place],
                "score_rejected": rejected[place],
                "preferred": preferred,
                "worst": min(preferred.values()),
                "group": groups.get(row["user"], row["group"]),
            }
        )
    return rows


def by_group(rows: Sequence[Mapping[str, Any]], sure: float = 0.5) -> list[dict[str, Any]]:
    """A row for each group that prefers one of the answers with at least this probability, turned to what it prefers.

    One revised pair may so be chosen for one group and rejected for another. `id` gets the group behind it.
    """
    made = []
    for row in rows:
        for name, probability in row["preferred"].items():
            sides = ("chosen", "rejected") if probability >= 0.5 else ("rejected", "chosen")
            if max(probability, 1 - probability) < sure:
                continue
            turned = {f"{to}": row[side] for to, side in zip(("chosen", "rejected"), sides, strict=True)}
            scores = {
                f"score_{to}": row[f"score_{side}"] for to, side in zip(("chosen", "rejected"), sides, strict=True)
            }
            made.append({**row, **turned, **scores, "group": name, "id": f"{row['id']} {name}", "pair": row["id"]})
    return made


def worst_off(rows: Sequence[Mapping[str, Any]], least: float = 0.5) -> Filter:
    """A pluralistic judge: keep a pair only if even the group that likes chosen least prefers it this surely."""
    kept = {row["id"]: row["worst"] >= least for row in rows}
    return Filter(
        least, f"kept only where every group prefers chosen with a probability of {least:g} or more",
        tuple(id for id, is_kept in kept.items() if is_kept), tuple(id for id, is_kept in kept.items() if not is_kept),
    )  # fmt: skip


def padded(rows: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The pairs with `text` behind the chosen answer: what a score should not care for."""
    return [
        {**row, "chosen": [*row["chosen"][:-1], {**row["chosen"][-1], "content": row["chosen"][-1]["content"] + text}]}
        for row in rows
    ]
