"""Saturation: which pairs have almost no gradient left, and what beta and weights amount to at the start.

The gradient size of a response is |dL/dh|, with h its log-ratio (the mean log-ratio per token if the objective divides
by lengths). That of a pair is the larger of its two. Autograd computes it, so a user's own function is treated like
any other objective. Its maximum is searched on a grid of rewards. A pair whose gradient size is below 5 % of the
maximum is saturated: training no longer moves it, whether it is far on the right side or, under objectives that give
up on lost pairs (APO, KTO), far on the wrong one.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from apo.losses.mixture import Mixture
from apo.packing.logps import PairLogps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from apo.losses.objectives import Objective

SATURATED = 0.05
"""Share of the maximal gradient size below which a pair counts as saturated."""
LARGE_LEAD = 1.0
"""Nats per token: in a sane run, no chosen response gets further ahead of the rejected one than this."""
_MAX_REWARD = 20.0
"""Largest reward, in both directions, of the grid on which the maximum is searched."""


def saturation_mask(
    objective: Mixture,
    policy: PairLogps,
    reference: tuple[Tensor, Tensor] | None,
    *,
    beta: float,
    kl: tuple[Tensor, Tensor],
) -> Tensor | None:
    """Return which of N pairs are saturated under every term of the objective, [N] bool.

    `kl` is KTO's divergence, summed and per token, [N] each. Terms whose gradient never vanishes (SFT) do not count;
    the result is None if the objective has no other term.
    """
    masks = []
    for _, term in objective.terms:
        maximum = max_gradient_size(term, beta)
        if maximum is not None:
            single = (policy.chosen_len == 0) | (policy.rejected_len == 0)  # an unpaired row weighs as much as a pair
            maximum = maximum * (1.0 + single) if term.kind == "unpaired" else maximum
            masks.append(gradient_size(term, policy, reference, beta=beta, kl=kl) < SATURATED * maximum)
    return torch.stack(masks).all(0) if masks else None


def gradient_size(
    term: Objective,
    policy: PairLogps,
    reference: tuple[Tensor, Tensor] | None,
    *,
    beta: float,
    kl: tuple[Tensor, Tensor],
) -> Tensor:
    """Return max(|dL/dh_w|, |dL/dh_l|) of N pairs, [N]; h is the log-ratio, per token if the term uses lengths."""
    with torch.enable_grad():
        leaves = [logps.detach().clone().requires_grad_() for logps in (policy.chosen, policy.rejected)]
        leaf_policy = policy._replace(chosen=leaves[0], rejected=leaves[1])
        alone = Mixture(((1.0, term),), term.name)
        kl_of_responses = tuple(torch.cat([value, value]) for value in kl)  # an unpaired objective gets 2N responses
        losses = alone.losses(leaf_policy, reference, beta=beta, kl=kl_of_responses)
        gradients = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    sizes = [gradient.abs() for gradient in gradients]
    if _uses_lengths(term):
        sizes = [size * length for size, length in zip(sizes, policy[2:4], strict=True)]
    return torch.maximum(sizes[0], sizes[1])


@functools.lru_cache(maxsize=64)
def max_gradient_size(term: Objective, beta: float) -> float | None:
    """Return the largest gradient size at rewards in [-20, 20]; if it grows without bound (IPO), that at the anchor.

    None for a term whose gradient is the same, or nearly so, everywhere: it never saturates.
    """
    line = torch.linspace(-_MAX_REWARD, _MAX_REWARD, 81, dtype=torch.float64)
    chosen, rejected = (side.flatten() for side in torch.meshgrid(line, line, indexing="ij"))
    ones, zeros = torch.ones_like(chosen), torch.zeros_like(chosen)
    policy = PairLogps(chosen / beta, rejected / beta, ones, ones)
    sizes = gradient_size(term, policy, (zeros, zeros), beta=beta, kl=(zeros, zeros))
    inner = sizes[(chosen.abs() <= _MAX_REWARD / 2) & (rejected.abs() <= _MAX_REWARD / 2)]
    bounded = sizes.max() <= 1.01 * inner.max()
    maximum = sizes.max() if bounded else sizes[(chosen == 0) & (rejected == 0)].squeeze()
    return maximum.item() if sizes.min() < SATURATED * maximum else None


def objective_notes(objective: Mixture, beta: float, lengths: Sequence[tuple[int, int]]) -> list[str]:
    """Return notes for the start of a run on pairs of these lengths (chosen, rejected; 0 for an absent response).

    One note per further term of a mixture: its gradient compared with the first term's. One note per term on mean
    log-probs that still pushes pairs which are `LARGE_LEAD` apart.
    """
    table = torch.tensor(lengths, dtype=torch.float64)
    longer = table.amax(1).sort().values
    quantiles = longer[[int(share * (len(longer) - 1)) for share in (0.5, 0.1, 0.9)]]
    median, short, long = quantiles.tolist()
    paired = bool((table.amin(1) > 0).any())
    notes = []
    if len(objective.terms) > 1:
        sizes = [weight * _initial_gradient(term, beta, quantiles, paired) for weight, term in objective.terms]
        first = objective.terms[0][1].name
        for (_, term), size in zip(objective.terms[1:], sizes[1:], strict=True):
            at_median, at_short, at_long = (f"{share:.2g}" for share in (100 * size / sizes[0]).tolist())
            notes.append(
                f"objective: at the start the gradient of {term.name} is {at_median} % of that of {first} on responses "
                f"of {median:.0f} tokens (the median), {at_short} % on responses of {short:.0f}, and {at_long} % on "
                f"responses of {long:.0f}"
            )
    for term in (term for _, term in objective.terms if _reads_means(term)):
        lead = _lead_at_half_gradient(term, beta)
        if lead > LARGE_LEAD:
            notes.append(
                f"objective: {term.name} at beta {beta:g} keeps over half of its initial gradient on a pair until the "
                f"chosen response leads by {lead:.3g} nats a token, {lead * median:,.0f} in all at the median of "
                f"{median:.0f} tokens; a larger beta is usual, {_USUAL_BETA.get(term.name, 5)}"
            )
    return notes


_USUAL_BETA = {"ipo": "1", "simpo": "2 to 10"}


def _reads_means(term: Objective) -> bool:
    return term.length_normalised or term.name in _USUAL_BETA


def _uses_lengths(term: Objective) -> bool:
    return term.length_normalised or "chosen_len" in term.inputs


def _initial_gradient(term: Objective, beta: float, lengths: Tensor, paired: bool) -> Tensor:
    """The larger derivative of the loss by a response's summed log-prob, at the anchor, for responses of `lengths`."""
    rejected = lengths if paired else torch.zeros_like(lengths)
    policy = PairLogps(-lengths, -rejected, lengths, rejected)
    zeros = torch.zeros_like(lengths)
    size = gradient_size(term, policy, (policy.chosen, policy.rejected), beta=beta, kl=(zeros, zeros))
    return size / lengths if _uses_lengths(term) else size


def _lead_at_half_gradient(term: Objective, beta: float) -> float:
    """The lead of the chosen response, in nats per token, at which the gradient is half of the initial one.

    Infinity if that lead is above 100.
    """
    lead = torch.linspace(0, 100, 10_001, dtype=torch.float64)
    ones, zeros = torch.ones_like(lead), torch.zeros_like(lead)
    policy = PairLogps(lead / 2, -lead / 2, ones, ones)
    sizes = gradient_size(term, policy, (zeros, zeros), beta=beta, kl=(zeros, zeros))
    below = (sizes <= sizes[0] / 2).nonzero()
    return lead[below[0, 0]].item() if len(below) else float("inf")
