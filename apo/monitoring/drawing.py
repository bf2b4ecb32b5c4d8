"""What all pictures share: colors, frames, lines, intervals. Drawn off screen without pyplot's global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"chosen": "#1b7f79", "rejected": "#c8553d"}
BLUE, GOLD, PLUM = "#33658a", "#c9962b", "#7b4b94"
QUIET, FAINT = "#6b7280", "#e5e7eb"

Line = tuple[list[int], list[float]]


def new_figure(width: float, height: float, dpi: int, **padding: Any) -> Figure:
    """Return a figure of this size in inches, whose axes are laid out without overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=dpi, layout=ConstrainedLayoutEngine(**padding))
    FigureCanvasAgg(figure)
    return figure


def escape_dollars(text: str) -> str:
    """Escape `$` in the user's text: matplotlib would typeset the text between two of them as mathematics."""
    return text.replace("$", r"\$")


def set_frame(axes: Axes, name: str, unit: str) -> None:
    """Set title, unit and a light frame."""
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold", pad=18)
    axes.text(0, 1.025, unit, transform=axes.transAxes, fontsize=8.5, color=QUIET)
    axes.set_xlabel("step", fontsize=9, color=QUIET)
    axes.tick_params(labelsize=8.5, colors=QUIET, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d1d5db")


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows, from the top."""
    axes.set_yticks(list(range(len(names))), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def plot_interval(
    axes: Axes, row: float, value: float, interval: Sequence[float] | None, color: str, fill: str | None = None
) -> None:
    """Plot a value as a dot, filled with its color or `fill`, and its interval as a line."""
    if interval:
        axes.plot(interval, [row, row], color=color, linewidth=1.9, solid_capstyle="round")
    axes.plot(value, row, "o", color=color, markersize=5, markerfacecolor=fill or color)


def plot_line(axes: Axes, line: Line, held_out: Line, color: Any) -> None:
    """Plot a line (a single value as a dot), and held-out values as hollow dots."""
    marker = "o" if len(line[0]) == 1 else None
    axes.plot(*line, color=color, linewidth=1.8, marker=marker, markersize=4, solid_capstyle="round")
    axes.plot(*held_out, "o", markersize=4.5, markerfacecolor="white", markeredgecolor=color, zorder=3)


def label_lines(axes: Axes, labels: list[tuple[float, int, str, Any]]) -> None:
    """Write each label (value, step, text, color) beside its line's end, above the label below it.

    A line that ends without a number has no label.
    """
    low, high = axes.get_ylim()
    height = -math.inf
    last = max((step for _, step, _, _ in labels), default=0)
    for value, _, text, color in sorted(label for label in labels if not math.isnan(label[0])):
        height = max(value, height + 0.085 * (high - low))
        axes.annotate(
            text,
            (last, height),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            color=color,
            fontsize=8.5,
            fontweight="bold",
        )
