"""VPL: a user is a latent vector, read from a few of their own comparisons (arXiv 2408.10075).

    q(z | D_u) = N(mu(D_u), diag sigma^2(D_u)),    P(a preferred to b | z) = sigmoid(r(a, z) - r(b, z))
    minimise   mean over targets of -log P  +  beta KL(q(z | D_u) || N(0, I)),   z ~ q

D_u are up to `CONTEXT` comparisons of the user, each encoded as (chosen, rejected) - the order carries the label -, set
to one another by self-attention and averaged, so that their order does not matter. No user has to be known: a new one
is a few comparisons, and which to ask next is the comparison whose answer says most about z (`next_question`). z is mu
wherever it is not trained. Too large a beta, or a decoder that does without z, and it collapses: `health` watches.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, softplus

from apo.rewards.scorer import WIDTH, Comparisons, Scorer
from clair.core.errors import UserError

CONTEXT = 8
"""The most comparisons that stand for a user in training."""
SEEN = 16
"""Comparisons of a user in one step: context and targets."""
USERS = 32
WARM_UP = 500
"""Steps over which beta grows from 0."""


class Health(NamedTuple):
    """Whether the latent is used: the share of its dimensions whose mean varies over users (variance above 0.01), and
    the mean cosine of mu with mu of the same comparisons turned round, -1 where turning a taste round turns z round.
    """

    active_units: float
    swap: float

    @property
    def collapsed(self) -> bool:
        """Whether all users look alike."""
        return self.active_units == 0


class VPL(Scorer):
    """A state is z [latent]."""

    kind = "vpl"
    decay, rate, epochs = 0.03, 3e-3, 160

    def __init__(self, sizes: tuple[int, int], latent: int = 8, beta: float = 1e-3) -> None:
        if not beta >= 0:
            raise UserError(f"beta is {beta:g}; the weight of the KL term is 0 or above")
        super().__init__(sizes, {"latent": latent, "beta": beta})
        width = self.answers.basis.shape[1]
        self.pair = nn.Sequential(
            nn.Linear(2 * width, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, WIDTH),
        )  # fmt: skip
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mean, self.log_variance = nn.Linear(WIDTH, latent), nn.Linear(WIDTH, latent)
        self.decoder = nn.Sequential(
            nn.Linear(width + latent, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, 1),
        )  # fmt: skip
        self.register_buffer("spread", torch.ones(1, latent))
        """sigma of every known user, [U, latent]."""

    def encode(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma^2, [B, latent], of contexts [B, C, D]."""
        pairs = self.pair(torch.cat([self.answers(chosen), self.answers(rejected)], -1))
        weights = (self.query(pairs) @ self.key(pairs).transpose(-1, -2) / WIDTH**0.5).softmax(-1)
        whole = (weights @ self.value(pairs)).mean(-2)
        return self.mean(whole), self.log_variance(whole).clamp(-6, 2)

    def reward(self, prompt: Tensor, answer: Tensor, state: Tensor) -> Tensor:
        found: Tensor = self.decoder(torch.cat([self.answers(answer), state], -1)).squeeze(-1)
        return found

    def batches(self, data: Comparisons, random: torch.Generator, size: int) -> list[Comparisons]:
        """Batches of draws of equally many comparisons of a user; `user` counts the draws of a batch. Users with one
        comparison have no target, and wait.
        """
        by_count: dict[int, list[Tensor]] = {}
        for user in data.user.unique():
            places = (data.user == user).nonzero().squeeze(1)
            count = min(SEEN, len(places))
            for _ in range(max(1, len(places) // SEEN) if count > 1 else 0):
                by_count.setdefault(count, []).append(places[torch.randperm(len(places), generator=random)[:count]])
        if not by_count:
            raise UserError("no user has two comparisons: nothing to infer a latent from; take bradley_terry")
        made = []
        for rows in by_count.values():
            order = torch.randperm(len(rows), generator=random).tolist()
            for start in range(0, len(rows), USERS):
                drawn = [rows[place] for place in order[start : start + USERS]]
                number = torch.arange(len(drawn)).repeat_interleave(len(drawn[0]))
                made.append(replace(data.select(torch.cat(drawn)), user=number))
        shuffled = torch.randperm(len(made), generator=random).tolist()
        return [made[place] for place in shuffled]

    def loss(self, batch: Comparisons, step: int) -> Tensor:
        users = int(batch.user[-1]) + 1
        count = len(batch) // users
        chosen, rejected = (part.view(users, count, -1) for part in (batch.chosen, batch.rejected))
        given = int(torch.randint(1, min(CONTEXT, count - 1) + 1, ()))
        mu, log_variance = self.encode(chosen[:, :given], rejected[:, :given])
        z = mu + torch.randn_like(mu) * (log_variance / 2).exp()
        targets = count - given
        state = z[:, None].expand(-1, targets, -1).reshape(users * targets, -1)
        ones, others = (part[:, given:].reshape(users * targets, -1) for part in (chosen, rejected))
        missed = softplus(-self.margin(batch.prompt[: len(ones)], ones, others, state)).mean()
        kl = -0.5 * (1 + log_variance - mu**2 - log_variance.exp()).sum(-1).mean()
        return missed + self.options["beta"] * min(1.0, step / WARM_UP) * kl

    def user_states(self, data: Comparisons) -> Tensor:
        """mu of each user from the first `CONTEXT` of their comparisons; 0 of users without any."""
        latent = self.options["latent"]
        found, spread = torch.zeros(len(data.users), latent), torch.ones(len(data.users), latent)
        with torch.no_grad():
            for user in data.user.unique().tolist():
                mine = data.of(user)
                found[user], log_variance = (part[0] for part in self._encoded(mine.select(range(len(mine))[:CONTEXT])))
                spread[user] = (log_variance / 2).exp()
        self.spread = spread
        return found

    def _encoded(self, given: Comparisons) -> tuple[Tensor, Tensor]:
        return self.encode(given.chosen[None], given.rejected[None])

    def adapt(self, given: Comparisons) -> Tensor:
        """mu of a new user's comparisons."""
        if not len(given):
            raise UserError("no comparisons of the new user; one is the least")
        with torch.no_grad():
            return self._encoded(given)[0][0]

    def sampled(self, given: Comparisons, samples: int, random: torch.Generator) -> Tensor:
        """z [samples, latent] from the posterior given comparisons; without any from the known users' together."""
        assert self.states is not None
        with torch.no_grad():
            if len(given):
                mu, log_variance = self._encoded(given)
                mu, sigma = mu.expand(samples, -1), (log_variance / 2).exp().expand(samples, -1)
            else:
                at = torch.randint(len(self.states), (samples,), generator=random)
                mu, sigma = self.states[at], self.spread[at]
            return mu + sigma * torch.randn(mu.shape, generator=random)

    def health(self, data: Comparisons) -> Health:
        """Whether the latent is used, over the users of the data."""
        states = self.user_states(data)
        there = data.user.unique()
        turned = self.user_states(replace(data, chosen=data.rejected, rejected=data.chosen))
        self.user_states(data)  # puts the spread back
        active = float((states[there].var(0, correction=0) > 0.01).float().mean())
        return Health(active, float(cosine_similarity(states[there], turned[there], dim=-1).mean()))


def next_question(
    scorer: VPL,
    pool: Comparisons,
    given: Comparisons,
    *,
    asked: set[int] | None = None,
    samples: int = 256,
    seed: int = 0,
) -> tuple[int, float]:
    """The place in the pool of the comparison whose answer says most about a user, and how much, in nats (BALD).

    H(mean_s p_s) - mean_s H(p_s) with p_s = sigmoid(r(a, z_s) - r(b, z_s)) and z_s from the posterior given what the
    user has answered so far. (The score in the paper's released code looks at variances only; this is the information.)
    """
    random = torch.Generator().manual_seed(seed)
    z = scorer.sampled(given, samples, random)
    odds = []
    with torch.no_grad():
        for some in z.split(max(1, 20_000 // len(pool))):
            state = some.repeat_interleave(len(pool), 0)
            pairs = (part.repeat(len(some), 1) for part in (pool.prompt, pool.chosen, pool.rejected))
            odds.append(scorer.margin(*pairs, state).sigmoid().view(len(some), -1))
    p = torch.cat(odds)
    gain = _entropy(p.mean(0)) - _entropy(p).mean(0)
    for place in asked or ():
        gain[place] = -math.inf
    best = int(gain.argmax())
    return best, float(gain[best])


def _entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-7, 1 - 1e-7)
    return -p * p.log() - (1 - p) * (1 - p).log()
