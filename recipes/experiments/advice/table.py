"""What following the advice costs against knowing the best, from the saved results alone.

python -m recipes.experiments.advice.table            # prints the page
python -m recipes.experiments.advice.table --write    # writes docs/advice.md
"""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import write_atomically
from clair.core.statistics import Difference, Estimate, clustered_mean, paired_difference
from recipes.experiments.advice.measure import (
    COMBINATIONS,
    EPOCHS,
    QUESTIONS,
    RATES,
    RESULTS,
    SEEDS,
    TARGETS,
    counts,
    world,
)
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.rows import markdown, points, with_interval
from recipes.world.running import ROOT

PAGE = Path("docs/advice.md")
NONE = "none"
OBJECTIVES = tuple(RATES)
NAMES = {"advice": "the advice, with a judge", "alone": "the advice, without"}


@dataclass(frozen=True)
class Measured:
    """One combination: what was advised, and the share of right answers by choice, mean over seeds; "none" is as it
    was before training.
    """

    name: str
    advice: Mapping[str, Any]
    right: Mapping[str, float]
    seeds: int

    @property
    def best(self) -> str:
        """The choice with most right answers."""
        return max(self.right, key=lambda choice: self.right[choice])

    def regret(self, choice: str) -> float:
        """How much less a choice gets right than the best, as a share."""
        return self.right[self.best] - self.right[choice]


def measured(lines: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """The combinations with a whole seed, in their order, by the seeds of which all objectives have run."""
    advised = {line["name"]: line for line in lines if line["kind"] == "advice"}
    runs = {line["name"]: _share(line["right"]) for line in lines if counts(line)}
    found = []
    for number, of in enumerate(COMBINATIONS):
        name = of.name(number)
        seeds = [seed for seed in SEEDS if all(f"{name}/{o}/{seed}" in runs for o in OBJECTIVES)]
        if name in advised and seeds:
            right = {o: math.fsum(runs[f"{name}/{o}/{seed}"] for seed in seeds) / len(seeds) for o in OBJECTIVES}
            before = _share(advised[name]["base"]["right"])
            found.append(Measured(name, advised[name], {**right, NONE: before}, len(seeds)))
    return found


def _share(right: str) -> float:
    return right.count("1") / len(right)


Choose = Callable[[Measured], str]


def policies() -> dict[str, Choose]:
    """The ways to choose that are compared."""
    told: dict[str, Choose] = {
        words: (lambda one, key=key: one.advice[key]["objective"]) for key, words in NAMES.items()
    }
    always: dict[str, Choose] = {f"always {o}": (lambda _, o=o: o) for o in (*OBJECTIVES, NONE)}
    return told | always


def regrets(found: Sequence[Measured], choose: Choose) -> list[float]:
    """The regret of a way to choose on each combination."""
    return [one.regret(choose(one)) for one in found]


def mean_regret(found: Sequence[Measured], choose: Choose) -> Estimate:
    """With a 95 % t interval, clustered by target, of which there are six."""
    return clustered_mean(regrets(found, choose), targets(found))


def against(found: Sequence[Measured], choose: Choose, other: Choose) -> Difference:
    """The regret of a way to choose minus that of another, combination by combination; below 0 is better."""
    return paired_difference(regrets(found, other), regrets(found, choose), targets(found))


def targets(found: Sequence[Measured]) -> list[str]:
    """The target of each combination."""
    return [one.name.split("-")[1] for one in found]


# ---- the page


def policy_rows(found: Sequence[Measured]) -> list[list[str]]:
    """Mean regret of each way to choose, and how often it takes the best."""
    rows = [["choice", "mean regret, points", "worst", "takes the best"]]
    for name, choose in policies().items():
        values = regrets(found, choose)
        hits = sum(value == 0 for value in values)
        told = _plain(mean_regret(found, choose))
        rows.append([name, told, f"{100 * max(values):.1f}", f"{hits} of {len(found)}"])
    return rows


def difference_rows(found: Sequence[Measured]) -> list[list[str]]:
    """The advice minus the constant choices."""
    ways = policies()
    rows = [["compared", "regret, points", "better on", "worse on", "p"]]
    for name in NAMES.values():
        for other in ("always apo_zero", "always dpo"):
            told = against(found, ways[name], ways[other])
            p = "" if math.isnan(told.p) else f"{told.p:.2f}"
            rows.append([f"{name} − {other}", with_interval(told.estimate), str(told.worse), str(told.better), p])
    return rows


def combination_rows(found: Sequence[Measured]) -> list[list[str]]:
    """Each combination: the advice, and what each choice came to."""
    rows = [["target and pairs", "n", "advised (sure)", "without a judge", "before", *OBJECTIVES, "regret"]]
    for one in found:
        told, alone = one.advice["advice"], one.advice["alone"]
        judge = " judge not used" if one.advice["distrust"] else ""
        changes = [points(one.right[o] - one.right[NONE]) for o in OBJECTIVES]
        changes = [f"**{text}**" if o == one.best else text for o, text in zip(OBJECTIVES, changes, strict=True)]
        before = f"{100 * one.right[NONE]:.1f}"
        before = f"**{before}**" if one.best == NONE else before
        rows.append(
            [one.name, str(one.advice["pairs"]), f"{told['objective']} ({told['sure']}){judge}",
             f"{alone['objective']} ({alone['sure']})", before, *changes,
             f"{100 * one.regret(told['objective']):.1f}"]
        )  # fmt: skip
    return rows


def sure_rows(found: Sequence[Measured]) -> list[list[str]]:
    """Whether it is more often right where it says that it is sure."""
    rows = [["advice", "sure", "combinations", "mean regret, points"]]
    for key, name in NAMES.items():
        for sure in ("high", "fair", "low"):
            values = [one.regret(one.advice[key]["objective"]) for one in found if one.advice[key]["sure"] == sure]
            if values:
                rows.append([name, sure, str(len(values)), f"{100 * math.fsum(values) / len(values):.1f}"])
    return rows


def verdict(found: Sequence[Measured]) -> str:
    """Whether the advice beats both constant rules, in words."""
    ways, told, words = policies(), [], []
    for other in ("always apo_zero", "always dpo"):
        estimate = against(found, ways[NAMES["advice"]], ways[other]).estimate
        words.append("beats" if estimate.hi < 0 else "is beaten by" if estimate.lo > 0 else "cannot be told from")
        told.append(f"{words[-1]} {other} ({with_interval(estimate)} points of regret)")
    both = (
        "beats both constant rules" if words == ["beats", "beats"] else "does not beat both constant rules for certain"
    )
    return f"The advice with a judge {both}: it {' and '.join(told)}."


def said() -> str:
    """The verdict, from the committed results; nothing where there are none."""
    found = measured(_committed())
    return verdict(found) if len(set(targets(found))) > 1 else ""


def _committed() -> list[dict[str, Any]]:
    return [line for line in results.read(ROOT / RESULTS) if line["world"] == world()]


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """All tables, with what has to be known to read them. Raises UserError where no combination is complete."""
    found = measured(lines)
    if len(set(targets(found))) < 2:
        raise UserError(
            f"{RESULTS} holds {len(found)} whole combinations, of {len(set(targets(found)))} targets; go on with: "
            "python -m recipes.experiments.advice.measure"
        )
    best = Counter(one.best for one in found)
    told = ", ".join(f"{choice} {count}" for choice, count in best.most_common())
    rates = ", ".join(f"{rate:g} ({objective})" for objective, rate in RATES.items())
    runs = sum(one.seeds for one in found) * len(OBJECTIVES)
    return f"""# Advice, measured

Is it worth following `apo advise`? {len(TARGETS)} tiny models and {len(COMBINATIONS)} sets of pairs that did not exist
before: revised, judged on-policy and off-policy, by a stronger and by a weaker writer, with labels drawn by lot or
exchanged, small ones; reviser and judge err and lean in different ways. The [rule](objectives.md#choose-an-objective)
was committed before any of it, and has not been changed since. The models' own answers were drawn at temperature 1,
where `apo advise` takes 0.3 today. Each set was trained on with three objectives and
{len(SEEDS)} seeds, {EPOCHS} epochs, at the beta of the advice; {QUESTIONS} held-out tasks. The learning rates are
{rates}: the medians of what the mini grid tuned for each objective on data sets
of its own. {_first(lines)}

{_missing(found, runs)} `python -m recipes.experiments.advice.measure` makes the results,
`python -m recipes.experiments.advice.table --write` this page from them.

Regret is how many points of held-out accuracy a choice is below the best of the four, which are the three objectives
and not training at all ("none"). The best was {told}. It is the best by the same runs, so that every regret is rather
too high; differences between choices are not. Intervals are 95 % t intervals, clustered by the {len(TARGETS)} models.

{verdict(found)}

## Ways to choose

{markdown(policy_rows(found))}
## The advice against constant choices

Below 0: the advice loses less.

{markdown(difference_rows(found))}
## Where it says that it is sure

{markdown(sure_rows(found))}
## Each combination

Per cent right before training, and points won by each objective, the best in bold. Regret is that of the advice with a
judge.

{markdown(combination_rows(found))}"""


def _first(lines: Sequence[Mapping[str, Any]]) -> str:
    """What came of the runs that were tried first, at the advice's own rate."""
    base = {line["name"]: _share(line["base"]["right"]) for line in lines if line["kind"] == "advice"}
    tried = [line for line in lines if line["kind"] == "run" and not counts(line)]
    if not tried:
        return ""
    moved = [abs(_share(line["right"]) - base[line["name"].split("/")[0]]) for line in tried]
    rates = sorted({line["learning_rate"] for line in tried})
    return (
        f"The advice's own rate, {' or '.join(f'{rate:g}' for rate in rates)} for all three, was tried first and given "
        f"up after {len(tried)} runs: they moved the accuracy by {100 * math.fsum(moved) / len(moved):.1f} points on "
        f"average, {100 * max(moved):.1f} at most, too little to tell objectives apart."
    )


def _missing(found: Sequence[Measured], runs: int) -> str:
    whole = len(COMBINATIONS) * len(OBJECTIVES) * len(SEEDS)
    if runs == whole:
        return f"All {runs} runs are in the tables."
    of = f"{len(found)} of {len(COMBINATIONS)} combinations"
    return f"**Not finished: {runs} of {whole} runs are in the tables, of {of}; a missing seed is left out of a mean.**"


def _plain(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} [{100 * estimate.lo:.1f}, {100 * estimate.hi:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="The advice's regret, in tables.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    args = parser.parse_args()
    os.chdir(ROOT)
    try:
        made = page(_committed())
    except UserError as error:
        raise SystemExit(f"advice: {error}") from None
    if args.write:
        write_atomically(PAGE, made)
        print(f"{PAGE} is written")
    else:
        print(made)


if __name__ == "__main__":
    main()
