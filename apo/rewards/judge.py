"""Apply a reward to pairs: score columns, one row per group, and a filter by the least favourable group."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from apo.analysis.features import EncodedPairs
from apo.data.pair_rows import pair_id
from apo.guarantees.calibrate import Filter
from apo.rewards.reward_dir import Reward

_SIDE = re.compile("chosen|rejected")
_REPLACED = ("state", "score_padded")
"""Columns of an earlier scoring that a row does not always get."""


def score_pairs(reward: Reward, pairs: EncodedPairs, states: Tensor) -> list[dict[str, Any]]:
    """Return the pairs' rows with these columns added:

    score_chosen, score_rejected   win rates against the reference answers for the pair's state, in [0, 1]
    preferred                      the probability that a group prefers chosen, by group
    worst                          the lowest of these probabilities
    group                          the user's group, if the reward has groups and the user is in one
    state                          the user's state, if the reward has states and the pair has a user

    Columns of an earlier scoring are replaced.
    """
    chosen, rejected = (values.tolist() for values in reward.win_rates(pairs, states))
    wins = {name: values.tolist() for name, values in reward.preferred(pairs).items()}
    groups = reward.groups() if len(wins) > 1 else {}
    rows = []
    for index, row in enumerate(pairs.rows):
        preferred = {name: values[index] for name, values in wins.items()}
        rows.append(
            {
                **{name: value for name, value in row.items() if name not in _REPLACED},
                "score_chosen": chosen[index],
                "score_rejected": rejected[index],
                "preferred": preferred,
                "worst": min(preferred.values()),
                "group": groups.get(row["user"], row["group"]),
                **({"state": states[index].tolist()} if states.shape[1] and row["user"] is not None else {}),
            }
        )
    return rows


def score_by_group(reward: Reward, pairs: EncodedPairs) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `score_pairs` for each group, with win rates for the group's state."""
    groups = reward.scorer.groups().items()
    return {name: score_pairs(reward, pairs, state.expand(len(pairs.rows), -1)) for name, state in groups}


def rows_by_group(
    scored: Mapping[str, Sequence[Mapping[str, Any]]], min_probability: float = 0.5
) -> list[dict[str, Any]]:
    """Return one row per pair and group, with the answer that the group prefers as chosen.

    `scored` has each group's rows of the same pairs. A group whose preference is below `min_probability` has no row.
    """
    return [
        group_row(row, name)
        for rows in zip(*scored.values(), strict=True)
        for name, row in zip(scored, rows, strict=True)
        if max(row["preferred"][name], 1 - row["preferred"][name]) >= min_probability
    ]


def group_row(row: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Return a scored row as one of a group, with the answer that the group prefers as chosen.

    `id` is the pair's id and the group. There is no `state`, which is that of a user. If the answers are swapped, so is
    every column with a value for each of them; `contrast` and `reasoning`, which say how rejected became chosen, are
    left out.
    """
    named = {**row, "group": group, "id": f"{row['id']} {group}", "pair": pair_id(row)}
    named.pop("state", None)
    if row["preferred"][group] >= 0.5:
        return named
    preferred = {name: 1 - probability for name, probability in row["preferred"].items()}
    columns = {name: value for name, value in named.items() if name not in ("contrast", "reasoning")}
    return {**_swap_sides(columns), "preferred": preferred, "worst": min(preferred.values())}


def _swap_sides(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Exchange each value that has `chosen` in its name with that of the same name with `rejected`."""
    swapped = {}
    for name, value in columns.items():
        other = columns.get(_SIDE.sub(lambda side: "rejected" if side[0] == "chosen" else "chosen", name), value)
        swapped[name] = _swap_sides(other) if isinstance(other, Mapping) else other
    return swapped


def worst_group_filter(
    rows: Sequence[Mapping[str, Any]], min_probability: float = 0.5, ids: Iterable[str] = ()
) -> Filter:
    """Return a filter that keeps a pair only if every group prefers chosen with at least `min_probability`.

    Of `ids`, those without a row are dropped: no group's preference is known.
    """
    promise = f"kept only if every group prefers chosen with a probability of {min_probability:g} or more"
    decisions = dict.fromkeys(ids, False) | {row["id"]: row["worst"] >= min_probability for row in rows}
    return Filter.from_decisions(min_probability, promise, decisions)


def pad_chosen(rows: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the pairs with `text` appended to the chosen answer. It should not change a score."""
    return [{**row, "chosen": _padded(row["chosen"], text)} for row in rows]


def _padded(answer: str | Sequence[Mapping[str, Any]], text: str) -> str | list[Mapping[str, Any]]:
    if isinstance(answer, str):
        return answer + text
    return [*answer[:-1], {**answer[-1], "content": (answer[-1].get("content") or "") + text}]
