"""Features of pairs: a frozen model's last hidden states, computed in one pass and cached by content.

The states are after the final norm (lm_head(phi) are the logits), so they are not normalised again. A pair has five
vectors: at the last token of the prompt, of prompt and chosen, and of prompt and rejected (the end of turn, never
padding), and the means over the tokens of each response. The cache has one file per `PART` pairs, under a key of
weights, type, attention implementation and token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.data.sources import check_exists, split_names
from apo.models import tensor_cache as cache
from clair.core.errors import UserError
from clair.core.files import content_hash
from clair.data.records import LABELS
from clair.storage.location import Location, cache_root

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

PART = 512
"""Pairs in one cache file; a killed run recomputes at most so many."""
NAMES = ("prompt", "chosen", "rejected", "chosen_mean", "rejected_mean")
BATCH_TOKENS = 8192
SCORES = ("score_chosen", "score_rejected")


@dataclass(frozen=True)
class Features:
    """The vectors of n pairs, each [n, D] in float32, and the identity of the model that computed them."""

    model: str
    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_mean: Tensor
    rejected_mean: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    def select(self, indices: Sequence[int]) -> Features:
        """Return the features of some pairs, in this order."""
        return Features(self.model, *(getattr(self, name)[list(indices)] for name in NAMES))


def same_model(expected: str, actual: str, what: str) -> None:
    """Raise UserError if features are from another model than `what` was fitted on."""
    if expected != actual:
        raise UserError(
            f"{what} was fitted on features of model {expected[:12]}, and these are of model {actual[:12]}: their "
            f"spaces have nothing in common; give the model it was fitted on, or fit again"
        )


def compute_features(
    dataset: Dataset, model: Any, folder: Path | None = None, log: Callable[[str], None] = lambda _: None
) -> Features:
    """Return the features of tokenised pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`), from the cache if there."""
    import torch

    folder = cache_root() if folder is None else folder
    weights = cache.hash_model(model, adapter=True)
    width = model.get_output_embeddings().in_features
    identity = [weights, str(model.dtype), getattr(model.config, "_attn_implementation", None)]
    chunks: list[Mapping[str, Tensor]] = []
    for start in range(0, len(dataset), PART):
        pairs = [dict(row) for row in dataset.select(range(start, min(start + PART, len(dataset))))]
        ids = [[pair[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] for pair in pairs]
        key = content_hash(["features 1", identity, ids])
        features: Mapping[str, Tensor] | None = cache.load(folder, key, dict.fromkeys(NAMES, (len(pairs), width)))
        if features is None:
            features = dict(zip(NAMES, encode(model, pairs), strict=True))
            note = cache.store(folder, key, features)
            log(f"features: {start + len(pairs):,} of {len(dataset):,} pairs" + (f"; {note}" if note else ""))
        chunks.append(features)
    columns = (torch.cat([chunk[name] for chunk in chunks]) for name in NAMES)
    return Features(content_hash(identity), *columns)


def encode(model: Any, pairs: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """Return the five features of some pairs, in the order of `NAMES`, each [n, D] in float32 on the host."""
    import torch

    rows = [(pair["prompt_ids"], pair[f"{name}_ids"]) for name in ("chosen", "rejected") for pair in pairs]
    order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
    out: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches(order, [sum(map(len, row)) for row in rows]):
                hidden = last_hidden(model, [rows[index][0] + rows[index][1] for index in batch])
                for index, states in zip(batch, hidden, strict=True):
                    start, end = len(rows[index][0]), sum(map(len, rows[index]))
                    out[index] = (states[start - 1], states[end - 1], states[start:end].mean(0))
    finally:
        model.train(was_training)
    n = len(pairs)
    prompt, chosen, chosen_mean = (torch.stack([out[index][at] for index in range(n)]) for at in range(3))
    rejected, rejected_mean = (torch.stack([out[index][at] for index in range(n, 2 * n)]) for at in (1, 2))
    return prompt, chosen, rejected, chosen_mean, rejected_mean


def last_hidden(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the last hidden states of rows of token ids, padded on the right, [N, L, D] in float32 on the host."""
    import torch

    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
        mask[at, : len(row)] = 1
    whole = model.get_base_model() if hasattr(model, "peft_config") else model
    decoder = whole.get_decoder()
    states = decoder(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    hidden: Tensor = states.last_hidden_state.float().cpu()
    return hidden


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Split the indices into batches of at most `BATCH_TOKENS` padded tokens, in this order."""
    batches: list[list[int]] = []
    for place in order:
        if batches and (len(batches[-1]) + 1) * lengths[place] <= BATCH_TOKENS:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs with features: rows of plain values (id, prompt, chosen, rejected as messages, `LABELS`, scores), their
    features and token ids in the same order, and the model.
    """

    rows: list[dict[str, Any]]
    features: Features
    tokenized: Dataset
    model: Any

    def select(self, indices: Sequence[int]) -> EncodedPairs:
        """Return some of the pairs, in this order."""
        rows = [self.rows[index] for index in indices]
        return EncodedPairs(rows, self.features.select(indices), self.tokenized.select(indices), self.model)


def encode_datasets(paths: Sequence[str], model: str, log: Callable[[str], None] = lambda _: None) -> EncodedPairs:
    """Read the pairs of some datasets and compute their features with the model at `model`.

    Raises UserError for a dataset or model that cannot be read, before anything is computed. Pairs that exceed the
    model's context are left out, with a note.
    """
    return encode_rows(read_rows(paths), model, log)


def encode_rows(rows: list[dict[str, Any]], model: str, log: Callable[[str], None] = lambda _: None) -> EncodedPairs:
    """Compute the features of rows, like `encode_datasets`."""
    from datasets import Dataset

    from apo.data.tokenize import eos_ids, tokenize
    from apo.models import load as models

    name = models.find_model(model)
    tokenizer = models.load_tokenizer(name)
    ends = eos_ids(tokenizer, models.load_generation_config(name))
    columns = [{key: row[key] for key in ("prompt", "chosen", "rejected", "id")} for row in rows]
    columns = [{**row, "_place": place} for place, row in enumerate(columns)]
    found = tokenize(Dataset.from_list(columns), tokenizer, models.context_length(name), ends, "given")
    for note in found.notes:
        log(f"note: {note}")
    if "too_long" in found.dropped:
        log(f"{found.dropped['too_long']:,} pairs are longer than the model's context and left out")
    if not len(found.dataset):
        raise UserError(f"none of {len(rows):,} pairs fits the context of model {model}")
    loaded = models.load_model(name)
    models.check_vocabulary(loaded, tokenizer, name.base)
    loaded.requires_grad_(False).eval()
    places = found.dataset["_place"][:]
    return EncodedPairs(
        [rows[place] for place in places], compute_features(found.dataset, loaded, log=log), found.dataset, loaded
    )


def read_rows(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Read all pairs of some datasets as plain rows; a folder's train and test rows have it in `split`.

    A missing `id` becomes the content's hash, a missing `source` the pipeline that built the folder, or the path's
    last component. Labels are text or None.
    """
    from clair.data.dataset import SPLITS, load_pairs, read_manifest
    from clair.data.dataset import read_rows as read_folder

    rows: list[dict[str, Any]] = []
    for path in map(Location, paths):
        check_exists(path)
        with path.local_copy() as folder:
            if (folder / "manifest.json").is_file():
                source, parts = read_manifest(folder)["pipeline"], [(s, read_folder(folder, [s])) for s in SPLITS]
            else:
                splits = [s for s in SPLITS if s in split_names(path)] if folder.is_dir() else ["train"]
                source, parts = Path(path).stem, [(s, load_pairs(path, s)) for s in splits]
        for split, row in ((split, row) for split, part in parts for row in part):
            content = [row["prompt"], row["chosen"], row["rejected"]]
            labels = {name: None if row.get(name) is None else str(row[name]) for name in LABELS}
            labels["source"] = labels["source"] or source
            kept = {name: row[name] for name in SCORES if row.get(name) is not None}
            rows.append(
                {
                    "id": str(row.get("id") or content_hash(content)[:16]),
                    **dict(zip(("prompt", "chosen", "rejected"), content, strict=True)),
                    **labels,
                    **kept,
                    "split": split,
                }
            )
    if not rows:
        raise UserError(f"{', '.join(paths)} hold no pairs")
    return rows
