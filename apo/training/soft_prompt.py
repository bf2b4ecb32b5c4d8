"""The soft prompt of a run: its data checked, built on the trainer's model, and followed by the trainer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from apo.data.encoding import common_prefix
from apo.distributed.launch import deepspeed_requested, fsdp_requested
from clair.core.errors import UserError, check_name

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from apo.training.trainer_config import APOConfig
    from clair.inference.generation.soft_prompt import SoftPrompt

MAX_TOKENS = 8
"""Embeddings of a soft prompt if the recipe sets no number and the chat template opens with as many tokens."""
_PROBES = ("a", "1 b")


def check_states(dataset: Any, column: str, name: str) -> int:
    """The width of the states in a column. Raises UserError for rows without one, or with another width.

    Also if all rows of the training pairs have the same state, as from a collapsed latent.
    """
    if not hasattr(dataset, "__len__"):
        raise UserError("soft_prompt: the states of a stream are not known in advance; give a datasets.Dataset")
    check_name(f"soft_prompt: the {name} dataset has no column", column, dataset.column_names, "found")
    states = dataset[column][:]
    width = len(states[0]) if isinstance(states[0], list) else 0
    for row, state in enumerate(states):
        location = f"soft_prompt: {column!r} of row {row} of the {name} dataset"
        if not isinstance(state, list) or not state:
            raise UserError(f"{location} is {state!r}; a list of numbers needed, the state of the row's user")
        if len(state) != width:
            raise UserError(f"{location} has {len(state)} numbers and that of row 0 has {width}; one width needed")
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in state):
            raise UserError(f"{location} is {state!r}; finite numbers needed")
    if name == "train" and all(state == states[0] for state in states):
        raise UserError(
            f"soft_prompt: every {column!r} of the train dataset is the same, so that users cannot be told apart; has "
            "the latent collapsed? leave soft_prompt out, or fit the reward again"
        )
    return width


def shared_opening(tokenizer: PreTrainedTokenizerBase, datasets: list[Dataset], tokens: int | None) -> list[int]:
    """The first `tokens` token ids, which the chat template writes in front of every prompt of the tokenized datasets.

    Without a number all of them, at most `MAX_TOKENS`. Raises UserError if the prompts share fewer.
    """
    probes: Any = [[{"role": "user", "content": text}] for text in _PROBES]
    texts = [str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)) for turns in probes]
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    opening = list(first[: common_prefix(first, second)])
    for dataset in datasets:
        for prompt in dataset["prompt_ids"]:
            opening = opening[: common_prefix(opening, prompt)]
    if len(opening) < (tokens or 1):
        raise UserError(
            f"soft_prompt.tokens: {tokens or 1}, but the prompts share only the first {len(opening)} tokens, those "
            "that the chat template writes in front; lower it, or begin all prompts with the same system turn"
        )
    return opening[: tokens or MAX_TOKENS]


def check_soft_prompt(
    args: APOConfig, tokenizer: PreTrainedTokenizerBase, train: Dataset, evaluated: Dataset | None
) -> tuple[list[int], int]:
    """The opening and the width of the states of tokenized pairs. Raises UserError for what cannot work."""
    assert args.soft_prompt is not None
    if fsdp_requested(args) or deepspeed_requested(args):
        raise UserError("soft_prompt: its weights are whole in every process; leave FSDP and DeepSpeed out")
    width = check_states(train, args.soft_prompt, "train")
    if evaluated is not None and check_states(evaluated, args.soft_prompt, "eval") != width:
        raise UserError(f"soft_prompt: {args.soft_prompt!r} has another width in the eval dataset than in train")
    held_out = [] if evaluated is None else [evaluated]
    return shared_opening(tokenizer, [train, *held_out], args.soft_prompt_tokens), width


def add_soft_prompt(
    args: APOConfig, model: Any, tokenizer: PreTrainedTokenizerBase, train: Dataset, evaluated: Any
) -> SoftPrompt | None:
    """Put a soft prompt in front of the pairs of a model that is about to be trained; None if `args` have none."""
    if args.soft_prompt is None:
        return None
    import torch

    from clair.inference.generation.soft_prompt import SoftPrompt

    if isinstance(evaluated, dict):
        raise UserError("soft_prompt: give one eval dataset, not several by name")
    opening, width = check_soft_prompt(args, tokenizer, train, evaluated)
    states = [tuple(state) for state in train[args.soft_prompt]]
    names: list[Any] = train["user"][:] if "user" in train.column_names else [None] * len(states)
    users = {name: torch.tensor(state) for name, state in zip(names, states, strict=True) if name is not None}
    embeddings = model.get_input_embeddings().weight
    prompt = SoftPrompt(opening, width, embeddings.shape[-1], users)
    prompt.fit(torch.tensor(states), embeddings)
    return prompt.attach(model)
