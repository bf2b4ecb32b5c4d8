"""Plots of a run's log and of the speeds of clusters, drawn off screen without pyplot's global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.monitoring.metrics import adjusted_logps, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from apo.monitoring.prediction import OrderCheck

COLORS = {"chosen": "#1b7f79", "rejected": "#c8553d"}
QUIET, FAINT = "#6b7280", "#e5e7eb"

Rows = Sequence[Mapping[str, Any]]
Line = tuple[list[int], list[float]]


def draw_dynamics(rows: Rows, path: str | Path, title: str = "") -> None:
    """Plot chosen and rejected over training: rewards on the left (0 is the anchor), log-probs on the right.

    Thin lines are logged values, each the mean of other pairs. Bold lines of log-probs are adjusted to the average pair
    (`adjusted_logps`). Hollow dots are held-out pairs. Without a reference there are no rewards, and a single panel.
    """
    has_rewards = bool(series(rows, "rewards/chosen")[0])
    count = 2 if has_rewards else 1
    figure = _figure(5.7 * count, 3.8, 150, w_pad=0.12, h_pad=0.08, wspace=0.05)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    if has_rewards:
        rewards = panels.pop(0)
        _set_frame(rewards, "Reward", "beta x log-ratio to the reference; 0 is the anchor")
        rewards.axhline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
        _draw(rewards, _both_sides(rows, "rewards"), _both_sides(rows, "eval_rewards"))
    logged = _both_sides(rows, "logps")
    unit = "nats per response" + (", bold: of the average pair" if has_rewards else "")
    _set_frame(panels[0], "Log-probability", unit)
    if has_rewards:
        for name, line in logged.items():
            panels[0].plot(*line, color=COLORS[name], linewidth=0.8, alpha=0.35)
        logged = {name: adjusted_logps(rows, name) for name in COLORS}
    _draw(panels[0], logged, _both_sides(rows, "eval_logps"))
    if title:
        figure.suptitle(_plain(title), x=0.012, ha="left", fontsize=9.5, color=QUIET)
    figure.savefig(path, format="png")


def draw_clusters(report: Mapping[str, Any], path: str | Path) -> None:
    """Plot a report of `apo distinguish`.

    Left: predicted speeds with their intervals, fastest first. Right: cosines of the directions, red for conflicts.
    """
    clusters = report["clusters"]
    names = [_plain(f"{cluster['name'][:28]} ({cluster['n']})") for cluster in clusters]
    indices = range(len(clusters))
    figure = _figure(10.5, 1.6 + 0.36 * len(clusters), 150)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1]})
    unit = f"fall of the loss per unit of learning rate at the start, {report['objective']}"
    _set_frame(left, "Predicted speed", _plain(unit))
    left.set_xlabel("")
    left.axvline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    for index, cluster in zip(indices, clusters, strict=True):
        speed = cluster["speed"]
        color = COLORS["rejected"] if speed["value"] < 0 else COLORS["chosen"]
        _plot_interval(left, index, speed["value"], (speed["lo"], speed["hi"]), color)
    _set_rows(left, names)
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


def draw_order(check: OrderCheck, path: str | Path, title: str = "") -> None:
    """Plot a prediction held against a run, a color for each group, from dark (predicted first) to light.

    Left: the held-out loss of each group over training. Right: fall of the loss over the run by predicted speed, with
    95 % intervals.
    """
    from matplotlib import colormaps

    figure = _figure(10.5, 4.2, 150, w_pad=0.12, h_pad=0.08, wspace=0.05)
    left, right = figure.subplots(1, 2)
    _set_frame(left, "What was learned first", "held-out loss of each group; darker: predicted earlier")
    low, high = check.interval
    _set_frame(right, "As predicted?", f"rank correlation {check.correlation:.2f} [{low:.2f}, {high:.2f}]")
    labels = []
    for index, group in enumerate(check.groups):
        color = colormaps["viridis"](0.9 * index / max(1, len(check.groups) - 1))
        _plot(left, ([*group.steps], [*group.losses]), ([], []), color)
        labels.append((group.losses[-1], group.steps[-1], _plain(group.name[:28]), color))
        speed = group.speed
        right.plot([speed["lo"], speed["hi"]], [group.area] * 2, color=color, linewidth=1.2)
        right.plot(
            [speed["value"]] * 2, [group.area - group.noise, group.area + group.noise], color=color, linewidth=1.2
        )
        right.plot(speed["value"], group.area, "o", color=color, markersize=6)
    _label_lines(left, labels)
    right.set_xlabel("predicted speed", fontsize=9, color=QUIET)
    right.set_ylabel("mean fall of the loss", fontsize=9, color=QUIET)
    if title:
        figure.suptitle(_plain(title), x=0.012, ha="left", fontsize=9.5, color=QUIET)
    figure.savefig(path, format="png")


def draw_curve(curve: Mapping[str, Any], path: str | Path) -> None:
    """Plot a result of `apo reward curve`: accuracy over the number of comparisons, with intervals."""
    points = curve["points"]
    shots = [point["shots"] for point in points]
    figure = _figure(6.5, 4.2, 150)
    axes = figure.subplots()
    _set_frame(axes, "Users not seen in training", f"accuracy on their further comparisons, {curve['splits']} splits")
    axes.set_xlabel("comparisons of the user", fontsize=8.5, color=QUIET)
    axes.set_xscale("log")
    axes.set_xticks(shots, [str(n) for n in shots])
    axes.minorticks_off()
    lines = {"adapted": (curve["kind"], COLORS["chosen"]), "alone": ("of the user alone", COLORS["rejected"])}
    for key, (name, color) in {**lines, "bradley_terry": ("Bradley-Terry", QUIET)}.items():
        means, lows, highs = ([point[key][part] for point in points] for part in ("mean", "lo", "hi"))
        axes.plot(shots, means, color=color, marker="o", markersize=4, label=name)
        axes.fill_between(shots, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.legend(frameon=False, fontsize=8.5)
    figure.savefig(path, format="png")


def draw_sweep(result: Mapping[str, Any], path: str | Path) -> None:
    """Plot the runs of `apo sweep`, a row each, on the held-out pairs with 95 % intervals.

    Left: the share of pairs in the right order; hollow: the best run, corrected for its selection. Right: log-ratios.
    """
    runs, best = result["runs"], result["best"]
    figure = _figure(10.5, 1.6 + 0.36 * len(runs), 150)
    left, right = figure.subplots(1, 2)
    _set_frame(left, "Right pairs", "held out; hollow: the best, corrected for its selection")
    _set_frame(right, "Log-ratio", "held out, nats a response; 0 is the reference")
    for index, run in enumerate(runs):
        _plot_interval(left, index, run["right"]["mean"], run["right"]["ci95"], BLUE)
        if best and best["name"] == run["name"]:
            _plot_interval(left, index + 0.22, best["corrected"], best["ci95"], GOLD, fill="white")
        for offset, (side, color) in zip((-0.1, 0.1), COLORS.items(), strict=True):
            _plot_interval(right, index + offset, run[side]["mean"], run[side]["ci95"], color)
    _set_rows(left, [_plain(run["name"]) for run in runs])
    _set_rows(right, [""] * len(runs))
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
    figure = _figure(7.5, 1.6 + 0.36 * len(pilots), 150)
    axes = figure.subplots()
    unit = "points" if scale == 100 else "score"
    _set_frame(axes, "Gain over the base", f"{unit}; hollow: the best, corrected for its selection")
    axes.axvline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    names = []
    for index, pilot in enumerate(pilots):
        names.append(_plain(f"{pilot['objective']}, {pilot['learning_rate']:.2g}"))
        if gain := pilot["gain"]:
            interval = [scale * end for end in gain["ci95"]] if gain["ci95"] else None
            _plot_interval(axes, index, scale * gain["mean"], interval, BLUE)
        else:
            axes.text(0, index, " stopped", va="center", fontsize=8.5, color=COLORS["rejected"])
        if pilot["name"] == verdict["best"]:
            ends = [scale * end for end in verdict["ci95"]]
            _plot_interval(axes, index + 0.22, scale * verdict["corrected"], ends, GOLD, fill="white")
    _set_rows(axes, names)
    axes.set_xlabel("")
    figure.savefig(path, format="png")


def _plot_interval(
    axes: Axes, row: float, value: float, interval: Sequence[float] | None, color: str, fill: str | None = None
) -> None:
    if interval:
        axes.plot(interval, [row, row], color=color, linewidth=1.9, solid_capstyle="round")
    axes.plot(value, row, "o", color=color, markersize=5, markerfacecolor=fill or color)


def _set_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows, from the top."""
    axes.set_yticks(list(range(len(names))), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _figure(width: float, height: float, dpi: int, **padding: Any) -> Figure:
    """Return a figure of this size in inches, whose axes are laid out without overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=dpi, layout=ConstrainedLayoutEngine(**padding))
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str) -> str:
    """Escape `$` in the user's text: matplotlib would typeset the text between two of them as mathematics."""
    return text.replace("$", r"\$")


def _both_sides(rows: Rows, key: str) -> dict[str, Line]:
    return {name: series(rows, f"{key}/{name}") for name in COLORS}


def _set_frame(axes: Axes, name: str, unit: str) -> None:
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


def _draw(axes: Axes, lines: Mapping[str, Line], held_out: Mapping[str, Line]) -> None:
    by_step = {name: dict(zip(*line, strict=True)) for name, line in lines.items()}
    steps = sorted(by_step["chosen"].keys() & by_step["rejected"].keys())  # a log of unpaired rows may lack a side
    chosen, rejected = ([by_step[name][step] for step in steps] for name in COLORS)
    is_ahead = [upper >= lower for upper, lower in zip(chosen, rejected, strict=True)]
    axes.fill_between(steps, chosen, rejected, where=is_ahead, color=COLORS["chosen"], alpha=0.07, linewidth=0)
    for name, color in COLORS.items():
        _plot(axes, lines[name], held_out[name], color)
    _label_lines(
        axes, [(values[-1], steps[-1], name, COLORS[name]) for name, (steps, values) in lines.items() if steps]
    )


def _plot(axes: Axes, line: Line, held_out: Line, color: Any) -> None:
    """Plot a line (a single value as a dot), and held-out values as hollow dots."""
    marker = "o" if len(line[0]) == 1 else None
    axes.plot(*line, color=color, linewidth=1.8, marker=marker, markersize=4, solid_capstyle="round")
    axes.plot(*held_out, "o", markersize=4.5, markerfacecolor="white", markeredgecolor=color, zorder=3)


def _label_lines(axes: Axes, labels: list[tuple[float, int, str, Any]]) -> None:
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


# ---- the diagnosis of a run


BLUE, GOLD, PLUM = "#33658a", "#c9962b", "#7b4b94"


def draw_diagnosis(rows: Rows, path: str | Path, title: str = "") -> None:
    """Plot every metric group that a log has over the steps, one panel each.

    Lines are training, hollow dots are held-out pairs, bands are the 10 % to 90 % quantiles of the pairs.
    """
    panels = [panel for panel in _PANELS if any(series(rows, key)[0] for key in panel.lines)]
    columns = min(3, max(1, len(panels)))
    lines = -(-len(panels) // columns) or 1
    height = 3.15 * lines + (0.5 if title else 0)
    figure = _figure(4.7 * columns, height, 140, w_pad=0.14, h_pad=0.1, wspace=0.06, hspace=0.07)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw(axes, rows)
    if title:
        figure.suptitle(_plain(title), x=0.012, ha="left", fontsize=10, color=QUIET)
    figure.savefig(path, format="png")


@dataclass(frozen=True)
class Panel:
    """A panel of the diagnosis: its title, the unit of its axis, and its metrics.

    `share` formats the axis in per cent, `zero` draws a line at 0.
    """

    name: str
    unit: str
    lines: dict[str, tuple[str, str]]
    """Metric to (label, color)."""
    share: bool = False
    zero: bool = False

    def draw(self, axes: Axes, rows: Rows) -> None:
        """Draw lines with labels beside their ends, held-out values, and bands of quantiles or noise."""
        from matplotlib.ticker import PercentFormatter

        _set_frame(axes, self.name, self.unit)
        if self.zero:
            axes.axhline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
        labels = []
        for key, (label, color) in self.lines.items():
            steps, values = series(rows, key)
            if not steps:
                continue
            low, high = (series(rows, f"{key}_{point}") for point in ("p10", "p90"))
            if low[0] and low[0] == high[0]:
                axes.fill_between(low[0], low[1], high[1], color=color, alpha=0.11, linewidth=0)
            _plot(axes, (steps, values), series(rows, f"eval_{key}"), color)
            noise = series(rows, f"{key}_noise")[1]
            if len(noise) == len(values):
                lower, upper = ([v + sign * n for v, n in zip(values, noise, strict=True)] for sign in (-1, 1))
                axes.fill_between(steps, lower, upper, color=color, alpha=0.13, linewidth=0)
            labels.append((values[-1], steps[-1], label, color))
        if self.share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.margins(x=0.02)
        _label_lines(axes, labels)


_PANELS = (
    Panel(
        "Reward",
        "beta x log-ratio; band: a tenth to nine tenths of pairs",
        {f"rewards/{side}": (side, color) for side, color in COLORS.items()},
        zero=True,
    ),
    Panel("Loss", "the objective, mean of pairs", {"loss": ("loss", BLUE)}),
    Panel(
        "Pairs",
        "share of all",
        {
            "rewards/accuracies": ("right order", BLUE),
            "chosen_falls": ("chosen falls", COLORS["rejected"]),
            "saturation": ("saturated", GOLD),
        },
        share=True,
    ),
    Panel(
        "Log-probability",
        "nats a response, of the pairs of each log",
        {f"logps/{side}": (side, color) for side, color in COLORS.items()},
    ),
    Panel(
        "Where chosen and rejected move",
        "probe: log-ratio, nats a token",
        {
            "probe/edited_chosen": ("chosen, edited", COLORS["chosen"]),
            "probe/shared_chosen": ("chosen, shared", PLUM),
            "probe/edited_rejected": ("rejected, edited", COLORS["rejected"]),
        },
        zero=True,
    ),
    Panel("Distance to the reference", "probe: KL of the next token, nats", {"probe/kl": ("KL", BLUE)}, zero=True),
    Panel(
        "Guard: text",
        "rise of the loss, nats a token; band: its noise",
        {"guard/text_loss_rise": ("rise", PLUM)},
        zero=True,
    ),
    Panel(
        "Guard: tasks", "accuracy lost; band: its noise", {"guard/accuracy_drop": ("lost", PLUM)}, share=True, zero=True
    ),
    Panel(
        "Length",
        "tokens a response, of the pairs of each log",
        {f"lengths/{side}": (side, color) for side, color in COLORS.items()},
    ),
    Panel("Gradient", "norm before clipping", {"grad_norm": ("norm", BLUE)}),
    Panel("Speed", "pairs a second", {"pairs_per_second": ("pairs/s", BLUE)}),
    Panel(
        "What is computed",
        "share of tokens, and of the device's peak",
        {"mfu": ("MFU", BLUE), "padding": ("padding", COLORS["rejected"]), "shared": ("shared", COLORS["chosen"])},
        share=True,
    ),
)
