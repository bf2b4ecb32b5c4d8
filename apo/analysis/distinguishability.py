"""Preference distinguishability: predicts, before training, which clusters of pairs are learned first or harmed.

After Im & Li, "Understanding the Learning Dynamics of Alignment with Human Feedback" (arXiv 2403.18742). Three measures
of each cluster, all about the first steps of training:

    literal     answers are one of two texts: delta = |mean phi(x) where one is preferred - mean where the other is|
    pair-level  u = mean hidden state of chosen - of rejected: delta = |mean u|, coherence = |mean u|^2 / mean |u|^2,
                cosines between the clusters' mean u; ours, an extension to free text
    gradient    v = the objective's step on a pair with respect to the LM head; speed of a cluster = the mean of
                <v of its pair, v of all others>; a negative speed means that the mixture harms the cluster at first

Means of products exclude a pair's product with itself, which is memorisation and would dominate in small clusters.

The distance delta orders speeds only if the gradients of chosen and rejected are equal (DPO, APO-zero). At the start,
APO-down has a gradient on the rejected alone; use the gradient measure there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from apo.analysis.clusters import clusters_of

if TYPE_CHECKING:
    from torch import Tensor

    from apo.analysis.features import EncodedPairs
    from apo.losses.mixture import Mixture
    from apo.packing.logps import PairLogps

SKETCH = 4096
"""Dimensions of a gradient; that of a larger LM head is a TensorSketch, with errors of about 3 % of the norms."""
NEGLECTED = 0.1
"""Share of the fastest cluster's predicted speed below which a cluster is reported as neglected."""
DRAWS = 500


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval over pairs."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Literal:
    """`delta` between the prompts of two fixed answers; `scaled` = delta / sqrt(trace), `concentration` and `trace` the
    larger of both classes' covariance norms (spectral, trace); `positive` the share of the first class.
    """

    delta: float
    scaled: float
    concentration: float
    trace: float
    positive: float


@dataclass(frozen=True)
class Cluster:
    """The measures of one cluster.

    `speed` is the fall of a pair's loss by training on the others, at the start, per unit of learning rate.
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
    """Of the fastest cluster's speed."""
    conflict: float
    """The lowest cosine of its mean u with another cluster's; NaN where it is alone."""
    conflict_with: str
    literal: Literal | None


@dataclass(frozen=True)
class Report:
    """The clusters, fastest first, the objective's initial gradients on chosen and rejected, and warnings."""

    objective: str
    beta: float
    pull: tuple[float, float]
    """Mean derivative of the loss by the log-prob of chosen and of rejected, at the reference."""
    clusters: list[Cluster]
    cosines: list[list[float]]
    warnings: list[str]

    def plain(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def distinguish(
    pairs: EncodedPairs, by: str, objective: Any = "apo_zero", beta: float = 0.1, *, seed: int = 0, draws: int = DRAWS
) -> Report:
    """Report on pairs clustered by a label or by k-means of their prompts (`kmeans:K`).

    Raises UserError for a label that some pairs lack, and for clusters of fewer than two pairs.
    """
    import torch

    from apo.losses.mixture import resolve_mixture

    mixture = resolve_mixture(objective)
    names = clusters_of(pairs.rows, by, pairs.features.prompt, seed)
    chosen, rejected, logps = head_gradients(pairs.model, pairs.tokenized, seed=seed)
    a_chosen, a_rejected = pulls(mixture, beta, logps)
    steps = -(a_chosen[:, None] * chosen + a_rejected[:, None] * rejected)
    u = pairs.features.chosen_mean - pairs.features.rejected_mean
    order = sorted(set(names))
    members = [torch.tensor([index for index, name in enumerate(names) if name == cluster]) for cluster in order]
    drawn = [resampled(len(indices), draws, seed + number) for number, indices in enumerate(members)]
    speeds = _speeds([steps[indices] for indices in members], drawn)
    centres = torch.stack([u[indices].mean(0) for indices in members])
    cosines = torch.nn.functional.cosine_similarity(centres[:, None], centres[None], dim=-1)
    fastest = max(speed.value for speed in speeds)
    results = []
    for number, (name, indices) in enumerate(zip(order, members, strict=True)):
        delta, scaled, coherence = _pair_level(u[indices], drawn[number])
        others = [(float(cosines[number, other]), order[other]) for other in range(len(order)) if other != number]
        conflict, conflict_with = min(others, default=(float("nan"), ""))
        rows = [pairs.rows[index] for index in indices.tolist()]
        results.append(
            Cluster(
                name, len(indices), delta, scaled, coherence, _overlap(rows), speeds[number],
                speeds[number].value / fastest if fastest > 0 else float("nan"), conflict, conflict_with,
                literal_of(rows, pairs.features.prompt[indices]),
            )
        )  # fmt: skip
    ranked = sorted(range(len(results)), key=lambda number: -results[number].speed.value)
    pull = float(a_chosen.mean()), float(a_rejected.mean())
    clusters = [results[number] for number in ranked]
    table = [[float(cosines[one, other]) for other in ranked] for one in ranked]
    return Report(mixture.name, beta, pull, clusters, table, warnings_of(mixture.name, beta, pull, clusters))


# ---- distances


def literal_of(rows: Sequence[Mapping[str, Any]], hidden: Tensor) -> Literal | None:
    """Return the literal distinguishability if all answers are one of two texts, each preferred at least twice.

    `hidden` [n, D] is the hidden state at the last token of each prompt.
    """
    chosen, rejected = ([row[side][-1]["content"] for row in rows] for side in ("chosen", "rejected"))
    answers = sorted({*chosen, *rejected})
    if len(answers) != 2:
        return None
    positive = [answer == answers[1] for answer in chosen]
    return distinguishability(hidden, positive) if 2 <= sum(positive) <= len(rows) - 2 else None


def distinguishability(hidden: Tensor, positive: Sequence[bool]) -> Literal:
    """Return delta = |mean of hidden [n, D] over positive - over negative prompts|, and the spread of both classes."""
    import torch

    mask = torch.tensor(positive)
    classes = [hidden[mask], hidden[~mask]]
    covariances = [torch.cov(states.T, correction=0).reshape(hidden.shape[1], -1) for states in classes]
    delta = float((classes[0].mean(0) - classes[1].mean(0)).norm())
    concentration = max(float(torch.linalg.matrix_norm(c, 2)) for c in covariances)
    trace = max(float(c.trace()) for c in covariances)
    return Literal(delta, delta / trace**0.5, concentration, trace, float(mask.float().mean()))


def _pair_level(u: Tensor, weights: Tensor) -> tuple[Interval, float, Interval]:
    """Return |mean u|, |mean u| / sqrt(trace of the covariance of u), and |mean u|^2 / mean |u|^2, with intervals."""
    n, squares = len(u), (u**2).sum(1)
    product = ((u.sum(0) ** 2).sum() - squares.sum()) / (n * (n - 1))  # the mean of <u_i, u_j>, i != j
    drawn = ((weights @ u) ** 2).sum(1)
    square = _interval(product, drawn)
    delta = Interval(*(max(0.0, value) ** 0.5 for value in (square.value, square.lo, square.hi)))
    trace = (squares.mean() - product).clamp(min=1e-30)
    coherence = _interval(product / squares.mean(), drawn / (weights @ squares))
    return delta, delta.value / float(trace.sqrt()), coherence


def _overlap(rows: Sequence[Mapping[str, Any]]) -> float:
    from clair.data.contrast import contrast_of

    pairs = [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in rows]
    return sum(contrast_of(chosen, rejected).jaccard for chosen, rejected in pairs) / len(pairs)


# ---- gradients


def pulls(mixture: Mixture, beta: float, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Return dL/d log pi(chosen) and dL/d log pi(rejected) of each pair's loss at the reference, [n] each.

    DPO -beta/2 and +beta/2, APO-zero -beta/4 and +beta/4, APO-down 0 and +beta/4.
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

    grad log pi(y|x) = sum over response tokens t of (onehot(y_t) - softmax) h_t^T, [V, D]. It is flattened if it has at
    most `dimensions` entries; otherwise it is a TensorSketch (Pham & Pagh 2013), whose inner products are unbiased.
    """
    import torch

    from apo.analysis.features import last_hidden
    from apo.packing.layout import response_mask
    from apo.packing.logps import PairLogps

    head = model.get_output_embeddings()
    vocabulary, hidden_size = head.weight.shape
    sketch = _sketch(vocabulary, hidden_size, dimensions, seed)
    gradients: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
    sums: dict[str, list[float]] = {"chosen": [], "rejected": []}
    lengths: dict[str, list[int]] = {"chosen": [], "rejected": []}
    with torch.no_grad():
        for pair in tokenized:
            rows = [pair["prompt_ids"] + pair[f"{side}_ids"] for side in gradients]
            for side, states, row in zip(gradients, last_hidden(model, rows), rows, strict=True):
                start, mask = len(pair["prompt_ids"]), torch.tensor(response_mask(pair, side), dtype=torch.bool)
                hidden = states[start - 1 : len(row) - 1][mask]
                token_logps = head(hidden.to(head.weight)).float().cpu().log_softmax(-1)
                picked = torch.tensor(row[start:])[mask][:, None]
                sums[side].append(float(token_logps.gather(1, picked).sum()))
                lengths[side].append(len(picked))
                residual = (-token_logps.exp()).scatter_add(1, picked, torch.ones(len(picked), 1))
                gradients[side].append(sketch(residual, hidden))
    logps = PairLogps(
        torch.tensor(sums["chosen"]),
        torch.tensor(sums["rejected"]),
        torch.tensor(lengths["chosen"]),
        torch.tensor(lengths["rejected"]),
    )
    return torch.stack(gradients["chosen"]), torch.stack(gradients["rejected"]), logps


def _sketch(rows: int, columns: int, dimensions: int, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of a [T, rows] and b [T, columns] that computes sum_t a_t b_t^T, flattened or sketched."""
    import torch

    if rows * columns <= dimensions:
        return lambda a, b: (a.T @ b).flatten()
    random = torch.Generator().manual_seed(seed)
    bins = [torch.randint(dimensions, (size,), generator=random) for size in (rows, columns)]
    signs = [torch.randint(2, (size,), generator=random) * 2.0 - 1 for size in (rows, columns)]

    def counted(values: Tensor, which: int) -> Tensor:
        return torch.zeros(len(values), dimensions).index_add_(1, bins[which], values * signs[which])

    def sketched(a: Tensor, b: Tensor) -> Tensor:
        product = torch.fft.rfft(counted(a, 0)) * torch.fft.rfft(counted(b, 1))
        return torch.fft.irfft(product.sum(0), n=dimensions)

    return sketched


def _speeds(steps: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Interval]:
    """Return the mean of <v_i, mean of v over all other pairs> for each cluster, from its steps [n_c, m]."""
    import torch

    sizes = torch.tensor([float(len(cluster)) for cluster in steps])
    shares, total = sizes / sizes.sum(), float(sizes.sum())
    means = torch.stack([cluster.mean(0) for cluster in steps])
    drawn = torch.stack([weight @ cluster for weight, cluster in zip(weights, steps, strict=True)])  # [K, draws, m]
    squares = torch.stack([(cluster**2).sum(1).mean() for cluster in steps])
    values = (total * means @ (shares @ means) - squares) / (total - 1)
    spreads = (drawn * torch.einsum("k,kdm->dm", shares, drawn)).sum(-1)
    return [_interval(value, spread) for value, spread in zip(values, spreads, strict=True)]


def resampled(n: int, draws: int, seed: int) -> Tensor:
    """Return the weights of n pairs in `draws` samples with replacement, [draws, n]; each row sums to 1."""
    import torch

    random = torch.Generator().manual_seed(seed)
    indices = torch.randint(n, (draws, n), generator=random)
    return torch.zeros(draws, n).scatter_add_(1, indices, torch.full((draws, n), 1 / n))


def _interval(value: Tensor, drawn: Tensor) -> Interval:
    """Return `value` minus the quantiles of the samples' deviations from their mean.

    The samples' mean is not used itself: repeated pairs make products too large in all samples.
    """
    import torch

    low, high = torch.quantile(drawn - drawn.mean(), torch.tensor([0.025, 0.975], dtype=drawn.dtype))
    return Interval(float(value), float(value - high), float(value - low))


# ---- warnings


def warnings_of(objective: str, beta: float, pull: tuple[float, float], clusters: Sequence[Cluster]) -> list[str]:
    """Return warnings for the user."""
    warnings = []
    chosen, rejected = pull
    if abs(chosen) < 0.01 * abs(rejected):
        warnings.append(
            f"{objective} pulls at the rejected alone at first: distinguishability does not order its speeds, go by "
            f"the predicted speed"
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
                f"{cluster.name} gets {cluster.relative:.1%} of the fastest one's speed: it will be neglected"
            )
        pair = frozenset((cluster.name, cluster.conflict_with))
        if cluster.conflict < -0.1 and pair not in conflicts:
            conflicts.add(pair)
            warnings.append(f"{cluster.name} and {cluster.conflict_with} conflict (cosine {cluster.conflict:.2f})")
        if cluster.literal and not 0.4 <= cluster.literal.positive <= 0.6:
            warnings.append(
                f"{cluster.name} prefers one answer in {cluster.literal.positive:.0%} of its prompts: an unbalanced "
                f"behaviour is learned along its base rate too, not along delta alone; balance it to compare"
            )
    return warnings
