"""PAL: prototypical tastes that all users share, and weights of the prototypes for each user (arXiv 2406.08469).

A user prefers the answer that is nearer to their ideal point. f is a shared map, and w_u = softmax(v_u) weights the K
prototypes. Each user has K parameters; all other parameters are shared.

    PAL-A   a_u = f(sum_k w_uk P_k),          margin = s (dist(f(rejected), a_u) - dist(f(chosen), a_u))
    PAL-B   a_u(c) = sum_k w_uk g_k(phi(c)),  margin = s (cos(f(chosen), a_u(c)) - cos(f(rejected), a_u(c)))

The distance is squared, or the Euclidean norm. The loss is logistic, -log sigmoid(margin), or the hinge,
max(0, 1 - margin); both move the chosen answer nearer to a_u. A new user is located by fitting v alone. With K = 1,
all users have the same reward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, relu, softplus

from apo.rewards.scorer import Comparisons, ResidualMLP, Scorer, mlp
from clair.core.errors import UserError

if TYPE_CHECKING:
    from apo.rewards.config import Distance, Loss


class PAL(Scorer):
    """PAL-A, or PAL-B with `by_prompt`, whose ideal point depends on the prompt. A state is w [K]."""

    kind = "pal"
    per_user = frozenset({"v"})

    def __init__(
        self,
        sizes: tuple[int, int],
        users: int,
        prototypes: int = 2,
        by_prompt: bool = False,
        distance: Distance = "squared",
        loss: Loss = "logistic",
    ) -> None:
        if prototypes < 1:
            raise UserError(f"prototypes is {prototypes}; it is 1 or more")
        options = {"users": users, "prototypes": prototypes, "by_prompt": by_prompt}
        super().__init__(sizes, {**options, "distance": distance, "loss": loss})
        width = self.answers.basis.shape[1]
        self.f = mlp(width, width)
        self.v = nn.Parameter(torch.randn(users, prototypes))
        self.scale = nn.Parameter(torch.tensor(0.0))
        if by_prompt:
            inputs = self.prompts.basis.shape[1]
            self.g = nn.ModuleList(ResidualMLP(inputs, width) for _ in range(prototypes))
            # K functions have many parameters for few data. With less decay, or an initial scale of 1 / 0.07, f and g
            # overfit the comparisons. They become good only after the learning rate has decayed, hence the patience.
            self.decay, self.patience = 10.0, 1.0
        else:
            self.prototypes = nn.Parameter(torch.randn(prototypes, width) / width**0.5)

    def embed(self, x: Tensor) -> Tensor:
        """Map x to x + f(x), [n, d] -> [n, d]."""
        embedded: Tensor = x + self.f(x)
        return embedded

    def reward(self, prompt: Tensor, answer: Tensor, state: Tensor) -> Tensor:
        x = self.embed(self.answers(answer))
        if self.options["by_prompt"]:
            projected = self.prompts(prompt)
            ideal = (torch.stack([g(projected) for g in self.g], -1) * state[:, None, :]).sum(-1)
            return self.scale.exp().clamp(max=100) * cosine_similarity(x, ideal, dim=-1)
        square = ((x - self.embed(state @ self.prototypes)) ** 2).sum(-1)
        if self.options["distance"] == "norm":
            return -self.scale.exp() * (square / x.shape[-1] + 1e-12).sqrt()  # the root has no gradient at 0
        return -self.scale.exp() * square / x.shape[-1]

    def loss(self, batch: Comparisons, step: int) -> Tensor:
        state = self.v.softmax(-1)[batch.user]
        return self._loss(batch, state)

    def _loss(self, batch: Comparisons, state: Tensor) -> Tensor:
        margin = self.margin(batch.prompt, batch.chosen, batch.rejected, state)
        return (relu(1 - margin) if self.options["loss"] == "hinge" else softplus(-margin)).mean()

    def user_states(self, data: Comparisons) -> Tensor:
        return self.v.softmax(-1)

    def adapt(self, comparisons: Comparisons, *, steps: int = 120, rate: float = 0.1) -> Tensor:
        """Fit v of a new user by Adam from 0, slightly regularised, with all other parameters frozen."""
        if not len(comparisons):
            raise UserError("no comparisons of the new user; give at least one")
        v = torch.zeros(self.options["prototypes"], requires_grad=True)
        optimizer = torch.optim.Adam([v], lr=rate)
        for _ in range(steps):
            state = v.softmax(-1).expand(len(comparisons), -1)
            loss = self._loss(comparisons, state) + 1e-3 * (v**2).sum()
            optimizer.zero_grad()
            (v.grad,) = torch.autograd.grad(loss, [v])
            optimizer.step()
        return v.detach().softmax(-1)

    def groups(self) -> dict[str, Tensor]:
        """Return one state per prototype, `group 1` to `group K`."""
        states = torch.eye(self.options["prototypes"])
        return {f"group {number + 1}": state for number, state in enumerate(states)}
