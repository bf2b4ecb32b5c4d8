"""Preference distinguishability: predict, before training, which clusters of pairs are learned first or harmed.

After Im & Li, "Understanding the Learning Dynamics of Alignment with Human Feedback" (arXiv 2403.18742). Three measures
describe a cluster in the first steps of training:

    literal     for answers that are one of two texts: delta = |mean of phi(x) over the prompts that prefer the first
                text - mean over the prompts that prefer the second|
    pair-level  u = mean hidden state of chosen - of rejected: delta = |mean u|, coherence = |mean u|^2 / mean |u|^2,
                cosines between the clusters' mean u. This extension to free text is ours.
    gradient    v = the objective's step on a pair with respect to the LM head. The speed of a cluster is the mean of
                <v of its pair, v of all other pairs>. A negative speed means that training harms the cluster at first.
                If the answers are one of two texts, the numbers of pairs that prefer each are taken as fixed.

Means of products leave out a pair's product with itself: it measures memorisation, and would dominate small clusters.

The distance delta orders speeds only if the gradients of chosen and rejected are equal (DPO, APO-zero). At the start,
APO-down has a gradient on the rejected response alone; use the gradient measure for it.

If the LM head alone is trained, a behaviour's accuracy is that of a linear classifier on h. Along d its rate is
Phi(delta / 2 sigma) for Gaussian classes of standard deviation sigma along d. For classes of any distribution it is at
least 1 - c / (c + delta^2 / 4) with c the concentration (Cantelli's inequality), with the threshold in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from apo.analysis.bootstrap import DRAWS, Interval, bootstrap_interval, bootstrap_weights
from apo.analysis.clusters import clusters_of
from apo.analysis.gradients import head_gradients, logp_gradients
from apo.data.message_texts import answer_text

if TYPE_CHECKING:
    from torch import Tensor

    from apo.analysis.features import EncodedPairs

NEGLECTED = 0.1
"""A cluster is reported as neglected if its predicted speed is below this share of the fastest cluster's."""


@dataclass(frozen=True)
class Literal:
    """Distinguishability of the prompts of two fixed answers.

    `delta` is the distance of the two classes' means, `scaled` = delta / sqrt(trace). `concentration` and `trace` are
    the larger of both classes' covariance norms (spectral, trace), `positive` is the share of the first class.
    `accuracy` is Phi(delta / 2 sigma) with the larger class's sigma along d, `accuracy_bound` Cantelli's bound.
    """

    delta: float
    scaled: float
    concentration: float
    trace: float
    positive: float
    accuracy: float
    accuracy_bound: float


@dataclass(frozen=True)
class Cluster:
    """The measures of one cluster.

    `speed` is how much a step on all other pairs lowers a pair's loss at the start, per unit of learning rate.
    """

    name: str
    n: int
    delta: Interval
    scaled: float
    coherence: Interval
    overlap: float
    """Mean Jaccard overlap of the words of chosen and rejected."""
    speed: Interval
    relative: float
    """`speed` as a share of the fastest cluster's."""
    rank: tuple[int, int]
    """The 95 % interval of its rank by speed over bootstrap samples of the pairs; 1 is the fastest."""
    conflict: float
    """The lowest cosine of its direction with another cluster's; NaN for a single cluster."""
    conflict_with: str
    literal: Literal | None


@dataclass(frozen=True)
class Distinguishability:
    """The clusters (fastest first), the objective's initial gradients on chosen and rejected, and warnings."""

    by: str
    objective: str
    beta: float
    pull: tuple[float, float]
    """Mean derivative of the loss by the log-prob of chosen and of rejected, at the reference."""
    clusters: list[Cluster]
    cosines: list[list[float]]
    """Between the clusters' directions, in the order of `clusters`: their mean u, or, if all have two fixed answers,
    the difference of the two classes' means."""
    warnings: list[str]

    def prediction(self) -> list[str]:
        """Return the order in which the clusters will be learned, in words, with its uncertainty."""
        names = [cluster.name for cluster in self.clusters]
        if len(names) < 2:
            return [f"No prediction: {names[0]} is the only group, and an order needs two"]
        middle = f", then {', '.join(names[1:-1])}" if names[1:-1] else ""
        ranks = [f"{cluster.name} {' to '.join(map(str, dict.fromkeys(cluster.rank)))}" for cluster in self.clusters]
        return [
            f"Prediction: under {self.objective}, {names[0]} is learned first{middle}; {names[-1]} last",
            f"Its rank with a 95 % interval over the choice of pairs: {', '.join(ranks)}",
        ]


def distinguish(
    pairs: EncodedPairs, by: str, objective: Any = "apo_zero", beta: float = 0.1, *, seed: int = 0, draws: int = DRAWS
) -> Distinguishability:
    """Report on the clusters of pairs by a label, or by k-means of their prompts (`kmeans:K`).

    Raises UserError for a label that some pairs lack, and for clusters of fewer than two pairs.
    """
    import torch

    from apo.losses.mixture import resolve_mixture

    mixture = resolve_mixture(objective)
    names = clusters_of(pairs.rows, by, pairs.features.prompt, seed)
    chosen, rejected, logps = head_gradients(pairs.model, pairs.tokenized, seed=seed)
    chosen_gradients, rejected_gradients = logp_gradients(mixture, beta, logps)
    steps = -(chosen_gradients[:, None] * chosen + rejected_gradients[:, None] * rejected)
    u = pairs.features.chosen_mean - pairs.features.rejected_mean
    order = sorted(set(names))
    members = [torch.tensor([index for index, name in enumerate(names) if name == cluster]) for cluster in order]
    weights = [bootstrap_weights(len(indices), draws, seed + number) for number, indices in enumerate(members)]
    rows = [[pairs.rows[index] for index in indices.tolist()] for indices in members]
    literals = [literal_of(group, pairs.features.prompt[indices]) for group, indices in zip(rows, members, strict=True)]
    cells = [
        (number, indices[torch.tensor([answer_text(row["chosen"]) == answer for row in group])] if literal else indices)
        for number, (literal, group, indices) in enumerate(zip(literals, rows, members, strict=True))
        for answer in (sorted({answer_text(row["chosen"]) for row in group}) if literal else [""])
    ]
    speeds, ranks = _speeds(steps, cells, draws, seed)
    if all(literals):
        by_cluster = [[indices for number, indices in cells if number == k] for k in range(len(order))]
        hidden = pairs.features.prompt
        centres = torch.stack([hidden[second].mean(0) - hidden[first].mean(0) for first, second in by_cluster])
    else:
        centres = torch.stack([u[indices].mean(0) for indices in members])
    cosines = torch.nn.functional.cosine_similarity(centres[:, None], centres[None], dim=-1)
    fastest = max(speed.value for speed in speeds)
    results = []
    for number, (name, indices) in enumerate(zip(order, members, strict=True)):
        delta, scaled, coherence = _pair_level(u[indices], weights[number])
        neighbours = [
            (cosine, neighbour)
            for cosine, neighbour in zip(cosines[number].tolist(), order, strict=True)
            if neighbour != name
        ]
        conflict, conflict_with = min(neighbours, default=(float("nan"), ""))
        cluster = Cluster(
            name=name,
            n=len(indices),
            delta=delta,
            scaled=scaled,
            coherence=coherence,
            overlap=_overlap(rows[number]),
            speed=speeds[number],
            relative=speeds[number].value / fastest if fastest > 0 else float("nan"),
            rank=ranks[number],
            conflict=conflict,
            conflict_with=conflict_with,
            literal=literals[number],
        )
        results.append(cluster)
    ranking = sorted(range(len(results)), key=lambda number: -results[number].speed.value)
    pull = float(chosen_gradients.mean()), float(rejected_gradients.mean())
    clusters, ranked_cosines = [results[number] for number in ranking], cosines[ranking][:, ranking].tolist()
    warnings = warnings_of(mixture.name, beta, pull, clusters)
    for name, group in zip(order, rows, strict=True):
        if len({(answer_text(row["chosen"]), answer_text(row["rejected"])) for row in group}) == 1:
            warnings.append(
                f"{name} prefers the same answer to the same other in all of its prompts: it has no two classes whose "
                "distance could be measured, and is learned by its base rate"
            )
    return Distinguishability(by, mixture.name, beta, pull, clusters, ranked_cosines, warnings)


# ---- distances


def literal_of(rows: Sequence[Mapping[str, Any]], hidden: Tensor) -> Literal | None:
    """Return the literal distinguishability if all answers are one of two texts, each preferred at least twice.

    `hidden` [n, D] is the hidden state at the last token of each prompt.
    """
    chosen, rejected = ([answer_text(row[side]) for row in rows] for side in ("chosen", "rejected"))
    answers = sorted({*chosen, *rejected})
    if len(answers) != 2:
        return None
    positive = [answer == answers[1] for answer in chosen]
    return distinguishability(hidden, positive) if 2 <= sum(positive) <= len(rows) - 2 else None


def distinguishability(hidden: Tensor, positive: Sequence[bool]) -> Literal:
    """Measure the distance between positive and negative prompts in `hidden` [n, D], and the spread of both classes."""
    import torch

    mask = torch.tensor(positive)
    classes = [hidden[mask], hidden[~mask]]
    covariances = [torch.cov(states.T, correction=0).reshape(hidden.shape[1], -1) for states in classes]
    difference = classes[0].mean(0) - classes[1].mean(0)
    delta = float(difference.norm())
    concentration = max(float(torch.linalg.matrix_norm(c, 2)) for c in covariances)
    trace = max(float(c.trace()) for c in covariances)
    sigma = max(float(difference @ c @ difference) for c in covariances) ** 0.5 / max(delta, 1e-30)
    accuracy = NormalDist().cdf(delta / max(2 * sigma, 1e-30))
    bound = 1 - concentration / max(concentration + delta**2 / 4, 1e-30)
    positives = float(mask.float().mean())
    return Literal(delta, delta / max(trace, 1e-30) ** 0.5, concentration, trace, positives, accuracy, bound)


def _pair_level(u: Tensor, weights: Tensor) -> tuple[Interval, float, Interval]:
    """Return |mean u|, |mean u| / sqrt(trace of the covariance of u), and |mean u|^2 / mean |u|^2, with intervals."""
    n, squares = len(u), (u**2).sum(1)
    product = ((u.sum(0) ** 2).sum() - squares.sum()) / (n * (n - 1))  # the mean of <u_i, u_j>, i != j
    drawn = ((weights @ u) ** 2).sum(1)  # the squared norms of the samples' mean u
    square = bootstrap_interval(product, drawn)
    delta = Interval(*(max(0.0, value) ** 0.5 for value in (square.value, square.lo, square.hi)))
    trace = (squares.mean() - product).clamp(min=1e-30)
    coherence = bootstrap_interval(product / squares.mean(), drawn / (weights @ squares))
    return delta, delta.value / float(trace.sqrt()), coherence


def _overlap(rows: Sequence[Mapping[str, Any]]) -> float:
    from clair.data.contrast import contrast_of

    pairs = [(answer_text(row["chosen"]), answer_text(row["rejected"])) for row in rows]
    return sum(contrast_of(chosen, rejected).jaccard for chosen, rejected in pairs) / len(pairs)


# ---- speeds


def _speeds(
    steps: Tensor, cells: Sequence[tuple[int, Tensor]], draws: int, seed: int
) -> tuple[list[Interval], list[tuple[int, int]]]:
    """Return the speed of each cluster, and the 95 % interval of its rank, from the steps [n, m] of all pairs.

    A cell is a cluster's number and the indices of some of its pairs: all, or those that prefer one of two answers. The
    numbers of pairs of the cells are fixed, so that the mean over all other pairs is taken cell by cell: of the pair's
    own cell without the pair itself. Otherwise a pair would meet one pair less of its own answer than of the other
    one, and the mean hidden state, which is much longer than the differences, would decide.
    """
    import torch

    numbers = torch.tensor([number for number, _ in cells])
    sizes = torch.tensor([float(len(indices)) for _, indices in cells])
    means = torch.stack([steps[indices].mean(0) for _, indices in cells])
    squares = torch.stack([(steps[indices] ** 2).sum(1).mean() for _, indices in cells])
    weights = [bootstrap_weights(len(indices), draws, seed + number) for number, (_, indices) in enumerate(cells)]
    drawn = torch.stack([weight @ steps[indices] for weight, (_, indices) in zip(weights, cells, strict=True)])
    products = means @ means.T
    within = (sizes * products.diagonal() - squares) / (sizes - 1)
    shares = sizes / sizes.sum()
    by_cell = (products - products.diagonal().diag() + within.diag()) @ shares
    drawn_by_cell = torch.einsum("cdm,dm->cd", drawn, torch.einsum("c,cdm->dm", shares, drawn))
    members = torch.stack([sizes * (numbers == number) for number in range(int(numbers.max()) + 1)])
    members = members / members.sum(1, keepdim=True)
    values, spreads = members @ by_cell, members @ drawn_by_cell
    drawn_speeds = values[:, None] - (spreads - spreads.mean(1, keepdim=True))
    ranks = (-drawn_speeds).argsort(0).argsort(0) + 1.0
    bounds = torch.quantile(ranks, torch.tensor([0.025, 0.975], dtype=ranks.dtype), dim=1, interpolation="nearest")
    intervals = [bootstrap_interval(value, spread) for value, spread in zip(values, spreads, strict=True)]
    return intervals, [(int(low), int(high)) for low, high in bounds.T]


# ---- warnings


def warnings_of(objective: str, beta: float, pull: tuple[float, float], clusters: Sequence[Cluster]) -> list[str]:
    """Return warnings for the user."""
    warnings = []
    chosen, rejected = pull
    if abs(chosen) < 0.01 * abs(rejected):
        warnings.append(
            f"{objective} has a gradient on the rejected alone at first: distinguishability does not order its speeds; "
            f"go by the predicted speed"
        )
    elif abs(chosen + rejected) <= 0.01 * abs(chosen) and abs(chosen) < 0.99 * beta / 2:
        warnings.append(
            f"{objective} at beta {beta:g} starts at {abs(chosen) / (beta / 2):.2g} of DPO's speed; beta "
            f"{beta * (beta / 2) / abs(chosen):.3g} starts as fast as DPO at {beta:g}"
        )
    conflicts: set[frozenset[str]] = set()
    for cluster in clusters:
        if cluster.speed.hi < 0:
            warnings.append(
                f"{cluster.name} is hurt at first: its loss rises (predicted speed {cluster.speed.value:.3g})"
            )
        elif cluster.speed.value < 0:
            warnings.append(f"{cluster.name} may be hurt at first: its predicted speed is below 0, its interval is not")
        elif cluster.relative < NEGLECTED:
            warnings.append(
                f"{cluster.name} has {cluster.relative:.1%} of the fastest cluster's speed: it will be neglected"
            )
        pair = frozenset((cluster.name, cluster.conflict_with))
        if cluster.conflict < -0.1 and pair not in conflicts:
            conflicts.add(pair)
            warnings.append(f"{cluster.name} and {cluster.conflict_with} conflict (cosine {cluster.conflict:.2f})")
        if cluster.literal and not 0.4 <= cluster.literal.positive <= 0.6:
            warnings.append(
                f"{cluster.name} prefers one answer in {cluster.literal.positive:.0%} of its prompts: an unbalanced "
                f"behaviour is also learned by its base rate, not by delta alone; balance it to compare"
            )
    return warnings
