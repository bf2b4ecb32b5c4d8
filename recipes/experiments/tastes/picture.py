"""The table and the picture of docs/vpl.md, from the committed results alone.

python -m recipes.experiments.tastes.picture            # prints the table; with --write it draws docs/images/vpl.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.experiments.tastes.conditioned import POLICIES, RESULTS, USERS, cell, rate, read_results, summary

PICTURE = Path(__file__).parents[3] / "docs" / "images" / "vpl.png"


def table() -> list[list[str]]:
    """The rows of the page's table: win rates of trained and new users, and of the worst-served one, by policy."""
    return [[policy, *map(cell, row.values())] for policy, row in summary(read_results(RESULTS)).items()]


def draw(file: Path) -> None:
    """Draw the win rate of each user under each policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    panel = figure.subplots()
    lines = read_results(RESULTS)
    for column, policy in enumerate(POLICIES):
        for kind, marker, is_new in (("trained", "o", False), ("new", "x", True)):
            rates = [
                rate(digits)
                for line in lines
                for user, digits in line["wins"][policy].items()
                if (int(user[1:]) >= USERS) == is_new
            ]
            offsets = [column + (0.12 if is_new else -0.12) + 0.015 * (number % 7 - 3) for number in range(len(rates))]
            label = f"{kind} users" if not column else None
            panel.plot(offsets, rates, marker, ms=4, alpha=0.6, color="C1" if is_new else "C0", label=label)
    panel.axhline(0.5, color="0.6", lw=1)
    panel.set(xticks=range(len(POLICIES)), ylabel="win rate against the base", ylim=(0, 1.02))
    panel.set_xticklabels([policy.replace("_", " ") for policy in POLICIES])
    panel.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="The table and the picture of docs/vpl.md.")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for row in table():
        print("| " + " | ".join(row) + " |")
    if args.write:
        draw(PICTURE)


if __name__ == "__main__":
    main()
