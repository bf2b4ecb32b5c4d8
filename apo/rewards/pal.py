"""PAL: a few prototypical tastes that all users share, and for each user their weights (arXiv 2406.08469).

Ideal points: a user prefers the answer that is nearer to a point of their own. f is a map that all share, w_u =
softmax(v_u) over K prototypes; user u owns K numbers, the rest is learned from everybody.

    PAL-A   a_u = f(sum_k w_uk P_k),          margin = |f(rejected) - a_u|^2 - |f(chosen) - a_u|^2
    PAL-B   a_u(c) = sum_k w_uk g_k(phi(c)),  margin = s (cos(f(chosen), a_u(c)) - cos(f(rejected), a_u(c)))

The distances enter with the sign that draws the chosen answer nearer, and each vector is that of the last token. Loss:
logistic, -log sigmoid(margin). A new user is located by fitting v alone. K = 1 is a homogeneous model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, softplus

from apo.rewards.scorer import Comparisons, Linearly, Scorer, mlp
from clair.core.errors import UserError


class PAL(Scorer):
    """PAL-A, or PAL-B where the ideal point depends on the prompt (`by_prompt`). A state is w [K]."""

    kind = "pal"
    per_user = frozenset({"v"})

    def __init__(self, sizes: tuple[int, int], users: int, prototypes: int = 2, by_prompt: bool = False) -> None:
        if prototypes < 1:
            raise UserError(f"prototypes is {prototypes}; it is 1 or more")
        super().__init__(sizes, {"users": users, "prototypes": prototypes, "by_prompt": by_prompt})
        width = self.answers.basis.shape[1]
        self.f = mlp(width, width)
        self.v = nn.Parameter(torch.randn(users, prototypes))
        self.scale = nn.Parameter(torch.tensor(0.0))
        if by_prompt:
            inputs = self.prompts.basis.shape[1]
            self.g = nn.ModuleList(Linearly(inputs, width) for _ in range(prototypes))
            # K functions are much to learn from little. With less decay, or a scale of 1 / 0.07 to begin with, f and g
            # learn the comparisons by heart; and they come out well only when the rate has fallen.
            self.decay, self.patience = 10.0, 1.0
        else:
            self.prototypes = nn.Parameter(torch.randn(prototypes, width) / width**0.5)

    def place(self, x: Tensor) -> Tensor:
        """f with the identity past it, [n, d] -> [n, d]."""
        placed: Tensor = x + self.f(x)
        return placed

    def reward(self, prompt: Tensor, answer: Tensor, state: Tensor) -> Tensor:
        x = self.place(self.answers(answer))
        if self.options["by_prompt"]:
            seen = self.prompts(prompt)
            ideal = (torch.stack([g(seen) for g in self.g], -1) * state[:, None, :]).sum(-1)
            return self.scale.exp().clamp(max=100) * cosine_similarity(x, ideal, dim=-1)
        ideal = self.place(state @ self.prototypes)
        return -self.scale.exp() * ((x - ideal) ** 2).sum(-1) / x.shape[-1]

    def loss(self, batch: Comparisons, step: int) -> Tensor:
        state = self.v.softmax(-1)[batch.user]
        return softplus(-self.margin(batch.prompt, batch.chosen, batch.rejected, state)).mean()

    def user_states(self, data: Comparisons) -> Tensor:
        return self.v.softmax(-1)

    def adapt(self, given: Comparisons, *, steps: int = 120, rate: float = 0.1) -> Tensor:
        """Few-shot localisation: v of a new user by Adam from 0 with a small pull to 0, everything else frozen."""
        if not len(given):
            raise UserError("no comparisons of the new user; one is the least")
        v = torch.zeros(self.options["prototypes"], requires_grad=True)
        optimizer = torch.optim.Adam([v], lr=rate)
        for _ in range(steps):
            state = v.softmax(-1).expand(len(given), -1)
            margin = self.margin(given.prompt, given.chosen, given.rejected, state)
            loss = softplus(-margin).mean() + 1e-3 * (v**2).sum()
            optimizer.zero_grad()
            (v.grad,) = torch.autograd.grad(loss, [v])
            optimizer.step()
        return v.detach().softmax(-1)

    def groups(self) -> dict[str, Tensor]:
        """Each prototype by itself, `group 1` to `group K`."""
        states = torch.eye(self.options["prototypes"])
        return {f"group {number + 1}": state for number, state in enumerate(states)}
