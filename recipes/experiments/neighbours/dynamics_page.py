"""The figures of docs/learning_order.md from the raw results alone: tables, and the picture.

python -m recipes.experiments.neighbours.dynamics_page          # prints the part of the page
python -m recipes.experiments.neighbours.dynamics_page --write  # writes it, and docs/images/learning_order.png
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from apo.monitoring.drawing import FAINT, QUIET
from apo.monitoring.prediction import check_order, rank_correlation
from clair.core.files import write_atomically
from clair.core.statistics import clustered_mean
from recipes.experiments.neighbours.dynamics import OBJECTIVES, cells, read_results
from recipes.experiments.paper_mini.picture import COLORS, DISPLAY_NAMES
from recipes.experiments.paper_mini.rows import markdown

PAGE, PICTURE = Path("docs/learning_order.md"), Path("docs/images/learning_order.png")
START, END = "<!-- dynamics -->\n", "<!-- /dynamics -->\n"
Lines = Sequence[Mapping[str, Any]]


def fall(curve: Sequence[float]) -> float:
    """The mean fall of a loss over training, as a share of the loss at the start."""
    return (curve[0] - float(np.trapezoid(curve)) / (len(curve) - 1)) / curve[0]


def over_seeds(values: Sequence[float]) -> str:
    """The mean of rank correlations with its 95 % t interval over seeds, inside [-1, 1]."""
    if len(values) < 2:
        return f"{values[0]:.2f} (one seed)" if values else "not run"
    estimate = clustered_mean(values, range(len(values)))
    return f"{estimate.mean:.2f} [{max(-1, estimate.lo):.2f}, {min(1, estimate.hi):.2f}]"


def head_falls(line: Mapping[str, Any], objective: str, split: str) -> list[float]:
    """The fall of each behaviour's loss when the head is trained on it alone."""
    return [fall(behaviour["curves"][objective][f"{split}_loss"]) for behaviour in line["behaviours"]]


def deltas(line: Mapping[str, Any]) -> list[float]:
    """The distance of each behaviour, in the order of the line."""
    return [behaviour["delta"] for behaviour in line["behaviours"]]


def head_correlations(lines: Lines, objective: str, split: str) -> list[float]:
    """The rank correlation of distance and fall, by seed."""
    return [
        float(rank_correlation(np.array(deltas(line)), np.array(head_falls(line, objective, split)))) for line in lines
    ]


def train_correlations(lines: Lines, objective: str) -> dict[str, list[float]]:
    """The rank correlation of the fall with the predicted speed and with the distance, by seed."""
    result: dict[str, list[float]] = {"speed": [], "delta": []}
    for line in (line for line in lines if line["objective"] == objective):
        check = check_order(line["prediction"], line["log"])
        assert check is not None
        falls = np.array([group.area for group in check.groups])
        distances = [cluster["literal"]["delta"] for cluster in line["prediction"]["clusters"]]
        result["speed"].append(check.correlation)
        result["delta"].append(float(rank_correlation(np.array(distances), falls)))
    return result


def head_table(lines: Lines) -> str:
    """A behaviour a row, means over seeds, from the largest distance."""
    rows = []
    for index, behaviour in enumerate(lines[0]["behaviours"]):
        same = [line["behaviours"][index] for line in lines]
        dpo = [entry["curves"]["dpo"] for entry in same]
        falls = {o: fmean(head_falls(line, o, "test")[index] for line in lines) for o in OBJECTIVES}
        delta = fmean(entry["delta"] for entry in same)
        cells = [f"{fmean(entry[key] for entry in same):.2f}" for key in ("accuracy_bound", "accuracy")]
        reached = [f"{fmean(curve[f'{split}_right'][-1] for curve in dpo):.2f}" for split in ("train", "test")]
        shares = [f"{100 * value:.1f} %" for value in falls.values()]
        rows.append((delta, [behaviour["behaviour"], f"{delta:.1f}", *cells, *reached, *shares]))
    names = [f"fall, {DISPLAY_NAMES[objective]}" for objective in OBJECTIVES]
    header = ["behaviour", "delta", "bound", "Phi", "DPO reaches, training", "held out", *names]
    return markdown([header, *(row for _, row in sorted(rows, key=lambda row: -row[0]))])


def bound_lines(lines: Lines) -> str:
    """How the accuracies that DPO reaches on the head lie to both formulas."""
    reached, bound, phi = [], [], []
    for behaviour in (behaviour for line in lines for behaviour in line["behaviours"]):
        reached.append(behaviour["curves"]["dpo"]["train_right"][-1])
        bound.append(behaviour["accuracy_bound"])
        phi.append(behaviour["accuracy"])
    above = sum(value >= limit for value, limit in zip(reached, bound, strict=True))
    gaps = [value - expected for value, expected in zip(reached, phi, strict=True)]
    return (
        f"Of {len(reached)} heads trained by DPO, {above} reach the bound on training pairs. They differ from Phi "
        f"by {100 * fmean(gaps):+.1f} points on average, from {100 * min(gaps):+.1f} to {100 * max(gaps):+.1f}; "
        f"the rank correlation of Phi and accuracy is {float(rank_correlation(np.array(phi), np.array(reached))):.2f}."
    )


def text(lines: Lines) -> str:
    """The part of the page that is made of the results."""
    head = [line for line in lines if line["part"] == "head"]
    train = [line for line in lines if line["part"] == "train"]
    missing = len(cells()) - len(lines)
    parts = ["### The head alone, each behaviour by itself\n"]
    if head:
        parts += [head_table(head), bound_lines(head)]
        rows = [
            [DISPLAY_NAMES[o], *(over_seeds(head_correlations(head, o, split)) for split in ("train", "test"))]
            for o in OBJECTIVES
        ]
        seeds = f"mean of {len(head)} seeds with its 95 % interval over seeds:"
        parts.append(f"Rank correlation of delta and fall over the eight behaviours; {seeds}")
        parts.append(markdown([["objective", "training loss", "held-out loss"], *rows]))
    parts.append("### All behaviours together, by the commands\n")
    rows = []
    for objective in OBJECTIVES:
        found = train_correlations(train, objective)
        checks = [check_order(line["prediction"], line["log"]) for line in train if line["objective"] == objective]
        verdicts = [check.verdict() for check in checks if check is not None]
        true = sum(verdict.startswith("the prediction came true") for verdict in verdicts)
        cell = f"{true} of {len(verdicts)}" if verdicts else "not run"
        rows.append([DISPLAY_NAMES[objective], over_seeds(found["speed"]), over_seeds(found["delta"]), cell])
    header = ["objective", "speed and fall", "delta and fall", "`apo diagnose`: came true"]
    parts.append(markdown([header, *rows]))
    seconds = sum(line["cpu_seconds"] for line in lines)
    unfinished = f"; {missing} of {len(cells())} cells have not run" if missing else ""
    parts.append(f"{len(lines)} cells, {seconds / 60:.0f} CPU minutes{unfinished}.")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def draw(lines: Lines, path: Path) -> None:
    """Draw the fall of the held-out loss: left of the head alone by distance, right of all together by speed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, title, label in (
        (left, "The head alone, each behaviour by itself", "distinguishability delta"),
        (right, "All together, LoRA, apo train", "predicted speed, in % of the fastest"),
    ):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(label, fontsize=9, color=QUIET)
        axes.set_ylabel("mean fall of the held-out loss, %", fontsize=9, color=QUIET)
        axes.grid(color=FAINT, linewidth=0.7)
        axes.axhline(0, color=QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.spines[["top", "right"]].set_visible(False)
    for objective in OBJECTIVES:
        style = {"color": COLORS[objective], "s": 22, "alpha": 0.75, "linewidths": 0}
        head = [line for line in lines if line["part"] == "head"]
        x = [value for line in head for value in deltas(line)]
        y = [100 * value for line in head for value in head_falls(line, objective, "test")]
        left.scatter(x, y, label=DISPLAY_NAMES[objective], **style)
        for line in (line for line in lines if line["part"] == "train" and line["objective"] == objective):
            check = check_order(line["prediction"], line["log"])
            assert check is not None
            fastest = max(abs(group.speed["value"]) for group in check.groups)
            x = [100 * group.speed["value"] / fastest for group in check.groups]
            right.scatter(x, [100 * group.area for group in check.groups], **style)
    left.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the page and its picture instead of printing")
    lines = read_results()
    if not parser.parse_args().write:
        print(text(lines))
        return
    before, rest = PAGE.read_text("utf-8").split(START)
    write_atomically(PAGE, before + START + "\n" + text(lines) + "\n" + END + rest.split(END)[1])
    draw(lines, PICTURE)


if __name__ == "__main__":
    main()
