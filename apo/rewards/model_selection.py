"""Whether people differ: one reward or several tastes, decided on comparisons that nothing was fitted on.

Each user's comparisons are parted: 3 in 5 fit, 1 in 5 chooses K (and when to stop), 1 in 5 judges. K is the fewest
prototypes that the best number is not better than with 95 % confidence. Several tastes are
recommended only where they predict the judging part better than the better of two models of one taste (Bradley-Terry,
PAL with K = 1), by more than `LEAST_GAIN` nats a comparison with 95 % confidence, users being the clusters. On real
data one reward often wins: docs/neighbours.md says where.
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

LEAST_GAIN = 0.01
"""Nats a comparison: a smaller gain is not worth a second taste."""
KINDS = ("bradley_terry", "pal", "vpl")
STARTS = 3
"""Fits of PAL with several prototypes, from different draws: one in five may end with two tastes in one prototype."""


def new_scorer(
    kind: str, data: Comparisons, *, prototypes: int = 2, by_prompt: bool = False, beta: float = 1e-3, seed: int = 0
) -> Scorer:
    """A scorer that has learned nothing yet. Raises UserError for an unknown kind."""
    torch.manual_seed(seed)
    sizes = data.prompt.shape[1], data.chosen.shape[1]
    if kind == "bradley_terry":
        return BradleyTerry(sizes)
    if kind == "pal":
        return PAL(sizes, len(data.users), prototypes, by_prompt)
    if kind == "vpl":
        return VPL(sizes, beta=beta)
    raise UserError(f"unknown kind {kind!r}{near_miss(kind, KINDS)}; allowed: {', '.join(KINDS)}")


def fitted(
    kind: str, data: Comparisons, training: Comparisons, valid: Comparisons, *, prototypes: int = 2,
    by_prompt: bool = False, beta: float = 1e-3, seed: int = 0,
) -> Scorer:  # fmt: skip
    """A scorer for the users of `data`, fitted on `training`: of several starts the one that explains it best."""
    starts = STARTS if kind == "pal" and prototypes > 1 else 1
    found = []
    for start in (seed + 1000 * number for number in range(starts)):
        scorer = new_scorer(kind, data, prototypes=prototypes, by_prompt=by_prompt, beta=beta, seed=start)
        found.append(fit(scorer, training, valid, seed=start))
    return min(found, key=lambda scorer: float(nll(scorer, training).mean()))


@dataclass(frozen=True)
class Candidate:
    """A model that was tried: mean over users of -log P of what they chose, on the choosing and the judging part."""

    name: str
    tastes: int
    choosing: float
    choosing_se: float
    judging: float


@dataclass(frozen=True)
class Selection:
    """What is recommended, in words, and on what evidence. `gain` is nats a comparison over one taste."""

    plural: bool
    tastes: int
    words: str
    candidates: list[Candidate]
    gain: Estimate | None

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "gain": self.gain._asdict() if self.gain else None}


def select(data: Comparisons, *, most: int = 4, by_prompt: bool = False, seed: int = 0) -> Selection:
    """Choose the number of tastes, 1 to `most`, and whether more than one is worth it.

    Raises UserError where fewer than two users have five comparisons: nobody's own could be held out.
    """
    fitting, choosing, judging = split(data, (0.6, 0.2, 0.2), seed)
    users = judging.user.unique()
    if len(users) < 2:
        raise UserError(
            f"{len(users)} of {len(data.user.unique())} users have the five comparisons that it takes to hold some "
            f"out; whether tastes differ needs two such users at least, so take bradley_terry"
        )
    found: dict[str, tuple[Candidate, Tensor]] = {}
    missed: dict[int, Tensor] = {}
    for name, tastes in [("bradley_terry", 1), *((f"pal {k}", k) for k in range(1, most + 1))]:
        kind = name.split()[0]
        scorer = fitted(
            kind, data, fitting, choosing, prototypes=tastes, by_prompt=by_prompt and kind == "pal", seed=seed
        )
        missed[tastes] = nll(scorer, choosing)
        by_user = clustered_mean(missed[tastes].tolist(), choosing.user.tolist())
        judged = nll(scorer, judging)
        found[name] = Candidate(name, tastes, by_user.mean, by_user.se, float(judged.mean())), judged
    one = min((name for name in found if found[name][0].tastes == 1), key=lambda name: found[name][0].choosing)
    candidates = [candidate for candidate, _ in found.values()]
    tastes = _fewest({k: values for k, values in missed.items() if k > 1}, choosing.user.tolist())
    several = next((candidate for candidate in candidates if candidate.tastes == tastes), None)
    if several is None:
        return Selection(False, 1, "one taste: no other was tried", candidates, None)
    gain = clustered_mean((found[one][1] - found[several.name][1]).tolist(), judging.user.tolist())
    plural = gain.lo > LEAST_GAIN
    told = f"{gain.mean:+.3f} nats a comparison [{gain.lo:+.3f}, {gain.hi:+.3f}] over {one}, {len(users)} users"
    words = (
        f"several tastes: PAL with {several.tastes} prototypes predicts held-out choices better, {told}"
        if plural
        else f"one taste: {several.tastes} prototypes do not predict held-out choices better by more than "
        f"{LEAST_GAIN:g} nats, {told}"
    )
    return Selection(plural, several.tastes if plural else 1, words, candidates, gain)


def _fewest(missed: dict[int, Tensor], users: list[int]) -> int | None:
    """The fewest tastes that the best number is not better than with 95 % confidence, comparison by comparison."""
    if not missed:
        return None
    best = min(missed, key=lambda tastes: float(missed[tastes].mean()))
    return next(
        tastes for tastes in sorted(missed)
        if tastes == best or clustered_mean((missed[tastes] - missed[best]).tolist(), users).lo <= 0
    )  # fmt: skip
