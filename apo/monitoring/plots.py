"""Plots of a run: its log, its diagnosis, and a prediction held against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apo.monitoring.drawing import (
    BLUE,
    COLORS,
    GOLD,
    PLUM,
    QUIET,
    Line,
    escape_dollars,
    label_lines,
    new_figure,
    plot_line,
    set_frame,
)  # fmt: skip
from apo.monitoring.metrics import adjusted_logps, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from apo.monitoring.prediction import OrderCheck

Rows = Sequence[Mapping[str, Any]]


def draw_dynamics(rows: Rows, path: str | Path, title: str = "") -> None:
    """Plot chosen and rejected over training: rewards on the left (0 is the anchor), log-probs on the right.

    Thin lines are logged values, each the mean of other pairs. Bold lines of log-probs are adjusted to the average pair
    (`adjusted_logps`). Hollow dots are held-out pairs. Without a reference there are no rewards, and a single panel.
    """
    has_rewards = bool(series(rows, "rewards/chosen")[0])
    count = 2 if has_rewards else 1
    figure = new_figure(5.7 * count, 3.8, 150, w_pad=0.12, h_pad=0.08, wspace=0.05)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    if has_rewards:
        rewards = panels.pop(0)
        set_frame(rewards, "Reward", "beta x log-ratio to the reference; 0 is the anchor")
        rewards.axhline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
        _draw(rewards, _both_sides(rows, "rewards"), _both_sides(rows, "eval_rewards"))
    logged = _both_sides(rows, "logps")
    unit = "nats per response" + (", bold: of the average pair" if has_rewards else "")
    set_frame(panels[0], "Log-probability", unit)
    if has_rewards:
        for name, line in logged.items():
            panels[0].plot(*line, color=COLORS[name], linewidth=0.8, alpha=0.35)
        logged = {name: adjusted_logps(rows, name) for name in COLORS}
    _draw(panels[0], logged, _both_sides(rows, "eval_logps"))
    if title:
        figure.suptitle(escape_dollars(title), x=0.012, ha="left", fontsize=9.5, color=QUIET)
    figure.savefig(path, format="png")


def _both_sides(rows: Rows, key: str) -> dict[str, Line]:
    return {name: series(rows, f"{key}/{name}") for name in COLORS}


def _draw(axes: Axes, lines: Mapping[str, Line], held_out: Mapping[str, Line]) -> None:
    by_step = {name: dict(zip(*line, strict=True)) for name, line in lines.items()}
    steps = sorted(by_step["chosen"].keys() & by_step["rejected"].keys())  # a log of unpaired rows may lack a side
    chosen, rejected = ([by_step[name][step] for step in steps] for name in COLORS)
    is_ahead = [upper >= lower for upper, lower in zip(chosen, rejected, strict=True)]
    axes.fill_between(steps, chosen, rejected, where=is_ahead, color=COLORS["chosen"], alpha=0.07, linewidth=0)
    for name, color in COLORS.items():
        plot_line(axes, lines[name], held_out[name], color)
    label_lines(axes, [(values[-1], steps[-1], name, COLORS[name]) for name, (steps, values) in lines.items() if steps])


def draw_order(check: OrderCheck, path: str | Path, title: str = "") -> None:
    """Plot a prediction held against a run, a color for each group, from dark (predicted first) to light.

    Left: the held-out loss of each group over training. Right: fall of the loss over the run by predicted speed, with
    95 % intervals.
    """
    from matplotlib import colormaps

    figure = new_figure(10.5, 4.2, 150, w_pad=0.12, h_pad=0.08, wspace=0.05)
    left, right = figure.subplots(1, 2)
    set_frame(left, "What was learned first", "held-out loss of each group; darker: predicted earlier")
    low, high = check.interval
    set_frame(right, "As predicted?", f"rank correlation {check.correlation:.2f} [{low:.2f}, {high:.2f}]")
    labels = []
    for index, group in enumerate(check.groups):
        color = colormaps["viridis"](0.9 * index / max(1, len(check.groups) - 1))
        plot_line(left, ([*group.steps], [*group.losses]), ([], []), color)
        labels.append((group.losses[-1], group.steps[-1], escape_dollars(group.name[:28]), color))
        speed = group.speed
        right.plot([speed["lo"], speed["hi"]], [group.area] * 2, color=color, linewidth=1.2)
        right.plot(
            [speed["value"]] * 2, [group.area - group.noise, group.area + group.noise], color=color, linewidth=1.2
        )
        right.plot(speed["value"], group.area, "o", color=color, markersize=6)
    label_lines(left, labels)
    right.set_xlabel("predicted speed", fontsize=9, color=QUIET)
    right.set_ylabel("mean fall of the loss", fontsize=9, color=QUIET)
    if title:
        figure.suptitle(escape_dollars(title), x=0.012, ha="left", fontsize=9.5, color=QUIET)
    figure.savefig(path, format="png")


# ---- the diagnosis of a run


def draw_diagnosis(rows: Rows, path: str | Path, title: str = "") -> None:
    """Plot every metric group that a log has over the steps, one panel each.

    Lines are training, hollow dots are held-out pairs, bands are the 10 % to 90 % quantiles of the pairs.
    """
    panels = [panel for panel in _PANELS if any(series(rows, key)[0] for key in panel.lines)]
    columns = min(3, max(1, len(panels)))
    lines = -(-len(panels) // columns) or 1
    height = 3.15 * lines + (0.5 if title else 0)
    figure = new_figure(4.7 * columns, height, 140, w_pad=0.14, h_pad=0.1, wspace=0.06, hspace=0.07)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw(axes, rows)
    if title:
        figure.suptitle(escape_dollars(title), x=0.012, ha="left", fontsize=10, color=QUIET)
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

        set_frame(axes, self.name, self.unit)
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
            plot_line(axes, (steps, values), series(rows, f"eval_{key}"), color)
            noise = series(rows, f"{key}_noise")[1]
            if len(noise) == len(values):
                lower, upper = ([v + sign * n for v, n in zip(values, noise, strict=True)] for sign in (-1, 1))
                axes.fill_between(steps, lower, upper, color=color, alpha=0.13, linewidth=0)
            labels.append((values[-1], steps[-1], label, color))
        if self.share:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.margins(x=0.02)
        label_lines(axes, labels)


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
        "Guard: own answers",
        "log-prob lost, nats a token; band: its noise",
        {"guard/kl": ("lost", PLUM)},
        zero=True,
    ),
    Panel(
        "Guard: winners",
        "below their highest, nats a token; band: its noise",
        {"guard/winners_fall": ("fall", PLUM)},
        zero=True,
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
