"""Plots of results: clusters of pairs, the reward's curve, a sweep, pilots. Each takes the result that is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apo.monitoring.drawing import (
    BLUE,
    COLORS,
    GOLD,
    QUIET,
    escape_dollars,
    name_rows,
    new_figure,
    plot_interval,
    set_frame,
)  # fmt: skip


def draw_clusters(report: Mapping[str, Any], path: str | Path) -> None:
    """Plot a report of `apo distinguish`.

    Left: predicted speeds with their intervals, fastest first. Right: cosines of the directions, red for conflicts.
    """
    clusters = report["clusters"]
    names = [escape_dollars(f"{cluster['name'][:28]} ({cluster['n']})") for cluster in clusters]
    indices = range(len(clusters))
    figure = new_figure(10.5, 1.6 + 0.36 * len(clusters), 150)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1]})
    unit = f"fall of the loss per unit of learning rate at the start, {report['objective']}"
    set_frame(left, "Predicted speed", escape_dollars(unit))
    left.set_xlabel("")
    left.axvline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    for index, cluster in zip(indices, clusters, strict=True):
        speed = cluster["speed"]
        color = COLORS["rejected"] if speed["value"] < 0 else COLORS["chosen"]
        plot_interval(left, index, speed["value"], (speed["lo"], speed["hi"]), color)
    name_rows(left, names)
    right.imshow(report["cosines"], cmap="RdBu", vmin=-1, vmax=1)
    right.set_title("Agreement", loc="left", fontsize=11, fontweight="bold", pad=18)
    right.text(0, 1.025, "cosine of chosen - rejected", transform=right.transAxes, fontsize=8.5, color=QUIET)
    right.set_xticks([])
    right.set_yticks([])
    for row in indices:
        for column in indices:
            value = report["cosines"][row][column]
            color = "white" if abs(value) > 0.6 else QUIET
            right.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=color)
    figure.savefig(path, format="png")


def draw_curve(curve: Mapping[str, Any], path: str | Path) -> None:
    """Plot a result of `apo reward curve`: accuracy over the number of comparisons, with intervals."""
    points = curve["points"]
    shots = [point["shots"] for point in points]
    figure = new_figure(6.5, 4.2, 150)
    axes = figure.subplots()
    set_frame(axes, "Users not seen in training", f"accuracy on their further comparisons, {curve['splits']} splits")
    axes.set_xlabel("comparisons of the user", fontsize=8.5, color=QUIET)
    axes.set_xscale("log")
    axes.set_xticks(shots, [str(n) for n in shots])
    axes.minorticks_off()
    lines = {"adapted": (curve["kind"], COLORS["chosen"]), "alone": ("of the user alone", COLORS["rejected"])}
    for key, (name, color) in {**lines, "bradley_terry": ("Bradley-Terry", QUIET)}.items():
        means, lows, highs = ([point[key][statistic] for point in points] for statistic in ("mean", "lo", "hi"))
        axes.plot(shots, means, color=color, marker="o", markersize=4, label=name)
        axes.fill_between(shots, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, format="png")


def draw_sweep(result: Mapping[str, Any], path: str | Path) -> None:
    """Plot the runs of `apo sweep`, a row each, on the held-out pairs with 95 % intervals.

    Left: the share of pairs in the right order; hollow: the best run, corrected for its selection. Right: log-ratios.
    """
    runs, best = result["runs"], result["best"]
    figure = new_figure(10.5, 1.6 + 0.36 * len(runs), 150)
    left, right = figure.subplots(1, 2)
    set_frame(left, "Right pairs", "held out; hollow: the best, corrected for its selection")
    set_frame(right, "Log-ratio", "held out, nats a response; 0 is the reference")
    for index, run in enumerate(runs):
        plot_interval(left, index, run["right"]["mean"], run["right"]["ci95"], BLUE)
        if best and best["name"] == run["name"]:
            plot_interval(left, index + 0.22, best["corrected"], best["ci95"], GOLD, fill="white")
        for offset, (side, color) in zip((-0.1, 0.1), COLORS.items(), strict=True):
            plot_interval(right, index + offset, run[side]["mean"], run[side]["ci95"], color)
    name_rows(left, [escape_dollars(run["name"]) for run in runs])
    name_rows(right, [""] * len(runs))
    right.axvline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    for axes in (left, right):
        axes.set_xlabel("")
    for side, color in COLORS.items():
        right.plot([], [], "o", color=color, markersize=5, label=side)
    right.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, format="png")


def draw_pilots(result: Mapping[str, Any], path: str | Path) -> None:
    """Plot the gain of each pilot of `apo advise --pilot` over the base with its 95 % interval, a row each.

    Hollow: the best one, corrected for its selection. A pilot that was stopped has a row without a value.
    """
    pilots, verdict, scale = result["pilots"], result["verdict"], result["scale"]
    figure = new_figure(7.5, 1.6 + 0.36 * len(pilots), 150)
    axes = figure.subplots()
    unit = "points" if scale == 100 else "score"
    set_frame(axes, "Gain over the base", f"{unit}; hollow: the best, corrected for its selection")
    axes.axvline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    names = []
    for index, pilot in enumerate(pilots):
        names.append(escape_dollars(f"{pilot['objective']}, {pilot['learning_rate']:.2g}"))
        if gain := pilot["gain"]:
            interval = [scale * end for end in gain["ci95"]] if gain["ci95"] else None
            plot_interval(axes, index, scale * gain["mean"], interval, BLUE)
        else:
            axes.text(0, index, " stopped", va="center", fontsize=8.5, color=COLORS["rejected"])
        if pilot["name"] == verdict["best"]:
            corrected = [scale * end for end in verdict["ci95"]]
            plot_interval(axes, index + 0.22, scale * verdict["corrected"], corrected, GOLD, fill="white")
    name_rows(axes, names)
    axes.set_xlabel("")
    figure.savefig(path, format="png")
