"""The pictures of a run: drawn off screen, without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.dynamics import series, settled_logps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"chosen": "#1b7f79", "rejected": "#c8553d"}
QUIET, FAINT = "#6b7280", "#e5e7eb"

Rows = Sequence[Mapping[str, Any]]
Line = tuple[list[int], list[float]]


def draw_dynamics(rows: Rows, path: str | Path, title: str = "") -> None:
    """Chosen and rejected over training: rewards on the left (from the anchor 0), log-probs on the right.

    Thin lines are what was logged, over other pairs each time; bold log-prob lines are settled on the average pair
    (`settled_logps`). Hollow dots are the held-out pairs. Without a reference there are no rewards, and one panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_rewards = bool(series(rows, "rewards/chosen")[0])
    count = 2 if has_rewards else 1
    figure = Figure(figsize=(5.7 * count, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.05)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    if has_rewards:
        rewards = panels.pop(0)
        _dress(rewards, "Reward", "beta x log-ratio to the reference; 0 is the anchor")
        rewards.axhline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
        _draw(rewards, _both(rows, "rewards"), _both(rows, "eval_rewards"))
    logged = _both(rows, "logps")
    _dress(panels[0], "Log-probability", "nats per response" + (", bold: of the average pair" if has_rewards else ""))
    if has_rewards:
        for name, line in logged.items():
            panels[0].plot(*line, color=COLORS[name], linewidth=0.8, alpha=0.35)
        logged = {name: settled_logps(rows, name) for name in COLORS}
    _draw(panels[0], logged, _both(rows, "eval_logps"))
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=9.5, color=QUIET)
    figure.savefig(path, format="png")


def draw_clusters(report: Mapping[str, Any], path: str | Path) -> None:
    """A report of `apo distinguish`: predicted speeds with their intervals on the left, fastest first; on the right the
    cosines of the directions, red where two clusters pull apart.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clusters = report["clusters"]
    names = [f"{cluster['name'][:28]} ({cluster['n']})" for cluster in clusters]
    places = range(len(clusters))
    figure = Figure(figsize=(10.5, 1.6 + 0.36 * len(clusters)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1]})
    _dress(left, "Predicted speed", f"fall of the loss per unit of learning rate at the start, {report['objective']}")
    left.set_xlabel("")
    left.axvline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    for place, cluster in zip(places, clusters, strict=True):
        speed = cluster["speed"]
        color = COLORS["rejected"] if speed["value"] < 0 else COLORS["chosen"]
        left.plot([speed["lo"], speed["hi"]], [place, place], color=color, linewidth=1.9, solid_capstyle="round")
        left.plot(speed["value"], place, "o", color=color, markersize=5)
    left.set_yticks(list(places), names)
    left.set_ylim(len(clusters) - 0.5, -0.5)
    right.imshow(report["cosines"], cmap="RdBu", vmin=-1, vmax=1)
    right.set_title("Agreement", loc="left", fontsize=11, fontweight="bold", pad=18)
    right.text(0, 1.025, "cosine of chosen - rejected", transform=right.transAxes, fontsize=8.5, color=QUIET)
    right.set_xticks([])
    right.set_yticks([])
    for row in places:
        for column in places:
            value = report["cosines"][row][column]
            right.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
                       color="white" if abs(value) > 0.6 else QUIET)  # fmt: skip
    figure.savefig(path, format="png")


def _both(rows: Rows, key: str) -> dict[str, Line]:
    return {name: series(rows, f"{key}/{name}") for name in COLORS}


def _dress(axes: Axes, name: str, unit: str) -> None:
    """Title, unit and a quiet frame."""
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold", pad=18)
    axes.text(0, 1.025, unit, transform=axes.transAxes, fontsize=8.5, color=QUIET)
    axes.set_xlabel("step", fontsize=9, color=QUIET)
    axes.tick_params(labelsize=8.5, colors=QUIET, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d1d5db")


def _draw(axes: Axes, lines: Mapping[str, Line], held_out: Mapping[str, Line]) -> None:
    at = {name: dict(zip(*line, strict=True)) for name, line in lines.items()}
    steps = sorted(at["chosen"].keys() & at["rejected"].keys())  # a log of unpaired rows may hold one side only
    chosen, rejected = ([at[name][step] for step in steps] for name in COLORS)
    ahead = [one >= other for one, other in zip(chosen, rejected, strict=True)]
    axes.fill_between(steps, chosen, rejected, where=ahead, color=COLORS["chosen"], alpha=0.07, linewidth=0)
    for name, color in COLORS.items():
        alone = "o" if len(lines[name][0]) == 1 else None
        axes.plot(*lines[name], color=color, linewidth=1.9, marker=alone, markersize=4, solid_capstyle="round")
        axes.plot(*held_out[name], "o", markersize=4.5, markerfacecolor="white", markeredgecolor=color, zorder=3)
    _name_ends(axes, lines)


def _name_ends(axes: Axes, lines: Mapping[str, Line]) -> None:
    """Write each line's name beside its end, apart where the ends meet: no legend to look up."""
    ends = {name: values[-1] for name, (_, values) in lines.items() if values}
    if not ends:
        return
    last = max(steps[-1] for steps, _ in lines.values() if steps)
    low, high = axes.get_ylim()
    apart = 0.07 * (high - low)
    push = max(0.0, (apart - abs(ends["chosen"] - ends["rejected"])) / 2) if len(ends) == 2 else 0.0
    higher = max(ends, key=lambda name: ends[name])
    for name, end in ends.items():
        at = end + (push if name == higher else -push)
        beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(name, (last, at), color=COLORS[name], fontsize=9, fontweight="bold", **beside)
