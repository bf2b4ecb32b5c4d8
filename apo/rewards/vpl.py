"""VPL: a user is a latent vector, inferred from a few of the user's comparisons (arXiv 2408.10075).

    q(z | D_u) = N(mu(D_u), diag sigma^2(D_u)),    P(a preferred to b | z) = sigmoid(r(a, z) - r(b, z))
    minimise   mean over targets of -log P  +  beta KL(q(z | D_u) || N(0, I)),   z ~ q

D_u are up to `CONTEXT` comparisons of the user. Each is encoded as (chosen, rejected), an order that carries the label.
Self-attention and a mean combine the comparisons, so that their own order does not matter. A new user needs only a few
comparisons, and `next_question` selects the comparison whose answer is most informative about z. Outside of training,
z = mu. With `bounded`, as in the released code, mu and log sigma^2 are clamped to [-1, 1] and z is scaled to the length
sqrt(latent); there in training only, here always. The latent collapses if beta is too large or the decoder ignores z;
`health` detects that.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize, softplus

from apo.rewards.scorer import WIDTH, Comparisons, Scorer
from clair.core.errors import UserError

CONTEXT = 8
"""Maximal number of comparisons that represent a user in training."""
PER_USER = 16
"""Comparisons of a user in one step, context and targets together."""
USERS = 32
WARM_UP = 500
"""Steps over which beta grows from 0."""


class Health(NamedTuple):
    """Measures of how much the latent is used.

    active_units   share of the dimensions whose mean varies over users (variance above 0.01)
    swap           mean cosine of mu with the mu of the same comparisons reversed; -1 if reversing a taste reverses z
    """

    active_units: float
    swap: float

    @property
    def collapsed(self) -> bool:
        """True if all users have the same latent."""
        return self.active_units == 0


class VPL(Scorer):
    """A reward with a latent per user. A state is z [latent]."""

    kind = "vpl"
    decay, rate, epochs = 0.03, 3e-3, 160

    def __init__(self, sizes: tuple[int, int], latent: int = 8, beta: float = 1e-3, bounded: bool = False) -> None:
        if not beta >= 0:
            raise UserError(f"beta is {beta:g}; give a weight of the KL term of 0 or more")
        super().__init__(sizes, {"latent": latent, "beta": beta, **({"bounded": True} if bounded else {})})
        width = self.answers.basis.shape[1]
        self.pair = _two_hidden_layers(2 * width, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mean, self.log_variance = nn.Linear(WIDTH, latent), nn.Linear(WIDTH, latent)
        self.decoder = _two_hidden_layers(width + latent, 1)
        self.register_buffer("spread", torch.ones(1, latent))
        """sigma of all known users, [U, latent]."""

    def encode(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and log sigma^2, [B, latent], of contexts [B, C, D]."""
        pairs = self.pair(torch.cat([self.answers(chosen), self.answers(rejected)], -1))
        weights = (self.query(pairs) @ self.key(pairs).transpose(-1, -2) / WIDTH**0.5).softmax(-1)
        context = (weights @ self.value(pairs)).mean(-2)
        mean, log_variance = self.mean(context), self.log_variance(context)
        if self.options.get("bounded"):
            return mean.clamp(-1, 1), log_variance.clamp(-1, 1)
        return mean, log_variance.clamp(-6, 2)

    def latent(self, z: Tensor) -> Tensor:
        """Return a draw or a mean [.., latent] as the decoder reads it: scaled to its length if `bounded`."""
        return z.shape[-1] ** 0.5 * normalize(z, dim=-1) if self.options.get("bounded") else z

    def reward(self, prompt: Tensor, answer: Tensor, state: Tensor) -> Tensor:
        reward: Tensor = self.decoder(torch.cat([self.answers(answer), state], -1)).squeeze(-1)
        return reward

    def batches(self, data: Comparisons, random: torch.Generator, size: int) -> list[Comparisons]:
        """Return batches of draws. A draw is a number of comparisons of one user, the same number in all of a batch.

        `user` is the index of the draw in its batch. Users with one comparison are skipped: they would have no target.
        """
        by_count: dict[int, list[Tensor]] = {}
        for user in data.user.unique():
            indices = (data.user == user).nonzero().squeeze(1)
            count = min(PER_USER, len(indices))
            for _ in range(max(1, len(indices) // PER_USER) if count > 1 else 0):
                by_count.setdefault(count, []).append(indices[torch.randperm(len(indices), generator=random)[:count]])
        if not by_count:
            raise UserError("no user has two comparisons, so no latent can be inferred; use bradley_terry")
        batches = []
        for rows in by_count.values():
            order = torch.randperm(len(rows), generator=random).tolist()
            for start in range(0, len(rows), USERS):
                drawn = [rows[index] for index in order[start : start + USERS]]
                number = torch.arange(len(drawn)).repeat_interleave(len(drawn[0]))
                batches.append(replace(data.select(torch.cat(drawn)), user=number))
        shuffled = torch.randperm(len(batches), generator=random).tolist()
        return [batches[index] for index in shuffled]

    def loss(self, batch: Comparisons, step: int) -> Tensor:
        users = int(batch.user[-1]) + 1
        count = len(batch) // users
        chosen, rejected = (side.view(users, count, -1) for side in (batch.chosen, batch.rejected))
        context = int(torch.randint(1, min(CONTEXT, count - 1) + 1, ()))
        mu, log_variance = self.encode(chosen[:, :context], rejected[:, :context])
        z = self.latent(mu + torch.randn_like(mu) * (log_variance / 2).exp())
        targets = count - context
        state = z[:, None].expand(-1, targets, -1).reshape(users * targets, -1)
        preferred, refused = (side[:, context:].reshape(users * targets, -1) for side in (chosen, rejected))
        nll = softplus(-self.margin(batch.prompt[: len(preferred)], preferred, refused, state)).mean()
        kl = -0.5 * (1 + log_variance - mu**2 - log_variance.exp()).sum(-1).mean()
        return nll + self.options["beta"] * min(1.0, step / WARM_UP) * kl

    def user_states(self, data: Comparisons) -> Tensor:
        """Return mu of each user from the first `CONTEXT` comparisons, or 0 without any. Stores sigma in `spread`."""
        latent = self.options["latent"]
        states, spread = torch.zeros(len(data.users), latent), torch.ones(len(data.users), latent)
        with torch.no_grad():
            for user in data.user.unique().tolist():
                comparisons = data.by_user(user)
                context = comparisons.select(range(len(comparisons))[:CONTEXT])
                mu, log_variance = (value[0] for value in self._encode_user(context))
                states[user] = self.latent(mu)
                spread[user] = (log_variance / 2).exp()
        self.spread = spread
        return states

    def _encode_user(self, comparisons: Comparisons) -> tuple[Tensor, Tensor]:
        return self.encode(comparisons.chosen[None], comparisons.rejected[None])

    def adapt(self, comparisons: Comparisons) -> Tensor:
        """Return mu of a new user's comparisons."""
        if not len(comparisons):
            raise UserError("no comparisons of the new user; give at least one")
        with torch.no_grad():
            return self.latent(self._encode_user(comparisons)[0][0])

    def sample(self, comparisons: Comparisons, samples: int, random: torch.Generator) -> Tensor:
        """Sample z [samples, latent] from a user's posterior; without comparisons, from those of all known users."""
        assert self.states is not None
        with torch.no_grad():
            if len(comparisons):
                mu, log_variance = self._encode_user(comparisons)
                mu, sigma = mu.expand(samples, -1), (log_variance / 2).exp().expand(samples, -1)
            else:
                users = torch.randint(len(self.states), (samples,), generator=random)
                mu, sigma = self.states[users], self.spread[users]
            return self.latent(mu + sigma * torch.randn(mu.shape, generator=random))

    def health(self, data: Comparisons) -> Health:
        """Measure how much the latent is used, over the users of the data."""
        states = self.user_states(data)
        users = data.user.unique()
        reversed_states = self.user_states(replace(data, chosen=data.rejected, rejected=data.chosen))
        self.user_states(data)  # restores `spread`
        active = float((states[users].var(0, correction=0) > 0.01).float().mean())
        return Health(active, float(cosine_similarity(states[users], reversed_states[users], dim=-1).mean()))


def next_question(
    scorer: VPL,
    pool: Comparisons,
    answered: Comparisons,
    *,
    excluded: set[int] | None = None,
    samples: int = 256,
    seed: int = 0,
) -> tuple[int, float]:
    """Return the index of the comparison that is most informative about a user, and its information in nats (BALD).

    The information is H(mean_s p_s) - mean_s H(p_s), with p_s = sigmoid(r(a, z_s) - r(b, z_s)). z_s are samples of the
    posterior after the answered comparisons. (The paper's released code uses variances only.)
    """
    random = torch.Generator().manual_seed(seed)
    z = scorer.sample(answered, samples, random)
    probabilities = []
    with torch.no_grad():
        for chunk in z.split(max(1, 20_000 // len(pool))):
            state = chunk.repeat_interleave(len(pool), 0)
            prompt, first, second = (side.repeat(len(chunk), 1) for side in (pool.prompt, pool.chosen, pool.rejected))
            probabilities.append(scorer.margin(prompt, first, second, state).sigmoid().view(len(chunk), -1))
    p = torch.cat(probabilities)
    gain = _entropy(p.mean(0)) - _entropy(p).mean(0)
    for index in excluded or ():
        gain[index] = -math.inf
    best = int(gain.argmax())
    return best, float(gain[best])


def _two_hidden_layers(inputs: int, outputs: int) -> nn.Sequential:
    first, second, last = nn.Linear(inputs, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, outputs)
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), last)


def _entropy(p: Tensor) -> Tensor:
    p = p.clamp(1e-7, 1 - 1e-7)
    return -p * p.log() - (1 - p) * (1 - p).log()
