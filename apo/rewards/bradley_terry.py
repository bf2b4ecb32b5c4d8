"""Bradley-Terry: one reward for all users, P(a preferred to b) = sigmoid(r(a) - r(b)) (Bradley & Terry 1952)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from apo.rewards.scorer import Comparisons, Scorer, mlp


class BradleyTerry(Scorer):
    """r(phi), an MLP plus a linear map. The state is empty, because all users have the same reward."""

    kind = "bradley_terry"

    def __init__(self, sizes: tuple[int, int]) -> None:
        super().__init__(sizes, {})
        width = self.answers.basis.shape[1]
        self.body, self.linear = mlp(width, 1), torch.nn.Linear(width, 1)

    def reward(self, prompt: Tensor, answer: Tensor, state: Tensor) -> Tensor:
        x = self.answers(answer)
        reward: Tensor = (self.body(x) + self.linear(x)).squeeze(-1)
        return reward

    def loss(self, batch: Comparisons, step: int) -> Tensor:
        return softplus(-self.margin(batch.prompt, batch.chosen, batch.rejected, batch.chosen[:, :0])).mean()

    def user_states(self, data: Comparisons) -> Tensor:
        return torch.zeros(len(data.users), 0)

    def adapt(self, comparisons: Comparisons) -> Tensor:
        return torch.zeros(0)
