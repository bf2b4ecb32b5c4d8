"""The paper's claims as comparisons of cells of the mini grid, and the rule for their verdicts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clair.core.statistics import Best, Estimate, best_of, clustered_mean
from clair.core.student_t import t_quantile

Verdict = Literal["reproduced", "not reproduced", "undecided", "not measured"]
Name = tuple[str, str]
"""A cell: data set and objective."""


@dataclass(frozen=True)
class Compared:
    """`left` minus `right`, of accuracy or of the held-out winners' log-likelihood; expected above 0, or below.

    A `right` of None is the model before training.
    """

    left: Name
    right: Name | None
    above: bool = True
    of: Literal["accuracy", "likelihood"] = "accuracy"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper. It is reproduced if all its comparisons are as expected."""

    text: str
    compared: tuple[Compared, ...]


CLAIRS, DOWN = ("clair", "apo_zero"), ("off_policy", "apo_down")
CLAIMS = (
    Claim("CLAIR with APO-zero makes the model better", (Compared(CLAIRS, None),)),
    Claim(
        "CLAIR beats judged pairs, on-policy and off-policy",
        (Compared(CLAIRS, ("on_policy", "apo_zero")), Compared(CLAIRS, DOWN)),
    ),
    Claim("Contrast matters: CLAIR beats stronger preferred", (Compared(CLAIRS, ("stronger", "apo_zero")),)),
    Claim(
        "APO-zero beats DPO and KTO where winners are better than the model",
        (Compared(CLAIRS, ("clair", "dpo")), Compared(CLAIRS, ("clair", "kto"))),
    ),
    Claim(
        "APO-down beats APO-zero and DPO on off-policy judge pairs",
        (Compared(DOWN, ("off_policy", "apo_zero")), Compared(DOWN, ("off_policy", "dpo"))),
    ),
    Claim("APO-down harms on CLAIR", (Compared(("clair", "apo_down"), None, above=False),)),
    Claim(
        "Under DPO winners of CLAIR become less likely",
        (Compared(("clair", "dpo"), None, above=False, of="likelihood"),),
    ),
    Claim("Under APO-zero winners of CLAIR become more likely", (Compared(CLAIRS, None, of="likelihood"),)),
)

AFTERWARDS = tuple(
    Compared((data, "sft"), (data, "apo_zero")) for data in ("clair", "on_policy", "off_policy", "stronger")
)
"""Comparisons that were added after the results were known. They are no claims of the paper and have no verdict."""


def verdict_of(claim: Claim, estimates: Sequence[Estimate | None]) -> Verdict:
    """The verdict of a claim from the estimates of its comparisons.

    reproduced       every interval lies on the expected side of 0
    not reproduced   one lies on the other side
    undecided        anything else
    not measured     a cell has no runs
    """
    if any(estimate is None for estimate in estimates):
        return "not measured"
    sides = [
        _side(estimate) * (1 if comparison.above else -1)
        for comparison, estimate in zip(claim.compared, estimates, strict=True)
    ]
    if -1 in sides:
        return "not reproduced"
    return "reproduced" if all(side == 1 for side in sides) else "undecided"


def _side(estimate: Estimate | None) -> int:
    assert estimate is not None
    return (estimate.lo > 0) - (estimate.hi < 0)


# ---- values of a cell


def right_of(runs: Sequence[Mapping[str, Any]]) -> list[list[list[float]]]:
    """Right (1.0) or wrong (0.0) by seed, checkpoint and question. Runs that were stopped early are left out."""
    return [
        [[float(c) for c in checkpoint["right"]] for checkpoint in run["checkpoints"]]
        for run in runs
        if run["checkpoints"]
    ]


def mean_of(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean of several rows, column by column."""
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def over_checkpoints(runs: Sequence[Mapping[str, Any]]) -> dict[int, list[float]]:
    """For each seed: for each question, the share of checkpoints that answer it right."""
    complete_runs = [run for run in runs if run["checkpoints"]]
    return {run["seed"]: mean_of(values) for run, values in zip(complete_runs, right_of(complete_runs), strict=True)}


def interval(by_seed: Sequence[Sequence[float]], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of values by seed and question with a 95 % interval over both.

    se^2 = se_questions^2 + se_seeds^2: the clustered error of the means over seeds (clair.core.statistics), and the
    error of the means of the seeds. The first includes a part of the second, so the interval is a little too wide.
    Degrees of freedom are Welch-Satterthwaite's. With one seed, the interval is over questions alone.
    """
    questions = clustered_mean(mean_of(by_seed), clusters)
    if len(by_seed) < 2:
        return questions
    seeds = clustered_mean([math.fsum(values) / len(values) for values in by_seed], range(len(by_seed)))
    a, b = questions.se**2, seeds.se**2
    if a + b == 0:
        return questions
    df = max(1.0, (a + b) ** 2 / (a**2 / questions.df + b**2 / seeds.df))
    se = math.sqrt(a + b)
    half = t_quantile(0.975, df) * se
    return Estimate(
        questions.mean, se, questions.mean - half, questions.mean + half, questions.n, questions.clusters, df
    )


def gains(
    left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]] | None, base: Sequence[float]
) -> list[list[float]]:
    """By seed and question: left minus right of the same seed, over checkpoints; minus `base` if `right` is None."""
    first = over_checkpoints(left)
    second = over_checkpoints(right) if right is not None else {seed: list(base) for seed in first}
    return [[a - b for a, b in zip(first[s], second[s], strict=True)] for s in sorted(first.keys() & second.keys())]


def compare(
    comparison: Compared,
    cells: Mapping[Name, Sequence[Mapping[str, Any]]],
    base: Sequence[float],
    clusters: Sequence[str],
) -> Estimate | None:
    """The comparison's estimate; None if a cell has no runs, or for the log-likelihood fewer than two.

    The log-likelihood is in nats a winner at the last checkpoint minus before training, with an interval over seeds.
    """
    left, right = cells.get(comparison.left, []), cells.get(comparison.right, []) if comparison.right else None
    if comparison.of == "likelihood":
        falls = [
            run["checkpoints"][-1]["pairs"]["logps/chosen"] - run["start"]["logps/chosen"]
            for run in left
            if run["checkpoints"]
        ]
        return clustered_mean(falls, range(len(falls))) if len(falls) > 1 else None
    differences = gains(left, right, base)
    return interval(differences, clusters) if differences else None


BETTER = ("apo_zero", "apo_down")
"""The objectives of the main result: CLAIR with the better of them against the model before training."""


def better_apo(
    cells: Mapping[Name, Sequence[Mapping[str, Any]]], base: Sequence[float], clusters: Sequence[str]
) -> tuple[str, Best] | None:
    """The objective of `BETTER` that gains more on CLAIR, and its gain corrected for the selection.

    Gains are over checkpoints and seeds, with an interval over questions. None if one of the objectives has no runs.
    """
    gains_by_objective = [gains(cells.get(("clair", objective), []), None, base) for objective in BETTER]
    if not all(gains_by_objective):
        return None
    best = best_of([mean_of(by_seed) for by_seed in gains_by_objective], clusters)
    return BETTER[best.candidate], best


def maximum_difference(
    left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]] | None, base: Sequence[float]
) -> float:
    """The highest accuracy over checkpoints (means over seeds) of left minus that of right, as the paper compares."""

    def highest(runs: Sequence[Mapping[str, Any]]) -> float:
        return max(sum(mean_of(rows)) / len(base) for rows in zip(*right_of(runs), strict=True))

    return highest(left) - (highest(right) if right is not None else sum(base) / len(base))
