"""Model selection: one reward or several tastes, decided on held-out comparisons.

The comparisons of each user are split: 3 in 5 to fit, 1 in 5 to choose K (and the epoch), 1 in 5 to judge. K is the
smallest number of prototypes that is not worse than the best number with 95 % confidence. Several tastes are
recommended only if they predict the judging split better than the better model of one taste (Bradley-Terry, PAL with
K = 1): by more than `MIN_GAIN` nats per comparison with 95 % confidence, clustered by user. On real data one reward
often wins; see docs/neighbours.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from apo.rewards.bradley_terry import BradleyTerry
from apo.rewards.pal import PAL
from apo.rewards.scorer import Comparisons, Scorer, fit, nll, split
from apo.rewards.vpl import VPL
from clair.core.errors import UserError, near_miss
from clair.core.statistics import Estimate, clustered_mean

MIN_GAIN = 0.01
"""Nats per comparison: a smaller gain does not justify a second taste."""
KINDS = ("bradley_terry", "pal", "vpl")
STARTS = 3
"""Fits of PAL with several prototypes, from different seeds. One fit in five may merge two tastes in one prototype."""


def new_scorer(
    kind: str, data: Comparisons, *, seed: int = 0, beta: float = 1e-3, bounded: bool = False, **options: Any
) -> Scorer:
    """Return an initialised scorer; `beta` and `bounded` are VPL's, `options` PAL's. Raises UserError for the kind."""
    torch.manual_seed(seed)
    sizes = data.prompt.shape[1], data.chosen.shape[1]
    if kind == "bradley_terry":
        return BradleyTerry(sizes)
    if kind == "pal":
        return PAL(sizes, len(data.users), **options)
    if kind == "vpl":
        return VPL(sizes, beta=beta, bounded=bounded)
    raise UserError(f"unknown kind {kind!r}{near_miss(kind, KINDS)}; allowed: {', '.join(KINDS)}")


def fit_best(
    kind: str, data: Comparisons, training: Comparisons, valid: Comparisons, *, seed: int = 0, **options: Any
) -> Scorer:
    """Return a scorer for the users of `data`, fitted on `training`: the best of several starts."""
    starts = STARTS if kind == "pal" and options.get("prototypes", 2) > 1 else 1
    scorers = []
    for start in (seed + 1000 * number for number in range(starts)):
        scorers.append(fit(new_scorer(kind, data, seed=start, **options), training, valid, seed=start))
    return min(scorers, key=lambda scorer: float(nll(scorer, training).mean()))


@dataclass(frozen=True)
class Candidate:
    """A model with its mean -log P of the users' choices on the choosing and the judging split."""

    name: str
    tastes: int
    choosing: float
    choosing_se: float
    judging: float


@dataclass(frozen=True)
class Selection:
    """The recommendation and its evidence. `gain` is in nats per comparison over one taste."""

    plural: bool
    tastes: int
    conclusion: str
    candidates: list[Candidate]
    gain: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Return the selection as JSON values, its conclusion under the key `words`."""
        values = {"words" if key == "conclusion" else key: value for key, value in asdict(self).items()}
        return {**values, "gain": self.gain._asdict() if self.gain else None}


def select(data: Comparisons, *, max_tastes: int = 4, by_prompt: bool = False, seed: int = 0) -> Selection:
    """Choose the number of tastes, 1 to `max_tastes`, and decide if more than one is justified.

    Raises UserError if fewer than two users have five comparisons, the fewest of which some can be held out.
    """
    fitting, choosing, judging = split(data, (0.6, 0.2, 0.2), seed)
    users = judging.user.unique()
    if len(users) < 2:
        raise UserError(
            f"{len(users)} of {len(data.user.unique())} users have the five comparisons that are needed to hold some "
            f"out; a test of several tastes needs at least two such users, so use bradley_terry"
        )
    results: dict[str, tuple[Candidate, Tensor]] = {}
    losses: dict[int, Tensor] = {}
    for name, tastes in [("bradley_terry", 1), *((f"pal {k}", k) for k in range(1, max_tastes + 1))]:
        kind = name.split()[0]
        scorer = fit_best(
            kind, data, fitting, choosing, prototypes=tastes, by_prompt=by_prompt and kind == "pal", seed=seed
        )
        losses[tastes] = nll(scorer, choosing)
        mean_loss = clustered_mean(losses[tastes].tolist(), choosing.user.tolist())
        judged = nll(scorer, judging)
        results[name] = Candidate(name, tastes, mean_loss.mean, mean_loss.se, float(judged.mean())), judged
    candidates = [candidate for candidate, _ in results.values()]
    single = min((c for c in candidates if c.tastes == 1), key=lambda candidate: candidate.choosing).name
    tastes = _min_tastes({k: values for k, values in losses.items() if k > 1}, choosing.user.tolist())
    several = next((candidate for candidate in candidates if candidate.tastes == tastes), None)
    if several is None:
        return Selection(False, 1, "one taste: no other was tried", candidates, None)
    gain = clustered_mean((results[single][1] - results[several.name][1]).tolist(), judging.user.tolist())
    plural = gain.lo > MIN_GAIN
    evidence = f"{gain.mean:+.3f} nats a comparison [{gain.lo:+.3f}, {gain.hi:+.3f}] over {single}, {len(users)} users"
    conclusion = (
        f"several tastes: PAL with {several.tastes} prototypes predicts held-out choices better, {evidence}"
        if plural
        else f"one taste: {several.tastes} prototypes do not predict held-out choices better by more than "
        f"{MIN_GAIN:g} nats, {evidence}"
    )
    return Selection(plural, several.tastes if plural else 1, conclusion, candidates, gain)


def _min_tastes(losses: dict[int, Tensor], users: list[int]) -> int | None:
    """Return the smallest number of tastes that is not worse than the best with 95 % confidence, clustered by user."""
    if not losses:
        return None
    best = min(losses, key=lambda tastes: float(losses[tastes].mean()))

    def beaten(tastes: int) -> bool:
        return clustered_mean((losses[tastes] - losses[best]).tolist(), users).lo > 0

    return next(tastes for tastes in sorted(losses) if tastes == best or not beaten(tastes))
