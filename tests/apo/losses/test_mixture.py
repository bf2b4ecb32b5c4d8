"""The values of a recipe's `objective`: names, options, weights and sums, and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from apo.losses.mixture import _option_names, objective_title, resolve_mixture
from apo.losses.objectives import OBJECTIVES, resolve_objective
from apo.packing.logps import PairLogps
from clair.core.errors import UserError

# Two pairs: log-ratios (4, -6) and (-2, 3) nats, lengths (4, 3) and (2, 1).
POLICY = PairLogps(torch.tensor([-6.0, -12.0]), torch.tensor([-16.0, -2.0]), torch.tensor([4, 2]), torch.tensor([3, 1]))
REFERENCE = torch.tensor([-10.0, -10.0]), torch.tensor([-10.0, -5.0])


def losses(spec, beta=1.0, **more):
    return resolve_mixture(spec).losses(POLICY, REFERENCE, beta=beta, **more).tolist()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_a_sum_weighs_its_terms():
    zero = [sigmoid(-4) + sigmoid(-6), sigmoid(2) + sigmoid(3)]
    sft = [6 / 4, 12 / 2]
    assert losses("apo_zero") == pytest.approx(zero)
    assert losses({"apo_zero": 2, "sft": 0.1}) == pytest.approx(
        [2 * a + 0.1 * b for a, b in zip(zero, sft, strict=True)]
    )


def test_length_normalised_log_ratios_are_means_over_tokens():
    assert losses({"dpo": {"length_normalised": True}}, beta=5) == pytest.approx(
        [math.log(1 + math.exp(-5 * (4 / 4 + 6 / 3))), math.log(1 + math.exp(-5 * (-2 / 2 - 3 / 1)))]
    )
    unpaired = losses({"apo_zero_unpaired": {"length_normalised": True}})
    paired = losses({"apo_zero": {"length_normalised": True}})
    assert unpaired == pytest.approx([loss / 2 for loss in paired])


def test_kto_takes_the_kl_that_is_measured_as_its_log_ratios_are():
    summed, per_token = 2.0, 0.5
    values = losses({"kto": 1.0}, kl=(summed, per_token))
    assert values[0] == pytest.approx((sigmoid(2 - 4) + sigmoid(-6 - 2)) / 2)
    values = losses({"kto": {"length_normalised": True}}, kl=torch.tensor([summed, per_token]))
    assert values[0] == pytest.approx((sigmoid(0.5 - 1) + sigmoid(-2 - 0.5)) / 2)


def test_options_reach_the_function_and_each_term_has_its_own():
    smoothed = losses({"dpo": {"label_smoothing": 0.25}})[0]
    assert smoothed == pytest.approx(0.75 * math.log(1 + math.exp(-10)) + 0.25 * math.log(1 + math.exp(10)))
    both = losses({"dpo": {"label_smoothing": 0.25, "weight": 0.5}, "apo_zero": 1})[0]
    assert both == pytest.approx(smoothed / 2 + sigmoid(-4) + sigmoid(-6))
    # -6 / 4 + 16 / 3 nats a token
    assert losses({"simpo": {"gamma": 3}})[0] == pytest.approx(math.log(1 + math.exp(3 + 6 / 4 - 16 / 3)))


def test_a_function_of_yours_mixes_with_names():
    def hinge(chosen, rejected, *, beta, margin=1.0):
        return (margin - beta * (chosen - rejected)).relu()

    mixture = resolve_mixture({hinge: {"margin": 12}, "sft": 1})
    assert mixture.losses(POLICY, REFERENCE, beta=1.0).tolist() == pytest.approx([2 + 1.5, 17 + 6])
    assert mixture.spec == {"hinge": {"margin": 12}, "sft": 1}


def test_a_sum_needs_the_inputs_of_its_terms():
    specs = ("sft", {"sft": 1, "simpo": 1}, {"sft": 1, "dpo": 1})
    assert [resolve_mixture(spec).needs_reference for spec in specs] == [False, False, True]
    assert resolve_mixture({"sft": 1, "kto": 0.1}).needs_divergence
    assert not resolve_mixture({"sft": 1, "apo_zero_unpaired": 0.1}).needs_divergence


# Every objective with every option it has, away from its default, in sums too, and where it is on log-ratios also on
# those of a mean token.
OPTIONS = {
    "dpo": {"label_smoothing": 0.2}, "robust": {"label_smoothing": 0.3}, "simpo": {"gamma": 1.5},
    "kto": {"desirable_weight": 0.5, "undesirable_weight": 3.0},
    "apo_zero_unpaired": {"desirable_weight": 2.0, "undesirable_weight": 0.25},
}  # fmt: skip
ON_RATIOS = [name for name in OBJECTIVES if name not in ("ipo", "sft", "simpo")]
SPECS = [
    *OBJECTIVES,
    *({name: options} for name, options in OPTIONS.items()),
    *({name: {"length_normalised": True, **OPTIONS.get(name, {})}} for name in ON_RATIOS),
    dict.fromkeys(OBJECTIVES, 0.5),
]


def test_every_option_of_every_objective_is_tried_out():
    for name in OBJECTIVES:
        options = set(_option_names(resolve_objective(name)))
        assert options == set(OPTIONS.get(name, {}))
        if name in ON_RATIOS:
            assert resolve_mixture({name: {"length_normalised": True}}).terms[0][1].length_normalised
        else:
            with pytest.raises(UserError, match="length_normalised would be ignored"):
                resolve_mixture({name: {"length_normalised": True}})


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: objective_title(spec)[:60])
def test_derivatives_agree_with_finite_differences_in_float64(spec):
    """For pairs and, if the objective takes them, unpaired rows, of differing lengths."""
    mixture = resolve_mixture(spec)
    line = torch.linspace(-3, 3, 5, dtype=torch.float64)
    lengths = torch.tensor([[1, 2, 3, 4, 5], [2, 3, 1, 6, 4]])
    reference = torch.stack([-line.flip(0) / 3, line.square() / 7])
    for present in (torch.ones(2, 5), torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]])):
        if not present.all() and mixture.paired_only_reason:
            continue
        present = present.double()
        counts = (lengths * present).long()

        def loss(chosen, rejected, present=present, counts=counts):
            policy = PairLogps(chosen * present[0], rejected * present[1], *counts)
            return mixture.losses(policy, tuple(reference * present), beta=0.7, kl=(1.3, 0.4))

        inputs = line.clone().requires_grad_(), (0.8 - 1.1 * line).requires_grad_()
        assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: objective_title(spec)[:60])
@pytest.mark.parametrize("size", [20.0, 1e4])
def test_losses_and_gradients_are_finite_at_extremes_in_float32(spec, size):
    extremes = torch.tensor([[size, -size, size, -size], [-size, size, size, -size]])
    leaves = [end.clone().requires_grad_() for end in extremes]
    for length in (1, 1000):
        policy = PairLogps(*leaves, torch.full((4,), length), torch.full((4,), length))
        values = resolve_mixture(spec).losses(policy, (torch.zeros(4), torch.zeros(4)), beta=1.0, kl=(size, size))
        slopes = torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True)
        assert values.isfinite().all()
        assert torch.stack(slopes).isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_can_be_one_term(name):
    assert losses({name: 3.0}) == pytest.approx([3 * loss for loss in losses(name)])
    assert resolve_mixture(name).spec == name


def test_length_normalisation_is_offered_to_those_on_log_ratios_that_do_not_see_to_it():
    for name in OBJECTIVES:
        spec = {name: {"length_normalised": True}}
        if name in ("ipo", "sft", "simpo"):
            with pytest.raises(UserError, match="would be ignored"):
                resolve_mixture(spec)
        else:
            assert resolve_mixture(spec).terms[0][1].length_normalised


def test_titles_are_short():
    assert objective_title("dpo") == "dpo"
    assert objective_title({"apo_zero": 1.0, "sft": 0.1}) == "apo_zero + 0.1 sft"
    assert objective_title({"dpo": {"label_smoothing": 0.1, "weight": 2}}) == "2 dpo(label_smoothing=0.1)"
    assert resolve_mixture(resolve_objective("dpo")).name == "dpo"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "objective is empty"),
        ({"apo_zer": 1}, "unknown objective 'apo_zer' (did you mean 'apo_zero'?)"),
        ({"apo_zero": 0}, "apo_zero: weight is 0; it must be above 0, or leave the objective out"),
        ({"apo_zero": -1, "sft": 1}, "weight is -1"),
        ({"apo_zero": float("nan")}, "weight is nan; it is a finite number"),
        ({"apo_zero": True}, "weight is True; it is a finite number"),
        ({"apo_zero": "much"}, "weight is 'much'"),
        ({"dpo": {"label_smothing": 0.1}}, "dpo has no option 'label_smothing' (did you mean 'label_smoothing'?)"),
        (
            {"apo_zero": {"label_smoothing": 0.1}},
            "apo_zero has no option 'label_smoothing'; allowed: length_normalised",
        ),
        ({"dpo": {"label_smoothing": 0.5}}, "objective dpo: label_smoothing is 0.5; it is a share of wrong labels"),
        ({"robust": {"label_smoothing": -0.1}}, "objective robust: label_smoothing is -0.1"),
        ({"simpo": {"gamma": -1}}, "objective simpo: gamma is -1; it must be 0 or above"),
        ({"simpo": {"gamma": None}}, "gamma is None; it is a finite number"),
        ({"dpo": {"beta": 0.1}}, "beta is a key of the recipe's top level"),
        ({"dpo": {"length_normalised": 1}}, "length_normalised is 1; it is true or false"),
        ({"sft": 1, OBJECTIVES["sft"]: 2}, "names sft twice"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(spec, message):
    with pytest.raises(UserError) as error:
        resolve_mixture(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
