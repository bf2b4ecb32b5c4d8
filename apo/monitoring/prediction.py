"""The prediction of `apo distinguish`, held against a run: in which order are the groups of pairs learned?

During training, the loss of each group's held-out pairs is logged. The area of a group is the mean fall of its loss
over the whole run, as a share of the loss at the start. It orders the groups also if some never reach a threshold, and
it does not depend on where the measurements lie. The prediction comes true if groups with a higher predicted speed have
larger areas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apo.monitoring.metrics import series
from clair.core.errors import UserError
from clair.core.statistics import clustered_mean
from clair.data.records import LABELS

REPORT = "distinguish.json"
DRAWS = 2000
"""Samples of an interval, and random orders of a p-value."""


def read_prediction(path: str) -> dict[str, Any]:
    """Read the file of `apo distinguish`, or the one in its folder. Raises UserError if it predicts no order."""
    file = Path(path) / REPORT if Path(path).is_dir() else Path(path)
    try:
        report = json.loads(file.read_text("utf-8"))
        by, groups = report["by"], [cluster["name"] for cluster in report["clusters"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"prediction: {file} is no {REPORT} of `apo distinguish`; give its `out`") from error
    if by not in LABELS:
        raise UserError(
            f"prediction: {file} is about {by}, which no held-out pair names; predict by {', '.join(LABELS)}"
        )
    if len(groups) < 2:
        raise UserError(f"prediction: {file} has {len(groups)} {by}, and an order needs at least two")
    return report


def check_prediction(report: Mapping[str, Any], objective: str, beta: float, labels: Sequence[str | None]) -> None:
    """Raise UserError if a prediction is of another training, or a group has fewer than two held-out pairs."""
    if (report["objective"], report["beta"]) != (objective, beta):
        raise UserError(
            f"prediction: it is of {report['objective']} at beta {report['beta']:g}, and this run trains {objective} "
            f"at beta {beta:g}; run `apo distinguish` with these"
        )
    for cluster in report["clusters"]:
        if (count := labels.count(cluster["name"])) < 2:
            raise UserError(
                f"prediction: {count} of {len(labels):,} held-out pairs are of {report['by']} {cluster['name']!r}; "
                "at least 2 are needed"
            )


def right_order(chosen: float, rejected: float, rounding: float) -> float:
    """Return 1 if the chosen answer has the larger log-ratio, 1/2 for a tie within the rounding, otherwise 0."""
    return 0.5 if abs(chosen - rejected) <= rounding else float(chosen > rejected)


def group_metrics(labels: Sequence[str | None], rows: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return each group's mean loss, its noise (half of the 95 % interval over pairs), and the share of right orders.

    `rows` are the losses and rightness of all held-out pairs, in the order of `labels`.
    """
    metrics = {}
    for name in sorted({label for label in labels if label is not None}):
        losses, right = zip(*(row for label, row in zip(labels, rows, strict=True) if label == name), strict=True)
        metrics |= {f"group/{name}/loss": sum(losses) / len(losses), f"group/{name}/right": sum(right) / len(right)}
        if len(losses) > 1:
            estimate = clustered_mean(losses, range(len(losses)))
            metrics[f"group/{name}/loss_noise"] = estimate.mean - estimate.lo
    return metrics


@dataclass(frozen=True)
class LearnedGroup:
    """What was predicted of a group, and what came. `noise` is half of the 95 % interval of the area over pairs."""

    name: str
    speed: Mapping[str, float]
    rank: Sequence[int]
    measured_rank: int
    area: float
    noise: float
    right: float
    steps: Sequence[int]
    losses: Sequence[float]


@dataclass(frozen=True)
class OrderCheck:
    """A prediction held against a run: groups in the predicted order, and how well both orders agree.

    `interval` is the 95 % interval of the rank correlation over the pairs behind speeds and areas, with these groups
    and this run. `chance` is the share of random orders that agree at least as well.
    """

    groups: Sequence[LearnedGroup]
    correlation: float
    interval: tuple[float, float]
    chance: float

    def verdict(self) -> str:
        """Return whether the prediction came true, in a sentence."""
        if self.interval[0] > 0 and self.chance < 0.05:
            return "the prediction came true: the groups were learned in about the predicted order"
        if self.interval[1] < 0:
            return "the prediction did not come true: the groups were learned in about the opposite order"
        few = f"; {len(self.groups)} groups are too few to exclude chance" if len(self.groups) < 4 else ""
        return f"undecided: the order that was measured is compatible with the predicted one and with chance{few}"


def check_order(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> OrderCheck | None:
    """Hold a prediction against the lines of a run's log; None if the log has fewer than two measurements."""
    clusters = report["clusters"]
    measured = [series(rows, f"group/{cluster['name']}/loss") for cluster in clusters]
    if any(len(steps) < 2 for steps, _ in measured):
        return None
    areas, noises = [], []
    for cluster, (steps, losses) in zip(clusters, measured, strict=True):
        noise = series(rows, f"group/{cluster['name']}/loss_noise")[1]
        start, duration = losses[0], steps[-1] - steps[0]
        areas.append((start - float(np.trapezoid(losses, steps)) / duration) / abs(start))
        # The measurements share their pairs, so their errors do not average out: the mean of the noises is the bound.
        noises.append(float(np.trapezoid(noise, steps)) / duration / abs(start))
    speeds = [cluster["speed"] for cluster in clusters]
    values = np.array([speed["value"] for speed in speeds])
    random = np.random.default_rng(0)
    drawn_speeds = random.normal(values, [(speed["hi"] - speed["lo"]) / 3.92 for speed in speeds], (DRAWS, len(values)))
    drawn_areas = random.normal(areas, np.array(noises) / 1.96, (DRAWS, len(values)))
    correlation = float(rank_correlation(values, np.array(areas)))
    low, high = np.nanquantile(rank_correlation(drawn_speeds, drawn_areas), [0.025, 0.975])
    orders = random.permuted(np.tile(areas, (DRAWS, 1)), axis=1)
    chance = float((rank_correlation(values, orders) >= correlation - 1e-9).mean())
    by_area = sorted(areas, reverse=True)
    groups = [
        LearnedGroup(
            name=cluster["name"],
            speed=cluster["speed"],
            rank=cluster["rank"],
            measured_rank=by_area.index(area) + 1,
            area=area,
            noise=noise,
            right=series(rows, f"group/{cluster['name']}/right")[1][-1],
            steps=steps,
            losses=losses,
        )
        for cluster, area, noise, (steps, losses) in zip(clusters, areas, noises, measured, strict=True)
    ]
    return OrderCheck(groups, correlation, (float(min(low, correlation)), float(max(high, correlation))), chance)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation over the last axis, of arrays [..., K]; NaN if all values of one are equal."""
    ranks = []
    for values in (first, second):
        smaller = (values[..., None, :] < values[..., :, None]).sum(-1)
        equal = (values[..., None, :] == values[..., :, None]).sum(-1)
        ranks.append(smaller + equal / 2 - values.shape[-1] / 2)
    norms = np.sqrt((ranks[0] ** 2).sum(-1) * (ranks[1] ** 2).sum(-1))
    with np.errstate(invalid="ignore"):
        return (ranks[0] * ranks[1]).sum(-1) / norms


def check_lines(report: Mapping[str, Any], check: OrderCheck | None) -> list[str]:
    """Return the check as lines of the report of `apo diagnose`."""
    title = f"prediction of apo distinguish ({report['objective']}, beta {report['beta']:g}, by {report['by']})"
    if check is None:
        return [f"{title}: not yet measured twice on held-out pairs"]
    width = max(len(group.name) for group in check.groups)
    lines = [f"{title}, and what came:", f"{'':{width}}  predicted rank  rank  fall of the loss   right at the end"]
    for index, group in enumerate(check.groups, 1):
        predicted = f"{index} ({group.rank[0]} to {group.rank[1]})"
        fall = f"{group.area:.1%} +- {group.noise:.1%}"
        lines.append(f"{group.name:{width}}  {predicted:>14}  {group.measured_rank:>4}  {fall:>16}   {group.right:.0%}")
    low, high = check.interval
    return [
        *lines,
        f"rank correlation {check.correlation:.2f}, 95 % interval {low:.2f} to {high:.2f} over pairs; of random orders "
        f"{check.chance:.1%} agree as well",
        check.verdict(),
    ]
