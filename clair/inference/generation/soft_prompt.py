"""Soft prompts: a user's state, such as a latent taste, mapped to k embeddings in front of the first turn.

A chat template writes the same tokens in front of every first turn (`opening`). On the first k of them the model reads

    e_i + (z W)_i * scale,    z = state - mean,    i = 1 ... k

in place of their embeddings e_i, with a trained map W [S, k, h]. This is a prompt of k free vectors that starts at real
embeddings (arXiv 2104.08691), and it takes no position of its own: nothing moves, prompts are no longer, and at W = 0
or for the mean user the model is the one without a soft prompt, bit by bit.

Marked token ids say where: `mark` replaces the ids of the opening by ids beyond the vocabulary, which name a row of
`states` and a position i. So a batch may hold several users, padded, packed or in a cache, and rows without a user.

soft_prompt.json          opening, sizes, names of the users
soft_prompt.safetensors   W, mean, scale, states of these users
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clair.core.errors import UserError, near_miss, one_line
from clair.core.files import publish, read_json, write_json
from clair.inference.model_folder import SOFT_PROMPT

_WEIGHTS = "soft_prompt.safetensors"
GAIN = 16.0
"""Offsets per unit of z W, in units of the embeddings' own size. An optimizer moves W by a fixed amount per step, so
this is how much faster the soft prompt learns than the weights below."""


class SoftPrompt(nn.Module):
    """The map from states [n, S] to offsets [n, k, h], and the model whose embeddings it changes (`attach`)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, opening: Sequence[int], width: int, hidden: int, users: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.opening, self.users = list(opening), dict(users or {})
        self.weight = nn.Parameter(torch.zeros(width, len(self.opening), hidden))
        self.register_buffer("mean", torch.zeros(width), persistent=False)
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.states: Tensor | None = None
        """The states [n, S] that marked ids refer to; None: no ids are marked."""
        self._vocabulary = 0

    def fit(self, states: Tensor, embeddings: Tensor) -> None:
        """Set mean and scale by the states [n, S] of the training pairs, and the size of the model's embeddings."""
        self.mean = states.mean(0).to(self.mean)
        spread = (states - states.mean(0)).square().mean().sqrt()
        size = embeddings.detach().float().square().mean().sqrt()
        self.scale = (GAIN * size / spread.to(size)).to(self.scale)

    def forward(self, states: Tensor) -> Tensor:
        """The offsets [n, k, h] of states [n, S]."""
        z = (states.to(self.weight) - self.mean) * self.scale
        return torch.einsum("ns,skh->nkh", z, self.weight)

    def attach(self, model: Any) -> SoftPrompt:
        """Become a part of `model`, whose embeddings then read marked ids. Returns itself.

        Raises UserError for a model of another width, and for a repetition penalty, which looks ids up.
        """
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        embeddings = base.get_input_embeddings()
        self._vocabulary, hidden = embeddings.weight.shape
        if hidden != self.weight.shape[-1]:
            raise UserError(
                f"the soft prompt has embeddings of {self.weight.shape[-1]} numbers, and those of the model have "
                f"{hidden}; load the model that it was trained with"
            )
        if getattr(base.generation_config, "repetition_penalty", None) not in (None, 1.0):
            raise UserError(
                "generation_config.repetition_penalty does not work with a soft prompt; take it out of the model's "
                "generation_config.json"
            )
        self.to(embeddings.weight.device)
        plain = embeddings.forward

        def forward(_: Any, input: Tensor, *args: Any, **options: Any) -> Tensor:
            return self._embed(plain, input, *args, **options)

        embeddings.forward = types.MethodType(forward, embeddings)
        base.soft_prompt = self
        return self

    def _embed(self, plain: Any, ids: Tensor, *args: Any, **options: Any) -> Tensor:
        if self.states is None or not (marked := ids >= self._vocabulary).any():
            return plain(ids, *args, **options)
        number = ids[marked] - self._vocabulary
        row, position = number // len(self.opening), number % len(self.opening)
        opening = torch.tensor(self.opening, device=ids.device)
        embedded = plain(ids.masked_scatter(marked, opening[position]), *args, **options)
        offsets = self(self.states.to(ids.device))[row, position]
        return embedded.index_put(marked.nonzero(as_tuple=True), offsets.to(embedded.dtype), accumulate=True)

    def marks(self, row: int = 0) -> list[int]:
        """The ids that stand for the opening of a prompt of the user in row `row` of `states`."""
        return [self._vocabulary + row * len(self.opening) + position for position in range(len(self.opening))]

    def mark(self, ids: Sequence[int], row: int = 0) -> list[int]:
        """The ids of a prompt, marked for the user in row `row` of `states`.

        Raises UserError if the prompt begins with other tokens than those of training.
        """
        if list(ids[: len(self.opening)]) != self.opening:
            raise UserError(
                f"the prompt begins with the tokens {list(ids[: len(self.opening)])}, and the soft prompt was trained "
                f"on {self.opening}; use the chat template and the system prompt of training"
            )
        return [*self.marks(row), *ids[len(self.opening) :]]

    @contextmanager
    def using(self, states: Tensor) -> Iterator[None]:
        """Let marked ids refer to these states [n, S] within."""
        previous, self.states = self.states, states
        try:
            yield
        finally:
            self.states = previous

    def state_of(self, user: str | Sequence[float]) -> Tensor:
        """The state [S] of a user who was trained, by name, or the given state.

        Raises UserError for an unknown name and for a state of another width.
        """
        if isinstance(user, str):
            if user not in self.users:
                raise UserError(
                    f"the soft prompt knows no user {user!r}{near_miss(user, self.users)}; it knows {len(self.users)} "
                    "users; a new user is given as a state, from `apo reward adapt`"
                )
            return self.users[user]
        state = torch.tensor([float(value) for value in user])
        if len(state) != len(self.mean):
            raise UserError(f"a state of {len(state)} numbers; the soft prompt was trained on {len(self.mean)}")
        return state

    def save(self, folder: Path) -> None:
        """Write both files, the JSON last."""
        from safetensors.torch import save_file

        states = torch.stack([*self.users.values()]) if self.users else torch.zeros(0, len(self.mean))
        tensors = {"weight": self.weight.detach(), "mean": self.mean, "scale": self.scale, "states": states}
        temporary = folder / f".{_WEIGHTS}.tmp"
        save_file({name: tensor.float().cpu().clone().contiguous() for name, tensor in tensors.items()}, temporary)
        publish(temporary, folder / _WEIGHTS)
        facts = {"format": 1, "opening": self.opening, "state": len(self.mean), "hidden": self.weight.shape[-1]}
        write_json(folder / SOFT_PROMPT, {**facts, "users": list(self.users)})

    @classmethod
    def load(cls, folder: Path) -> SoftPrompt:
        """Read a folder. Raises UserError if it has no soft prompt that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not (folder / SOFT_PROMPT).is_file():
            raise UserError(f"{folder} has no {SOFT_PROMPT}; give a run that was trained with `soft_prompt`")
        facts = read_json(folder / SOFT_PROMPT)
        try:
            tensors = load_file(folder / _WEIGHTS)
            users = dict(zip(facts["users"], tensors["states"], strict=True))
            prompt = cls(facts["opening"], facts["state"], facts["hidden"], users)
            prompt.load_state_dict({"weight": tensors["weight"]})
            prompt.mean, prompt.scale = tensors["mean"], tensors["scale"]
        except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the soft prompt in {folder} cannot be read ({one_line(error)}); train it again"
            ) from error
        return prompt

    def restore(self, folder: Path) -> None:
        """Take the weights of a checkpoint of the same training."""
        saved = SoftPrompt.load(folder)
        with torch.no_grad():
            self.weight.copy_(saved.weight)
