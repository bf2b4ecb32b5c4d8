"""The choice among pilots and the matching of rates, on scripted measurements."""

from __future__ import annotations

import math
import random

import pytest

from apo.pilot.decision import decide, rows_needed
from apo.pilot.matching import MAX_TRIALS, RateTrials, is_match, matched_rate, next_rate
from apo.pilot.plan import RAISES_WINNERS
from apo.pilot.tables import pilot_lines
from clair.core.statistics import best_of, clustered_mean

OBJECTIVES = {"sft-0.03": "sft", "sft-0.1": "sft", "dpo-0.03": "dpo"}


def gains(*shares: float, n: int = 60, seed: int = 0) -> list[list[float]]:
    """Gains of pilots on the same prompts: +1 by the given share, -1 by a tenth, else 0."""
    rng = random.Random(seed)
    return [
        [1.0 if rng.random() < share else -1.0 if rng.random() < 0.1 else 0.0 for _ in range(n)] for share in shares
    ]


def chosen(values: list[list[float]], difference: float = 0.1, unit: str = ""):
    named = dict(zip(OBJECTIVES, values, strict=True))
    return decide(named, range(len(values[0])), OBJECTIVES, difference, unit)


# ---- the choice


def test_a_pilot_far_above_all_others_is_chosen_with_high_certainty():
    verdict = chosen(gains(0.1, 0.15, 0.6))
    assert (verdict.choice, verdict.sure, verdict.close) == ("dpo-0.03", "high", [])
    assert 0 < verdict.ci95[0] < verdict.corrected <= verdict.gain < verdict.ci95[1]


def test_two_objectives_that_gain_alike_are_not_told_apart():
    verdict = chosen(gains(0.1, 0.5, 0.5))
    assert verdict.choice in ("sft-0.1", "dpo-0.03")
    assert verdict.sure == "fair"
    assert len(verdict.close) == 1


def test_another_rate_of_the_same_objective_takes_no_certainty():
    verdict = chosen(gains(0.5, 0.5, 0.1))
    assert verdict.sure == "high"
    assert len(verdict.close) == 1


def test_the_selection_is_corrected_as_the_best_of_a_sweep_is():
    values = gains(0.15, 0.15, 0.15)
    verdict, best = chosen(values), best_of(values, range(60))
    assert (verdict.gain, verdict.bias, verdict.corrected) == (best.observed, best.bias, best.corrected)
    assert verdict.bias > 0
    own = clustered_mean(values[best.candidate], range(60))
    assert verdict.ci95[0] <= own.lo - best.bias


def test_a_lead_by_luck_alone_is_too_few_and_says_how_many_would_do():
    verdict = chosen(gains(0.1, 0.1, 0.1, seed=5))
    assert (verdict.choice, verdict.sure) == (None, "low")
    assert verdict.needed is not None
    assert verdict.needed > 60
    assert verdict.because.startswith(f"too few prompts to say: 60, and {verdict.needed} would detect")


def test_pilots_below_the_base_are_no_ground_to_collect_more():
    verdict = chosen([[-abs(v) for v in row] for row in gains(0.4, 0.5, 0.6)])
    assert (verdict.choice, verdict.sure, verdict.needed) == (None, "high", None)


def test_a_gain_that_is_surely_small_is_no_ground_not_to_train_and_says_what_would_detect_it():
    verdict = chosen(gains(0.1, 0.1, 0.1, seed=5), difference=0.6)
    assert verdict.ci95[1] < 0.6
    assert (verdict.choice, verdict.sure) == (None, "low")
    assert verdict.because.endswith("would detect a gain of 0.12")


def test_pilots_that_change_nothing_are_too_few_however_many_prompts():
    few, many = chosen([[0.0] * 12] * 3), chosen([[0.0] * 60] * 3)
    assert (few.sure, many.sure) == ("low", "low")
    assert (few.choice, many.choice) == (None, None)
    assert few.because.endswith("would detect a gain of 0.1")
    assert many.because.endswith("would detect a gain of 0.02")


def test_three_prompts_that_are_all_better_are_not_enough():
    verdict = chosen([[1.0, 1.0, 1.0, 0.0], [0.0] * 4, [0.0] * 4])
    assert verdict.choice is None


def test_needed_rows_have_80_per_cent_power():
    values = gains(0.2)[0]
    deviation = clustered_mean(values, range(60)).se * math.sqrt(60)
    assert rows_needed(values, range(60), 0.05) == pytest.approx((2.8016 * deviation / 0.05) ** 2, abs=1)


def test_lines_say_what_is_recommended_why_and_at_what_cost():
    verdict = chosen(gains(0.1, 0.5, 0.5))
    result = {
        "verdict": vars(verdict), "recommended": ["objective=sft", "trainer.learning_rate=2e-05"], "beta": 0.1,
        "best_guess": ["objective=sft", "trainer.learning_rate=2e-05"],
        "scale": 100, "left_out": 0, "recipe": "train.yaml",
        "cost": {"matching_steps": 280, "pilot_steps": 960, "full_steps": 360, "share": 3.44},
    }  # fmt: skip
    lines = list(pilot_lines(result))
    assert lines[0] == "objective: sft, learning rate 2e-05, beta 0.1 (certainty: fair)"
    assert lines[-1] == "train: apo train train.yaml --set objective=sft --set trainer.learning_rate=2e-05"
    assert "280 steps to match rates and 960 of pilots, 3.4 of a full run's 360" in lines[-2]
    assert any(line.startswith("! these prompts do not tell it apart from ") for line in lines)
    none = {**result, "recommended": None, "verdict": {**vars(verdict), "needed": 900}}
    lines = list(pilot_lines(none))
    assert lines[0] == "too few prompts to recommend training (certainty: fair)"
    assert lines[-1].startswith("if you train anyway, the best guess is: apo train train.yaml --set objective=sft ")
    harm = {**none, "verdict": {**vars(verdict), "needed": None}}
    assert not any("apo train" in line for line in pilot_lines(harm))


def test_only_objectives_that_should_raise_winners_are_stopped_for_their_fall():
    assert {"sft", "apo_zero"} <= RAISES_WINNERS
    assert not {"dpo", "apo_down"} & RAISES_WINNERS


# ---- matched rates


def trials_of(response, targets=(0.03, 0.1), first=1e-5):
    trials: list[tuple[float, float]] = []
    while (rate := next_rate(trials, targets, first)) is not None:
        trials.append((rate, response(rate)))
    return trials


@pytest.mark.parametrize(
    "response",
    [
        lambda r: 300 * r, lambda r: 30_000 * r, lambda r: 3 * r, lambda r: 200 * r**0.9,
        lambda r: 0.2 * (1 - math.exp(-2e3 * r)),
    ],
    ids=["proportional", "far too high", "far too low", "slower", "with a ceiling"],
)  # fmt: skip
def test_both_targets_are_reached_in_few_trials(response):
    trials = trials_of(response)
    assert len(trials) <= MAX_TRIALS
    for target in (0.03, 0.1):
        assert is_match(response(matched_rate(trials, target)), target)


def test_a_proportional_response_needs_one_trial_for_each_target_after_the_first():
    assert [round(moved, 4) for _, moved in trials_of(lambda r: 300 * r)] == [0.003, 0.03, 0.1]


def test_a_trial_that_moves_nothing_is_followed_by_a_ten_times_higher_rate():
    assert next_rate([(1e-6, 0.0)], (0.03,), 1e-6) == pytest.approx(1e-5)


def test_each_trial_starts_from_the_state_after_the_warm_up():
    callback, starts = train_trials((0.03, 0.1))
    assert starts == pytest.approx([-0.01] * len(starts), rel=1e-4)  # ten steps of warm-up
    assert [rate for rate, _ in callback.trials] == pytest.approx([1e-3, 1.5e-3, 5e-3], rel=1e-4)
    assert [moved for _, moved in callback.trials] == pytest.approx([0.02, 0.03, 0.1], rel=1e-4)


def test_trials_for_a_new_displacement_continue_the_earlier_ones():
    earlier = [(1e-3, 0.02), (1.5e-3, 0.03), (5e-3, 0.1), (4e-3, 0.08), (3e-3, 0.06), (2e-3, 0.04)]
    callback, starts = train_trials((0.01, 0.1), earlier=earlier)
    assert starts == pytest.approx([-0.01], rel=1e-4)
    assert callback.trials[:-1] == earlier
    assert callback.trials[-1] == pytest.approx((5e-4, 0.01), rel=1e-4)


def train_trials(targets, **options):
    """Run trials on a model of one weight. Returns the callback, and the weight at which each trial started."""
    import torch
    from transformers import TrainerControl, TrainerState

    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    callback = RateTrials(lambda: [model.weight.item()], targets, 1e-3, **options)
    state, control, starts = TrainerState(), TrainerControl(), []
    while not control.should_training_stop:
        if state.global_step == 10 or (state.global_step > 10 and (state.global_step - 10) % 20 == 0):
            starts.append(model.weight.item())
        model.weight.grad = torch.ones_like(model.weight)  # every step lowers the weight by the rate
        optimizer.step()
        schedule.step()
        state.global_step += 1
        callback.on_step_end(None, state, control, model=model, optimizer=optimizer, lr_scheduler=schedule)
    return callback, starts
