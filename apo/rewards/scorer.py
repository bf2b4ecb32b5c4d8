"""Scorers: rewards as functions of features and a user's state, fitted on comparisons.

A state is a vector that represents a user: empty (one reward for all), weights of prototypes (PAL), or a latent (VPL).
Rewards of different states have different scales and zeros. To compare users, use `win_rate` against reference answers.
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
"""Directions of the features that are used, and the units of a hidden layer."""


@dataclass(frozen=True)
class Comparisons:
    """The features of n comparisons: prompt [n, C], chosen and rejected answer [n, D], and user [n].

    `user` is an index into `users`, -1 for an unknown user.
    """

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    user: Tensor
    users: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.user)

    def select(self, indices: Tensor | Sequence[int]) -> Comparisons:
        """Return some of the comparisons; `users` stays the same."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        return Comparisons(self.prompt[rows], self.chosen[rows], self.rejected[rows], self.user[rows], self.users)

    def by_user(self, user: int) -> Comparisons:
        """Return the comparisons of one user."""
        return self.select((self.user == user).nonzero().squeeze(1))


class Projection(nn.Module):
    """Centres features and projects them on the `WIDTH` directions of the largest spread, scaled to 1 on average.

    [n, D] -> [n, min(D, WIDTH)]. For answers, the spread is that of chosen - rejected: what both answers of a pair have
    in common does not matter.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("basis", torch.eye(inputs)[:, : min(inputs, WIDTH)].clone())

    def fit(self, points: Tensor, spread: Tensor) -> None:
        """Set the mean from `points` and the directions from `spread`, both [n, D]."""
        values, vectors = torch.linalg.eigh((spread.T @ spread).double() / len(spread))
        width = self.basis.shape[1]
        scale = (width / values[-width:].sum().clamp(min=1e-12)).sqrt()
        self.mean, self.basis = points.mean(0), (scale * vectors[:, -width:].flip(1)).to(self.basis)

    def forward(self, points: Tensor) -> Tensor:
        return (points - self.mean) @ self.basis


class Scorer(nn.Module):
    """A reward of an answer for a user's state. Subclasses define `reward`, `adapt`, `user_states` and `loss`."""

    kind: ClassVar[str]
    decay: float = 1.0
    rate: ClassVar[float] = 1e-2
    epochs: ClassVar[int] = 60
    patience: float = 0.5
    """Settings of the fit: AdamW's weight decay and learning rate, and the number of epochs. Fitting stops after
    `patience`, a share of the epochs, without a gain on held-out comparisons."""
    per_user: ClassVar[frozenset[str]] = frozenset()
    """Parameters that belong to one user each. A user has few comparisons, so they learn faster than shared ones."""

    def __init__(self, sizes: tuple[int, int], options: dict[str, Any]) -> None:
        super().__init__()
        self.sizes, self.options = sizes, options
        self.prompts, self.answers = Projection(sizes[0]), Projection(sizes[1])
        self.states: Tensor | None = None
        """The states of all known users, [U, S], after fitting."""

    def reward(self, prompt: Tensor, answer: Tensor, state: Tensor) -> Tensor:
        """Return the reward [n] of answers [n, D] to prompts [n, C] for states [n, S]."""
        raise NotImplementedError

    def margin(self, prompt: Tensor, first: Tensor, second: Tensor, state: Tensor) -> Tensor:
        """Return the log-odds [n] that `first` is preferred to `second`, [n, D] each."""
        return self.reward(prompt, first, state) - self.reward(prompt, second, state)

    def adapt(self, comparisons: Comparisons) -> Tensor:
        """Return the state [S] of a new user from at least one comparison."""
        raise NotImplementedError

    def loss(self, batch: Comparisons, step: int) -> Tensor:
        """Return the loss that a step of fitting minimises."""
        raise NotImplementedError

    def user_states(self, data: Comparisons) -> Tensor:
        """Return the states [U, S] of the users of the data, after fitting."""
        raise NotImplementedError

    def groups(self) -> dict[str, Tensor]:
        """Return one state per group of users, by name; the single group `all` if the reward has no groups."""
        return {"all": self.mean_state()}

    def mean_state(self) -> Tensor:
        """Return the mean state [S] of all known users."""
        assert self.states is not None
        return self.states.mean(0)

    def batches(self, data: Comparisons, random: torch.Generator, size: int) -> list[Comparisons]:
        """Return one epoch of batches, with every comparison once."""
        order = torch.randperm(len(data), generator=random)
        return [data.select(order[start : start + size]) for start in range(0, len(data), size)]

    def state_rows(self, user: Tensor) -> Tensor:
        """Return the states [n, S] of users [n] after fitting; the mean state for -1."""
        assert self.states is not None
        return torch.cat([self.states, self.mean_state()[None]])[user]


def mlp(inputs: int, outputs: int, hidden: int = WIDTH) -> nn.Sequential:
    """Return an MLP with one hidden layer. Its last layer is initialised small, as in a residual branch."""
    layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    with torch.no_grad():
        for parameter in layers[-1].parameters():
            parameter.mul_(0.1)
    return layers


class ResidualMLP(nn.Module):
    """An MLP plus a linear map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body, self.linear = mlp(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + self.linear(x)
        return out


def nll(scorer: Scorer, data: Comparisons, states: Tensor | None = None) -> Tensor:
    """Return -log P [n] of the choices under a fitted scorer, for `states` [n, S]; None: those of the users."""
    with torch.no_grad():
        state = scorer.state_rows(data.user) if states is None else states
        return softplus(-scorer.margin(data.prompt, data.chosen, data.rejected, state))


def accuracy(scorer: Scorer, data: Comparisons, states: Tensor | None = None) -> float:
    """Return the share of comparisons that a fitted scorer predicts, with ties as one half."""
    with torch.no_grad():
        state = scorer.state_rows(data.user) if states is None else states
        margin = scorer.margin(data.prompt, data.chosen, data.rejected, state)
    return float(((margin > 0).float() + (margin == 0).float() / 2).mean())


def win_rate(scorer: Scorer, prompt: Tensor, answer: Tensor, state: Tensor, references: Tensor) -> Tensor:
    """Return the mean probability [n] of being preferred to reference answers [m, D] to the same prompt.

    VPL's self-play scaling (arXiv 2408.10075): rewards of different users have different scales, win rates have one.
    """
    with torch.no_grad():
        reward = scorer.reward(prompt, answer, state)
        total = torch.zeros_like(reward)
        for reference in references:
            reference_reward = scorer.reward(prompt, reference.expand_as(answer), state)
            total += (reward - reference_reward).sigmoid()
    return total / len(references)


@contextlib.contextmanager
def flush_denormals() -> Iterator[None]:
    """Treat numbers below 1e-38 as 0 within, because arithmetic on them is a hundred times slower on a CPU."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@flush_denormals()
def fit(
    scorer: Scorer,
    data: Comparisons,
    valid: Comparisons | None = None,
    *,
    epochs: int | None = None,
    batch: int = 64,
    seed: int = 0,
) -> Scorer:
    """Fit with AdamW and a cosine schedule to 0. With `valid`, restore the epoch that predicts it best.

    The users' parameters learn ten times as fast as shared ones, and without decay, because a user has few comparisons.
    Deterministic for a seed. Raises UserError if there are no comparisons.
    """
    if not len(data):
        raise UserError("no comparisons to fit a reward on")
    epochs = epochs or scorer.epochs
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    scorer.prompts.fit(data.prompt, data.prompt - data.prompt.mean(0))
    scorer.answers.fit(torch.cat([data.chosen, data.rejected]), data.chosen - data.rejected)
    per_user = [p for name, p in scorer.named_parameters() if name in scorer.per_user]
    shared = [p for name, p in scorer.named_parameters() if name not in scorer.per_user]
    groups = [{"params": per_user, "lr": 10 * scorer.rate, "weight_decay": 0.0}, {"params": shared}]
    optimizer = torch.optim.AdamW(groups, lr=scorer.rate, weight_decay=scorer.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    )
    best: tuple[float, int, dict[str, Tensor], Tensor | None] | None = None
    step = 0
    for epoch in range(epochs):
        scorer.train()
        for comparisons in scorer.batches(data, random, batch):
            optimizer.zero_grad()
            scorer.loss(comparisons, step).backward()
            optimizer.step()
            step += 1
        schedule.step()
        if valid is not None and len(valid):
            scorer.eval()
            scorer.states = scorer.user_states(data).detach()
            valid_loss = float(nll(scorer, valid).mean())
            if best is None or valid_loss < best[0]:
                best = valid_loss, epoch, copy.deepcopy(scorer.state_dict()), scorer.states
            elif epoch - best[1] >= epochs * scorer.patience:
                break
    scorer.eval()
    if best is not None:
        scorer.load_state_dict(best[2])
    with torch.no_grad():
        scorer.states = scorer.user_states(data).detach()
    return scorer


def split(data: Comparisons, shares: Sequence[float], seed: int = 0) -> list[Comparisons]:
    """Split the comparisons of every user by these shares.

    The comparisons of a user who has fewer than five are all in the first split.
    """
    random = torch.Generator().manual_seed(seed)
    splits: list[list[Tensor]] = [[] for _ in shares]
    for user in data.user.unique():
        indices = (data.user == user).nonzero().squeeze(1)
        indices = indices[torch.randperm(len(indices), generator=random)]
        if len(indices) < 5:
            splits[0].append(indices)
            continue
        stops = [round(len(indices) * sum(shares[: number + 1])) for number in range(len(shares))]
        for members, start, stop in zip(splits, [0, *stops[:-1]], stops, strict=True):
            members.append(indices[start:stop])
    return [data.select(torch.cat(members).sort().values) if members else data.select([]) for members in splits]
