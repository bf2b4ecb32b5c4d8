"""Log-probs of responses: a plain reference, which tests every fast path, and the padded form of TRL's stacked batch.

`pair_logps(model, stacked)` is a plug point of the trainer: any function that takes a stacked batch (batch.py) and
returns `PairLogps`. `padded_logps` is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from apo.packing.batch import Stacked

_NOT_FOR_THE_MODEL = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps"})


class PairLogps(NamedTuple):
    """Summed log-probs of both responses of B pairs in nats, and their numbers of trained tokens. All [B].

    An empty response, as an unpaired row has, has log-prob 0 and length 0.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor
    aux_loss: Tensor | None = None
    """The load-balancing loss of a mixture-of-experts model, if requested (`output_router_logits`)."""


PairLogpsFunction = Callable[..., PairLogps]


def pad_right(rows: Sequence[Sequence[int]], length: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of token ids with zeros behind, up to the longest row or to `length`, and their attention mask, [N, L]."""
    import torch

    length = max(length, *map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def response_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """log pi(y|x) = sum over response tokens t of log softmax(logits_{t-1})[t], in nats, float32, [N].

    `input_ids`, `attention_mask` and `completion_mask` are [N, L]; `completion_mask` is 1 on the response, end of turn
    included. Slow and plain on purpose: whole logits, one model call.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(-1)
    picked = logps.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return (picked * completion_mask[:, 1:]).sum(-1)


def plain_logps(model: nn.Module, stacked: Stacked) -> PairLogps:
    """`PairLogps` of a stacked batch by `response_logps`, with any causal model."""
    logps = response_logps(model, stacked["input_ids"], stacked["attention_mask"], stacked["completion_mask"])
    return _unstack(logps, stacked["completion_mask"])


def padded_logps(model: nn.Module, stacked: Stacked, **options: Any) -> PairLogps:
    """`PairLogps` of a stacked batch through TRL's fused LM head, which `DPOTrainer` puts on the model.

    `options` go to the model, for example `output_router_logits=True`. Empty responses of unpaired rows are not run.
    """
    mask = stacked["completion_mask"]
    present = mask.any(1).nonzero().squeeze(1)
    labels = stacked["input_ids"].masked_fill(mask == 0, -100)[present]
    paired = len(present) == len(mask)  # then nothing is indexed: images need not have a row for each sequence
    items = ((key, value) for key, value in stacked.items() if key not in _NOT_FOR_THE_MODEL)
    inputs = {key: value if paired else value[present] for key, value in items}
    outputs = model(**inputs, **options, labels=labels, use_cache=False, fused_lm_head=True)
    # Prompt tuning prepends virtual tokens to the outputs; the real ones are the last.
    sums = outputs.log_probs[:, -(mask.shape[1] - 1) :].sum(-1)
    logps = sums.new_zeros(len(mask)).index_copy(0, present, sums)
    return _unstack(logps, mask, getattr(outputs, "aux_loss", None))


def _unstack(logps: Tensor, completion_mask: Tensor, aux_loss: Tensor | None = None) -> PairLogps:
    chosen, rejected = logps.chunk(2)
    chosen_len, rejected_len = completion_mask[:, 1:].sum(-1).chunk(2)
    return PairLogps(chosen, rejected, chosen_len, rejected_len, aux_loss)
