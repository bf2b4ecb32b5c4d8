"""The mini grid's pages: verdicts, tables and pictures, from the file of results alone.

python -m recipes.experiments.paper_mini.table [--small]  # prints both pages
python -m recipes.experiments.paper_mini.table --write    # writes the pages and pictures of a complete grid
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
TABLES = Path("docs/paper_tables.md")
PICTURES = {"paper-rewards.png": True, "paper-likelihoods.png": False}
"""Files under docs/images; True for plots of rewards."""


def page(world: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The main page: verdicts, gains and pictures, with the explanations needed to read them."""
    cells, design, base = cells_of(runs), design_of(world), base_of(world)
    count, accuracy, templates = len(base), sum(base) / len(base), len(set(world["templates"]))
    counts = Counter(verdict for _, _, verdict in judged(cells, world))
    verdict_counts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict) if counts[verdict])
    data = world["data"]
    return f"""# The paper in miniature

This page repeats the paper's grid, four data sets times five objectives, on a model of 0.8 million weights and a world
of made-up tasks ([recipes/experiments/paper_mini](recipes.md#recipesexperimentspaper_mini)). Each cell of the grid has
{len(design.seeds)} seed(s), and each run {design.epochs} checkpoint(s). Before training, the model answers
{accuracy:.1%} of {count} held-out tasks right. `make paper-mini` trains the missing runs.
`python -m recipes.experiments.paper_mini.table --write` makes this page, [its further tables]({TABLES.name}) and its
pictures from `{results.COMMITTED}` alone, without training. {len(runs)} runs are in them.

**{sum(counts.values())} claims: {verdict_counts}.**{_better(cells, world)}

These results hold for this world. The paper's models are 10,000 times as large, its prompts are real, and its metric is
another. Nothing was tuned until it agreed: claims, verdicts and grid were fixed before the first run.

## Claims

A claim is *reproduced* if every interval lies on the expected side of 0, *not reproduced* if one lies on the other
side, and otherwise *undecided*. Each interval is a 95 % interval of one comparison. That of an accuracy is over seeds
and over questions (clustered by {templates} task templates), that of a log-likelihood over seeds. Accuracies are means
over checkpoints. *By the maxima* compares as the paper does: the best checkpoint of each side, as means over seeds. The
verdict does not use it.

{markdown(verdict_rows(cells, world))}
One comparison was added after the results were known, and has no verdict: SFT on the winners against APO-zero on the
same pairs.

{markdown(afterwards_rows(cells, world))}
## Data sets

All have the same prompts, and are cut to the same number of response tokens. Jaccard is the share of words that both
answers have; Levenshtein counts the characters to change. Both are means over the training pairs. The paper calls pairs
more contrastive if Jaccard is higher and Levenshtein lower: then fewer differences do not matter.

{markdown(contrast_rows(world))}
## Gains

Points over the model before training. The maximum over checkpoints is too high, because it was selected. The corrected
maximum, with a 95 % interval over questions, is what the selected checkpoint is expected to gain on new questions.
Learning rate and beta were tuned on another seed and other tasks, by one rule for all
([recipes](recipes.md#recipesexperimentspaper_mini)); [the runs of the learning rates]({TABLES.name}#learning-rates).
{_edges(cells, design)}

{markdown(gain_rows(cells, world))}
## Dynamics

Held-out pairs of each data set during training, measured {_evaluation_counts(cells)} times in a run, on one scale for
each data set. SFT has no beta; its rewards are drawn with 0.1. [Answers]({TABLES.name}#answers) and [log-likelihoods of
held-out pairs]({TABLES.name}#held-out-pairs) at the last checkpoint are on the page of tables.

![Rewards of held-out winners and losers over training, by data set and objective](images/paper-rewards.png)

![Log-likelihood of held-out winners and losers over training, by data set and objective](images/paper-likelihoods.png)

## Advice

[`apo advise`](choosing.md) predicts from pairs and model which objective to use. This was measured
[on other models and data sets](advice.md). {advice_table.verdict_sentence()}

## How far to trust it

- An interval adds the variance of seeds to that of questions, which already includes a part of it. So intervals are a
  little too wide, and *undecided* is a little too frequent.
- There are {len(judged(cells, world))} claims at 95 % each: one interval in twenty misses its value by chance.
- Before training, {_share(world["base"]["wording"], "p"):.0%} of the greedy answers are worded plainly, whatever the
  samples are. They have no padding to lose, so pairs can only teach the step from plain to engaging wording.
- The sizes are those that two cores can train in an hour: {data["clair"]["train"]} pairs of CLAIR, {count} questions,
  and {design.validation} questions with one seed for tuning.
- Learning rates are a factor of about three apart, and the best at the end of training is used. This is a disadvantage
  for an objective that is sensitive to its rate. No run is stopped early.
"""


def tables_page(world: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of further tables: learning rates, answers, and held-out pairs."""
    cells, design = cells_of(runs), design_of(world)
    return f"""# The paper in miniature: tables

These tables belong to [the paper in miniature]({PAGE.name}), which explains the grid and its verdicts, and are made
from the same {len(runs)} runs.

## Learning rates

The runs that tuned the learning rate, at beta {design.betas[0]:g}: per cent right of {design.validation} tuning tasks
at the end of training, and in brackets the change of the log-likelihood of held-out winners, in nats per response.

{markdown(rate_rows(runs, design.learning_rates))}
## Answers

The answers of the last checkpoint: per cent right by skill, the shares of three kinds of wording, and the mean length
in words.

{markdown(answer_rows(cells, world))}
## Held-out pairs

At the last checkpoint. Reward accuracy is the share of pairs whose winner gained more log-likelihood than its loser; so
it exists for SFT too, which has no rewards. Margins are beta times the difference of the gains. Winner and loser: the
change of the log-likelihood in nats per response, summed over all its tokens, over those that it shares with the other
response in the same order, and over the edited ones.

{markdown(per_pair_metrics(cells))}"""


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
    """A sentence on the cells that use the lowest or the highest learning rate."""
    edges = {design.learning_rates[0], design.learning_rates[-1]}
    rates = {" ".join(name): runs[0]["learning_rate"] for name, runs in cells.items()}
    names = [f"{name} ({rate:g})" for name, rate in rates.items() if rate in edges]
    if len(design.learning_rates) == 1:
        return ""
    return f"At an edge of the allowed rates: {', '.join(names) or 'none'}."


def _evaluation_counts(cells: Mapping[Name, Runs]) -> str:
    counts = sorted({len(run["looks"]["step"]) for runs in cells.values() for run in runs if run["checkpoints"]})
    return " or ".join(str(count) for count in counts)


def _share(letters: str, letter: str) -> float:
    return letters.count(letter) / len(letters)


def write(world: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the pages and their pictures."""
    images = PAGE.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, reward in PICTURES.items():
        plots.draw(cells_of(runs), images / name, reward=reward)
    write_atomically(PAGE, page(world, runs))
    write_atomically(TABLES, tables_page(world, runs))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The mini grid's tables and pictures.")
    parser.add_argument("--small", action="store_true", help="of the small grid")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} and {TABLES}")
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
            print(f"wrote {PAGE}, {TABLES} and {len(PICTURES)} pictures")
        else:
            print(page(world, runs), tables_page(world, runs), sep="\n")
    except UserError as error:
        raise SystemExit(f"mini: {error}") from None


def check_complete(world: Mapping[str, Any], runs: Mapping[str, Any], *, small: bool) -> None:
    """Raise UserError if the pages would show less than the full grid."""
    if small:
        raise UserError(f"{PAGE} shows the full grid only; leave --small or --write out")
    if left := due(design_of(world), runs, world["world"]):
        raise UserError(
            f"{len(left)} or more runs are missing; run them with: python -m recipes.experiments.paper_mini.grid"
        )


if __name__ == "__main__":
    main()
