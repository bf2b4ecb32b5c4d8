"""Regrets of advice by pilots and of constant choices, and the registered tests, from the saved results alone.

python -m recipes.experiments.advice.table                    # from the committed file
python -m recipes.experiments.advice.table --write            # writes them into docs/advice.md
python -m recipes.experiments.advice.table --results FILE     # from a run's results.jsonl
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from clair.core.errors import UserError
from clair.core.files import write_atomically
from clair.core.statistics import Estimate, clustered_mean, holm, paired_difference
from clair.core.student_t import detectable_difference
from recipes.experiments.advice import picture
from recipes.experiments.advice.measure import (
    COMMITTED,
    DISPLACEMENTS,
    of_last_draws,
    pilots_of,
    truth_of,
    truth_runs,
)
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.design import OBJECTIVES, accuracy
from recipes.experiments.paper_mini.rows import markdown, points, with_interval
from recipes.world.running import ROOT, ending_in_one_line

NONE = "none"
PAGE = ROOT / "docs/advice.md"
PICTURE = ROOT / "docs/images/advice-regret.png"
MARKER = "<!-- regrets -->\n"


@dataclass(frozen=True)
class MeasuredSet:
    """One set of pairs: the line of its pilot, and the share of right answers by option, as a mean over two orders."""

    pilot: Mapping[str, Any]
    right: Mapping[str, float]

    @property
    def target(self) -> str:
        """The unit of the tests."""
        return self.pilot["world"]

    def regret(self, option: str) -> float:
        """The share of right answers of the best option minus that of this one."""
        return max(self.right.values()) - self.right[option]


Policy = Callable[[MeasuredSet], str]


def measured_sets(lines: Sequence[Mapping[str, Any]]) -> list[MeasuredSet]:
    """The sets whose pilot and whose runs are all there."""
    lines = of_last_draws(lines)
    rows, sets = truth_of(lines), []
    for pilot in pilots_of(lines).values():
        runs = truth_runs(pilot)
        if any(run.key not in rows for run in runs):
            continue
        values: dict[str, list[float]] = {}
        for run, option in zip(runs, [option for option in pilot["rates"] for _ in range(2)], strict=True):
            checkpoints = rows[run.key]["checkpoints"]
            values.setdefault(option, []).append(accuracy(checkpoints[-1]))
            values.setdefault(NONE, []).append(accuracy(checkpoints[0]))
        sets.append(MeasuredSet(pilot, {option: fmean(shares) for option, shares in values.items()}))
    return sets


def policies(sets: Sequence[MeasuredSet]) -> dict[str, Policy]:
    """The policies by name: the pilot, four constants at the better of their rates, no training, the old rule."""
    result: dict[str, Policy] = {"pilot": lambda item: item.pilot["choice"]}
    for objective in OBJECTIVES:
        options = [f"{objective}-{displacement:g}" for displacement in DISPLACEMENTS]
        best = max(options, key=lambda option: fmean(item.right[option] for item in sets))
        result[f"always {objective}"] = lambda _, best=best: best
    result["always none"] = lambda _: NONE
    low = DISPLACEMENTS[0]
    result["the rule"] = lambda item: NONE if item.pilot["rule"] == NONE else f"{item.pilot['rule']}-{low:g}"
    return result


def registered_tests(sets: Sequence[MeasuredSet]) -> dict[str, tuple[Any, float]]:
    """For each constant objective: the pilot's regret minus its own, paired over targets, and p by Holm over four."""
    regrets = regrets_of(sets)
    names = [f"always {objective}" for objective in OBJECTIVES]
    targets = [item.target for item in sets]
    tests = [paired_difference(regrets[name], regrets["pilot"], targets) for name in names]
    return dict(zip(names, zip(tests, holm([test.p for test in tests]), strict=True), strict=True))


def power(estimate: Estimate) -> str:
    """The true difference that this spread between targets detects with 80 % power, at 5 % and at Holm's first step."""
    if math.isnan(estimate.se):
        return "–"
    return " and ".join(
        f"{100 * detectable_difference(estimate.se, estimate.df, alpha=alpha):.1f}" for alpha in (0.05, 0.05 / 4)
    )


def guarded_options(sets: Sequence[MeasuredSet]) -> list[tuple[MeasuredSet, str]]:
    """The options whose pilots the guard stopped. They answered nothing, so that they could not be chosen."""
    return [(item, pilot["name"]) for item in sets for pilot in item.pilot["pilots"] if pilot["stopped"]]


def regrets_of(sets: Sequence[MeasuredSet]) -> dict[str, list[float]]:
    """The regret of each policy on each set."""
    return {name: [item.regret(choose(item)) for item in sets] for name, choose in policies(sets).items()}


def write(sets: Sequence[MeasuredSet]) -> None:
    """Put the tables at the end of the guide, after the marker, and plot the regrets."""
    text = page(sets)
    picture.draw(regrets_of(sets), [item.target for item in sets], PICTURE)
    head, marker, _ = PAGE.read_text("utf-8").partition(MARKER)
    write_atomically(PAGE, f"{head.rstrip()}\n\n{marker or MARKER}{text}")


def page(sets: Sequence[MeasuredSet]) -> str:
    """All tables. Raises UserError for fewer than two targets."""
    targets = [item.target for item in sets]
    if len(set(targets)) < 2:
        raise UserError(f"{len(set(targets))} whole target(s); the tables need two, and the design 13")
    regret_rows = [["choice", "mean regret, points", "worst", "chooses the best"]]
    for name, values in regrets_of(sets).items():
        mean = clustered_mean(values, targets)
        text = f"{100 * mean.mean:.1f} [{100 * mean.lo:.1f}, {100 * mean.hi:.1f}]"
        best = f"{sum(value == 0 for value in values)} of {len(values)}"
        regret_rows.append([name, text, f"{100 * max(values):.1f}", best])
    test_rows = [["pilot minus", "regret, points", "p", "p, Holm over four", "verdict", "80 % power from, points"]]
    for name, (test, corrected) in registered_tests(sets).items():
        beaten = corrected < 0.05 and not math.isnan(corrected)
        verdict = ("beats" if test.estimate.mean < 0 else "is beaten by") if beaten else "not shown"
        p_values = [f"{test.p:.3f}", f"{corrected:.3f}"]
        test_rows.append([name, with_interval(test.estimate), *p_values, verdict, power(test.estimate)])
    sure_rows = [["certainty", "sets", "mean regret of the pilot, points", "worst"]]
    for sure in ("high", "fair", "low"):
        if values := [item.regret(item.pilot["choice"]) for item in sets if item.pilot["sure"] == sure]:
            sure_rows.append([sure, str(len(values)), f"{100 * fmean(values):.1f}", f"{100 * max(values):.1f}"])
    set_rows = [["target and pairs", "chosen (certainty)", "before", *sets[0].pilot["rates"], "regret"]]
    for item in sets:
        gains = [points(item.right[option] - item.right[NONE]) for option in item.pilot["rates"]]
        chosen = f"{item.pilot['choice']} ({item.pilot['sure']})"
        name = f"{item.target} {item.pilot['pairs']}"
        regret = f"{100 * item.regret(item.pilot['choice']):.1f}"
        set_rows.append([name, chosen, f"{100 * item.right[NONE]:.1f}", *gains, regret])
    guarded = guarded_options(sets)
    guard = f"The guard stopped {len(guarded)} of {sum(len(item.pilot['rates']) for item in sets)} pilots"
    if guarded:
        gain = fmean(item.right[option] - item.right[NONE] for item, option in guarded)
        best = sum(item.regret(option) == 0 for item, option in guarded)
        guard += f", whose options gain {points(gain)} points on average; {best} are the best of their set"
    shares = [item.pilot["cost"]["share"] for item in sets if item.pilot["cost"]]
    cost = f"Pilots cost {fmean(shares):.1f} full runs on average, {max(shares):.1f} at most.\n" if shares else ""
    return "\n".join(
        [f"{len(sets)} sets of {len(set(targets))} targets.\n", markdown(regret_rows), markdown(test_rows),
         markdown(sure_rows), f"{guard}. {cost}", markdown(set_rows)]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Regrets of advice by pilots, and the registered tests.")
    parser.add_argument("--results", type=Path, default=ROOT / COMMITTED, help="the file of results")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/advice.md")
    args = parser.parse_args()
    with ending_in_one_line("advice"):
        if args.write and args.results != ROOT / COMMITTED:
            raise UserError("docs/advice.md shows committed results only; remove --results")
        sets = measured_sets(results.read(args.results))
        print(page(sets))
        if args.write:
            write(sets)


if __name__ == "__main__":
    main()
