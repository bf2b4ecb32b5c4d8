"""What every reward is: a function of features and of a user's state, fitted on comparisons, saved as safetensors.

A state is a vector that stands for a user: nothing (one reward for all), weights of prototypes (PAL), a latent (VPL).
Rewards fix scale and zero for one state only; `win_rate` against reference answers is what may be compared across
users.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from clair.core.errors import UserError

WIDTH = 64
"""Directions that are looked at, and units of a hidden layer."""


@dataclass(frozen=True)
class Comparisons:
    """Of n comparisons: features of prompt [n, C], of the chosen and the rejected answer [n, D], and whose it is [n].

    `user` counts into `users`; -1 is nobody known.
    """

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    user: Tensor
    users: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.user)

    def select(self, places: Tensor | Sequence[int]) -> Comparisons:
        """Some of the comparisons, users as they were."""
        at = torch.as_tensor(places, dtype=torch.long)
        parts = (self.prompt[at], self.chosen[at], self.rejected[at], self.user[at])
        return Comparisons(*parts, self.users)

    def of(self, user: int) -> Comparisons:
        """The comparisons of one user."""
        return self.select((self.user == user).nonzero().squeeze(1))


class Standard(nn.Module):
    """Centred, turned to the `WIDTH` directions of largest spread, which is 1 on average: [n, D] to [n, min(D, WIDTH)].

    For answers the spread is that of chosen - rejected: what the answers of a pair have in common decides nothing.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("basis", torch.eye(inputs)[:, : min(inputs, WIDTH)].clone())

    def look(self, points: Tensor, spread: Tensor) -> None:
        """Learn the mean from `points` and the directions from `spread`, both [n, D]."""
        values, vectors = torch.linalg.eigh((spread.T @ spread).double() / len(spread))
        width = self.basis.shape[1]
        scale = (width / values[-width:].sum().clamp(min=1e-12)).sqrt()
        self.mean, self.basis = points.mean(0), (scale * vectors[:, -width:].flip(1)).to(self.basis)

    def forward(self, points: Tensor) -> Tensor:
        return (points - self.mean) @ self.basis


class Scorer(nn.Module):
    """A reward of answers for a user's state. Subclasses say `reward`, `adapt`, `user_states` and `loss`."""

    kind: ClassVar[str]
    decay: float = 1.0
    rate: ClassVar[float] = 1e-2
    epochs: ClassVar[int] = 60
    patience: float = 0.5
    """How it is fitted: AdamW's weight decay and learning rate, passes over the comparisons, and the share of these
    without a gain on held-out ones after which fitting ends."""
    per_user: ClassVar[frozenset[str]] = frozenset()
    """Parameters of users, which see a comparison where the shared ones see all: they learn faster."""

    def __init__(self, sizes: tuple[int, int], options: dict[str, Any]) -> None:
        super().__init__()
        self.sizes, self.options = sizes, options
        self.prompts, self.answers = Standard(sizes[0]), Standard(sizes[1])
        self.states: Tensor | None = None
        """Of every known user, [U, S], once fitted."""

    def reward(self, prompt: Tensor, answer: Tensor, state: Tensor) -> Tensor:
        """The reward [n] of answers [n, D] to prompts [n, C] for states [n, S]."""
        raise NotImplementedError

    def margin(self, prompt: Tensor, one: Tensor, other: Tensor, state: Tensor) -> Tensor:
        """The log-odds [n] that `one` is preferred to `other`, [n, D] each."""
        return self.reward(prompt, one, state) - self.reward(prompt, other, state)

    def adapt(self, given: Comparisons) -> Tensor:
        """The state [S] of a user who is known by these comparisons only, at least one."""
        raise NotImplementedError

    def loss(self, batch: Comparisons, step: int) -> Tensor:
        """What a step of fitting makes smaller."""
        raise NotImplementedError

    def user_states(self, data: Comparisons) -> Tensor:
        """The states [U, S] of the users of the data, after fitting."""
        raise NotImplementedError

    def groups(self) -> dict[str, Tensor]:
        """The states that stand for a group of users, by name; one for all unless the reward knows groups."""
        return {"all": self.public()}

    def public(self) -> Tensor:
        """The state [S] of nobody in particular: the mean of all known users'."""
        assert self.states is not None
        return self.states.mean(0)

    def batches(self, data: Comparisons, random: torch.Generator, size: int) -> list[Comparisons]:
        """One epoch of batches; every comparison once."""
        order = torch.randperm(len(data), generator=random)
        return [data.select(order[start : start + size]) for start in range(0, len(data), size)]

    def state_rows(self, user: Tensor) -> Tensor:
        """The states [n, S] of users [n] after fitting; the public one for -1."""
        assert self.states is not None
        return torch.cat([self.states, self.public()[None]])[user]


def mlp(inputs: int, outputs: int, hidden: int = WIDTH) -> nn.Sequential:
    """One hidden layer; what it adds to the way past it starts small."""
    made = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    with torch.no_grad():
        for parameter in made[-1].parameters():
            parameter.mul_(0.1)
    return made


class Linearly(nn.Module):
    """An MLP with a linear way past it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body, self.linear = mlp(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + self.linear(x)
        return out


def nll(scorer: Scorer, data: Comparisons, states: Tensor | None = None) -> Tensor:
    """-log of the probability [n] that a fitted scorer gives to what was chosen; `states` [n, S] or the users' own."""
    with torch.no_grad():
        state = scorer.state_rows(data.user) if states is None else states
        return softplus(-scorer.margin(data.prompt, data.chosen, data.rejected, state))


def accuracy(scorer: Scorer, data: Comparisons, states: Tensor | None = None) -> float:
    """The share of comparisons that a fitted scorer gets right, ties one half."""
    with torch.no_grad():
        state = scorer.state_rows(data.user) if states is None else states
        margin = scorer.margin(data.prompt, data.chosen, data.rejected, state)
    return float(((margin > 0).float() + (margin == 0).float() / 2).mean())


def win_rate(scorer: Scorer, prompt: Tensor, answer: Tensor, state: Tensor, references: Tensor) -> Tensor:
    """The mean probability [n] of being preferred to reference answers [m, D] to the same prompt, in [0, 1].

    What VPL calls self-play scaling (arXiv 2408.10075): rewards of different users have different scales, this has one.
    """
    with torch.no_grad():
        own = scorer.reward(prompt, answer, state)
        total = torch.zeros_like(own)
        for reference in references:
            other = scorer.reward(prompt, reference.expand_as(answer), state)
            total += (own - other).sigmoid()
    return total / len(references)


@contextlib.contextmanager
def denormals_flushed() -> Iterator[None]:
    """Numbers below 1e-38 are 0 within: arithmetic on them takes a hundred times as long on a CPU."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@denormals_flushed()
def fit(
    scorer: Scorer, data: Comparisons, valid: Comparisons | None = None, *, epochs: int | None = None,
    batch: int = 64, seed: int = 0,
) -> Scorer:  # fmt: skip
    """Fit by AdamW, the rate falling to 0 as a half cosine; with `valid`, keep the epoch that predicts it best.

    Users' own numbers learn ten times as fast as what is shared and are not decayed: each sees few comparisons.
    Raises UserError where there is nothing to fit on. Deterministic for a seed.
    """
    if not len(data):
        raise UserError("no comparisons to fit a reward on")
    epochs = epochs or scorer.epochs
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    scorer.prompts.look(data.prompt, data.prompt - data.prompt.mean(0))
    scorer.answers.look(torch.cat([data.chosen, data.rejected]), data.chosen - data.rejected)
    own = [p for name, p in scorer.named_parameters() if name in scorer.per_user]
    shared = [p for name, p in scorer.named_parameters() if name not in scorer.per_user]
    groups = [{"params": own, "lr": 10 * scorer.rate, "weight_decay": 0.0}, {"params": shared}]
    optimizer = torch.optim.AdamW(groups, lr=scorer.rate, weight_decay=scorer.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 0.5 * (1 + math.cos(math.pi * at / epochs)))
    best: tuple[float, int, dict[str, Tensor], Tensor | None] | None = None
    step = 0
    for epoch in range(epochs):
        scorer.train()
        for part in scorer.batches(data, random, batch):
            optimizer.zero_grad()
            scorer.loss(part, step).backward()
            optimizer.step()
            step += 1
        schedule.step()
        if valid is not None and len(valid):
            scorer.eval()
            scorer.states = scorer.user_states(data).detach()
            seen = float(nll(scorer, valid).mean())
            if best is None or seen < best[0]:
                best = seen, epoch, copy.deepcopy(scorer.state_dict()), scorer.states
            elif epoch - best[1] >= epochs * scorer.patience:
                break
    scorer.eval()
    if best is not None:
        scorer.load_state_dict(best[2])
    with torch.no_grad():
        scorer.states = scorer.user_states(data).detach()
    return scorer


def split(data: Comparisons, shares: Sequence[float], seed: int = 0) -> list[Comparisons]:
    """The comparisons in parts of these shares, user by user, so that each part has some of every user's.

    Users with fewer than five comparisons are in the first part only.
    """
    random = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in shares]
    for user in data.user.unique():
        places = (data.user == user).nonzero().squeeze(1)
        places = places[torch.randperm(len(places), generator=random)]
        if len(places) < 5:
            parts[0].append(places)
            continue
        edges = [round(len(places) * sum(shares[: at + 1])) for at in range(len(shares))]
        for at, (start, end) in enumerate(zip([0, *edges[:-1]], edges, strict=True)):
            parts[at].append(places[start:end])
    return [data.select(torch.cat(part).sort().values) if part else data.select([]) for part in parts]
