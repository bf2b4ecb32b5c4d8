"""Features of pairs: a frozen model's last hidden states, computed in one pass and cached by content.

The states are taken after the final norm (lm_head(phi) are the logits), so they are not normalised again. A pair has
seven vectors: those at the last token of the prompt, of prompt and chosen, and of prompt and rejected (the end of turn,
never padding), and two averages over the tokens of each response. The mean weights all tokens alike. The cumulative
average begins where the two responses first differ, with weights 1, 2, ..., l over their sum. The cache has one file
per `CHUNK_PAIRS` pairs; its key is a hash of weights, number type, attention implementation and token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from apo.data.encoding import common_prefix
from apo.data.pair_rows import read_pair_rows
from apo.models import tensor_cache as cache
from clair.core.errors import UserError
from clair.core.files import content_hash
from clair.data.records import LABELS
from clair.data.row_formats import COLUMNS
from clair.storage.location import cache_root

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

CHUNK_PAIRS = 512
"""Pairs in one cache file, and the most that a killed run has to compute again."""
NAMES = (
    *("prompt", "chosen", "rejected"),
    *("chosen_mean", "rejected_mean", "chosen_cumulative", "rejected_cumulative"),
)
Pooling = Literal["last", "mean", "cumulative"]
"""What represents a response: the state at its last token, or an average over its tokens."""
BATCH_TOKENS = 8192
"""Tokens of a batch, padding included."""


@dataclass(frozen=True)
class Features:
    """The vectors of n pairs, each [n, D] in float32, and the identity of the model that computed them."""

    model: str
    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_mean: Tensor
    rejected_mean: Tensor
    chosen_cumulative: Tensor
    rejected_cumulative: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    def select(self, indices: Sequence[int]) -> Features:
        """Return the features of some pairs, in this order."""
        return Features(self.model, *(getattr(self, name)[list(indices)] for name in NAMES))

    def pooled(self, pooling: Pooling) -> Features:
        """Return the features with this average over tokens as those of chosen and rejected, under its own identity."""
        if pooling == "last":
            return self
        chosen, rejected = (getattr(self, f"{side}_{pooling}") for side in ("chosen", "rejected"))
        return replace(self, model=content_hash([self.model, pooling]), chosen=chosen, rejected=rejected)


def compute_features(
    dataset: Dataset, model: Any, folder: Path | None = None, log: Callable[[str], None] = lambda _: None
) -> Features:
    """Return the features of tokenised pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`), cached ones if possible."""
    import torch

    folder = cache_root() if folder is None else folder
    weights = cache.hash_model(model, adapter=True)
    width = model.get_output_embeddings().in_features
    identity = [weights, str(model.dtype), getattr(model.config, "_attn_implementation", None)]
    chunks: list[Mapping[str, Tensor]] = []
    for start in range(0, len(dataset), CHUNK_PAIRS):
        pairs = [dict(row) for row in dataset.select(range(start, min(start + CHUNK_PAIRS, len(dataset))))]
        ids = [[pair[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] for pair in pairs]
        key = content_hash(["features 2", identity, ids])
        features: Mapping[str, Tensor] | None = cache.load(folder, key, dict.fromkeys(NAMES, (len(pairs), width)))
        if features is None:
            features = dict(zip(NAMES, encode(model, pairs), strict=True))
            note = cache.store(folder, key, features)
            log(f"features: {start + len(pairs):,} of {len(dataset):,} pairs" + (f"; {note}" if note else ""))
        chunks.append(features)
    columns = (torch.cat([chunk[name] for chunk in chunks]) for name in NAMES)
    return Features(content_hash(identity), *columns)


def encode(model: Any, pairs: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """Return the features of some pairs, in the order of `NAMES`, each [n, D] in float32 on the host."""
    import torch

    rows = [(pair["prompt_ids"], pair[f"{name}_ids"]) for name in ("chosen", "rejected") for pair in pairs]
    order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
    parting = [common_prefix(pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs]
    vectors: dict[int, tuple[Tensor, ...]] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches(order, [sum(map(len, row)) for row in rows]):
                hidden = last_hidden(model, [rows[index][0] + rows[index][1] for index in batch])
                for index, states in zip(batch, hidden, strict=True):
                    start, end = len(rows[index][0]), sum(map(len, rows[index]))
                    differing = states[min(start + parting[index % len(pairs)], end - 1) : end]
                    weights = torch.arange(1.0, len(differing) + 1)
                    cumulative = weights @ differing / weights.sum()
                    vectors[index] = states[start - 1], states[end - 1], states[start:end].mean(0), cumulative
    finally:
        model.train(was_training)
    columns = zip(*(vectors[index] for index in range(len(rows))), strict=True)
    (prompt, _), *responses = (torch.stack(column).split(len(pairs)) for column in columns)
    return prompt, *(side for sides in responses for side in sides)


def last_hidden(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the last hidden states of rows of token ids, padded on the right, [N, L, D] in float32 on the host."""
    from apo.packing.logps import pad_right

    ids, mask = pad_right(rows)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    decoder = base.get_decoder()
    states = decoder(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    hidden: Tensor = states.last_hidden_state.float().cpu()
    return hidden


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Split the indices into batches of at most `BATCH_TOKENS` padded tokens, in this order."""
    batches: list[list[int]] = []
    for index in order:
        if batches and (len(batches[-1]) + 1) * lengths[index] <= BATCH_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs with their features.

    `rows` are those of `read_rows`. `features` and `tokenized` (token ids) are in the same order. Features of a file
    come without `tokenized` and `model`.
    """

    rows: list[dict[str, Any]]
    features: Features
    tokenized: Dataset | None = None
    model: Any = None

    def select(self, indices: Sequence[int]) -> EncodedPairs:
        """Return some of the pairs, in this order."""
        rows = [self.rows[index] for index in indices]
        tokenized = None if self.tokenized is None else self.tokenized.select(indices)
        return EncodedPairs(rows, self.features.select(indices), tokenized, self.model)


def encode_rows(rows: list[dict[str, Any]], model: str, log: Callable[[str], None] = lambda _: None) -> EncodedPairs:
    """Compute the features of rows of pairs (`read_rows`) with the model at `model`.

    Raises UserError for a model that cannot be read, before anything is computed. Pairs that are longer than the
    model's context are left out, with a note.
    """
    from apo.data.tokenize import eos_ids, tokenize
    from apo.models import load as models

    name = models.find_model(model)
    tokenizer = models.load_tokenizer(name)
    eos = eos_ids(tokenizer, models.load_generation_config(name))
    tokenized = tokenize(_normalised(rows), tokenizer, models.context_length(name), eos, "given")
    for note in tokenized.notes:
        log(f"note: {note}")
    if "too_long" in tokenized.dropped:
        log(f"{tokenized.dropped['too_long']:,} pairs are left out: they are longer than the model's context")
    if not len(tokenized.dataset):
        raise UserError(f"none of {len(rows):,} pairs fits the context of model {model}")
    loaded = models.load_model(name)
    models.check_vocabulary(loaded, tokenizer, name.base)
    loaded.requires_grad_(False).eval()
    remaining = [rows[index] for index in tokenized.dataset["_index"]]
    features = compute_features(tokenized.dataset, loaded, log=log)
    return EncodedPairs(remaining, features, tokenized.dataset, loaded)


def _normalised(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Return rows as the dataset that `load_pairs` would give: tools, calls and options of the template as JSON text.

    Arrow would merge the keys of all tools, and refuse arguments of different types.
    """
    from datasets import Dataset

    from clair.data.preferences import ROW, TRAITS, decode, encode_row

    columns = (*COLUMNS, "tools", "chat_template_kwargs")
    keep_text = all(isinstance(row["chosen"], str) for row in rows)
    encoded = []
    for index, row in enumerate(rows):
        given = {name: row[name] for name in columns if row.get(name) is not None}
        text, traits = encode_row(given, f"pair {row['id']!r}", keep_text=keep_text)
        encoded.append({"id": row["id"], "_index": index, ROW: text, TRAITS: traits})
    return decode(Dataset.from_list(encoded), "given dataset").dataset


def read_rows(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Read all pairs of some datasets as `read_pair_rows` does. Labels are text or None."""
    rows = [
        {**row, **{name: None if row.get(name) is None else str(row[name]) for name in LABELS}}
        for path in paths
        for row in read_pair_rows(path)
    ]
    if not rows:
        raise UserError(f"{', '.join(paths)} hold no pairs")
    return rows
