"""Write the page of the designs from their committed results.

python -m recipes.experiments.paper_mini.story [--small]     # prints the page
python -m recipes.experiments.paper_mini.story --write       # writes docs/paper.md and its plot, when D0 is complete
"""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clair.core.errors import UserError
from clair.core.files import write_atomically
from clair.core.statistics import clustered_mean, exact_proportion
from recipes.experiments.paper_mini import picture, results
from recipes.experiments.paper_mini.analysis import (
    SHARE_OF_BEST,
    DesignResults,
    Judged,
    contrasts,
    d0_gains,
    delta_verdict,
    dose_gains,
    judge_claims,
    margin,
    mean,
    minus,
    slopes,
    strata_gains,
    tolerance,
)
from recipes.experiments.paper_mini.design import FULL, OBJECTIVES, SMALL, Name, is_regime, regime_gains, select
from recipes.experiments.paper_mini.rows import in_nats, markdown, points, with_interval
from recipes.experiments.paper_mini.run import SMALL_RUN, rows_of
from recipes.experiments.paper_mini.worlds import CONTRASTED, TEST_PAIRS
from recipes.world.running import ROOT

PAGE = Path("docs/paper.md")
PICTURE = Path("docs/images/paper-evidence.png")
REGISTRATION = "log/2026-11-29-evidence.md"
NOT_TESTED = "not tested"


def read_results(file: Path, *, small: bool) -> DesignResults:
    """Read the results in a file. Raises UserError if it has no run."""
    lines = results.read(file)
    rows = rows_of(lines)
    if not rows:
        command = f"python -m recipes.experiments.paper_mini.run {'--small' if small else 'D0'}"
        raise UserError(f"{file} holds no runs; make them with: {command}")
    worlds = {line["name"]: line for line in lines if line["kind"] == "world"}
    return DesignResults(SMALL if small else FULL, worlds, rows)


def page(measured: DesignResults) -> str:
    """Return the text of the page."""
    points_of_margin = margin(measured)
    judged = judge_claims(contrasts(measured), points_of_margin)
    counts = Counter(_verdict(item, points_of_margin) for item in judged)
    commits = sorted({str(row["commit"])[:12] for row in (*measured.rows.values(), *measured.worlds.values())})
    return f"""# The paper in miniature

This page says which claims of the paper hold on a model of 0.8 million weights in a world of made-up tasks, where
winners can be made better or worse than the model. Claims, regimes, contrasts and rules of judgement were
[written down before the first run]({REGISTRATION}). `make paper-mini` runs what is missing, and
`python -m recipes.experiments.paper_mini.story --write` makes this page from the results in `{results.COMMITTED}`:
{len(measured.rows)} runs in {len(measured.worlds)} worlds, of commit {", ".join(commits)}.
[The first grid](paper_first_grid.md) tested claims in the wrong regime; its page has corrected intervals.

**{len(judged)} claims: {", ".join(f"{count} {verdict}" for verdict, count in counts.items())}.**

![Gain over the learning rate by objective, and gain by regime and objective](images/{PICTURE.name})

## Claims

A figure is the mean over worlds with a 95 % t interval. *Reproduced*: the sign is as expected and p is below 0.05,
corrected by Holm for nine tests. *Equal*: two one-sided tests reject a difference of the margin or more, either way.
{_margin_sentence(points_of_margin)} *Not reproduced*: tested, but neither; either the opposite, or undecided.

{markdown(claim_rows(measured, judged, points_of_margin))}
## Clean CLAIR pairs, by rate (D0)

{_d0(measured)}
## CLAIR at shared rates (D1)

{_selected(measured, "D1", ("clair",))}{_d1_by_rate(measured)}
## Regime by objective (D2)

{_regimes(measured)}{_selected(measured, "D2", ("weak", "strong"))}
## Contrast as a dose (D3)

{_doses(measured)}
## Minimal contrast against large delta (D4)

{_contrasted(measured, points_of_margin)}
## Worlds

A world is used only if its gates are met. *Right* is the share of right greedy answers to held-out questions. *As its
region says* is the share of these answers that agree with the target's training.

{markdown(world_rows(measured))}
## How far to trust it

- These results hold for this world: the paper's models are 10,000 times as large, and its prompts are real.
- The intervals are over worlds; phrasings and skills are fixed. Of the questions, 60 % have a phrasing that occurs in
  the pairs, 20 % another phrasing of the same skills, 20 % a skill without pairs.
- No design tests KTO, or the paper's claim that CLAIR beats judged pairs.
"""


# ---- claims


def _verdict(item: Judged, margin: int | None) -> str:
    return f"equal within {margin} points" if item.verdict == "equal" else item.verdict


def _margin_sentence(margin: int | None) -> str:
    if margin is None:
        return "The margin follows from D0, which is not complete."
    return f"The margin is {margin} points; it follows from the spread between D0's draws."


def gate(measured: DesignResults, name: Name) -> str:
    """Return the state of a design's gates: `worlds 10 of 10`, for D2 also its regimes."""
    worlds, tested = measured.design.worlds_of(name), measured.tested(name)
    text = f"worlds {len(tested)} of {len(worlds)}"
    if name != "D2":
        return text if tested else NOT_TESTED
    met = {regime: is_regime(measured.design, regime, measured.tuning, measured.rows) for regime in ("weak", "strong")}
    return "; ".join([text, *(f"{r} {'met' if m else NOT_TESTED if m is None else 'not met'}" for r, m in met.items())])


def claim_rows(measured: DesignResults, judged: Sequence[Judged], margin: int | None) -> list[list[str]]:
    """Return the nine claims with source, gate, figure and verdict."""
    rows = [["claim", "source", "design, gate", "compared", "figure", "p, Holm", "verdict"]]
    for item in judged:
        claim = item.claim
        unit = "nats" if claim.nats else "points"
        sign = "above" if claim.above else "below"
        figure = "–" if item.estimate is None else (in_nats if claim.nats else with_interval)(item.estimate)
        p = "–" if math.isnan(item.p) else "<0.001" if item.p < 0.001 else f"{item.p:.3f}"
        remark = f" ({item.remark})" if item.remark else ""
        compared = f"{claim.contrast}, {unit}; expected {sign} 0"
        state = f"{claim.design}: {gate(measured, claim.design)}"
        rows.append([claim.text, claim.source, state, compared, figure, p, f"{_verdict(item, margin)}{remark}"])
    return rows


# ---- designs


def _d0(measured: DesignResults) -> str:
    design = measured.design
    rows = [["objective", "beta", *(f"{rate:g}" for rate in design.rates), f"keeps {SHARE_OF_BEST:.0%} of its best at"]]
    for objective in OBJECTIVES:
        for beta in design.betas if objective != "sft" else design.betas[:1]:
            gains = d0_gains(measured, objective, beta)
            if gains is None:
                continue
            at_end = [gains[rate, design.short] for rate in design.rates]
            cells = [f"{points(mean(v))} [{points(min(v))}, {points(max(v))}]" for v in at_end]
            settings = f"{tolerance(gains)} of {len(gains)}"
            rows.append([objective, "–" if objective == "sft" else f"{beta:g}", *cells, settings])
    if len(rows) == 1:
        return f"D0 is {NOT_TESTED}.\n"
    return (
        f"Points gained after epoch {design.short} on the quickstart's model, with the lowest and the highest of "
        f"{len(measured.tested('D0'))} draws. The last column counts the settings of rate and epoch whose mean over "
        f"draws is at least {SHARE_OF_BEST:.0%} of the objective's best.\n\n{markdown(rows)}"
    )


def _selected(measured: DesignResults, name: Name, sets: Sequence[str]) -> str:
    rows = [
        ["pairs", "objective", "rate, epoch", "gain", "trained", "new phrasing", "new skill", "order of held-out pairs"]
    ]
    for pairs in sets:
        for objective in OBJECTIVES:
            gains, setting = measured.gains(name, pairs, objective), None
            if gains is not None:
                setting = select(measured.design, pairs, objective, measured.tuning, measured.rows)
            strata = strata_gains(measured, name, pairs, objective)
            if gains is None or setting is None or strata is None:
                continue
            by_stratum = [points(strata[s]) if s in strata else "–" for s in ("trained", "new phrasing", "new skill")]
            estimate = clustered_mean(gains, range(len(gains)))
            selected = f"{setting.learning_rate:g}, {setting.epoch}"
            order = _order(measured, name, pairs, objective, setting.learning_rate)
            rows.append([pairs, objective, selected, with_interval(estimate), *by_stratum, order])
    if len(rows) == 1:
        return f"{name} is {NOT_TESTED}.\n"
    return (
        "Points gained at the rate and checkpoint that the tuning worlds select, with 95 % t intervals over worlds, "
        "and by kind of question. The last column is the share of held-out pairs in the right order at the last "
        f"checkpoint, exact where all {TEST_PAIRS} pairs of every world are.\n\n{markdown(rows)}"
    )


def _d1_by_rate(measured: DesignResults) -> str:
    """The gains after the last epoch at every rate, if all runs are there."""
    if not picture.is_d1_whole(measured):
        return ""
    rates, epochs = measured.design.shared_rates, measured.design.epochs
    rows = [["objective", *(f"{rate:g}" for rate in rates)]]
    for objective in OBJECTIVES:
        gains = [measured.at_rate(objective, rate) or [] for rate in rates]
        rows.append([objective, *(with_interval(clustered_mean(v, range(len(v)))) for v in gains)])
    return (
        f"\nPoints gained after epoch {epochs} at every rate, without selection. A run that was stopped keeps its last "
        f"value.\n\n{markdown(rows)}"
    )


def _order(measured: DesignResults, name: Name, pairs: str, objective: str, rate: float) -> str:
    """Return the reward accuracy over worlds; SFT has none. If it is 1 or 0 in all worlds, the interval is exact."""
    rows = [measured.rows[measured.design.run(w, pairs, objective, rate).key] for w in measured.tested(name)]
    values = [row["checkpoints"][-1]["pairs"].get("rewards/accuracies") for row in rows]
    if None in values:
        return "–"
    estimate = clustered_mean(values, range(len(values)))
    if estimate.se == 0 and estimate.mean in (0, 1):
        count = TEST_PAIRS * len(values)
        estimate = exact_proportion(round(count * estimate.mean), count)
    return f"{estimate.mean:.1%} [{max(0, estimate.lo):.1%}, {min(1, estimate.hi):.1%}]"


def _regimes(measured: DesignResults) -> str:
    sentences = []
    for regime, expected in (("weak", "lose"), ("strong", "gain")):
        gains = regime_gains(measured.design, regime, measured.tuning, measured.rows)
        if gains:
            met = is_regime(measured.design, regime, measured.tuning, measured.rows)
            listed = ", ".join(points(value) for value in gains)
            sentences.append(
                f"Gate *{regime}*: SFT on the winners must {expected} in every tuning world, and changes the accuracy "
                f"by {listed} points: {'met' if met else 'not met, so the regime is not tested'}."
            )
    return "\n".join([*sentences, "", ""]) if sentences else ""


def _doses(measured: DesignResults) -> str:
    rows = [["objective", "correction only", "opening", "and closing", "and sentence", "slope, points a dose"]]
    for objective in measured.design.dose_objectives:
        gains = dose_gains(measured, objective)
        if gains:
            slope = slopes(gains)
            cells = [points(mean(values)) for values in gains]
            rows.append([objective, *cells, with_interval(clustered_mean(slope, range(len(slope))))])
    return markdown(rows) if len(rows) > 1 else f"D3 is {NOT_TESTED}.\n"


def _contrasted(measured: DesignResults, margin: int | None) -> str:
    """CLAIR's pairs minus delta pairs at equal tokens by objective, and the verdict on APO-zero's difference."""
    rows = [["objective", "CLAIR pairs", "delta pairs", "difference"]]
    for objective in measured.design.dose_objectives:
        sides = [measured.gains("D4", pairs, objective) for pairs in CONTRASTED]
        difference = minus(*sides)
        if difference is not None:
            cells = [with_interval(clustered_mean(v, range(len(v)))) for v in (*sides, difference) if v is not None]
            rows.append([objective, *cells])
    if len(rows) == 1:
        return f"D4 is {NOT_TESTED}.\n"
    difference = minus(*(measured.gains("D4", pairs, "apo_zero") for pairs in CONTRASTED))
    verdict = delta_verdict(difference, margin) if difference else NOT_TESTED
    return (
        f"Points gained at equal tokens, each at the rate and checkpoint that its tuning worlds select. The one test, "
        f"outside of the nine: APO-zero on both sets, two-sided at 5 %. Verdict: {verdict}.\n\n{markdown(rows)}"
    )


def world_rows(measured: DesignResults) -> list[list[str]]:
    """Return a row per world: the measurements of its gates, and the share of right winners in its sets."""
    rows = [["world", "own samples, nats", "well formed", "right", "as its region says", "winners right", "gates"]]
    for name, world in measured.worlds.items():
        unmet = [gate for gate, met in world["gates"].items() if not met]
        winners = ", ".join(f"{item} {values['winners_right']:.2f}" for item, values in world["sets"].items())
        regional = f"{world['regional']:.0%}" if name.startswith("regions") else "–"
        figures = [f"{world['nats']:.2f}", f"{world['well_formed']:.1%}", f"{world['right']:.1%}", regional]
        rows.append([name, *figures, winners, "met" if not unmet else "not met: " + ", ".join(unmet)])
    return rows


def write(measured: DesignResults) -> None:
    """Write the page and its plot. Raises UserError unless D0 is complete."""
    if margin(measured) is None:
        raise UserError(f"D0 is not complete, so {PAGE} is not written; continue with: python -m {__package__}.run D0")
    picture.draw(measured, PICTURE)
    write_atomically(PAGE, page(measured))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print or write the page of the designs.")
    parser.add_argument("--small", action="store_true", help="of the small version")
    parser.add_argument("--run", type=Path, help="use the results in this run folder, not the committed ones")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} and {PICTURE}")
    args = parser.parse_args(arguments)
    os.chdir(ROOT)
    folder = args.run or (SMALL_RUN if args.small else None)
    file = folder / "results.jsonl" if folder else results.COMMITTED
    try:
        measured = read_results(file, small=args.small)
        if args.write and folder:
            raise UserError(f"{PAGE} shows committed results only; remove --small and --run")
        if args.write:
            write(measured)
            print(f"wrote {PAGE} and {PICTURE}")
        else:
            print(page(measured))
    except UserError as error:
        raise SystemExit(f"paper-mini: {error}") from None


if __name__ == "__main__":
    main()
