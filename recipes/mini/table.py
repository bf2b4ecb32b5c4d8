"""The mini grid's tables and verdicts, from the file of results alone.

python -m recipes.mini.table [--small]       # prints them
python -m recipes.mini.table --write         # writes docs/paper.md; refused while a run of the full grid is missing
"""

from __future__ import annotations

import argparse
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clair.recipe import UserError, write_atomically
from clair.statistics import Estimate, best_of, clustered_mean
from recipes.mini import results
from recipes.mini.cells import Design, due
from recipes.mini.claims import CLAIMS, Compared, Name, compare, gains, interval, mean_of, right_of, verdict_of
from recipes.mini.data import run_folder
from recipes.world.running import ROOT

PAGE = Path("docs/paper.md")
Runs = Sequence[Mapping[str, Any]]


def cells_of(runs: Mapping[str, Mapping[str, Any]]) -> dict[Name, list[Mapping[str, Any]]]:
    """The grid's runs by data set and objective, by seed; those to tune by are left out."""
    found: dict[Name, list[Mapping[str, Any]]] = defaultdict(list)
    for run in sorted(runs.values(), key=lambda run: run["seed"]):
        if run["purpose"] == "grid":
            found[run["data"], run["objective"]].append(run)
    return dict(found)


def design_of(world: Mapping[str, Any]) -> Design:
    """The design that the results were made by."""
    return Design(**{key: tuple(v) if isinstance(v, list) else v for key, v in world["design"].items()})


def base_of(world: Mapping[str, Any]) -> list[float]:
    """Right (1.0) or wrong (0.0) of the model before training, by question."""
    return [float(c) for c in world["base"]["right"]]


# ---- tables, as rows of texts; the first row is the heading


def points(value: float) -> str:
    """A fraction as points, with its sign."""
    return f"{100 * value:+.1f}"


def with_interval(estimate: Estimate, scale: float = 100.0) -> str:
    """`+7.1 [+4.0, +10.2]`."""
    return f"{scale * estimate.mean:+.1f} [{scale * estimate.lo:+.1f}, {scale * estimate.hi:+.1f}]"


def gain_rows(cells: Mapping[Name, Runs], world: Mapping[str, Any]) -> list[list[str]]:
    """Of each cell the gain over the model before training: mean and maximum over checkpoints, and that corrected."""
    base, clusters = base_of(world), world["templates"]
    rows = [["pairs", "objective", "seeds", "mean", "maximum", "maximum, corrected", "lr", "beta"]]
    for (data, objective), runs in cells.items():
        by_seed = right_of(runs)
        if not by_seed:
            rows.append([data, objective, "0", *["broke off"] * 3, *_tuned(runs)])
            continue
        of_checkpoint = [mean_of(rows) for rows in zip(*by_seed, strict=True)]
        differences = [[a - b for a, b in zip(values, base, strict=True)] for values in of_checkpoint]
        mean = with_interval(interval(gains(runs, None, base), clusters))
        rows.append([data, objective, str(len(by_seed)), mean, *_maximum(differences, clusters), *_tuned(runs)])
    return rows


def _maximum(differences: Sequence[Sequence[float]], clusters: Sequence[str]) -> list[str]:
    """The highest mean over checkpoints as seen, and corrected; of one checkpoint there is no choice to correct for."""
    if len(differences) == 1:
        only = clustered_mean(differences[0], clusters)
        return [points(only.mean), with_interval(only)]
    best = best_of(differences, clusters)
    return [points(best.seen), f"{points(best.corrected)} [{points(best.lo)}, {points(best.hi)}]"]


def _tuned(runs: Runs) -> list[str]:
    return [f"{runs[0]['learning_rate']:g}", f"{runs[0]['beta']:g}"]


def answer_rows(cells: Mapping[Name, Runs], world: Mapping[str, Any]) -> list[list[str]]:
    """Of the last checkpoint's answers: right by skill, wording, length; those before training first."""
    skills = list(dict.fromkeys(world["skills"]))
    rows = [["pairs", "objective", *skills, "engaging", "plain", "padded", "words"]]
    rows.append(["", "before", *_answers([world["base"]], world["skills"], skills)])
    for (data, objective), runs in cells.items():
        if last := [run["checkpoints"][-1] for run in runs if run["checkpoints"]]:
            rows.append([data, objective, *_answers(last, world["skills"], skills)])
    return rows


def _answers(told: Sequence[Mapping[str, Any]], of: Sequence[str], skills: Sequence[str]) -> list[str]:
    right = mean_of([[float(c) for c in one["right"]] for one in told])
    words = math.fsum(one["words"] for one in told) / len(told)
    letters = "".join(one["wording"] for one in told)
    by_skill = [[value for value, skill in zip(right, of, strict=True) if skill == wanted] for wanted in skills]
    shares = [letters.count(letter) / len(letters) for letter in "epd"]
    return [*(f"{100 * sum(v) / len(v):.1f}" for v in by_skill), *(f"{share:.0%}" for share in shares), f"{words:.1f}"]


def pair_rows(cells: Mapping[Name, Runs]) -> list[list[str]]:
    """Of held-out pairs at the last checkpoint, means over seeds: reward accuracy and margin, and displacement."""
    rows = [["pairs", "objective", "reward accuracy", "margin", "winner", "loser", "winners that fall"]]
    for (data, objective), runs in cells.items():
        whole = [run for run in runs if run["checkpoints"]]
        if not whole:
            continue
        last = [run["checkpoints"][-1]["pairs"] for run in whole]
        moved = [
            math.fsum(at[name] - run["start"][name] for at, run in zip(last, whole, strict=True)) / len(whole)
            for name in ("logps/chosen", "logps/rejected")
        ]
        rows.append(
            [data, objective, _mean(last, "rewards/accuracies", "{:.0%}"), _mean(last, "rewards/margins", "{:+.3f}"),
             *(f"{value:+.2f}" for value in moved), _mean(last, "chosen_falls", "{:.0%}")]
        )  # fmt: skip
    return rows


def _mean(told: Sequence[Mapping[str, float]], name: str, form: str) -> str:
    """The mean where all have it; SFT has no reference, and so no rewards."""
    return form.format(math.fsum(one[name] for one in told) / len(told)) if all(name in one for one in told) else "–"


def contrast_rows(world: Mapping[str, Any]) -> list[list[str]]:
    """The data sets side by side."""
    rows = [["pairs", "train", "held out", "response tokens", "Jaccard", "Levenshtein", "length ratio"]]
    for name, of in world["data"].items():
        told = of["contrast"]
        numbers = [f"{told['jaccard']:.2f}", f"{told['levenshtein']:.1f}", f"{told['length_ratio']:.2f}"]
        rows.append([name, str(of["train"]), str(of["test"]), str(of["train_tokens"]), *numbers])
    return rows


def verdict_rows(cells: Mapping[Name, Runs], world: Mapping[str, Any]) -> list[list[str]]:
    """The paper's claims: our figures, and what they come to."""
    rows = [["claim", "compared", "figure", "verdict"]]
    for claim in CLAIMS:
        found = [compare(one, cells, base_of(world), world["templates"]) for one in claim.compared]
        for at, (one, estimate) in enumerate(zip(claim.compared, found, strict=True)):
            figure = "–" if estimate is None else with_interval(estimate, 100.0 if one.of == "accuracy" else 1.0)
            rows.append(
                [claim.text if at == 0 else "", _told(one), figure, verdict_of(claim, found) if at == 0 else ""]
            )
    return rows


def _told(one: Compared) -> str:
    left, right = ("before" if name is None else " ".join(name) for name in (one.left, one.right))
    unit = "points" if one.of == "accuracy" else "nats a winner"
    return f"{left} − {right}, {unit}; expected {'above' if one.above else 'below'} 0"


# ---- the page


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def page(world: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """All tables, with what has to be known to read them."""
    cells, design, base = cells_of(runs), design_of(world), base_of(world)
    count, templates = len(base), len(set(world["templates"]))
    return f"""# The paper in miniature

Four data sets, five objectives, {len(design.seeds)} seed(s), {design.epochs} checkpoint(s) a run, on a tiny model that
gets {sum(base) / count:.1%} of {count} held-out tasks right before training. `make paper-mini` makes the results,
`python -m recipes.mini.table` these tables. {len(runs)} runs are in them.

## Claims

Reproduced: every interval lies on the expected side of 0. Not reproduced: one lies on the other side. Undecided: the
rest. Each interval is a 95 % interval of its own comparison, over seeds and over questions (clustered by {templates}
task templates); of log-likelihoods over seeds. Accuracies are means over checkpoints.

{markdown(verdict_rows(cells, world))}
## Data sets

{markdown(contrast_rows(world))}
## Gains

Points over the model before training. The maximum over checkpoints is too high by what choosing adds; corrected, with
a 95 % interval over questions, it is what the chosen checkpoint is expected to keep.

{markdown(gain_rows(cells, world))}
## Answers

Of the last checkpoint, per cent; `words` is the mean length.

{markdown(answer_rows(cells, world))}
## Held-out pairs

At the last checkpoint: change of the log-likelihood of winner and loser in nats, and the share of winners that became
less likely.

{markdown(pair_rows(cells))}"""


def main() -> None:
    parser = argparse.ArgumentParser(description="The mini grid's tables.")
    parser.add_argument("--small", action="store_true", help="of the small grid")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    args = parser.parse_args()
    os.chdir(ROOT)
    file = run_folder(True) / "runs.jsonl" if args.small else results.COMMITTED
    try:
        lines = results.read(file)
        world = results.world_of(lines, file)
        runs = results.runs_of(lines, world["world"])
        if args.write:
            check_whole(world, runs, small=args.small)
            write_atomically(PAGE, page(world, runs))
            print(f"{PAGE} is written")
        else:
            print(page(world, runs))
    except UserError as error:
        raise SystemExit(f"mini: {error}") from None


def check_whole(world: Mapping[str, Any], runs: Mapping[str, Any], *, small: bool) -> None:
    """UserError where the page would be of less than the full grid."""
    design = design_of(world)
    if small:
        raise UserError(f"{PAGE} is of the full grid only; leave --small or --write out")
    if left := due(design, runs, world["world"]):
        raise UserError(f"{len(left)} or more runs are missing; go on with: python -m recipes.mini.grid")


if __name__ == "__main__":
    main()
