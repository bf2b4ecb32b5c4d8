"""The rows of a trainer's datasets, tokenized by its options, with counts of those left out and notes."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from apo.data.tokenize import Tokenized, answer_lengths, eos_ids, tokenize, tokenize_stream
from apo.losses.mixture import resolve_mixture
from apo.losses.saturation import objective_notes
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError


def tokenize_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    args: APOConfig,
    name: str,
    day: str | None = None,
) -> Tokenized:
    """Tokenize a dataset, or a stream row by row. `day` is the date that a chat template writes as today's."""
    eos, objective = eos_ids(tokenizer, generation), resolve_mixture(args.objective)
    if isinstance(dataset, IterableDataset):
        return tokenize_stream(dataset, tokenizer, args.max_length, eos, name, objective, args.weights)
    return tokenize(
        dataset,
        tokenizer,
        args.max_length,
        eos,
        name,
        num_proc=args.dataset_num_proc,
        objective=objective,
        day=day,
        weights=args.weights,
    )


def prepare_rows(dataset: Any, tokenizer: Any, generation: GenerationConfig | None, args: APOConfig, name: str) -> Any:
    """`Tokenized` rows to train or evaluate on, with notes on what the objective and `max_length` do to them.

    Raises UserError for what is no dataset or no tokenizer, and if no row is left.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise UserError(f"{name} dataset is a {type(dataset).__name__}; give a datasets.Dataset or IterableDataset")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"a {type(tokenizer).__name__} is no tokenizer; only text models can be trained")
    tokenized = tokenize_rows(dataset, tokenizer, generation, args, name)
    if isinstance(dataset, IterableDataset):
        return tokenized
    args.check_dataset(tokenized.dataset.column_names)
    if not len(tokenized.dataset):
        raise UserError(f"every row of the {name} dataset is longer than max_length {args.max_length}; raise it")
    if too_long := tokenized.dropped.get("too_long"):
        tokenized.notes.append(
            f"{name}: {too_long:,} of {len(dataset):,} rows are longer than max_length {args.max_length:,} and left "
            "out; TRL would cut them (truncation_mode)"
        )
    if name == "train" and tokenized.dataset is not dataset:
        tokenized.notes.extend(
            objective_notes(resolve_mixture(args.objective), args.beta, answer_lengths(tokenized.dataset))
        )
    return tokenized
