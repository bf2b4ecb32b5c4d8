"""The regret of following the advice, against the best choice, from the saved results alone.

python -m recipes.experiments.advice.table          # prints the page
python -m recipes.experiments.advice.table --write  # writes docs/advice.md
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
    is_at_tuned_rate,
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
    """One combination: the advice, and the share of right answers by choice, as a mean over seeds.

    The choice "none" is the untrained model.
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
        """The share of right answers of the best choice minus that of this one."""
        return self.right[self.best] - self.right[choice]


def measured(lines: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """The combinations with at least one complete seed (all objectives have run), in their order."""
    advised = {line["name"]: line for line in lines if line["kind"] == "advice"}
    runs = {line["name"]: _share(line["right"]) for line in lines if is_at_tuned_rate(line)}
    result = []
    for number, combination in enumerate(COMBINATIONS):
        name = combination.name(number)
        seeds = [seed for seed in SEEDS if all(f"{name}/{o}/{seed}" in runs for o in OBJECTIVES)]
        if name in advised and seeds:
            right = {o: math.fsum(runs[f"{name}/{o}/{seed}"] for seed in seeds) / len(seeds) for o in OBJECTIVES}
            untrained = _share(advised[name]["base"]["right"])
            result.append(Measured(name, advised[name], {**right, NONE: untrained}, len(seeds)))
    return result


def _share(right: str) -> float:
    return right.count("1") / len(right)


Choose = Callable[[Measured], str]


def policies() -> dict[str, Choose]:
    """The policies that are compared, by name: each chooses an objective for a combination."""
    by_advice: dict[str, Choose] = {
        name: (lambda item, key=key: item.advice[key]["objective"]) for key, name in NAMES.items()
    }
    always: dict[str, Choose] = {f"always {o}": (lambda _, o=o: o) for o in (*OBJECTIVES, NONE)}
    return by_advice | always


def regrets(items: Sequence[Measured], choose: Choose) -> list[float]:
    """The regret of a policy on each combination."""
    return [item.regret(choose(item)) for item in items]


def mean_regret(items: Sequence[Measured], choose: Choose) -> Estimate:
    """The mean regret with a 95 % t interval, clustered by the six targets."""
    return clustered_mean(regrets(items, choose), targets(items))


def against(items: Sequence[Measured], choose: Choose, reference: Choose) -> Difference:
    """The paired difference of the regrets of two policies; below 0, `choose` is better."""
    return paired_difference(regrets(items, reference), regrets(items, choose), targets(items))


def targets(items: Sequence[Measured]) -> list[str]:
    """The target of each combination."""
    return [item.name.split("-")[1] for item in items]


# ---- the page


def policy_rows(items: Sequence[Measured]) -> list[list[str]]:
    """The mean regret of each policy, and how often it chooses the best."""
    rows = [["choice", "mean regret, points", "worst", "chooses the best"]]
    for name, choose in policies().items():
        values = regrets(items, choose)
        hits = sum(value == 0 for value in values)
        text = _plain(mean_regret(items, choose))
        rows.append([name, text, f"{100 * max(values):.1f}", f"{hits} of {len(items)}"])
    return rows


def difference_rows(items: Sequence[Measured]) -> list[list[str]]:
    """The advice minus the constant choices."""
    choices = policies()
    rows = [["compared", "regret, points", "better on", "worse on", "p"]]
    for name in NAMES.values():
        for constant in ("always apo_zero", "always dpo"):
            difference = against(items, choices[name], choices[constant])
            p = "" if math.isnan(difference.p) else f"{difference.p:.2f}"
            rows.append(
                [
                    f"{name} − {constant}",
                    with_interval(difference.estimate),
                    str(difference.worse),
                    str(difference.better),
                    p,
                ]
            )
    return rows


def combination_rows(items: Sequence[Measured]) -> list[list[str]]:
    """Each combination: the advice, and the result of each choice."""
    rows = [["target and pairs", "n", "advised (sure)", "without a judge", "before", *OBJECTIVES, "regret"]]
    for item in items:
        advice, alone = item.advice["advice"], item.advice["alone"]
        judge = " judge not used" if item.advice["distrust"] else ""
        changes = [points(item.right[o] - item.right[NONE]) for o in OBJECTIVES]
        changes = [f"**{text}**" if o == item.best else text for o, text in zip(OBJECTIVES, changes, strict=True)]
        untrained = f"{100 * item.right[NONE]:.1f}"
        untrained = f"**{untrained}**" if item.best == NONE else untrained
        advised = [f"{advice['objective']} ({advice['sure']}){judge}", f"{alone['objective']} ({alone['sure']})"]
        regret = f"{100 * item.regret(advice['objective']):.1f}"
        rows.append([item.name, str(item.advice["pairs"]), *advised, untrained, *changes, regret])
    return rows


def sure_rows(items: Sequence[Measured]) -> list[list[str]]:
    """The mean regret by the certainty that the advice states."""
    rows = [["advice", "sure", "combinations", "mean regret, points"]]
    for key, name in NAMES.items():
        for sure in ("high", "fair", "low"):
            values = [item.regret(item.advice[key]["objective"]) for item in items if item.advice[key]["sure"] == sure]
            if values:
                rows.append([name, sure, str(len(values)), f"{100 * math.fsum(values) / len(values):.1f}"])
    return rows


def verdict(items: Sequence[Measured]) -> str:
    """A sentence: does the advice beat both constant policies?"""
    choices, clauses, verbs = policies(), [], []
    for constant in ("always apo_zero", "always dpo"):
        estimate = against(items, choices[NAMES["advice"]], choices[constant]).estimate
        verbs.append(
            "beats" if estimate.hi < 0 else "is beaten by" if estimate.lo > 0 else "does not differ clearly from"
        )
        clauses.append(f"{verbs[-1]} {constant} ({with_interval(estimate)} points of regret)")
    both = "beats both constant rules" if verbs == ["beats", "beats"] else "does not clearly beat both constant rules"
    return f"The advice with a judge {both}: it {' and '.join(clauses)}."


def verdict_sentence() -> str:
    """The verdict from the committed results; empty if there are none."""
    items = measured(_committed())
    return verdict(items) if len(set(targets(items))) > 1 else ""


def _committed() -> list[dict[str, Any]]:
    return [line for line in results.read(ROOT / RESULTS) if line["world"] == world()]


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """All tables, with the explanations needed to read them. Raises UserError if no combination is complete."""
    items = measured(lines)
    if len(set(targets(items))) < 2:
        raise UserError(
            f"{RESULTS} holds {len(items)} complete combinations of {len(set(targets(items)))} targets; continue with: "
            "python -m recipes.experiments.advice.measure"
        )
    best = Counter(item.best for item in items)
    wins = ", ".join(f"{choice} {count}" for choice, count in best.most_common())
    rates = ", ".join(f"{rate:g} ({objective})" for objective, rate in RATES.items())
    runs = sum(item.seeds for item in items) * len(OBJECTIVES)
    return f"""# Advice, measured

This page measures how good it is to follow `apo advise`, on {len(TARGETS)} tiny models and {len(COMBINATIONS)} sets of
pairs that were made for this test. The sets are revised, judged on-policy or off-policy, written by a stronger or a
weaker model, with random or exchanged labels, or small. Reviser and judge have different errors and biases. The
[rule](objectives.md#choose-an-objective) was committed before, and has not been changed since. The models' own answers
were sampled at temperature 1; today `apo advise` uses 0.3. Each set was trained on with three objectives and
{len(SEEDS)} seeds for {EPOCHS} epochs, at the advised beta, and evaluated on {QUESTIONS} held-out tasks. The learning
rates are {rates}: for each objective, the median of the rates that the
[first grid](paper_first_grid.md) tuned. {_first(lines)}

{_missing(items, runs)} `python -m recipes.experiments.advice.measure` makes the results,
`python -m recipes.experiments.advice.table --write` makes this page from them.

The regret of a choice is the held-out accuracy of the best choice minus its own, in points. There are four choices: the
three objectives, and no training ("none"). The best was {wins}. The best is determined from the same runs, so every
regret is a little too high; differences between choices are not. Intervals are 95 % t intervals, clustered by the
{len(TARGETS)} models.

{verdict(items)}

## Policies

{markdown(policy_rows(items))}
## The advice against constant choices

Below 0, the advice has less regret.

{markdown(difference_rows(items))}
## By stated certainty

{markdown(sure_rows(items))}
## Each combination

Per cent right before training, and the points gained by each objective, with the best in bold. Regret is that of the
advice with a judge.

{markdown(combination_rows(items))}"""


def _first(lines: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the earlier runs at the advised learning rate."""
    base = {line["name"]: _share(line["base"]["right"]) for line in lines if line["kind"] == "advice"}
    tried = [line for line in lines if line["kind"] == "run" and not is_at_tuned_rate(line)]
    if not tried:
        return ""
    moved = [abs(_share(line["right"]) - base[line["name"].split("/")[0]]) for line in tried]
    rates = sorted({line["learning_rate"] for line in tried})
    return (
        f"The advised rate, {' or '.join(f'{rate:g}' for rate in rates)} for all three, was tried first and abandoned "
        f"after {len(tried)} runs: they changed the accuracy by {100 * math.fsum(moved) / len(moved):.1f} points on "
        f"average, {100 * max(moved):.1f} at most, too little to distinguish objectives."
    )


def _missing(items: Sequence[Measured], runs: int) -> str:
    total = len(COMBINATIONS) * len(OBJECTIVES) * len(SEEDS)
    if runs == total:
        return f"All {runs} runs are in the tables."
    combinations = f"{len(items)} of {len(COMBINATIONS)} combinations"
    return (
        f"**Not finished: {runs} of {total} runs are in the tables, of {combinations}; means leave out missing seeds.**"
    )


def _plain(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} [{100 * estimate.lo:.1f}, {100 * estimate.hi:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="The advice's regret, in tables.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE}")
    args = parser.parse_args()
    os.chdir(ROOT)
    try:
        text = page(_committed())
    except UserError as error:
        raise SystemExit(f"advice: {error}") from None
    if args.write:
        write_atomically(PAGE, text)
        print(f"{PAGE} is written")
    else:
        print(text)


if __name__ == "__main__":
    main()
