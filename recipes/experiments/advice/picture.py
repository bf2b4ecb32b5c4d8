"""Plot the regret of each policy: one point per set of pairs, and the mean with its interval over targets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from apo.monitoring.drawing import FAINT, QUIET
from clair.core.statistics import clustered_mean

COLOR = "#1b7f79"


def draw(regrets: Mapping[str, Sequence[float]], clusters: Sequence[Hashable], path: Path) -> None:
    """Plot regrets by policy, in points; the first policy is at the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.42 * len(regrets) + 0.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, values in enumerate(regrets.values()):
        mean = clustered_mean(values, clusters)
        axes.plot([100 * value for value in values], [row] * len(values), "o", color=COLOR, alpha=0.25, markersize=5)
        half = 100 * (mean.hi - mean.mean)
        axes.errorbar(100 * mean.mean, row, xerr=half, color=COLOR, marker="D", capsize=3, linewidth=1.8)
    axes.set_yticks(range(len(regrets)), list(regrets))
    axes.invert_yaxis()
    axes.set_xlim(left=-0.5)
    axes.set_xlabel("points below the best of nine options: each set, and the mean with its 95 % interval", color=QUIET)
    axes.tick_params(colors=QUIET, length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
