"""Make the measurements and the picture of docs/properties_measured.md from the committed results alone.

python -m recipes.experiments.neighbours.conformal_page            # prints the section; --write: page and picture
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import write_atomically
from clair.core.statistics import Estimate, clustered_mean
from recipes.experiments.neighbours.conformal import (
    ALPHAS,
    DRAWS,
    FEATURES,
    RESULTS,
    ROWS,
    SEEDS,
    SHAPES,
    SHARES,
    SIZES,
    SPLITS,
    UNITS,
    WORLDS,
    distance_of_mean,
    jobs,
)
from recipes.experiments.paper_mini import results
from recipes.world.running import ROOT, ending_in_one_line

PAGE, PICTURE = Path("docs/properties_measured.md"), Path("docs/images/properties.png")
HEADING = "# Measurements of properties\n"
HIGHEST = 22
"""The highest change of the error in the picture, in per cent; what is above is written."""
Lines = Mapping[tuple[Any, ...], Mapping[str, Any]]


def read_lines(file: Path = RESULTS) -> Lines:
    """The results by key. Raises UserError unless all are there."""
    lines = {tuple(line["key"]): line for line in results.read(file)}
    missing = [key for key, _ in jobs() if key not in lines]
    if missing:
        raise UserError(f"{file} lacks {len(missing)} results, such as {missing[0]}; run the experiment to its end")
    return lines


def over(values: Sequence[float]) -> Estimate:
    """The mean over draws that count as independent, with its 95 % interval."""
    return clustered_mean(values, range(len(values)))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def three_digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f}"


# ---- tables


def splits(lines: Lines, name: str, shape: str) -> list[Mapping[str, Any]]:
    return [lines["table", name, split]["shapes"][shape] for split in range(SPLITS)]


def adjusted(lines: Lines, name: str, shape: str, alpha: float, value: str) -> list[float]:
    return [line["adjusted"][str(alpha)][value] for line in splits(lines, name, shape)]


def table_rows(lines: Lines, shape: str) -> list[list[str]]:
    """The paper's columns of one shape: band, risk and error by data set and alpha, means over the splits."""
    rows = []
    for name in SIZES:
        for alpha in ALPHAS:
            measured = splits(lines, name, shape)
            sides = [over(adjusted(lines, name, shape, alpha, side)).mean for side in ("above", "below")]
            risk = over(adjusted(lines, name, shape, alpha, "risk"))
            free, held = (over([line["error"][m] for line in measured]).mean for m in ("unconstrained", "constrained"))
            change = over(
                [
                    100 * (line["adjusted"][str(alpha)]["error"] / line["error"]["unconstrained"] - 1)
                    for line in measured
                ]
            )
            rows.append(
                [
                    name,
                    f"{alpha:g}",
                    *map(three_digits, sides),
                    f"{over([line['risk']['unconstrained'] for line in measured]).mean:.3f}",
                    f"{risk.mean:.3f} ± {1.96 * risk.se:.3f}",
                    f"{over([line['risk']['constrained'] for line in measured]).mean:.3f}",
                    three_digits(free),
                    three_digits(over(adjusted(lines, name, shape, alpha, "error")).mean),
                    three_digits(held),
                    f"{change.mean:+.1f} [{change.lo:+.1f}, {change.hi:+.1f}]",
                ]
            )
    return rows


def accepted_share(lines: Lines) -> Estimate:
    """The share of the domain on which a rising function lies in the band at alpha 0.05, over all sets and splits."""
    return over([1 - risk for name in SIZES for risk in adjusted(lines, name, "rises", 0.05, "risk")])


def side_rows(lines: Lines) -> list[list[str]]:
    rows = []
    for world in WORLDS:
        for n in UNITS:
            line = lines["sides", world, n]
            risks = {name: over(values) for name, values in line["risks"].items()}
            rows.append(
                [
                    world,
                    str(n),
                    f"{math.floor(0.1 * (n + 1) + 1e-9) / (n + 1):.4f}",
                    *(f"{risks[name].mean:.4f} ± {1.96 * risks[name].se:.4f}" for name in ("cuts", "best")),
                    *(three_digits(line["width"][name]) for name in ("cuts", "best")),
                ]
            )
    return rows


def biased(lines: Lines, share: float, rows: int, features: int, value: str) -> list[float]:
    return [lines["biased", share, rows, features, seed][value] for seed in range(SEEDS)]


def biased_rows(lines: Lines) -> list[list[str]]:
    result = []
    for share in SHARES:
        sizes = [(rows, FEATURES[1]) for rows in ROWS] + [(ROWS[2], features) for features in FEATURES[::2]]
        for rows, features in sizes:

            def mean(value: str, share: float = share, rows: int = rows, features: int = features) -> float:
                return over(biased(lines, share, rows, features, value)).mean

            result.append(
                [
                    f"{share:g}",
                    f"{rows:,}",
                    str(features),
                    f"{mean('error'):.4f}",
                    f"{mean('bound'):.4f}",
                    f"{mean('distance'):.4f}",
                    f"{mean('distance of mean'):.4f}",
                    f"{mean('risk'):.2f}",
                    f"{mean('risk adjusted'):.3f}",
                    f"{mean('from truth'):.4f}",
                    f"{mean('adjusted from truth'):.4f}",
                ]
            )
    return result


BIASED_HEAD = (
    "biased share", "rows", "features", "error from the labels' mean", "bound", "distance from rising", "its limit",
    "risk", "risk, adjusted", "from the truth", "adjusted, from the truth",
)  # fmt: skip
SIDES_HEAD = ("sides", "n", "bound", "risk, cuts", "risk, best", "width, cuts", "width, best")
TABLE_HEAD = (
    "data", "alpha", "above", "below", "risk, unconstrained", "risk, adjusted", "risk, constrained",
    "MSE, unconstrained", "MSE, adjusted", "MSE, constrained", "adjusted, change in %",
)  # fmt: skip
SECTION = """
The figures behind [properties of a function](properties.md).
`python -m recipes.experiments.neighbours.conformal` runs what is missing of the committed results, and
`python -m recipes.experiments.neighbours.conformal_page --write` makes this page and the picture from them.

## Four data sets

Means over {splits} random splits; ± and brackets are 95 % intervals over splits. As splits share rows, they describe
the spread and are somewhat too narrow. Risk is the share of test rows that the tester moves by more than the band (with
no band for the unconstrained and the constrained model). The data sets, all in scikit-learn: the course of *diabetes*
along the body-mass index; the worst radius of *breast cancer* cells along their mean area; OD280/OD315 of *wine* along
the flavanoids; the inked pixels of *digits* along the ink of one block. The unconstrained model is gradient boosting.
The constrained one is boosting with `monotonic_cst`; for concavity, a concave line fitted first plus boosting on the
other columns, which extrapolates badly on wine if nothing makes the line rise.

{tables}
At alpha 0.05 a rising function lies in the band on {share} of the rows of all four. For the paper, a
secondary source reports 0.975 at this alpha, on other data. It says that the paper's tables have these columns, for
Combined Cycle Power Plant, Abalone and Concrete; their cells were not available to us, so none stands here.

## Both sides of a band

The true risk of a band calibrated at alpha 0.1, over {draws} draws of n units with made-up sides. `cuts` is our rule.
`best` is the narrowest band of all that lose as few calibration units as conformal risk control allows, which has no
bound. The sides of a unit are made of two exponential draws a and b: *alike* (a, b), *unequal* (5a, b/2), *equal*
(a, a), *one side* (a, 0), *heavy* (exp 2a, b).

{sides}
## More data with the same bias

Labels of points (x, z) are min(x, 1/2) + z/5 with noise, and a share has 2 (x - 1/2) less for x above 1/2. A ridge
regression on random features is trained on them. Distances are root mean squares on a grid, means over {seeds} seeds;
`bound` and `its limit` are those of the formula. The band has alpha 0.05; 200 points without labels calibrate it.

{biased}
In closed form the limit is {limits}, and 0 without bias.
"""


def section(lines: Lines) -> str:
    """The text below the heading."""
    share = accepted_share(lines)
    return SECTION.format(
        splits=SPLITS,
        tables="\n".join(
            f"**The prediction {shape}**\n\n{markdown(TABLE_HEAD, table_rows(lines, shape))}" for shape in SHAPES
        ),
        share=f"{share.mean:.3f} [{share.lo:.3f}, {share.hi:.3f}]",
        draws=DRAWS,
        sides=markdown(SIDES_HEAD, side_rows(lines)),
        seeds=SEEDS,
        biased=markdown(BIASED_HEAD, biased_rows(lines)),
        limits=" and ".join(f"{distance_of_mean(share):.4f} for {share:g}" for share in SHARES[1:]),
    )


# ---- the picture


def draw(lines: Lines, path: Path) -> None:
    """Risk by alpha of the adjusted models; change of their error; distance from rising over the number of rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from apo.monitoring.drawing import FAINT, QUIET

    colors = ("#1b7f79", "#c8553d", "#4c5fd5", "#b7791f")
    figure = Figure(figsize=(11.5, 3.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    left.plot([0, 0.11], [0, 0.11], color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    middle.axhline(0, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    for index, (name, color) in enumerate(zip(SIZES, colors, strict=True)):
        for offset, (shape, marker) in enumerate(zip(SHAPES, "o^s", strict=True)):
            risks = [over(adjusted(lines, name, shape, alpha, "risk")).mean for alpha in ALPHAS]
            shifted = [alpha + 0.0012 * (index - 1.5) for alpha in ALPHAS]
            left.plot(shifted, risks, marker=marker, color=color, linewidth=0, markersize=5, alpha=0.8)
            for model, face in (("adjusted", color), ("constrained", "white")):
                changes = [
                    100
                    * (
                        (line["adjusted"]["0.05"]["error"] if model == "adjusted" else line["error"][model])
                        / line["error"]["unconstrained"]
                        - 1
                    )
                    for line in splits(lines, name, shape)
                ]
                estimate = over(changes)
                x = index + 0.25 * (offset - 1) + (0.06 if model == "constrained" else -0.06)
                if estimate.mean > HIGHEST:
                    middle.text(x, HIGHEST, f"↑ {estimate.mean:+.0f}", color=color, fontsize=8, ha="center", va="top")
                    continue
                middle.errorbar(
                    x, estimate.mean, yerr=estimate.hi - estimate.mean, color=color, marker=marker, markersize=5,
                    markerfacecolor=face, linewidth=1.2, capsize=2,
                )  # fmt: skip
    middle.set_ylim(-18, HIGHEST)
    left.set_title("Risk of adjusted models against alpha", fontsize=10)
    left.set_xlabel("alpha; circle: rises, triangle: concave, square: both", fontsize=9, color=QUIET)
    left.set_ylabel("share of test rows outside", fontsize=9, color=QUIET)
    middle.set_title("Error against the unconstrained model, alpha 0.05", fontsize=10)
    middle.set_xticks(range(len(SIZES)), list(SIZES))
    middle.set_xlabel("full: adjusted, open: constrained; 95 % intervals", fontsize=9, color=QUIET)
    middle.set_ylabel("change of the MSE in %", fontsize=9, color=QUIET)
    for share, color in zip(SHARES, (QUIET, "#4c5fd5", "#c8553d"), strict=True):
        distances = [over(biased(lines, share, rows, FEATURES[1], "distance")).mean for rows in ROWS]
        bounds = [over(biased(lines, share, rows, FEATURES[1], "bound")).mean for rows in ROWS]
        right.plot(ROWS, distances, color=color, marker="o", linewidth=1.6, label=f"{100 * share:g} % biased")
        right.plot(ROWS, bounds, color=color, linewidth=1, linestyle=(0, (4, 3)))
    right.set_xscale("log")
    right.set_ylim(bottom=0)
    right.set_title("Distance from rising functions, biased labels", fontsize=10)
    right.set_xlabel("training rows; dashed: the lower bound", fontsize=9, color=QUIET)
    right.legend(frameon=False, fontsize=9)
    for axes in (left, middle, right):
        axes.tick_params(labelsize=8.5, colors=QUIET, length=0)
        axes.grid(axis="y", color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description="The measurements of docs/properties_measured.md.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} and {PICTURE}")
    args = parser.parse_args()
    os.chdir(ROOT)
    with ending_in_one_line("conformal"):
        lines = read_lines()
        if args.write:
            write_atomically(PAGE, HEADING + section(lines))
            draw(lines, PICTURE)
            print(f"{PAGE} and {PICTURE} are written")
        else:
            print(section(lines))


if __name__ == "__main__":
    main()
