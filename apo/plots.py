"""The pictures of a run: drawn off screen, without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.dynamics import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHOSEN, REJECTED, QUIET = "#1b7f79", "#c8553d", "#6b7280"
_PANELS = (
    ("rewards", "Reward", "beta x log-ratio to the reference"),
    ("logps", "Log-probability", "nats per response"),
)


def draw_dynamics(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Chosen and rejected over training: rewards on the left (from the anchor 0), log-probs on the right.

    Lines are training means, hollow dots the held-out pairs. Without a reference there are no rewards, and one panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if series(rows, f"{panel[0]}/chosen")[0]]
    figure = Figure(figsize=(5.6 * max(len(panels), 1), 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.08)
    for axes, (key, name, unit) in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        _panel(axes, rows, key)
        axes.set_title(name, loc="left", fontsize=11, fontweight="semibold", pad=18)
        axes.text(0, 1.025, unit, transform=axes.transAxes, fontsize=8.5, color=QUIET)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=9.5, color=QUIET)
    figure.savefig(path, format="png")


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    lines = {name: series(rows, f"{key}/{name}") for name in ("chosen", "rejected")}
    held_out = {name: series(rows, f"eval_{key}/{name}") for name in ("chosen", "rejected")}
    steps = lines["chosen"][0]
    if key == "rewards":
        axes.axhline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    if steps == lines["rejected"][0]:
        above = [one >= other for one, other in zip(lines["chosen"][1], lines["rejected"][1], strict=True)]
        axes.fill_between(steps, lines["chosen"][1], lines["rejected"][1], where=above, color=CHOSEN, alpha=0.07, lw=0)
    for name, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
        axes.plot(*lines[name], color=color, linewidth=1.8, marker="o" if len(steps) == 1 else None, markersize=4)
        axes.plot(*held_out[name], "o", markersize=4.5, markerfacecolor="white", markeredgecolor=color, zorder=3)
    _name_lines(axes, lines)
    axes.set_xlabel("step", fontsize=9, color=QUIET)
    axes.tick_params(labelsize=8.5, colors=QUIET, length=0)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d1d5db")


def _name_lines(axes: Axes, lines: Mapping[str, tuple[list[int], list[float]]]) -> None:
    """Write each line's name at its end, the higher one above: no legend to look up."""
    ends = {name: values[-1] for name, (_, values) in lines.items() if values}
    higher = max(ends, key=lambda name: ends[name])
    for name, color in (("chosen", CHOSEN), ("rejected", REJECTED)):
        steps, values = lines[name]
        if steps:
            offset = 5 if name == higher else -5
            side = "bottom" if name == higher else "top"
            axes.annotate(
                name, (steps[-1], values[-1]), (-2, offset), textcoords="offset points",
                color=color, fontsize=9, fontweight="semibold", ha="right", va=side,
            )  # fmt: skip
