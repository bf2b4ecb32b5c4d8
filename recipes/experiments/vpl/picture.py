"""The tables and the picture of docs/vpl.md, from the committed results alone.

python -m recipes.experiments.vpl.picture            # prints the tables; with --write it draws docs/images/vpl.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recipes.experiments.tastes.conditioned import POLICIES, USERS, cell, rate, read_results, summary
from recipes.experiments.tastes.conditioned import RESULTS as POLICY_RESULTS
from recipes.experiments.vpl.contexts import RESULTS, SIZES, estimates

PICTURE = Path(__file__).parents[3] / "docs" / "images" / "vpl.png"


def context_worlds() -> list[tuple[str, bool]]:
    """The worlds of the results, and whether the latent is bounded, in their order."""
    lines = map(json.loads, RESULTS.read_text("utf-8").splitlines())
    return list(dict.fromkeys((line["world"], line["bounded"]) for line in lines))


def context_lines(world: tuple[str, bool]) -> list[dict[str, Any]]:
    """The results of one world, a line for each seed."""
    lines = map(json.loads, RESULTS.read_text("utf-8").splitlines())
    return [line for line in lines if (line["world"], line["bounded"]) == world]


def context_table() -> list[list[str]]:
    """Accuracy by the number of comparisons: random and chosen ones, and Bradley-Terry, for each world."""
    rows = []
    for world in context_worlds():
        by_name = estimates(context_lines(world))
        name = f"{world[0]}{', bounded' if world[1] else ''}"
        rows += [
            [f"{name}, {way}", *(cell(by_name[f"{way} {size}"]) for size in SIZES)] for way in ("random", "active")
        ]
        rows.append([f"{name}, Bradley-Terry", cell(by_name["bradley_terry"])])
    return rows


def policy_table() -> list[list[str]]:
    """Win rates of trained and new users, and of the worst-served one, by policy."""
    return [[policy, *map(cell, row.values())] for policy, row in summary(read_results(POLICY_RESULTS)).items()]


def draw(file: Path) -> None:
    """Draw accuracy by the size of the context, and the win rate of each user under each policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, world in enumerate(world for world in context_worlds() if not world[1]):
        by_name = estimates(context_lines(world))
        for style, way in (("-", "active"), ("--", "random")):
            points = [by_name[f"{way} {size}"] for size in SIZES]
            bars = [[p.mean - p.lo for p in points], [p.hi - p.mean for p in points]]
            means, label = [point.mean for point in points], f"{world[0]}, {way}"
            left.errorbar(SIZES, means, bars, color=f"C{number}", ls=style, marker="o", label=label)
        left.axhline(
            by_name["bradley_terry"].mean, color=f"C{number}", ls=":", lw=1, label=f"{world[0]}, Bradley-Terry"
        )
    left.set(xlabel="comparisons of an unseen user", ylabel="accuracy", xticks=SIZES)
    left.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    lines = read_results(POLICY_RESULTS)
    for column, policy in enumerate(POLICIES):
        for kind, marker, is_new in (("trained", "o", False), ("new", "x", True)):
            rates = [
                rate(digits)
                for line in lines
                for user, digits in line["wins"][policy].items()
                if (int(user[1:]) >= USERS) == is_new
            ]
            offsets = [column + (0.15 if is_new else -0.15) + 0.015 * (number % 9 - 4) for number in range(len(rates))]
            label = f"{kind} users" if not column else None
            right.plot(offsets, rates, marker, ms=3.5, alpha=0.5, color="C1" if is_new else "C0", label=label)
    right.axhline(0.5, color="0.6", lw=1)
    right.set(xticks=range(len(POLICIES)), ylabel="win rate of a user against the base", ylim=(0, 1.02))
    right.set_xticklabels([policy.replace("_", " ") for policy in POLICIES])
    right.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables and the picture of docs/vpl.md.")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for row in (*context_table(), *policy_table()):
        print("| " + " | ".join(row) + " |")
    if args.write:
        draw(PICTURE)


if __name__ == "__main__":
    main()
