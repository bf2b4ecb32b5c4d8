"""A fitted reward as a folder, and pairs as comparisons.

reward.json           what it is: kind, options, users and their groups, the model whose features it reads, what it
                      was trained on; written last, so that where it is the reward is whole
reward.safetensors    its numbers, the users' states, reference answers
users/ID.json         one user each who was added later (`apo reward adapt`), with their answers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apo.analysis.features import Labelled, same_model
from apo.rewards.bradley_terry import BradleyTerry
from apo.rewards.pal import PAL
from apo.rewards.scorer import Comparisons, Scorer, win_rate
from apo.rewards.vpl import VPL
from clair.core.errors import UserError, near_miss, one_line
from clair.core.files import content_hash, publish, read_json, write_json
from clair.core.provenance import provenance

SCORERS: dict[str, type[Scorer]] = {cls.kind: cls for cls in (BradleyTerry, PAL, VPL)}
REFERENCES = 64
"""Reference answers that a win rate is against."""
_NAMED = 3


def comparisons_of(found: Labelled) -> Comparisons:
    """Pairs with their features as comparisons; a pair without a user is nobody's (-1)."""
    users = tuple(dict.fromkeys(row["user"] for row in found.rows if row["user"] is not None))
    number = {user: place for place, user in enumerate(users)}
    user = torch.tensor([number.get(row["user"], -1) for row in found.rows])
    features = found.features
    return Comparisons(features.prompt, features.chosen, features.rejected, user, users)


def notes_on(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to know about the users: who has one comparison only, and who prefers a to b as well as b to a."""
    counts: dict[str, int] = {}
    said: dict[tuple[str, str], set[bool]] = {}
    for row in rows:
        if row["user"] is None:
            continue
        counts[row["user"]] = counts.get(row["user"], 0) + 1
        chosen, rejected = (content_hash(row[side]) for side in ("chosen", "rejected"))
        question = content_hash([row["prompt"], *sorted((chosen, rejected))])
        said.setdefault((row["user"], question), set()).add(chosen < rejected)
    notes = []
    if alone := [user for user, count in counts.items() if count == 1]:
        notes.append(f"{len(alone)} of {len(counts)} users have one comparison: little is known of {_some(alone)}")
    if both := list(dict.fromkeys(user for (user, _), ways in said.items() if len(ways) == 2)):
        notes.append(
            f"{len(both)} of {len(counts)} users contradict themselves, on the same two answers: {_some(both)}"
        )
    return notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


@dataclass
class Reward:
    """A fitted scorer with everything that it takes to use it. `states` of all users by name, added ones included."""

    scorer: Scorer
    references: Tensor
    facts: dict[str, Any]
    states: dict[str, Tensor] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def fitted(cls, scorer: Scorer, data: Comparisons, found: Labelled, model: str, **more: Any) -> Reward:
        """A reward that was just fitted on `data`, the comparisons of `found`."""
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
            "features": found.features.model,
            "trained_on": sorted({row["id"] for row in found.rows}),
            **more,
            **provenance(),
        }
        made = cls(scorer, answers[order[:REFERENCES]], facts, dict(zip(data.users, scorer.states, strict=True)))
        made.facts["groups"] = made.groups()
        return made

    def save(self, folder: Path) -> None:
        """Write the folder; reward.json last."""
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
        """Read a folder. Raises UserError where there is no finished reward in it."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not (folder / "reward.json").is_file():
            raise UserError(f"{folder} holds no finished reward (no reward.json); give a folder of `apo reward fit`")
        facts = read_json(folder / "reward.json")
        try:
            tensors = load_file(folder / "reward.safetensors")
            scorer = SCORERS[facts["kind"]](tuple(facts["sizes"]), **facts["options"])
            states, references = tensors.pop("_states"), tensors.pop("_references")
            for name, buffer in scorer.named_buffers():
                if name == "spread":  # as many rows as users
                    scorer.spread = torch.ones_like(tensors[name]) if name in tensors else buffer
            scorer.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, RuntimeError, TypeError) as error:
            raise UserError(f"{folder} cannot be read ({one_line(error)}); fit it again") from error
        scorer.states = states
        scorer.eval()
        made = cls(scorer, references, facts, dict(zip(facts["users"], states, strict=True)), folder)
        for file in sorted((folder / "users").glob("*.json")):
            user = read_json(file)
            if user.get("state") is not None:
                made.states[user["user"]] = torch.tensor(user["state"])
        return made

    def groups(self) -> dict[str, str]:
        """The group of each user: the prototype that weighs most; one for all where the reward knows no groups."""
        named = self.scorer.groups()
        if len(named) == 1:
            return dict.fromkeys(self.states, next(iter(named)))
        names = list(named)
        return {user: names[int(state.argmax())] for user, state in self.states.items()}

    def state_of(self, user: str) -> Tensor:
        """The state of a user or of a group. Raises UserError for a name that is neither, with the near miss."""
        known = {**self.scorer.groups(), **self.states}
        if user not in known:
            raise UserError(
                f"{user!r} is no user or group of this reward{near_miss(user, known)}; groups: "
                f"{', '.join(self.scorer.groups())}; add a user with `apo reward adapt`"
            )
        return known[user]

    def check(self, found: Labelled) -> None:
        """Raises UserError for features of another model than it was fitted on."""
        same_model(self.facts["features"], found.features.model, "this reward")

    def row_states(self, found: Labelled, user: str | None = None) -> Tensor:
        """The state of each pair's user, [n, S]; of `user` for all; the mean user's for a pair of nobody's.

        Raises UserError where some users are unknown.
        """
        if user is not None:
            return self.state_of(user).expand(len(found.rows), -1)
        users = [row["user"] for row in found.rows]
        unknown = [one for one in dict.fromkeys(users) if one is not None and one not in self.states]
        if unknown and self.scorer.kind != BradleyTerry.kind:
            raise UserError(
                f"{len(unknown)} of {len(set(users))} users are unknown to this reward: {_some(unknown)}; "
                f"add them with `apo reward adapt`, or score all pairs for one --user or group"
            )
        return torch.stack([self.states.get(one, self.scorer.public()) for one in users])

    def win_rates(self, found: Labelled, states: Tensor) -> tuple[Tensor, Tensor]:
        """Win rates [n] of chosen and rejected against the reference answers: what may be compared across users."""
        features = found.features
        chosen, rejected = (
            win_rate(self.scorer, features.prompt, answer, states, self.references)
            for answer in (features.chosen, features.rejected)
        )
        return chosen, rejected

    def preferred(self, found: Labelled) -> dict[str, Tensor]:
        """For each group the probability [n] that it prefers chosen to rejected."""
        features, wins = found.features, {}
        with torch.no_grad():
            for name, state in self.scorer.groups().items():
                rows = state.expand(len(found.rows), -1)
                margin = self.scorer.margin(features.prompt, features.chosen, features.rejected, rows)
                wins[name] = margin.sigmoid()
        return wins


def user_file(folder: Path, user: str) -> Path:
    """Where a user who was added later is kept; a name is no path."""
    return folder / "users" / f"{content_hash(user)[:16]}.json"


def save_user(reward: Reward, user: str, state: Tensor | None, answers: Sequence[Mapping[str, Any]]) -> None:
    """Keep a user's answers (id of the comparison, whether its chosen answer was preferred) and state, atomically."""
    assert reward.folder is not None
    group = None
    if state is not None:
        reward.states[user] = state
        group = reward.groups()[user]
    plain = None if state is None else [float(value) for value in state]
    write_json(user_file(reward.folder, user), {"user": user, "group": group, "state": plain, "answers": list(answers)})


def read_answers(folder: Path, user: str) -> list[dict[str, Any]]:
    """What a user who was added later has answered so far."""
    file = user_file(folder, user)
    return list(read_json(file)["answers"]) if file.is_file() else []
