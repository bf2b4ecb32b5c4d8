"""Write the page of the first grid from its committed results, with corrected intervals.

python -m recipes.experiments.paper_mini.first_grid --write        # writes docs/paper_first_grid.md

The code that trained the grid is that of commit e0bd0b3 and before. Its 193 runs stay in results/runs.jsonl: the lines
of kind `run` whose purpose is `grid` have, for each checkpoint, one digit a question; `moved` has the held-out pairs.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clair.core.files import write_atomically
from clair.core.statistics import Estimate, clustered_mean, exact_proportion, two_way_mean
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.rows import in_nats, markdown, with_interval
from recipes.world.running import ROOT

FILE = Path("recipes/experiments/paper_mini/results/runs.jsonl")
PAGE = Path("docs/paper_first_grid.md")
GridCell = tuple[str, str]
"""Data set and objective."""
CLAIMS: tuple[tuple[str, GridCell, GridCell | None], ...] = (
    ("CLAIR with APO-zero makes the model better", ("clair", "apo_zero"), None),
    ("CLAIR beats on-policy judge pairs", ("clair", "apo_zero"), ("on_policy", "apo_zero")),
    ("CLAIR beats off-policy judge pairs", ("clair", "apo_zero"), ("off_policy", "apo_down")),
    ("CLAIR beats stronger preferred", ("clair", "apo_zero"), ("stronger", "apo_zero")),
    ("APO-zero beats DPO on CLAIR", ("clair", "apo_zero"), ("clair", "dpo")),
    ("APO-zero beats KTO on CLAIR", ("clair", "apo_zero"), ("clair", "kto")),
    ("APO-down beats APO-zero off-policy", ("off_policy", "apo_down"), ("off_policy", "apo_zero")),
    ("APO-down beats DPO off-policy", ("off_policy", "apo_down"), ("off_policy", "dpo")),
    ("APO-down harms on CLAIR (expected below 0)", ("clair", "apo_down"), None),
    ("APO-zero beats SFT on CLAIR; not asked then", ("clair", "apo_zero"), ("clair", "sft")),
)
Runs = Mapping[GridCell, Sequence[Mapping[str, Any]]]


def read_grid(file: Path = FILE) -> tuple[Mapping[str, Any], Runs]:
    """Return the world's line, and the grid's runs by data set and objective in the order of their seeds."""
    lines, cells = results.read(file), defaultdict(list)
    world = [line for line in lines if line["kind"] == "world"][-1]
    for line in lines:
        if line["kind"] == "run" and line["world"] == world["world"] and line["purpose"] == "grid":
            cells[line["data"], line["objective"]].append(line)
    return world, {cell: sorted(runs, key=lambda run: run["seed"]) for cell, runs in cells.items()}


def _over_checkpoints(run: Mapping[str, Any]) -> list[float]:
    """Return for each question the share of checkpoints that answer it right."""
    columns = zip(*(checkpoint["right"] for checkpoint in run["checkpoints"]), strict=True)
    return [column.count("1") / len(column) for column in columns]


def difference(world: Mapping[str, Any], cells: Runs, left: GridCell, right: GridCell | None) -> Estimate:
    """Return the mean difference over seeds and questions, clustered by seed and by phrasing."""
    base = [float(digit) for digit in world["base"]["right"]]
    values, seeds, templates = [], [], []
    for index, run in enumerate(cells[left]):
        baseline = base if right is None else _over_checkpoints(cells[right][index])
        values += [a - b for a, b in zip(_over_checkpoints(run), baseline, strict=True)]
        seeds += [index] * len(base)
        templates += world["templates"]
    return two_way_mean(values, seeds, templates)


def by_pair(runs: Sequence[Mapping[str, Any]], value: Any) -> Estimate:
    """Return the mean of a value of held-out pairs over seeds, clustered by pair: all seeds have the same pairs.

    If the value is 1 for all pairs, the interval is exact.
    """
    values = [value(*sides) for run in runs for sides in _sides(run)]
    count = len(values) // len(runs)
    if min(values) == 1.0:
        return exact_proportion(count, count)
    return clustered_mean(values, [index % count for index in range(len(values))])


def _sides(run: Mapping[str, Any]) -> list[tuple[float, float]]:
    return list(zip(run["moved"]["chosen_logratio"], run["moved"]["rejected_logratio"], strict=True))


def claim_rows(world: Mapping[str, Any], cells: Runs) -> list[list[str]]:
    """Return the comparisons of the grid with their intervals."""
    rows = [["claim", "compared", "points"]]
    for text, left, right in CLAIMS:
        name = f"{' '.join(left)} − {' '.join(right) if right else 'before'}"
        rows.append([text, name, with_interval(difference(world, cells, left, right))])
    return rows


def cell_rows(world: Mapping[str, Any], cells: Runs) -> list[list[str]]:
    """Return a row per cell: gain, held-out winners and losers in nats, and the share of pairs in the right order."""
    rows = [["pairs", "objective", "rate", "gain, points", "winners, nats", "losers, nats", "pairs in order"]]
    for (data, objective), runs in cells.items():
        order = by_pair(runs, lambda w, lo: 0.5 if w == lo else float(w > lo))
        share = f"{order.mean:.1%} [{max(0.0, order.lo):.1%}, {min(1.0, order.hi):.1%}]"
        nats = [in_nats(by_pair(runs, lambda *sides, side=side: sides[side])) for side in (0, 1)]
        gain = with_interval(difference(world, cells, (data, objective), None))
        rows.append([data, objective, f"{runs[0]['learning_rate']:g}", gain, *nats, share])
    return rows


def page(world: Mapping[str, Any], cells: Runs) -> str:
    """Return the text of the page."""
    base = world["base"]["right"]
    return f"""# The first grid

The first grid of 2026-11-22: four data sets, five objectives and four seeds; the learning rate of each cell (data
set and objective) was tuned. Before training the model answers {base.count("1") / len(base):.1%} of {len(base)}
questions right. The figures were computed correctly, but **four of the eight claims could not have come out
otherwise in this world**. [Designs that set the regime](log/2026-11-29-evidence.md) replace it. Its results stay in
`{FILE}`, and `python -m recipes.experiments.paper_mini.first_grid --write` makes this page from them.

What is wrong with it:

- The target was a noisy model: by its own log-prob, its samples had -12.1 nats, CLAIR's winners -26.7, the stronger
  model's answers -7.9. Half of the CLAIR pairs differed in nothing that the metric counts, only in a new opening,
  which shifts every later token.
- DPO's small gain on CLAIR comes from this world. On the quickstart's model with 200 clean pairs DPO and APO-zero
  both rise from 51.5 to 87 % at a rate of 5e-5. Tuning scored only the last checkpoint, and tuned beta after the
  rate.
- Off-policy winners were right in 83 % and the target in 50 %. APO-down is meant for the opposite case, a target
  that is better than the winners.
- Each objective had a learning rate of its own. Tuning made APO-down's so small that APO-down could not harm. KTO's
  loss is half of APO-zero's if its KL is 0, and Adam's steps do not depend on such a factor. The stronger model's
  answers had no spurious differences, so missing contrast could not hurt.
- APO against SFT, a claim of the abstract, was not tested. SFT is the best, or cannot be distinguished from the
  best, on all four data sets.
- Seeds changed only the order of the pairs: target, prompts, samples, judge and tuning were drawn once.
- The grid was described as fixed in advance, but ten probe runs preceded it.
- Its intervals counted the variance of questions and seeds twice, and those of likelihoods treated seeds with the
  same pairs as independent, up to 73 times too narrow. Accuracies of 100 % had no interval. **Below they are
  corrected**: gains are clustered by seed and by phrasing, likelihoods by pair, and 100 % has an exact interval.

## Comparisons

Means over checkpoints. They describe this grid; no verdict follows from them.

{markdown(claim_rows(world, cells))}
## Cells

The change by the last checkpoint of held-out pairs, in nats an answer, and the share of pairs whose winner gained more.

{markdown(cell_rows(world, cells))}
## Dynamics

Held-out pairs during training; a band is all seeds.

![Rewards of held-out winners and losers over training, by data set and objective](images/paper-rewards.png)

![Log-likelihood of held-out winners and losers over training, by data set and objective](images/paper-likelihoods.png)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="The page of the first grid.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    args = parser.parse_args()
    os.chdir(ROOT)
    text = page(*read_grid())
    if args.write:
        write_atomically(PAGE, text)
        print(f"wrote {PAGE}")
    else:
        print(text)


if __name__ == "__main__":
    main()
