"""Verdicts by their rule, tolerance and margin by hand, and pages that are made from files of results alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clair.core.errors import UserError
from recipes.experiments.paper_mini import first_grid, picture, results, story
from recipes.experiments.paper_mini.analysis import (
    CLAIMS,
    contrasts,
    d0_gains,
    judge_claims,
    margin,
    slopes,
    strata_gains,
    tolerance,
    winners_change,
)
from recipes.experiments.paper_mini.design import FULL, SMALL, Design, Run
from recipes.experiments.paper_mini.story import read_results
from recipes.world.running import ROOT
from tests.experiments.synthetic_runs import all_results, as_the_paper_says, row_of

SPREAD = [-0.01, 0.0, 0.01, 0.005, -0.005]


def judged(index, values, points=3):
    """The verdict and remark on one claim if no other was tested."""
    every = [None] * len(CLAIMS)
    every[index] = values
    item = judge_claims(every, points)[index]
    return item.verdict, item.remark


def shifted(middle, scale=1.0):
    return [middle + scale * value for value in SPREAD]


@pytest.mark.parametrize(
    ("index", "values", "verdict"),
    [
        (1, shifted(0.1), ("reproduced", "")),
        (1, shifted(-0.1), ("not reproduced", "the opposite")),
        (3, shifted(-0.1), ("reproduced", "")),  # expected below 0
        (3, shifted(0.1), ("not reproduced", "the opposite")),
        (1, shifted(0.0), ("equal", "")),
        (1, shifted(0.0, 10), ("not reproduced", "undecided")),
        (1, shifted(-0.02, 0.1), ("equal", "the opposite sign, within the margin")),
        (5, shifted(0.001), ("not reproduced", "undecided")),  # likelihoods have no margin
        (1, None, ("not tested", "")),
    ],
)
def test_the_verdict_follows_the_rule_that_was_written_down(index, values, verdict):
    assert judged(index, values) == verdict


def test_without_a_margin_nothing_is_equal():
    assert judged(1, shifted(0.0), None) == ("not reproduced", "undecided")


def test_claims_that_did_not_run_count_among_the_tests():
    values = shifted(0.011)  # p is about 0.05 / 2
    alone = judge_claims([values, *[None] * 8], 3)[0]
    assert alone.p > 0.05 > alone.p / 9
    assert alone.verdict != "reproduced"


def test_nine_claims_without_any_effect_are_seldom_reproduced():
    rng, reproduced = np.random.default_rng(0), 0
    for _ in range(400):
        values = [list(rng.normal(0, 0.03, 10)) for _ in CLAIMS]
        reproduced += any(item.verdict == "reproduced" for item in judge_claims(values, 3))
    assert reproduced < 0.05 * 400  # one-sided by the sign, so about 2.5 %


def test_a_difference_outside_of_the_margin_is_seldom_called_equal():
    rng, equal = np.random.default_rng(1), 0
    for _ in range(400):
        item = judge_claims([None, list(rng.normal(-0.03, 0.03, 10)), *[None] * 7], 3)[1]
        equal += item.verdict == "equal"
    assert equal < 0.08 * 400


# ---- figures by hand


def test_slopes_agree_with_least_squares():
    by_dose = [[0.2, 0.1], [0.15, 0.2], [0.1, 0.1], [0.02, 0.3]]
    expected = [np.polyfit(range(4), column, 1)[0] for column in np.array(by_dose).T]
    assert slopes(by_dose) == pytest.approx(expected)


def test_tolerance_counts_the_settings_that_keep_four_fifths_of_the_best():
    gains = {(1e-5, 1): [0.1, 0.1], (1e-5, 2): [0.2, 0.12], (5e-5, 1): [0.2, 0.2], (5e-5, 2): [-0.3, -0.3]}
    assert tolerance(gains) == 2
    assert tolerance({(1e-5, 1): [-0.1, 0.0]}) == 0


def test_the_margin_is_that_of_the_spread_between_draws():
    design = Design(rates=(5e-5, 5e-4), betas=(0.1,), short=1)
    spread = {0: -0.04, 1: 0.0, 2: 0.04}

    def accuracy(run: Run, epoch: int) -> float:
        if epoch == 0 or run.learning_rate == 5e-4:  # at the high rate nothing is gained, so it does not count
            return 0.5 + 0.1 * (epoch > 0 and run.objective == "dpo" and run.seed == 1)
        return 0.8 + (spread[run.seed] if run.objective == "apo_zero" else 0.0)

    measured = all_results(design, ["D0"], accuracy)
    # The standard deviation is 4 points: (1.833 + 1.383) x 4 / sqrt(10) = 4.07.
    assert margin(measured) == 5
    gains = d0_gains(measured, "dpo", 0.1)
    assert gains
    assert gains[5e-5, 1] == pytest.approx([0.3] * 3, abs=1e-3)
    calm = all_results(design, ["D0"], lambda run, epoch: 0.5 + 0.2 * (epoch > 0))
    assert margin(calm) == 2


def test_strata_add_up_to_the_gain():
    measured = all_results(FULL, ["D1"])
    strata = strata_gains(measured, "D1", "clair", "apo_zero")
    gains = measured.gains("D1", "clair", "apo_zero")
    assert strata
    assert gains
    total = 0.6 * strata["trained"] + 0.2 * strata["new phrasing"] + 0.2 * strata["new skill"]
    assert total == pytest.approx(sum(gains) / len(gains), abs=1e-9)


def test_winners_change_is_from_the_start_to_the_last_checkpoint():
    run = FULL.run("regions-0", "clair", "dpo", 5e-5)
    assert winners_change(row_of(run, as_the_paper_says, -3.5)) == -3.5


# ---- pages


def test_a_world_in_which_the_paper_is_right_reproduces_all_nine_claims():
    measured = all_results(FULL)
    items = judge_claims(contrasts(measured), margin(measured))
    assert [item.verdict for item in items] == ["reproduced"] * 9
    assert "**9 claims: 9 reproduced.**" in story.page(measured)


def test_what_has_not_run_is_not_tested():
    text = story.page(all_results(FULL, ["D0"]))
    assert "**9 claims: 9 not tested.**" in text
    for name in ("D1", "D2", "D3"):
        assert f"{name} is not tested." in text
    text = story.page(all_results(FULL, ["D0", "D1"]))
    assert "**9 claims: 6 reproduced, 3 not tested.**" in text


def test_a_regime_whose_gate_is_missed_is_not_tested():
    def accuracy(run: Run, epoch: int) -> float:
        return 0.72 if run.pairs == "weak" and run.objective == "sft" and epoch else as_the_paper_says(run, epoch)

    measured = all_results(FULL, ["D0", "D1", "D2"], accuracy)
    verdicts = [item.verdict for item in judge_claims(contrasts(measured), margin(measured))]
    assert verdicts == [*["reproduced"] * 6, *["not tested"] * 3]
    text = story.page(measured)
    assert "strong met" in text
    assert "weak not met" in text


def test_the_page_stays_until_the_first_design_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(story, "PAGE", tmp_path / "paper.md")
    monkeypatch.setattr(story, "PICTURE", tmp_path / "images/paper.png")
    measured = all_results(FULL, ["D0"])
    rows = dict(measured.rows)
    rows.popitem()
    part = type(measured)(FULL, measured.worlds, {key: row for key, row in rows.items() if row["objective"] != "dpo"})
    with pytest.raises(UserError, match=r"D0 is not complete, so .* is not written"):
        story.write(part)
    assert not story.PAGE.exists()
    story.write(measured)
    assert story.PAGE.read_text("utf-8") == story.page(measured)
    assert story.PICTURE.stat().st_size > 20_000


def test_the_picture_has_the_curves_and_the_regimes():
    measured = all_results(FULL)
    assert set(picture.d0_curves(measured)) == set(picture.d1_curves(measured)) == set(picture.COLORS)
    rates, gains = picture.d0_curves(measured)["apo_zero"]
    assert rates == list(FULL.rates)
    assert [len(values) for values in gains] == [3] * 4
    assert len(picture.regime_estimates(measured)) == 8
    assert picture.regime_estimates(measured)["weak", "sft"].hi < 0


def test_the_picture_shows_the_rates_that_have_run_in_all_tuning_worlds():
    measured = all_results(FULL)
    worlds = (measured.tuning[1], measured.tested("D1")[4])
    missing = {FULL.run(world, "clair", "dpo", FULL.shared_rates[1]).key for world in worlds}
    rows = {key: row for key, row in measured.rows.items() if key not in missing}
    curves = picture.d1_curves(replace(measured, rows=rows))
    assert {len(values) for values in curves["sft"][1]} == {3}
    assert curves["dpo"][0] == [FULL.shared_rates[0], FULL.shared_rates[2]]
    assert "without selection" not in story.page(replace(measured, rows=rows))


def test_once_whole_the_picture_and_the_page_show_all_rates_in_the_test_worlds():
    measured = all_results(FULL)
    assert {len(values) for rates, gains in picture.d1_curves(measured).values() for values in gains} == {10}
    by_rate = story.page(measured).partition("without selection")[2].partition("## Regime")[0]
    assert by_rate.count("| dpo |") == 1
    assert by_rate.count("+") >= len(FULL.shared_rates)


def test_results_are_read_from_a_file_and_an_empty_one_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"holds no runs; make them with: .*run --small"):
        read_results(tmp_path / "results.jsonl", small=True)
    measured = all_results(SMALL, ["D0"])
    for line in (*measured.worlds.values(), *measured.rows.values()):
        results.append(tmp_path / "results.jsonl", line)
    assert story.page(read_results(tmp_path / "results.jsonl", small=True)) == story.page(measured)


def test_the_committed_page_is_that_of_the_committed_results():
    file = ROOT / results.COMMITTED
    if not file.exists():
        assert "paper_first_grid.md" in (ROOT / story.PAGE).read_text("utf-8")
        return
    assert story.page(read_results(file, small=False)) == (ROOT / story.PAGE).read_text("utf-8")


# ---- the first grid


def test_the_page_of_the_first_grid_is_made_from_its_committed_results():
    world, cells = first_grid.read_grid(ROOT / first_grid.FILE)
    assert first_grid.page(world, cells) == (ROOT / first_grid.PAGE).read_text("utf-8")


def test_intervals_of_the_first_grid_count_nothing_twice():
    world, cells = first_grid.read_grid(ROOT / first_grid.FILE)
    on_policy = first_grid.difference(world, cells, ("clair", "apo_zero"), ("on_policy", "apo_zero"))
    assert (100 * on_policy.mean, 100 * on_policy.lo, 100 * on_policy.hi) == pytest.approx((8.5, 0.9, 16.1), abs=0.1)
    fall = first_grid.by_pair(cells["clair", "dpo"], lambda winner, _: winner)
    assert (fall.hi - fall.mean) / 0.0116 == pytest.approx(73, rel=0.05)  # the interval over seeds alone was +-0.0116
    moved = {"chosen_logratio": [1.0] * 105, "rejected_logratio": [0.0] * 105}
    sure = first_grid.by_pair([{"moved": moved}] * 4, lambda winner, loser: float(winner > loser))
    assert (sure.lo, sure.hi) == pytest.approx((0.965, 1.0), abs=5e-4)
