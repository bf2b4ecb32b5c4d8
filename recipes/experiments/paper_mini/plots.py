"""Plots of the mini grid's dynamics: a panel per data set and objective, with chosen and rejected held-out answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo.monitoring.plots import COLORS, FAINT, QUIET
from recipes.experiments.paper_mini.claims import Name, mean_of

Runs = Sequence[Mapping[str, Any]]
DASHES: Mapping[str, Any] = {"chosen": "solid", "rejected": (0, (3.5, 1.6))}
"""Line styles, so that curves differ by more than colour."""
REWARDS = [sign * value for sign in (-1, 1) for value in (0, 1, 3, 10, 30, 100, 300)]
NATS = [-value for value in (0, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)]
"""Ticks of the axes."""
DISPLAY_NAMES = {
    "clair": "CLAIR",
    "on_policy": "on-policy judge",
    "off_policy": "off-policy judge",
    "stronger": "stronger preferred",
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "apo_zero": "APO-zero",
    "apo_down": "APO-down",
}


@dataclass(frozen=True)
class Curve:
    """One side's mean over seeds, and the lowest and highest seed, at each evaluation; `epochs` are their positions."""

    epochs: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def curve(runs: Runs, side: str, *, reward: bool) -> Curve | None:
    """The log-likelihood of one side of the held-out pairs in nats per response, or its reward.

    The reward is beta times the change by training. None if no run is complete. Missing values are drawn as gaps.
    """
    complete_runs = [run for run in runs if run["checkpoints"]]
    if not complete_runs:
        return None
    by_seed = []
    for run in complete_runs:
        values = [math.nan if value is None else value for value in run["looks"][f"logps/{side}"]]
        by_seed.append([run["beta"] * (value - values[0]) for value in values] if reward else values)
    steps, columns = complete_runs[0]["looks"]["step"], list(zip(*by_seed, strict=True))
    epochs = [step * complete_runs[0]["epochs"] / steps[-1] for step in steps]
    return Curve(epochs, mean_of(by_seed), [min(c) for c in columns], [max(c) for c in columns])


def draw(cells: Mapping[Name, Runs], path: Path, *, reward: bool) -> None:
    """Draw data sets from top to bottom and objectives from left to right; panels of a row share their axes.

    Scales are linear up to 1 (rewards) or 50 nats (log-likelihoods) and logarithmic beyond.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    sets, objectives = (list(dict.fromkeys(name[index] for name in cells)) for index in (0, 1))
    figure = Figure(figsize=(2.3 * len(objectives) + 0.6, 1.85 * len(sets) + 0.75), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(sets), len(objectives), squeeze=False, sharex=True, sharey="row")
    for row, data in zip(grid, sets, strict=True):
        for axes, objective in zip(row, objectives, strict=True):
            runs = cells.get((data, objective), [])
            axes.set_yscale("symlog", linthresh=1.0 if reward else 50.0)
            axes.yaxis.set_major_locator(FixedLocator(REWARDS if reward else NATS))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
            if reward:
                axes.axhline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
            for side, color in COLORS.items():
                if line := curve(runs, side, reward=reward):
                    axes.fill_between(line.epochs, line.low, line.high, color=color, alpha=0.16, linewidth=0)
                    axes.plot(line.epochs, line.mean, color=color, linewidth=1.7, linestyle=DASHES[side])
            _dress(axes, runs)
    for axes, objective in zip(grid[0], objectives, strict=True):
        axes.annotate(
            DISPLAY_NAMES[objective],
            (0.5, 1),
            xytext=(0, 19),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            fontsize=11,
            fontweight="bold",
        )
    for axes, data in zip(grid[:, 0], sets, strict=True):
        axes.set_ylabel(DISPLAY_NAMES[data], fontsize=10, fontweight="bold")
    from matplotlib.lines import Line2D

    labels = {"chosen": "winners", "rejected": "losers"}
    lines = [Line2D([], [], color=c, linewidth=1.7, linestyle=DASHES[s], label=labels[s]) for s, c in COLORS.items()]
    quantity = "Reward: beta x log-ratio to the model before training" if reward else "Log-likelihood, nats a response"
    figure.legend(handles=lines, loc="outside upper right", ncols=2, frameon=False, fontsize=10)
    figure.suptitle(f"{quantity}. Held-out pairs; band: all seeds", x=0.01, ha="left", fontsize=10.5, color=QUIET)
    figure.supxlabel("epoch", fontsize=9.5, color=QUIET)
    figure.savefig(path, format="png")


def _dress(axes: Any, runs: Runs) -> None:
    axes.set_title(
        f"lr {runs[0]['learning_rate']:g}, beta {runs[0]['beta']:g}" if runs else "", fontsize=8, color=QUIET
    )
    axes.tick_params(labelsize=8, colors=QUIET, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d1d5db")
