"""The mini grid's page: tables, verdicts and pictures, from the file of results alone.

python -m recipes.experiments.paper_mini.table [--small]       # prints the tables
python -m recipes.experiments.paper_mini.table --write   # docs/paper.md and its pictures; refused while runs miss
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from clair.core.errors import UserError
from clair.core.files import write_atomically
from recipes.experiments.advice import table as advice_table
from recipes.experiments.paper_mini import plots, results
from recipes.experiments.paper_mini.cells import Design, due
from recipes.experiments.paper_mini.claims import BETTER, Name, Verdict, better_apo
from recipes.experiments.paper_mini.data import run_folder
from recipes.experiments.paper_mini.rows import (
    Runs,
    afterwards_rows,
    answer_rows,
    base_of,
    cells_of,
    contrast_rows,
    design_of,
    gain_rows,
    judged,
    markdown,
    per_pair_metrics,
    points,
    rate_rows,
    verdict_rows,
)
from recipes.world.running import ROOT

PAGE = Path("docs/paper.md")
PICTURES = {"paper-rewards.png": True, "paper-likelihoods.png": False}
"""Files under docs/images; True for plots of rewards."""


def page(world: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """All tables, with the explanations needed to read them."""
    cells, design, base = cells_of(runs), design_of(world), base_of(world)
    count, templates = len(base), len(set(world["templates"]))
    tally = Counter(verdict for _, _, verdict in judged(cells, world))
    verdict_counts = ", ".join(f"{tally[verdict]} {verdict}" for verdict in get_args(Verdict) if tally[verdict])
    data = world["data"]
    return f"""# The paper in miniature

The paper's grid, four data sets times five objectives, on a model of 0.8 million weights and a world of made-up tasks
([recipes/experiments/paper_mini](recipes.md#recipesexperimentspaper_mini)): {len(design.seeds)} seed(s),
{design.epochs} checkpoint(s) a run. The model gets
{sum(base) / count:.1%} of {count} held-out tasks right before training. `make paper-mini` trains what is missing;
`python -m recipes.experiments.paper_mini.table --write` makes this page and its pictures from
`{results.COMMITTED}` alone, without training. {len(runs)} runs are in them.

**{sum(tally.values())} claims: {verdict_counts}.**{_better(cells, world)}

What holds here holds for this world. The paper's models are 10,000 times as large, its pairs are of real prompts, and
its metric is another. Nothing was tuned until it agreed: claims, verdicts and grid were laid down before its first run.

## Claims

Reproduced: every interval lies on the expected side of 0. Not reproduced: one lies on the other side. Undecided: the
rest. Each interval is a 95 % interval of its own comparison, over seeds and over questions (clustered by {templates}
task templates); of log-likelihoods over seeds. Accuracies are means over checkpoints. *By the maxima* is how the paper
compares: the best checkpoint of each side, as seen, means over seeds; the verdict does not look at it.

{markdown(verdict_rows(cells, world))}
Seen afterwards, and so without a verdict: SFT on the winners against APO-zero on the same pairs.

{markdown(afterwards_rows(cells, world))}
## Data sets

From the same prompts, cut to the same number of response tokens. Jaccard: words that both answers have, of all of
theirs; Levenshtein: single characters to change. Means over the pairs that are trained on. As the paper reads them,
pairs are the more contrastive the higher the first and the lower the second: then less differs but what matters.

{markdown(contrast_rows(world))}
## Gains

Points over the model before training. The maximum over checkpoints is too high by what choosing adds; corrected, with
a 95 % interval over questions, it is what the chosen checkpoint is expected to keep. Learning rate and beta were chosen
on a seed and tasks of their own, by one rule for all
([recipes](recipes.md#recipesexperimentspaper_mini)).{_edges(cells, design)}

{markdown(gain_rows(cells, world))}
## Learning rates

Of the runs that chose the rate, at beta {design.betas[0]:g}: per cent right of {design.validation} tasks of their own
at the end of training, and in brackets what became of the log-likelihood of held-out winners, in nats a response.

{markdown(rate_rows(runs, design.learning_rates))}
## Answers

Of the last checkpoint, per cent right by skill; then wording, and the mean length in words.

{markdown(answer_rows(cells, world))}
## Dynamics

Held-out pairs of each data set while it is trained on, {_looks(cells)} looks a run, on one scale for each data set. SFT
knows no beta; its rewards are drawn with 0.1.

![Rewards of held-out winners and losers over training, by data set and objective](images/paper-rewards.png)

![Log-likelihood of held-out winners and losers over training, by data set and objective](images/paper-likelihoods.png)

## Held-out pairs

At the last checkpoint. Reward accuracy is the share of pairs whose winner gained more likelihood than its loser, so it
can be told of SFT too, which knows no rewards; margins are beta times the difference. Winner and loser: change of the
log-likelihood in nats a response, of all its tokens, of those that the other has too in the same order, and of the
rest.

{markdown(per_pair_metrics(cells))}
## Advice

Whether what the paper teaches can be told from pairs and model beforehand, by [`apo advise`](choosing.md), was measured
[on other models and data sets](advice.md). {advice_table.verdict_sentence()}

## How far to trust it

- An interval adds the variance of seeds to that of questions, which holds a part of it already: it is rather too wide,
  and *undecided* a little too frequent.
- {len(judged(cells, world))} claims at 95 % each: one interval in twenty misses its value by chance.
- Before training {_share(world["base"]["wording"], "p"):.0%} of the greedy answers are worded plainly, whatever the
  samples are: such answers have no padding to lose, and what pairs teach of wording is plain becoming engaging.
- Sizes are what two cores get through in an hour: {data["clair"]["train"]} pairs of CLAIR, {count} questions, and
  {design.validation} with one seed to tune by.
- Learning rates lie a factor of about three apart, and the one taken is the best of them at the end of training: an
  objective that is more sensitive to its rate pays for that. Nothing stops a run early.
"""


def _better(cells: Mapping[Name, Runs], world: Mapping[str, Any]) -> str:
    """CLAIR with the better APO objective against the model before training, corrected for the choice."""
    better = better_apo(cells, base_of(world), world["templates"])
    if better is None:
        return ""
    name, best = better
    side = "above" if best.lo > 0 else "below" if best.hi < 0 else "on both sides of"
    both = " and ".join(plots.DISPLAY_NAMES[objective] for objective in BETTER)
    return (
        f" CLAIR with the better of {both} ({plots.DISPLAY_NAMES[name]}) "
        f"gains {points(best.corrected)} points [{points(best.lo)}, {points(best.hi)}] over the model before training, "
        f"corrected for the choice of the two: the interval lies {side} zero."
    )


def _edges(cells: Mapping[Name, Runs], design: Design) -> str:
    """Which cells took the lowest or highest learning rate there was."""
    edges = {design.learning_rates[0], design.learning_rates[-1]}
    names = [f"{' '.join(name)} ({runs[0]['learning_rate']:g})" for name, runs in cells.items()
             if runs[0]["learning_rate"] in edges]  # fmt: skip
    if len(design.learning_rates) == 1:
        return ""
    return f" At an edge of the rates that were allowed: {', '.join(names) or 'none'}."


def _looks(cells: Mapping[Name, Runs]) -> str:
    counts = sorted({len(run["looks"]["step"]) for runs in cells.values() for run in runs if run["checkpoints"]})
    return " or ".join(str(count) for count in counts)


def _share(letters: str, letter: str) -> float:
    return letters.count(letter) / len(letters)


def write(world: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> None:
    """The page and its pictures."""
    images = PAGE.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, reward in PICTURES.items():
        plots.draw(cells_of(runs), images / name, reward=reward)
    write_atomically(PAGE, page(world, runs))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The mini grid's tables and pictures.")
    parser.add_argument("--small", action="store_true", help="of the small grid")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    args = parser.parse_args(arguments)
    os.chdir(ROOT)
    file = run_folder(True) / "runs.jsonl" if args.small else results.COMMITTED
    try:
        lines = results.read(file)
        world = results.world_of(lines, file)
        runs = results.runs_of(lines, world["world"])
        if args.write:
            check_complete(world, runs, small=args.small)
            write(world, runs)
            print(f"{PAGE} is written, with {len(PICTURES)} pictures")
        else:
            print(page(world, runs))
    except UserError as error:
        raise SystemExit(f"mini: {error}") from None


def check_complete(world: Mapping[str, Any], runs: Mapping[str, Any], *, small: bool) -> None:
    """UserError where the page would be of less than the full grid."""
    if small:
        raise UserError(f"{PAGE} is of the full grid only; leave --small or --write out")
    if left := due(design_of(world), runs, world["world"]):
        raise UserError(
            f"{len(left)} or more runs are missing; go on with: python -m recipes.experiments.paper_mini.grid"
        )


if __name__ == "__main__":
    main()
