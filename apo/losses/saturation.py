"""Saturation: which pairs the objective no longer pulls at.

The pull on a response is the size of the loss's derivative by its log-ratio (by the mean log-ratio of a token, where
the objective looks at lengths); that on a pair is the larger of the two. It is taken by autograd, so that a function of
the user's is treated like any other. Its maximum is looked for on a grid of rewards. A pair whose pull is under 5 % of
the maximum is saturated: training moves it no more, whether it is far on the right side or, under objectives that give
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
"""Of the maximum: below this a pull is taken for none."""
FAR = 1.0
"""Nats a token: an objective that lets go of a pair only where its winner leads by more never does so in a sane run."""
_REACH = 20.0
"""Rewards up to which a maximum is looked for."""


def saturated(
    objective: Mixture,
    policy: PairLogps,
    reference: tuple[Tensor, Tensor] | None,
    *,
    beta: float,
    kl: tuple[Tensor, Tensor],
) -> Tensor | None:
    """Which of N pairs no term of the objective pulls at any more, [N] bool. `kl` is KTO's, [N] each.

    A term whose pull never vanishes (SFT) is left out; None where no other is left.
    """
    verdicts = []
    for _, term in objective.terms:
        most = greatest_pull(term, beta)
        if most is not None:
            alone = (policy.chosen_len == 0) | (policy.rejected_len == 0)  # an unpaired row weighs as much as a pair
            most = most * (1.0 + alone) if term.kind == "unpaired" else most
            verdicts.append(pull_of(term, policy, reference, beta=beta, kl=kl) < SATURATED * most)
    return torch.stack(verdicts).all(0) if verdicts else None


def pull_of(
    term: Objective,
    policy: PairLogps,
    reference: tuple[Tensor, Tensor] | None,
    *,
    beta: float,
    kl: tuple[Tensor, Tensor],
) -> Tensor:
    """max(|dL/dh_w|, |dL/dh_l|) of each of N pairs, [N], h the log-ratio or, with lengths, that of a mean token."""
    with torch.enable_grad():
        leaves = [logps.detach().clone().requires_grad_() for logps in policy[:2]]
        asked = PairLogps(*leaves, policy.chosen_len, policy.rejected_len)
        alone = Mixture(((1.0, term),), term.name)
        both = tuple(torch.cat([part, part]) for part in kl)  # an unpaired objective sees 2N responses
        losses = alone.losses(asked, reference, beta=beta, kl=both)
        slopes = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    sizes = [slope.abs() for slope in slopes]
    if term.length_normalised or "chosen_len" in term.asks_for:
        sizes = [size * length for size, length in zip(sizes, policy[2:4], strict=True)]
    return torch.maximum(*sizes)


@functools.lru_cache(maxsize=64)
def greatest_pull(term: Objective, beta: float) -> float | None:
    """The largest pull at rewards between -20 and 20; that of the anchor where it grows without end (IPO).

    None for a term that pulls everywhere alike, or nearly: nothing saturates.
    """
    line = torch.linspace(-_REACH, _REACH, 81, dtype=torch.float64)
    chosen, rejected = (side.flatten() for side in torch.meshgrid(line, line, indexing="ij"))
    one, zero = torch.ones_like(chosen), torch.zeros_like(chosen)
    policy = PairLogps(chosen / beta, rejected / beta, one, one)
    pulls = pull_of(term, policy, (zero, zero), beta=beta, kl=(zero, zero))
    near = pulls[(chosen.abs() <= _REACH / 2) & (rejected.abs() <= _REACH / 2)]
    most = pulls.max() if pulls.max() <= 1.01 * near.max() else pulls[(chosen == 0) & (rejected == 0)].squeeze()
    return most.item() if pulls.min() < SATURATED * most else None


def notes_at_start(objective: Mixture, beta: float, lengths: Sequence[tuple[int, int]]) -> list[str]:
    """What beta and weights come to on answers of these lengths (chosen, rejected; 0 where there is none).

    The terms of a mixture beside its first, by their pull on a nat at the start; a term that looks at mean log-probs
    and keeps pushing pairs that lie `FAR` apart.
    """
    there = torch.tensor(lengths, dtype=torch.float64)
    longest = there.amax(1).sort().values
    points = longest[[int(share * (len(longest) - 1)) for share in (0.5, 0.1, 0.9)]]
    paired = bool((there.amin(1) > 0).any())
    notes = []
    if len(objective.terms) > 1:
        first, *others = ((term.name, weight * _slope(term, beta, points, paired)) for weight, term in objective.terms)
        for name, slope in others:
            middle, low, high = (f"{share:.2g}" for share in (100 * slope / first[1]).tolist())
            notes.append(
                f"objective: at the start {name} pulls at answers of {points[0]:.0f} tokens (the median) with "
                f"{middle} % of the force of {first[0]}, at those of {points[1]:.0f} with {low} %, of {points[2]:.0f} "
                f"with {high} %"
            )
    for term in (term for _, term in objective.terms if _looks_at_means(term)):
        lead = _lead_at_half(term, beta)
        if lead > FAR:
            notes.append(
                f"objective: {term.name} at beta {beta:g} pushes a pair with over half of its first force until the "
                f"winner leads by {lead:.3g} nats a token, {lead * points[0]:,.0f} in all at the median of "
                f"{points[0]:.0f} tokens; it hardly ever lets go: a larger beta is usual, {_USUAL.get(term.name, 5)}"
            )
    return notes


_USUAL = {"ipo": "1", "simpo": "2 to 10"}


def _looks_at_means(term: Objective) -> bool:
    return term.length_normalised or (term.name in _USUAL)


def _slope(term: Objective, beta: float, lengths: Tensor, paired: bool) -> Tensor:
    """The larger derivative of the loss by the log-prob of an answer of these lengths, at the anchor."""
    other = lengths if paired else torch.zeros_like(lengths)
    policy = PairLogps(-lengths, -other, lengths, other)
    pull = pull_of(term, policy, (policy.chosen, policy.rejected), beta=beta, kl=(other * 0, other * 0))
    return pull / lengths if term.length_normalised or "chosen_len" in term.asks_for else pull


def _lead_at_half(term: Objective, beta: float) -> float:
    """Nats a token by which the winner leads where the pull is half of that at the start; infinity above 100."""
    lead = torch.linspace(0, 100, 10_001, dtype=torch.float64)
    one, zero = torch.ones_like(lead), torch.zeros_like(lead)
    policy = PairLogps(lead / 2, -lead / 2, one, one)
    pulls = pull_of(term, policy, (zero, zero), beta=beta, kl=(zero, zero))
    below = (pulls <= pulls[0] / 2).nonzero()
    return lead[below[0, 0]].item() if len(below) else float("inf")
