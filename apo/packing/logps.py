"""Log-probability of a response: the plain reference that every fast path is tested against, and TRL's stacked batch.

A batch is what TRL's collator makes of B pairs: `input_ids`, `attention_mask` and `completion_mask`, each [2B, L], the
B chosen sequences first, prompts included. Where an answer has turns in it that are not the model's, `completion_mask`
is 0 on them. An unpaired row is a pair whose other response is empty: a prompt alone, with log-prob 0 and length 0.
`pair_logps(model, batch)` is a plug point of the trainer: any function that takes a batch and gives `PairLogps`.
`padded_logps` is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Batch = Mapping[str, Any]


class PairLogps(NamedTuple):
    """Summed log-probs of both responses of B pairs in nats, and how many trained tokens they have. All [B]."""

    chosen: Tensor
    rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor
    aux_loss: Tensor | None = None
    """A mixture-of-experts model's load-balancing loss, where it was asked for (`output_router_logits`)."""


PairLogpsFunction = Callable[..., PairLogps]


def response_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """log pi(y|x) = sum over response tokens t of log softmax(logits_{t-1})[t], in nats, float32, [N].

    `input_ids`, `attention_mask` and `completion_mask` are [N, L]; `completion_mask` is 1 on the response, end of turn
    included. Slow and plain on purpose: whole logits, one model call.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1)
    picked = logps.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (picked * completion_mask[:, 1:]).sum(-1)


def plain_logps(model: nn.Module, batch: Batch) -> PairLogps:
    """`PairLogps` of a stacked batch by `response_logps`, with any causal model."""
    logps = response_logps(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    return _of_stack(logps, batch["completion_mask"])


def padded_logps(model: nn.Module, batch: Batch, **options: Any) -> PairLogps:
    """`PairLogps` of a stacked batch through TRL's fused LM head, which `DPOTrainer` puts on the model.

    `options` go to the model, for example `output_router_logits=True`. Of unpaired rows only the response that is there
    is run.
    """
    mask = batch["completion_mask"]
    there = mask.any(1).nonzero().squeeze(1)
    labels = batch["input_ids"].masked_fill(mask == 0, -100)[there]
    whole = len(there) == len(mask)  # of pairs, whose images need not have a row for each sequence
    inputs = {key: value if whole else value[there] for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}
    outputs = model(**inputs, **options, labels=labels, use_cache=False, fused_lm_head=True)
    # Prompt tuning prepends virtual tokens to the outputs; the real ones are the last.
    found = outputs.log_probs[:, -(mask.shape[1] - 1) :].sum(-1)
    logps = found.new_zeros(len(mask)).index_copy(0, there, found)
    return _of_stack(logps, mask, getattr(outputs, "aux_loss", None))


PAIR_WEIGHT = "pair_weight"
"""What each pair of a batch weighs, [B], where a dataset column says so."""
DUMMY = "dummy"
"""In a batch whose pairs another process has: it is run only because processes run together, and counts for nothing."""
IDS = ("input_ids", "attention_mask", "completion_mask")
"""What a stacked batch says of its tokens, each [2B, L]."""
_NOT_FOR_THE_MODEL = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps", PAIR_WEIGHT, DUMMY})


SIDES = ("chosen", "rejected")


def response_mask(example: Mapping[str, Any], side: str) -> list[int]:
    """1 for each token of a response that is trained, 0 for those of turns within it that are not the model's."""
    return example.get(f"{side}_mask") or [1] * len(example[f"{side}_ids"])


@dataclass(frozen=True)
class TurnCollator:
    """A collator of pairs that takes what `chosen_mask` and `rejected_mask` leave out, out of `completion_mask`."""

    pad: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The stacked batch."""
        batch = self.pad(examples)
        for row, (side, example) in enumerate((side, example) for side in SIDES for example in examples):
            if mask := example.get(f"{side}_mask"):
                start, trained = len(example["prompt_ids"]), batch["completion_mask"][row]
                trained[start : start + len(mask)] *= trained.new_tensor(mask)
        return batch


@dataclass(frozen=True)
class WeightedCollator:
    """A collator of pairs that also hands on what they weigh, from a column of the dataset."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    column: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The stacked batch, with `PAIR_WEIGHT` [B] in float32."""
        import torch

        return {**self.collate(examples), PAIR_WEIGHT: torch.tensor([float(e[self.column]) for e in examples])}


def _of_stack(logps: Tensor, completion_mask: Tensor, aux_loss: Tensor | None = None) -> PairLogps:
    return PairLogps(*logps.chunk(2), *completion_mask[:, 1:].sum(-1).chunk(2), aux_loss)


def rotate_responses(
    batches: Sequence[Batch],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    gather: Callable[[list[Any]], list[Any]] = list,
    rank: int = 0,
) -> list[Batch]:
    """The same pairs with each prompt answered by the next pair's responses, rotating over all the batches.

    This is how KTO's divergence is estimated (arXiv 2402.01306: x_i with y_j, j = i + 1 modulo their number). The
    batches keep their sizes. Over several processes `gather` puts their lists one behind the other, and pairs follow
    each other as they would in one process. A single pair has nobody to swap with: its batch is idle.
    """
    rows = [uncollate(batch) for batch in batches]
    heads = gather([[None if DUMMY in batch else row[0] for batch, row in zip(batches, rows, strict=True)]])
    order = sorted((step, process) for process, firsts in enumerate(heads) for step, one in enumerate(firsts) if one)
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    swapped = []
    for step, (batch, examples) in enumerate(zip(batches, rows, strict=True)):
        if DUMMY in batch or (len(order) == 1 and len(examples) == 1):
            swapped.append(dummy_batch(batch))
            continue
        then, where = after[step, rank]
        following = [*examples[1:], heads[where][then]]
        pairs = zip(examples, following, strict=True)
        swapped.append(collate([{**later, "prompt_ids": one["prompt_ids"]} for one, later in pairs]))
    return swapped


def uncollate(batch: Batch) -> list[dict[str, list[int]]]:
    """The token ids that a stacked batch was collated from: `prompt_ids`, `chosen_ids` and `rejected_ids` per pair, and
    a mask for each response that is not trained whole."""
    rows = []
    for ids, attended, trained in zip(
        batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["completion_mask"].tolist(), strict=True
    ):
        length = sum(attended)
        start = trained.index(1) if 1 in trained else length
        rows.append((ids[:length], trained[:length], start))
    half = len(rows) // 2
    return [_example(*pair) for pair in zip(rows[:half], rows[half:], strict=True)]


def _example(*rows: tuple[list[int], list[int], int]) -> dict[str, list[int]]:
    start = min(first for *_, first in rows)
    example = {"prompt_ids": rows[0][0][:start]}
    for side, (ids, trained, _) in zip(SIDES, rows, strict=True):
        example[f"{side}_ids"] = ids[start:]
        if 0 in trained[start:]:
            example[f"{side}_mask"] = trained[start:]
    return example


def select_pairs(batch: Batch, places: Sequence[int]) -> dict[str, Any]:
    """The stacked batch of some of its pairs, in this order."""
    pairs = len(batch["input_ids"]) // 2
    rows = [*places, *(place + pairs for place in places)]
    return {
        key: value[list(places)] if len(value) == pairs else value[rows] for key, value in batch.items()
    }  # fmt: skip


def dummy_batch(batch: Batch) -> dict[str, Any]:
    """The first pair of a batch as one that counts for nothing."""
    import torch

    return {**select_pairs(batch, [0]), DUMMY: torch.ones(1, dtype=torch.bool, device=batch["input_ids"].device)}


def pair_weights(batch: Batch) -> Tensor:
    """What the pairs of a stacked batch weigh, [B], float32: 1 each without a column of weights, 0 of an idle one."""
    import torch

    if DUMMY in batch:
        return torch.zeros(1, device=logps_device(batch))
    given = batch.get(PAIR_WEIGHT)
    return torch.ones(len(batch["input_ids"]) // 2, device=logps_device(batch)) if given is None else given.float()


def logps_device(batch: Batch) -> torch.device:
    """Where the log-probs of a stacked batch are wanted. The ids of one for packed rows stay on the host."""
    return batch.get(PAIR_WEIGHT, batch["input_ids"]).device
