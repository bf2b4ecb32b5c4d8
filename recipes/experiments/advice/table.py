"""Regrets of advice by pilots and of constant choices, and the registered tests, from the saved results alone.

python -m recipes.experiments.advice.table             # from the committed file, for each whole measurement
python -m recipes.experiments.advice.table --write     # writes them into docs/advice.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from clair.core.files import write_atomically
from clair.core.statistics import Estimate, clustered_mean, holm, paired_difference
from clair.core.student_t import detectable_difference
from recipes.experiments.advice import picture
from recipes.experiments.advice.measure import (
    COMMITTED,
    DISPLACEMENTS,
    FIRST,
    SECOND,
    Measurement,
    of_last_draws,
    pilots_of,
    truth_of,
    truth_runs,
)
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.design import OBJECTIVES, accuracy
from recipes.experiments.paper_mini.rows import markdown, points, with_interval
from recipes.experiments.paper_mini.run import passed_worlds
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


def measured_sets(lines: Sequence[Mapping[str, Any]], measurement: Measurement) -> list[MeasuredSet]:
    """The sets of a measurement whose pilot and whose runs are all there."""
    lines = of_last_draws(lines)
    rows, sets = truth_of(lines, measurement), []
    for pilot in pilots_of(lines, measurement).values():
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
    """The policies by name: the pilot's advice and its best guess, four constants at the better of their rates, no
    training, the old rule."""
    result: dict[str, Policy] = {
        "pilot": lambda item: item.pilot["choice"],
        "best guess": lambda item: item.pilot["verdict"].get("best", NONE),
    }
    for objective in OBJECTIVES:
        options = [f"{objective}-{displacement:g}" for displacement in DISPLACEMENTS]
        best = max(options, key=lambda option: fmean(item.right[option] for item in sets))
        result[f"always {objective}"] = lambda _, best=best: best
    result["always none"] = lambda _: NONE
    low = DISPLACEMENTS[0]
    result["the rule"] = lambda item: NONE if item.pilot["rule"] == NONE else f"{item.pilot['rule']}-{low:g}"
    return result


def regret_tests(sets: Sequence[MeasuredSet], policy: str) -> dict[str, tuple[Any, float]]:
    """For each constant objective: a policy's regret minus its own, paired over targets, and p by Holm over four."""
    regrets = regrets_of(sets)
    names = [f"always {objective}" for objective in OBJECTIVES]
    targets = [item.target for item in sets]
    tests = [paired_difference(regrets[name], regrets[policy], targets) for name in names]
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


def whole_measurements(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[MeasuredSet]]:
    """The sets of each measurement without a missing run, the last measurement first. No regret is shown before."""
    passed, whole = passed_worlds(lines), {}
    for title, measurement in (("Second measurement", SECOND), ("First measurement", FIRST)):
        sets = measured_sets(lines, measurement)
        gates = [passed.get(world) for world in measurement.targets]
        if None not in gates and len(sets) == 2 * sum(map(bool, gates)):
            whole[title] = sets
    return whole


def tables(whole: Mapping[str, Sequence[MeasuredSet]]) -> str:
    """The tables of the measurements, each under its title."""
    return "\n".join(f"### {title}\n\n{page(sets)}" for title, sets in whole.items())


def write(whole: Mapping[str, Sequence[MeasuredSet]]) -> None:
    """Put the tables at the end of the guide, after the marker, and plot the regrets of the last measurement."""
    sets = next(iter(whole.values()))
    picture.draw(regrets_of(sets), [item.target for item in sets], PICTURE)
    head, marker, _ = PAGE.read_text("utf-8").partition(MARKER)
    write_atomically(PAGE, f"{head.rstrip()}\n\n{marker or MARKER}{tables(whole)}")


def page(sets: Sequence[MeasuredSet]) -> str:
    """The tables over all sets of a measurement."""
    targets = [item.target for item in sets]
    regret_rows = [["choice", "mean regret, points", "worst", "chooses the best"]]
    for name, values in regrets_of(sets).items():
        mean = clustered_mean(values, targets)
        text = f"{100 * mean.mean:.1f} [{100 * mean.lo:.1f}, {100 * mean.hi:.1f}]"
        best = f"{sum(value == 0 for value in values)} of {len(values)}"
        regret_rows.append([name, text, f"{100 * max(values):.1f}", best])
    test_rows = [["difference of regrets", "points", "p", "p, Holm over four", "verdict", "80 % power from, points"]]
    for policy in ("pilot", "best guess"):
        for name, (test, corrected) in regret_tests(sets, policy).items():
            beaten = corrected < 0.05 and not math.isnan(corrected)
            verdict = ("beats" if test.estimate.mean < 0 else "is beaten by") if beaten else "not shown"
            p_values = [f"{test.p:.3f}", f"{corrected:.3f}"]
            row = [f"{policy} minus {name}", with_interval(test.estimate), *p_values, verdict, power(test.estimate)]
            test_rows.append(row)
    sure_rows = [["certainty", "sets", "mean regret of the pilot, points", "worst"]]
    for sure in ("high", "fair", "low"):
        if values := [item.regret(item.pilot["choice"]) for item in sets if item.pilot["sure"] == sure]:
            sure_rows.append([sure, str(len(values)), f"{100 * fmean(values):.1f}", f"{100 * max(values):.1f}"])
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
         markdown(sure_rows), f"{guard}. {cost}"]
    )  # fmt: skip


def set_table(sets: Sequence[MeasuredSet]) -> str:
    """The advice, and the gains of all options, by set."""
    set_rows = [["target and pairs", "chosen (certainty)", "before", *sets[0].pilot["rates"], "regret"]]
    for item in sets:
        gains = [points(item.right[option] - item.right[NONE]) for option in item.pilot["rates"]]
        chosen = f"{item.pilot['choice']} ({item.pilot['sure']})"
        name = f"{item.target} {item.pilot['pairs']}"
        regret = f"{100 * item.regret(item.pilot['choice']):.1f}"
        set_rows.append([name, chosen, f"{100 * item.right[NONE]:.1f}", *gains, regret])
    return markdown(set_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Regrets of advice by pilots, and the registered tests.")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/advice.md")
    args = parser.parse_args()
    with ending_in_one_line("advice"):
        whole = whole_measurements(results.read(ROOT / COMMITTED))
        print(tables(whole), *map(set_table, whole.values()), sep="\n")
        if args.write:
            write(whole)


if __name__ == "__main__":
    main()
