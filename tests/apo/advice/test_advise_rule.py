"""The rule of `apo advise`, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apo.advice.rule import Evidence, advise, pilot_order, sample_size, suggest_beta, suggest_learning_rate
from apo.analysis.bootstrap import Interval


def interval(value: float, half: float = 0.05) -> Interval:
    return Interval(value, value - half, value + half)


BELOW, LEVEL = interval(-0.3), interval(0.0)
PLAIN = Evidence(
    pairs=200,
    parameters=900_000,
    win=interval(0.8),
    right=interval(0.9),
    winner_gap=BELOW,
    loser_gap=LEVEL,
    winner_total=interval(-10.0),
    coherence=interval(0.2),
    displacement=interval(0.5),
    longer=interval(0.5),
)
ALONE = {"win": None, "right": None}
"""Without a judge."""


@pytest.mark.parametrize(
    ("evidence", "objective", "sure"),
    [
        # a judge decides
        ({}, "apo_zero", "high"),
        ({"win": interval(0.2)}, "apo_down", "high"),
        ({"win": interval(0.5)}, "dpo", "fair"),
        ({"win": interval(0.55)}, "dpo", "fair"),  # exactly one half at its lower end is not above it
        ({"win": interval(0.551)}, "apo_zero", "high"),
        # labels that say nothing
        ({"right": interval(0.5)}, "none", "fair"),
        ({"right": interval(0.3)}, "none", "high"),
        ({"right": interval(0.54)}, "none", "fair"),
        ({"coherence": interval(0.01)}, "apo_zero", "high"),  # the judge knows better
        # too little evidence is no reason not to train
        ({"right": interval(0.5, 0.17)}, "apo_zero", "low"),
        ({"right": interval(0.6, 0.15), "win": interval(0.5)}, "dpo", "low"),
        ({**ALONE, "coherence": interval(0.01)}, "apo_zero", "low"),
        # nobody judges: who made which side
        (ALONE, "apo_zero", "low"),
        ({**ALONE, "winners_own": 0.0, "losers_own": 1.0}, "apo_zero", "fair"),
        ({**ALONE, "winners_own": 0.0, "losers_own": 1.0, "winner_gap": LEVEL}, "apo_zero", "fair"),
        ({**ALONE, "winner_gap": LEVEL, "loser_gap": BELOW}, "apo_down", "low"),
        ({**ALONE, "winner_gap": BELOW, "loser_gap": BELOW}, "dpo", "low"),
        ({**ALONE, "winner_gap": LEVEL}, "dpo", "low"),
        ({**ALONE, "winners_own": 1.0, "losers_own": 1.0}, "dpo", "low"),
        ({**ALONE, "winner_gap": interval(0.3)}, "dpo", "low"),  # more likely than its own samples passes too
        # the model on both sides
        ({"winners_own": 1.0, "losers_own": 1.0}, "apo_zero", "fair"),
        ({"winners_own": 1.0, "losers_own": 1.0, "win": interval(0.5)}, "dpo", "low"),
        # another template
        ({"strange": 0.06}, "none", "high"),
        ({"strange": 0.05}, "apo_zero", "high"),
    ],
)
def test_each_case_has_its_advice(evidence, objective, sure):
    advice = advise(replace(PLAIN, **evidence))
    assert (advice.objective, advice.sure) == (objective, sure)
    assert (advice.beta is None) == (advice.learning_rate is None) == (objective == "none")
    assert advice.because


@pytest.mark.parametrize(
    ("evidence", "warning"),
    [
        ({"displacement": interval(-0.2)}, "less likely"),
        ({"longer": interval(0.9)}, "90% of the winners are longer"),
        ({"longer": interval(0.1)}, "10% of the winners are longer"),
        ({"winners_own": 1.0, "losers_own": 1.0}, "the model wrote both sides"),
        ({"winner_gap": LEVEL}, "both sides are as likely to the model as its own answers"),
        (
            {"right": interval(0.5, 0.17)},
            "too few pairs to say if winners are better than losers: the judge prefers 50% of "
            "them (33% to 67%); 197 prompts would do",
        ),
        ({**ALONE, "coherence": interval(0.01)}, "no common direction"),
    ],
)
def test_only_what_to_watch_is_reported(evidence, warning):
    assert advise(PLAIN).beware == []
    (beware,) = advise(replace(PLAIN, **evidence)).beware
    assert warning in beware


@pytest.mark.parametrize(
    ("win", "first"), [(interval(0.8), "apo_zero"), (interval(0.5), "dpo"), (interval(0.2), "apo_down")]
)
def test_the_evidence_orders_all_pilots(win, first):
    order = pilot_order(replace(PLAIN, win=win))
    assert order[0] == first
    assert sorted(order) == ["apo_down", "apo_zero", "dpo", "sft"]


@pytest.mark.parametrize("winner", [BELOW, LEVEL])
@pytest.mark.parametrize("loser", [BELOW, LEVEL])
def test_likelihood_alone_never_says_who_wrote_an_answer(winner, loser):
    advice = advise(replace(PLAIN, **ALONE, winner_gap=winner, loser_gap=loser))
    assert "the model wrote" not in " ".join([advice.because, *advice.beware])
    assert "their authors are unknown, and only a judge could say which is better" in advice.because
    assert advice.sure == "low"


def test_apo_down_is_meant_to_lower_winners_and_says_nothing_of_it():
    assert advise(replace(PLAIN, win=interval(0.2), displacement=interval(-0.2))).beware == []


@pytest.mark.parametrize(("below", "beta"), [(0, 0.1), (40, 0.1), (50, 0.08), (100, 0.04), (1000, 0.03), (-50, 0.1)])
def test_beta_brings_a_winner_at_the_models_own_level_to_reward_4_and_no_further(below, beta):
    assert suggest_beta(replace(PLAIN, winner_total=interval(-below))) == pytest.approx(beta)


@pytest.mark.parametrize(("parameters", "rate"), [(3e9, 1e-6), (900_000, 1.5e-5), (24e9, 5e-7), (8e9, 7.2e-7)])
def test_the_learning_rate_falls_with_the_cube_root_of_the_size(parameters, rate):
    assert suggest_learning_rate(int(parameters)) == pytest.approx(rate)


def test_the_sample_is_sized_by_power():
    # (1.960 + 0.842)^2 x 0.25 = 1.962 of variance over the squared difference
    assert [sample_size(difference) for difference in (0.10, 0.25)] == [197, 32]
