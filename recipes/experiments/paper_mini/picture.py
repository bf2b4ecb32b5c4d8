"""Plot the designs: gain over the learning rate by objective, and gain by regime and objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apo.monitoring.drawing import FAINT, QUIET
from clair.core.statistics import Estimate, clustered_mean
from recipes.experiments.paper_mini.analysis import DesignResults, d0_gains, mean
from recipes.experiments.paper_mini.design import OBJECTIVES, gain

DISPLAY_NAMES = {"sft": "SFT", "dpo": "DPO", "apo_zero": "APO-zero", "apo_down": "APO-down"}
COLORS = {"sft": "#6b7280", "dpo": "#c8553d", "apo_zero": "#1b7f79", "apo_down": "#4c5fd5"}
MARKERS = {"sft": "s", "dpo": "o", "apo_zero": "^", "apo_down": "v"}
Curve = tuple[list[float], list[list[float]]]
"""Rates, and for each the gains by draw or world."""


def d0_curves(measured: DesignResults) -> dict[str, Curve]:
    """Return D0's gains after its last epoch at the first beta, by objective; without incomplete objectives."""
    curves = {}
    for objective in OBJECTIVES:
        gains = d0_gains(measured, objective, measured.design.betas[0])
        if gains:
            rates = list(measured.design.rates)
            curves[objective] = (rates, [gains[rate, measured.design.short] for rate in rates])
    return curves


def is_d1_whole(measured: DesignResults) -> bool:
    """Return True if D1's test worlds have runs of every objective at every rate."""
    rates = measured.design.shared_rates
    return all(measured.at_rate(objective, rate) for objective in OBJECTIVES for rate in rates)


def d1_curves(measured: DesignResults) -> dict[str, Curve]:
    """Return D1's gains at the last checkpoint by objective, at the rates that have run in all worlds.

    The worlds are the test worlds, or the tuning worlds until all runs of the test worlds are there.
    """
    design, curves = measured.design, {}
    worlds = measured.tested("D1") if is_d1_whole(measured) else measured.tuning
    for objective in OBJECTIVES:
        keys = {rate: [design.run(w, "clair", objective, rate).key for w in worlds] for rate in design.shared_rates}
        rates = [rate for rate, row in keys.items() if worlds and all(key in measured.rows for key in row)]
        if rates:
            gains = [[gain(measured.rows[key], design.epochs) for key in keys[rate]] for rate in rates]
            curves[objective] = (rates, gains)
    return curves


def regime_estimates(measured: DesignResults) -> dict[tuple[str, str], Estimate]:
    """Return the mean gain over worlds by regime and objective, if it was tested."""
    result = {}
    for regime in ("weak", "strong"):
        for objective in OBJECTIVES:
            gains = measured.gains("D2", regime, objective)
            if gains:
                result[regime, objective] = clustered_mean(gains, range(len(gains)))
    return result


def draw(measured: DesignResults, path: Path) -> None:
    """Plot D0, D1 and, on its own scale, D2. The panel of a design without runs says "not tested"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 3.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    middle.sharey(left)
    middle.tick_params(labelleft=False)
    _draw_curves(left, d0_curves(measured), f"Quickstart's model, {measured.design.short} epochs (D0)")
    worlds = f"{len(measured.tested('D1'))} worlds" if is_d1_whole(measured) else "tuning"
    _draw_curves(middle, d1_curves(measured), f"Wrong by regions, {measured.design.epochs} epochs (D1, {worlds})")
    _draw_regimes(right, regime_estimates(measured))
    for axes in (left, middle, right):
        _dress(axes)
    left.set_ylabel("points gained on 600 questions", fontsize=9.5, color=QUIET)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLORS[o], marker=MARKERS[o], label=DISPLAY_NAMES[o]) for o in OBJECTIVES]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw_curves(axes: Any, curves: Mapping[str, Curve], title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log")
    ticks = sorted({rate for rates, _ in curves.values() for rate in rates})
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("learning rate; band: lowest and highest", fontsize=9.5, color=QUIET)
    for objective, (rates, gains) in curves.items():
        color = COLORS[objective]
        low, high = ([100 * side(values) for values in gains] for side in (min, max))
        axes.fill_between(rates, low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(
            rates, [100 * mean(values) for values in gains], color=color, marker=MARKERS[objective], linewidth=1.7
        )
    _say_if_empty(axes, curves)


def _draw_regimes(axes: Any, estimates: Mapping[tuple[str, str], Estimate]) -> None:
    axes.set_title("Winners worse or better than the model (D2)", fontsize=10)
    for index, regime in enumerate(("weak", "strong")):
        for offset, objective in enumerate(OBJECTIVES):
            estimate = estimates.get((regime, objective))
            if estimate is None:
                continue
            half = 100 * (estimate.hi - estimate.mean)
            x, y = index + 0.16 * (offset - 1.5), 100 * estimate.mean
            axes.errorbar(x, y, yerr=half, color=COLORS[objective], marker=MARKERS[objective], capsize=3, linewidth=1.5)
    axes.set_xticks([0, 1], ["worse", "better"])
    axes.set_xlim(-0.5, 1.5)
    axes.set_xlabel("95 % intervals over worlds", fontsize=9.5, color=QUIET)
    _say_if_empty(axes, estimates)


def _say_if_empty(axes: Any, drawn: Mapping[Any, Any]) -> None:
    if not drawn:
        axes.text(0.5, 0.5, "not tested", transform=axes.transAxes, ha="center", color=QUIET, fontsize=11)


def _dress(axes: Any, *, sides: Sequence[str] = ("top", "right", "left")) -> None:
    axes.axhline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.tick_params(labelsize=8.5, colors=QUIET, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in sides:
        axes.spines[side].set_visible(False)
