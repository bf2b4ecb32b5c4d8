"""The length-controlled win rate: by pencil, against statsmodels, and by simulation."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apo.evaluation.winrate.length_control import length_controlled

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import statsmodels.api as sm


def test_by_pencil():
    # Differences +1 and -1 (sd 1): 3 of 4 wins where longer, 1 of 4 where shorter. Both fit exactly:
    # theta + a t = log 3, theta - a t = -log 3 with t = tanh 1, so theta = 0 and a = log 3 / tanh 1.
    fit = length_controlled([1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 1, -1, -1, -1, -1], range(8))
    assert fit.rate == pytest.approx(0.5)
    assert fit.length == pytest.approx(math.log(3) / math.tanh(1))
    assert fit.lo < 0.5 < fit.hi


def test_if_length_has_no_effect_it_is_the_plain_rate():
    fit = length_controlled([1, 1, 0, 1, 1, 0], [1, 2, 1.5, -1, -2, -1.5], range(6))
    assert fit.rate == pytest.approx(4 / 6, abs=1e-6)
    assert fit.length == pytest.approx(0, abs=1e-6)


@given(st.lists(st.tuples(st.sampled_from([0, 0.25, 0.5, 0.75, 1]), st.integers(-300, 300), st.integers(0, 12)),
                min_size=12, max_size=60))  # fmt: skip
def test_it_agrees_with_statsmodels(rows):
    values, differences, clusters = zip(*rows, strict=True)
    spread = np.std(differences)
    try:
        fit = length_controlled(values, differences, clusters)
    except ValueError:
        return
    x = np.tanh(np.array(differences) / spread)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = sm.GLM(np.array(values), sm.add_constant(x, has_constant="add"), family=sm.families.Binomial()).fit(
            tol=1e-12, cov_type="cluster", cov_kwds={"groups": np.array(clusters), "use_correction": False}
        )
    scale = math.sqrt(len(set(clusters)) / (len(set(clusters)) - 1))
    assert (fit.theta, fit.length) == pytest.approx(tuple(fitted.params), abs=1e-5)
    assert (fit.theta_se, fit.length_se) == pytest.approx(tuple(scale * fitted.bse), rel=1e-3, abs=1e-5)


def test_a_model_that_only_writes_more_does_not_win_at_equal_lengths():
    rng = np.random.default_rng(0)
    differences = rng.normal(400, 300, 2000)
    x = np.tanh(differences / differences.std())
    wins = (rng.random(2000) < 1 / (1 + np.exp(-2 * x))).astype(float)
    fit = length_controlled(wins.tolist(), differences.tolist(), range(2000))
    assert wins.mean() > 0.75
    assert fit.lo <= 0.5 <= fit.hi
    assert fit.length == pytest.approx(2, abs=0.5)


@pytest.mark.slow
def test_95_of_100_intervals_hold_the_rate_where_samples_of_a_prompt_are_alike():
    rng, held, clusters = np.random.default_rng(1), 0, np.repeat(np.arange(100), 3).tolist()
    for _ in range(400):
        differences = rng.normal(100, 200, 300)
        x = np.tanh(differences / differences.std())
        luck = np.repeat(rng.random(100), 3)  # what decides is the same for all samples of a prompt
        wins = (luck < 1 / (1 + np.exp(-(0.4 + 1.0 * x)))).astype(float)
        fit = length_controlled(wins.tolist(), differences.tolist(), clusters)
        held += fit.lo <= 1 / (1 + math.exp(-0.4)) <= fit.hi
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize("prompts", [4, 5, 8])
def test_95_of_100_intervals_hold_the_rate_of_few_prompts(prompts):
    rng, held, fitted = np.random.default_rng(2), 0, 0
    while fitted < 400:
        differences = rng.normal(100, 200, prompts)
        chance = 1 / (1 + np.exp(-(0.4 + np.tanh(differences / differences.std()))))
        values = (rng.random((2, prompts)) < chance).mean(0)  # both orders
        try:
            fit = length_controlled(values.tolist(), differences.tolist(), range(prompts))
        except ValueError:
            continue
        fitted += 1
        held += fit.lo <= 1 / (1 + math.exp(-0.4)) <= fit.hi
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize(
    ("values", "differences", "match"),
    [
        ([1, 1, 1, 1], [1, 2, -1, 3], "wins always"),
        ([0, 0, 0, 0], [1, 2, -1, 3], "wins always"),
        ([1, 1, 0, 0], [3, 2, -1, -3], "whenever its answer is longer"),
        ([1, 0, 1, 0], [5, 5, 5, 5], "the same length"),
        ([1, 0], [5, 1], "too few"),
        ([1, 0, 1], [5, 1, 2], "3 prompt"),
    ],
)
def test_rates_that_cannot_be_estimated_are_refused(values, differences, match):
    with pytest.raises(ValueError, match=match):
        length_controlled(values, differences, range(len(values)))
