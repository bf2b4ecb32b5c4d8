"""Draw docs/images/objectives.png: where a small step takes a pair, under each paired objective.

python docs/make_objectives.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from apo.losses.objectives import apo_down, apo_zero, dpo

PANELS = {
    apo_zero: "winners up, losers down,\nslower the farther from the anchor",
    apo_down: "losers down first,\nthen winners with them",
    dpo: "only the difference counts:\neverything moves along the diagonal",
}


def field(objective, reach: float = 3.0, points: int = 13) -> tuple[np.ndarray, ...]:
    """Rewards of winner and loser on a grid, and the direction of a step against the gradient."""
    line = torch.linspace(-reach, reach, points, dtype=torch.float64)
    loser, winner = torch.meshgrid(line, line, indexing="ij")
    winner, loser = winner.reshape(-1).requires_grad_(), loser.reshape(-1).requires_grad_()
    objective(winner, loser, beta=1.0).sum().backward()
    return tuple(t.detach().numpy() for t in (winner, loser, -winner.grad, -loser.grad))


def draw(path: Path) -> None:
    """One panel an objective. Colour is the strength of the pull, on one scale; the longest arrow fills its cell."""
    figure = Figure(figsize=(11.4, 4.7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (objective, says) in zip(figure.subplots(1, 3, sharey=True), PANELS.items(), strict=True):
        winner, loser, right, down = field(objective)
        pull = np.hypot(right, down)
        axes.axhline(0, color="#d1d5db", linewidth=0.8, zorder=0)
        axes.axvline(0, color="#d1d5db", linewidth=0.8, zorder=0)
        axes.quiver(
            winner, loser, right, down, pull, cmap="viridis_r", clim=(0, 0.7), pivot="middle", zorder=2,
            angles="xy", scale_units="xy", scale=2.1 * pull.max(), width=0.006,
            headwidth=4.5, headlength=4.5, minlength=0.3,
        )  # fmt: skip
        axes.plot(0, 0, "o", color="#c8553d", markersize=5, zorder=3)
        axes.set_title(objective.__name__, loc="left", fontweight="bold", fontsize=12, pad=30)
        axes.text(0, 1.02, says, transform=axes.transAxes, fontsize=8.5, color="#6b7280", linespacing=1.2)
        axes.set_xlabel("reward of the winner", fontsize=9, color="#6b7280")
        axes.set_aspect("equal")
        axes.set_xlim(-3.5, 3.5)
        axes.set_ylim(-3.5, 3.5)
        axes.tick_params(labelsize=8, colors="#6b7280", length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    figure.axes[0].set_ylabel("reward of the loser", fontsize=9, color="#6b7280")
    figure.savefig(path)


if __name__ == "__main__":
    images = Path(__file__).parent / "images"
    images.mkdir(exist_ok=True)
    draw(images / "objectives.png")
