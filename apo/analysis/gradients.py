"""Gradients of an objective at the reference: by the log-probs of a pair, and of log-probs by the LM head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from apo.losses.mixture import Mixture
    from apo.packing.logps import PairLogps

SKETCH = 4096
"""Dimensions of a gradient. A larger gradient is a TensorSketch, with errors of about 3 % of the norms."""


def logp_gradients(mixture: Mixture, beta: float, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Return dL/d log pi(chosen) and dL/d log pi(rejected) of each pair's loss at the reference, [n] each.

    They are -beta/2 and +beta/2 for DPO, -beta/4 and +beta/4 for APO-zero, 0 and +beta/4 for APO-down.
    """
    import torch

    chosen, rejected = (side.detach().clone().requires_grad_() for side in (logps.chosen, logps.rejected))
    policy = logps._replace(chosen=chosen, rejected=rejected)
    losses = mixture.losses(policy, (logps.chosen, logps.rejected), beta=beta)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected), allow_unused=True, materialize_grads=True)
    return gradients[0], gradients[1]


def head_gradients(
    model: Any, tokenized: Any, *, dimensions: int = SKETCH, seed: int = 0
) -> tuple[Tensor, Tensor, PairLogps]:
    """Return the gradients of both responses' log-probs by the LM head, [n, m] each, and the log-probs.

    grad log pi(y|x) = sum over response tokens t of (onehot(y_t) - softmax) h_t^T, [V, D], times the slope of the scale
    and soft cap of the model's logits. It is flattened if it has at most `dimensions` entries. Otherwise it is a
    TensorSketch (Pham & Pagh 2013), whose inner products are unbiased.
    """
    import torch

    from apo.analysis.features import last_hidden
    from apo.packing.head import logit_scaling, scale_logits
    from apo.packing.layout import SIDES, response_mask
    from apo.packing.logps import PairLogps

    head = model.get_output_embeddings()
    vocabulary, hidden_size = head.weight.shape
    sketch = _sketch(vocabulary, hidden_size, dimensions, seed)
    scale, softcap = logit_scaling(model.config)
    results: dict[str, list[tuple[Tensor, float, int]]] = {side: [] for side in SIDES}
    with torch.no_grad():
        for pair in tokenized:
            rows = [pair["prompt_ids"] + pair[f"{side}_ids"] for side in SIDES]
            for side, states, row in zip(SIDES, last_hidden(model, rows), rows, strict=True):
                start, mask = len(pair["prompt_ids"]), torch.tensor(response_mask(pair, side), dtype=torch.bool)
                hidden = states[start - 1 : len(row) - 1][mask]
                logits = scale_logits(head(hidden.to(head.weight)).float().cpu(), scale, softcap)
                token_logps = logits.log_softmax(-1)
                targets = torch.tensor(row[start:])[mask][:, None]
                residual = (-token_logps.exp()).scatter_add(1, targets, torch.ones(len(targets), 1))
                residual *= scale if softcap is None else scale * (1 - (logits / softcap).square())
                logp = float(token_logps.gather(1, targets).sum())
                results[side].append((sketch(residual, hidden), logp, len(targets)))
    gradients, logps, lengths = zip(*(zip(*results[side], strict=True) for side in SIDES), strict=True)
    chosen, rejected = map(torch.stack, gradients)
    sums, counts = map(torch.tensor, (logps, lengths))
    return chosen, rejected, PairLogps(sums[0], sums[1], counts[0], counts[1])


def _sketch(rows: int, columns: int, dimensions: int, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that computes sum_t a_t b_t^T of a [T, rows] and b [T, columns], flattened or sketched."""
    import torch

    if rows * columns <= dimensions:
        return lambda a, b: (a.T @ b).flatten()
    random = torch.Generator().manual_seed(seed)
    bins = [torch.randint(dimensions, (size,), generator=random) for size in (rows, columns)]
    signs = [torch.randint(2, (size,), generator=random) * 2.0 - 1 for size in (rows, columns)]

    def count_sketch(values: Tensor, factor: int) -> Tensor:
        return torch.zeros(len(values), dimensions).index_add_(1, bins[factor], values * signs[factor])

    def tensor_sketch(a: Tensor, b: Tensor) -> Tensor:
        product = torch.fft.rfft(count_sketch(a, 0)) * torch.fft.rfft(count_sketch(b, 1))
        return torch.fft.irfft(product.sum(0), n=dimensions)

    return tensor_sketch
