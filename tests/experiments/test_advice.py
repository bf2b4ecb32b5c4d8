"""The measurement of advice by pilots: its design, its runs, and regrets by pencil."""

from __future__ import annotations

import pytest

from clair.core.statistics import Estimate
from recipes.experiments.advice import table
from recipes.experiments.advice.measure import (
    COMMITTED,
    FIRST,
    ORDERS,
    SECOND,
    TruthRun,
    missing_parts,
    of_last_draws,
    sets_of_target,
    truth_runs,
)
from recipes.experiments.advice.table import measured_sets, page, policies, power, regret_tests, whole_measurements
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.design import FULL, OBJECTIVES
from recipes.experiments.paper_mini.worlds import QUESTIONS_PER_TEMPLATE, TEMPLATES
from recipes.world.running import ROOT

OPTIONS = [f"{objective}-{displacement:g}" for objective in OBJECTIVES for displacement in (0.03, 0.1)]
RATES = {option: 1e-5 * number for number, option in enumerate(OPTIONS, 1)}
QUESTIONS = len(TEMPLATES) * QUESTIONS_PER_TEMPLATE


def pilot(world: str, pairs: str, choice: str, sure: str = "high", rule: str = "apo_zero") -> dict:
    pilots = [{"name": name, "stopped": "step 9" if name == "apo_zero-0.1" else None} for name in RATES]
    verdict = {"best": "sft-0.1"}
    return {"kind": "pilot", "version": FIRST.version, "world": world, "pairs": pairs, "choice": choice, "sure": sure,
            "rule": rule, "rates": RATES, "cost": {"share": 5.0}, "pilots": pilots, "verdict": verdict}  # fmt: skip


def digits(share: float) -> str:
    """The digits of a checkpoint with this share of right answers, in fifteenths."""
    return f"{round(share * QUESTIONS_PER_TEMPLATE):x}" * len(TEMPLATES)


def lines(choice: dict, right: dict[str, tuple[int, int]], base: int = 6) -> list[dict]:
    """A pilot and its runs, with these numbers of right answers of fifteen by option and order; the others as base."""
    result = [choice]
    for run in truth_runs(choice):
        option = next(option for option, rate in RATES.items() if rate == run.learning_rate)
        count = right.get(option, (base, base))[run.order]
        checkpoints = [{"epoch": 0, "right": digits(base / 15)}, {"epoch": 6, "right": digits(count / 15)}]
        line = {"kind": "run", "version": FIRST.version, "key": run.key, "world": run.world, "order": run.order}
        result.append({**line, "checkpoints": checkpoints})
    return result


@pytest.mark.parametrize("measurement", [FIRST, SECOND])
def test_a_design_has_13_new_targets_with_two_sets_of_four_kinds(measurement):
    targets = measurement.targets
    assert len(targets) == 13
    assert not set(targets) & {*FULL.worlds_of("D1"), *FULL.worlds_of("D2"), *FULL.tuning}
    assert {name for target in targets for name in sets_of_target(target)} == {"clair", "weak", "strong", "swapped"}
    assert all(len(sets_of_target(target)) == 2 for target in targets)


def test_the_second_measurement_has_other_targets():
    assert not set(FIRST.targets) & set(SECOND.targets)


def test_the_truth_has_eight_options_in_two_orders_on_questions_that_no_pilot_saw():
    runs = truth_runs(pilot("regions-200", "clair", "none"))
    assert len({run.key for run in runs}) == 16
    assert {run.split for run in runs} == {"heldout"}
    assert {run.seed for run in runs} == set(ORDERS)
    assert [run.objective for run in runs[::4]] == list(OBJECTIVES)
    assert isinstance(runs[0], TruthRun)


TWO = [
    # base 6: sft-0.1 is best (9), chosen dpo-0.03 (8): regret 1/15
    *lines(pilot("regions-200", "clair", "dpo-0.03", "fair"), {"sft-0.1": (10, 8), "dpo-0.03": (8, 8)}),
    # every run harms: the pilot says none, and is right
    *lines(pilot("regions-201", "strong", "none", "low"), dict.fromkeys(RATES, (3, 3))),
]


def test_regrets_by_pencil():
    first, second = measured_sets(TWO, FIRST)
    assert first.right["none"] == pytest.approx(6 / 15)
    assert first.right["sft-0.1"] == pytest.approx(9 / 15)
    assert first.regret("dpo-0.03") == pytest.approx(1 / 15)
    assert (second.regret("none"), second.regret("sft-0.1")) == (0, pytest.approx(3 / 15))


def test_a_constant_has_the_better_of_its_two_rates():
    sets = measured_sets(TWO, FIRST)
    chosen = policies(sets)
    assert chosen["always sft"](sets[1]) == "sft-0.1"
    assert chosen["always dpo"](sets[1]) == "dpo-0.03"
    assert chosen["the rule"](sets[0]) == "apo_zero-0.03"
    assert chosen["pilot"](sets[1]) == "none"


def test_differences_are_paired_by_target_and_corrected_for_four():
    test, corrected = regret_tests(measured_sets(TWO, FIRST), "pilot")["always sft"]
    # the pilot's regret minus SFT's: 1/15 - 0 and 0 - 3/15
    assert test.estimate.mean == pytest.approx((1 / 15 - 3 / 15) / 2)
    assert test.estimate.clusters == 2
    assert corrected >= test.p


def test_a_set_whose_runs_are_not_all_there_does_not_count():
    assert len(measured_sets(TWO[:-1], FIRST)) == 1
    assert whole_measurements(TWO) == {}


def whole_lines() -> list[dict]:
    """The lines of a first measurement, with one target that misses a gate."""
    worlds = [
        {"kind": "world", "name": name, "nats": -1.0, "sets": {}, "gates": {"all pairs": name != "regions-212"}}
        for name in FIRST.targets
    ]
    cells = [(target, pairs) for target in FIRST.targets[:12] for pairs in sets_of_target(target)]
    return [*worlds, *(line for cell in cells for line in lines(pilot(*cell, "none"), {"sft-0.1": (10, 8)}))]


def test_regrets_are_shown_once_every_run_of_the_targets_that_met_their_gates_is_there():
    ((title, sets),) = whole_measurements(whole_lines()).items()
    assert (title, len(sets)) == ("First measurement", 24)
    assert whole_measurements(whole_lines()[:-1]) == {}


def test_a_world_that_comes_out_differently_is_measured_again():
    def world(nats: float) -> dict:
        return {"kind": "world", "name": "regions-200", "nats": nats, "sets": {}}

    same, other = [world(-0.8), *TWO, world(-0.8)], [world(-0.8), *TWO, world(-0.9)]
    assert [item.target for item in measured_sets(same, FIRST)] == ["regions-200", "regions-201"]
    assert missing_parts("regions-200", of_last_draws(same), FIRST) == (["weak"], [])
    assert [item.target for item in measured_sets(other, FIRST)] == ["regions-201"]
    assert missing_parts("regions-200", of_last_draws(other), FIRST) == (["clair", "weak"], [])


def test_the_page_names_what_is_not_shown_and_the_worst_case():
    text = page(measured_sets(TWO, FIRST))
    assert "2 sets of 2 targets." in text
    assert "| pilot minus always sft | -6.7 [" in text
    assert "| best guess minus always sft | +0.0 [" in text
    assert "not shown" in text
    assert "| regions-200 clair | dpo-0.03 (fair) | 40.0 |" in table.set_table(measured_sets(TWO, FIRST))
    # the stopped option is as good as the base in one set, 3/15 worse in the other
    assert "The guard stopped 2 of 16 pilots, whose options gain -10.0 points on average; 0 are the best" in text
    assert "Pilots cost 5.0 full runs on average, 5.0 at most." in text


@pytest.mark.parametrize(("deviation", "alpha_index"), [(9.4, 0), (7.5, 1)])
def test_power_is_that_of_the_design(deviation, alpha_index):
    # 13 targets detect 8 points with 80 % power: at 5 % with deviation 9.4, at Holm's first step with 7.5
    estimate = Estimate(-0.08, deviation / 100 / 13**0.5, -0.1, 0, 26, 13, 12)
    assert float(power(estimate).split(" and ")[alpha_index]) == pytest.approx(8, abs=0.1)


def test_the_guide_has_the_tables_of_the_committed_results():
    tables = table.tables(whole_measurements(results.read(ROOT / COMMITTED)))
    assert table.PAGE.read_text("utf-8").partition(table.MARKER)[2] == tables


def test_the_tables_replace_those_of_the_guide(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "PAGE", tmp_path / "advice.md")
    monkeypatch.setattr(table, "PICTURE", tmp_path / "images/regret.png")
    table.PAGE.write_text("# Advice\n\nWords.\n\n<!-- regrets -->\nold\n")
    whole = {"First measurement": measured_sets(TWO, FIRST)}
    table.write(whole)
    assert table.PAGE.read_text() == f"# Advice\n\nWords.\n\n<!-- regrets -->\n{table.tables(whole)}"
    assert table.PICTURE.read_bytes().startswith(b"\x89PNG")
