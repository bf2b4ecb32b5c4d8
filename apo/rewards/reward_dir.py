"""A fitted reward and its folder, and the conversion of pairs to comparisons.

reward.json           kind, options, users and their groups, the model whose features it reads (null: those of a file),
                      and the ids of the pairs it was trained on; written last, so a folder that has it is complete
reward.safetensors    parameters, states of the users, reference answers
users/ID.json         a user who was added later (`apo reward adapt`), with their answers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apo.analysis.features import EncodedPairs, Pooling
from apo.data.pair_rows import pair_id
from apo.rewards.bradley_terry import BradleyTerry
from apo.rewards.pal import PAL
from apo.rewards.scorer import Comparisons, Scorer, win_rate
from apo.rewards.vpl import VPL
from clair.core.errors import UserError, list_some, near_miss, one_line
from clair.core.files import content_hash, publish, read_json, write_json
from clair.core.provenance import provenance

SCORERS: dict[str, type[Scorer]] = {cls.kind: cls for cls in (BradleyTerry, PAL, VPL)}
REFERENCES = 64
"""Reference answers that a win rate is measured against."""
_MAX_NAMES = 3


def to_comparisons(pairs: EncodedPairs) -> Comparisons:
    """Convert pairs with features to comparisons; a pair without a user has user -1."""
    users = tuple(dict.fromkeys(row["user"] for row in pairs.rows if row["user"] is not None))
    indices = {user: index for index, user in enumerate(users)}
    user = torch.tensor([indices.get(row["user"], -1) for row in pairs.rows])
    features = pairs.features
    return Comparisons(features.prompt, features.chosen, features.rejected, user, users)


def comparisons_of(pairs: EncodedPairs, user: str) -> tuple[EncodedPairs, str]:
    """Return the pairs whose column `user` has this user, and a note on the others; all pairs if none has a user.

    All pairs of a single other name are taken as this user's. Raises UserError for several other names.
    """
    names = [row["user"] for row in pairs.rows]
    known = [name for name in dict.fromkeys(names) if name is not None]
    if not known:
        return pairs, ""
    if user not in known and len(known) > 1:
        raise UserError(
            f"no comparison is of user {user!r}{near_miss(user, known)}; the column user has "
            f"{list_some(known, _MAX_NAMES)}; give this user's comparisons"
        )
    name = user if user in known else known[0]
    indices = [index for index, other in enumerate(names) if other == name]
    notes = [] if name == user else [f"the comparisons of user {name!r} are taken as those of {user!r}"]
    if len(indices) < len(names):
        notes.append(f"{len(names) - len(indices):,} of {len(names):,} comparisons are of others and are left out")
    return pairs.select(indices), "; ".join(notes)


def user_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return notes on users with a single comparison, and on users who prefer a to b and also b to a."""
    counts: dict[str, int] = {}
    orders: dict[tuple[str, str], set[bool]] = {}
    for row in rows:
        if row["user"] is None:
            continue
        counts[row["user"]] = counts.get(row["user"], 0) + 1
        chosen, rejected = (content_hash(row[side]) for side in ("chosen", "rejected"))
        question = content_hash([row["prompt"], *sorted((chosen, rejected))])
        orders.setdefault((row["user"], question), set()).add(chosen < rejected)
    notes = []
    if single := [user for user, count in counts.items() if count == 1]:
        notes.append(f"{len(single)} of {len(counts)} users have one comparison only: {list_some(single, _MAX_NAMES)}")
    if contradictory := list(dict.fromkeys(user for (user, _), order in orders.items() if len(order) == 2)):
        notes.append(
            f"{len(contradictory)} of {len(counts)} users contradict themselves on the same two answers: "
            f"{list_some(contradictory, _MAX_NAMES)}"
        )
    return notes


@dataclass
class Reward:
    """A fitted scorer, its reference answers, the content of reward.json (`facts`), and all users' states by name."""

    scorer: Scorer
    references: Tensor
    facts: dict[str, Any]
    states: dict[str, Tensor] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def from_fit(
        cls, scorer: Scorer, data: Comparisons, pairs: EncodedPairs, model: str | None, **extra: Any
    ) -> Reward:
        """Return the reward of a scorer that was fitted on `data`, the comparisons of `pairs`."""
        assert scorer.states is not None
        answers = torch.cat([data.chosen, data.rejected])
        order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(0))
        facts = {
            "format": 1,
            "kind": scorer.kind,
            "sizes": list(scorer.sizes),
            "options": scorer.options,
            "users": list(data.users),
            "model": model,
            "features": pairs.features.model,
            "trained_on": sorted({pair_id(row) for row in pairs.rows}),
            **extra,
            **provenance(),
        }
        reward = cls(scorer, answers[order[:REFERENCES]], facts, dict(zip(data.users, scorer.states, strict=True)))
        reward.facts["groups"] = reward.groups()
        return reward

    def save(self, folder: Path) -> None:
        """Write the folder, with reward.json last."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        assert self.scorer.states is not None
        tensors = {**self.scorer.state_dict(), "_states": self.scorer.states, "_references": self.references}
        temporary = folder / ".reward.tmp"
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, temporary)
        publish(temporary, folder / "reward.safetensors")
        write_json(folder / "reward.json", self.facts)
        self.folder = folder

    @classmethod
    def load(cls, folder: Path) -> Reward:
        """Read a folder. Raises UserError if it has no complete reward."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not (folder / "reward.json").is_file():
            raise UserError(f"{folder} holds no finished reward (no reward.json); give the `out` of `apo reward fit`")
        facts = read_json(folder / "reward.json")
        try:
            tensors = load_file(folder / "reward.safetensors")
            scorer = SCORERS[facts["kind"]](tuple(facts["sizes"]), **facts["options"])
            states, references = tensors.pop("_states"), tensors.pop("_references")
            for name, _ in list(scorer.named_buffers()):
                if name == "spread" and name in tensors:  # it has one row per user
                    scorer.register_buffer(name, torch.ones_like(tensors[name]))
            scorer.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"{folder} cannot be read ({one_line(error)}); fit it again") from error
        scorer.states = states
        scorer.eval()
        reward = cls(scorer, references, facts, dict(zip(facts["users"], states, strict=True)), folder)
        for file in sorted((folder / "users").glob("*.json")):
            user = read_json(file)
            if user.get("state") is not None:
                reward.states[user["user"]] = torch.tensor(user["state"])
        return reward

    @property
    def pooling(self) -> Pooling:
        """What represents a response among the features of the model."""
        return self.facts["pooling"]

    def groups(self) -> dict[str, str]:
        """Return the group of each user: the prototype with the largest weight, or the single group."""
        names = list(self.scorer.groups())
        return {user: names[int(state.argmax()) if len(names) > 1 else 0] for user, state in self.states.items()}

    def user_state(self, user: str) -> Tensor:
        """Return the state of a user or a group. Raises UserError, with the nearest name, for an unknown name."""
        states = {**self.scorer.groups(), **self.states}
        if user not in states:
            raise UserError(
                f"{user!r} is neither a user nor a group of this reward{near_miss(user, states)}; groups: "
                f"{', '.join(self.scorer.groups())}; add a user with `apo reward adapt`"
            )
        return states[user]

    def check_features(self, pairs: EncodedPairs) -> None:
        """Raise UserError if the features come from another model or encoder than the reward was fitted on."""
        sizes = pairs.features.prompt.shape[1], pairs.features.chosen.shape[1]
        if sizes[1] != self.scorer.sizes[1]:
            raise UserError(
                f"this reward was fitted on features {self.scorer.sizes[1]} wide, and these are {sizes[1]} wide; give "
                "features of the same encoder"
            )
        expected, actual = self.facts["features"], pairs.features.model
        if expected != actual:
            raise UserError(
                f"this reward was fitted on features of model {expected[:12]}, and these are of model {actual[:12]}: "
                f"features of two models cannot be compared; give the model it was fitted on, or fit again"
            )

    def row_states(self, pairs: EncodedPairs, user: str | None = None) -> Tensor:
        """Return the state of each pair's user, [n, S], or of `user` for all pairs.

        A pair without a user gets the mean state. Raises UserError if users are unknown.
        """
        if user is not None:
            return self.user_state(user).expand(len(pairs.rows), -1)
        users = [row["user"] for row in pairs.rows]
        unknown = [name for name in dict.fromkeys(users) if name is not None and name not in self.states]
        if unknown and self.scorer.kind != BradleyTerry.kind:
            raise UserError(
                f"{len(unknown)} of {len(set(users))} users are unknown to this reward: "
                f"{list_some(unknown, _MAX_NAMES)}; add them with `apo reward adapt`, or score all pairs for one user "
                f"or group"
            )
        return torch.stack([self.states.get(name, self.scorer.mean_state()) for name in users])

    def win_rates(self, pairs: EncodedPairs, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return win rates [n] of chosen and rejected against the reference answers, comparable across users."""
        features = pairs.features
        chosen, rejected = (
            win_rate(self.scorer, features.prompt, answer, states, self.references)
            for answer in (features.chosen, features.rejected)
        )
        return chosen, rejected

    def preferred(self, pairs: EncodedPairs) -> dict[str, Tensor]:
        """Return, for each group, the probability [n] that it prefers chosen to rejected."""
        features, wins = pairs.features, {}
        with torch.no_grad():
            for name, state in self.scorer.groups().items():
                rows = state.expand(len(pairs.rows), -1)
                margin = self.scorer.margin(features.prompt, features.chosen, features.rejected, rows)
                wins[name] = margin.sigmoid()
        return wins


def user_file(folder: Path, user: str) -> Path:
    """Return the file of a user who was added later. It is named by a hash: a user's name may not be a valid path."""
    return folder / "users" / f"{content_hash(user)[:16]}.json"


def save_user(reward: Reward, user: str, state: Tensor | None, answers: Sequence[Mapping[str, Any]]) -> None:
    """Write a user's state and answers atomically. An answer has a comparison's id, and if chosen was preferred."""
    assert reward.folder is not None
    group = None
    if state is not None:
        reward.states[user] = state
        group = reward.groups()[user]
    plain = None if state is None else [float(value) for value in state]
    write_json(user_file(reward.folder, user), {"user": user, "group": group, "state": plain, "answers": list(answers)})


def read_answers(folder: Path, user: str) -> list[dict[str, Any]]:
    """Return the stored answers of a user who was added later."""
    file = user_file(folder, user)
    return list(read_json(file)["answers"]) if file.is_file() else []
