"""Objectives: values by hand, properties, derivatives."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apo.losses import objectives
from apo.losses.objectives import (
    OBJECTIVES,
    apo_down,
    apo_hinge_zero,
    apo_zero,
    apo_zero_unpaired,
    dpo,
    ipo,
    kto,
    resolve_objective,
    robust,
    sft,
    simpo,
)
from clair.core.errors import UserError
from tests.apo.losses.derivatives import gradients

# (r_w, r_l): gradients of zero, down and dpo with respect to (r_w, r_l), from the paper's derivation, by hand.
GRADIENTS = {
    (0.0, 0.0): [(-0.2500, 0.2500), (0.0000, 0.2500), (-0.5000, 0.5000)],
    (0.5, -0.5): [(-0.2350, 0.2350), (0.0384, 0.1966), (-0.2689, 0.2689)],
    (1.0, -2.0): [(-0.1966, 0.1050), (0.1514, 0.0452), (-0.0474, 0.0474)],
    (-1.0, -3.0): [(-0.1966, 0.0452), (0.0916, 0.1050), (-0.1192, 0.1192)],
    (-2.0, -2.0): [(-0.1050, 0.1050), (-0.1450, 0.2500), (-0.5000, 0.5000)],
}
PAIRED = (apo_zero, apo_down, dpo)
UNPAIRED = (apo_zero_unpaired, kto)
rewards = st.floats(-15, 15, width=32)  # past 37 sigmoid is 1 in float64, and its derivative 0


@pytest.mark.parametrize("rewards", GRADIENTS)
@pytest.mark.parametrize("which", range(3), ids=[f.__name__ for f in PAIRED])
def test_gradients_are_those_worked_out_by_hand(rewards, which):
    assert gradients(PAIRED[which], *rewards, beta=1.0) == pytest.approx(GRADIENTS[rewards][which], abs=6e-5)


@pytest.mark.parametrize(
    ("objective", "start"),
    [
        (apo_zero, 1.0),
        (apo_down, 1.0),
        (dpo, math.log(2)),
        (apo_zero_unpaired, 0.5),
        (kto, 0.5),
        (apo_hinge_zero, 2.0),
        (robust, math.log(2)),
    ],
)
def test_the_loss_at_the_start_is_the_one_in_the_docstring(objective, start):
    second = torch.tensor([True, False]) if objective in UNPAIRED else torch.zeros(2)
    assert objective(torch.zeros(2), second, beta=0.1).tolist() == pytest.approx([start, start])


def test_beta_scales_logratios_into_rewards():
    logratios = torch.tensor([3.0, -7.0]), torch.tensor([1.0, 2.0])
    for objective in PAIRED:
        torch.testing.assert_close(
            objective(*logratios, beta=0.5), objective(logratios[0] * 0.5, logratios[1] * 0.5, beta=1.0)
        )


@given(rewards, rewards)
def test_unpaired_apo_zero_is_exactly_half_of_apo_zero(chosen, rejected):
    both = apo_zero_unpaired(torch.tensor([chosen, rejected]), torch.tensor([True, False]), beta=1.0)
    assert both.mean().item() == apo_zero(torch.tensor([chosen]), torch.tensor([rejected]), beta=1.0).item() / 2


def test_kto_by_hand():
    # beta 0.5, kl 2 nats: z0 = 1. Desirable r = 0.5: sigmoid(1 - 0.5). Undesirable r = -1: sigmoid(-1 - 1).
    losses = kto(torch.tensor([1.0, -2.0]), torch.tensor([True, False]), beta=0.5, kl=2.0)
    assert losses.tolist() == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(2))])


@given(rewards, st.booleans(), st.floats(-50, 0))
def test_kto_without_divergence_is_unpaired_apo_zero(reward, desirable, kl):
    args = torch.tensor([reward]), torch.tensor([desirable])
    assert torch.equal(kto(*args, beta=1.0, kl=kl), apo_zero_unpaired(*args, beta=1.0))


def test_the_kl_of_kto_carries_no_gradient():
    kl = torch.tensor(2.0, requires_grad=True)
    loss = kto(torch.tensor([1.0], requires_grad=True), torch.tensor([True]), kl=kl)
    assert torch.autograd.grad(loss.sum(), kl, allow_unused=True) == (None,)


def test_sft_by_hand_weighs_pairs_alike():
    losses = sft(torch.tensor([-6.0, -5.0]), torch.tensor([-1.0, -1.0]), torch.tensor([3, 10]), torch.tensor([1, 1]))
    assert losses.tolist() == pytest.approx([2.0, 0.5])


def test_apo_hinge_zero_by_hand_pulls_fully_until_a_response_is_one_past_the_anchor():
    # beta 0.5: rewards (1.5, -0.5), (-1, 2), (1, -1). A winner above 1 and a loser below -1 have nothing to gain.
    chosen = torch.tensor([3.0, -2.0, 2.0], requires_grad=True)
    rejected = torch.tensor([-1.0, 4.0, -2.0], requires_grad=True)
    losses = apo_hinge_zero(chosen, rejected, beta=0.5)
    assert losses.tolist() == [0 + 0.5, 2 + 3, 0]
    losses.sum().backward()
    assert (chosen.grad.tolist(), rejected.grad.tolist()) == ([0, -0.5, 0], [0.5, 0.5, 0])


def test_label_smoothing_by_hand():
    # sigmoid(log 3) = 3/4. The smoothed loss is least where sigmoid of the margin is 1 - e.
    margin = torch.tensor([math.log(3)], requires_grad=True)
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    smoothed = dpo(margin, torch.zeros(1), beta=1.0, label_smoothing=0.25)
    assert smoothed.item() == pytest.approx(0.75 * right + 0.25 * wrong)
    assert torch.autograd.grad(smoothed.sum(), margin)[0].item() == pytest.approx(0, abs=1e-7)
    unbiased = robust(margin, torch.zeros(1), beta=1.0, label_smoothing=0.25)
    assert unbiased.item() == pytest.approx((0.75 * right - 0.25 * wrong) / 0.5)


@given(rewards, rewards, st.floats(0, 0.45))
def test_robust_dpo_is_dpo_on_average_over_flipped_labels(chosen, rejected, share):
    winner, loser = torch.tensor([chosen], dtype=torch.float64), torch.tensor([rejected], dtype=torch.float64)
    unflipped, flipped = (robust(*pair, beta=1.0, label_smoothing=share) for pair in ((winner, loser), (loser, winner)))
    average = (1 - share) * unflipped + share * flipped
    assert average.item() == pytest.approx(dpo(winner, loser, beta=1.0).item(), abs=1e-9)


def test_ipo_by_hand_draws_every_pair_to_one_margin_per_token():
    # beta 0.25 asks for 2 nats a token. 12 / 4 - 3 / 3 = 2: there. 4 / 4 - (-6) / 3 = 3: one too far.
    chosen = torch.tensor([12.0, 4.0], requires_grad=True)
    losses = ipo(chosen, torch.tensor([3.0, -6.0]), torch.tensor([4, 4]), torch.tensor([3, 3]), beta=0.25)
    assert losses.tolist() == [0.0, 1.0]
    losses.sum().backward()
    assert chosen.grad.tolist() == [0.0, 2 * 1 / 4]


def test_simpo_by_hand():
    # -6 / 3 = -2 and -12 / 4 = -3 nats a token; beta 2 makes 2 of the difference, gamma 0.5 leaves 1.5.
    logps, lengths = (torch.tensor([-6.0]), torch.tensor([-12.0])), (torch.tensor([3]), torch.tensor([4]))
    assert simpo(*logps, *lengths, beta=2.0, gamma=0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))


@given(rewards, rewards)
def test_apo_zero_always_raises_winners_and_lowers_losers(chosen, rejected):
    winner, loser = gradients(apo_zero, chosen, rejected, beta=1.0)
    assert winner < 0 < loser


@given(rewards, rewards)
def test_apo_down_lowers_losers_always_and_winners_once_the_margin_exceeds_them(chosen, rejected):
    winner, loser = gradients(apo_down, chosen, rejected, beta=1.0)
    assert loser > 0
    if abs(chosen - rejected) > abs(chosen) + 1e-3:
        assert winner > 0  # a positive derivative of the loss: the step goes down
    elif abs(chosen - rejected) < abs(chosen) - 1e-3:
        assert winner < 0


@given(rewards, rewards)
def test_dpo_moves_both_by_the_same_amount(chosen, rejected):
    winner, loser = gradients(dpo, chosen, rejected, beta=1.0)
    assert winner == -loser < 0


@given(rewards, rewards, st.permutations(range(4)))
def test_the_order_of_pairs_changes_nothing(first, second, order):
    chosen, rejected = torch.tensor([first, second, 0.5, 1.5]), torch.tensor([second, 1.0, first, -3.0])
    for objective in PAIRED:
        shuffled = objective(chosen[list(order)], rejected[list(order)])
        assert torch.equal(objective(chosen, rejected)[list(order)], shuffled)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
@pytest.mark.parametrize("size", [20.0, 1e4])
def test_losses_and_gradients_are_finite_at_extremes_in_float32(objective, size):
    described = resolve_objective(objective)
    first = torch.tensor([size, -size, size, -size], requires_grad=True)
    second = torch.tensor([-size, size, size, -size])
    second = second > 0 if described.kind == "unpaired" else second
    lengths = {"chosen_len": torch.ones(4), "rejected_len": torch.ones(4)}
    losses = described(first, second, beta=1.0, kl=3.0, **lengths)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert first.grad.isfinite().all()


def test_the_gradient_survives_where_one_minus_sigmoid_loses_it():
    reward = torch.tensor([20.0], requires_grad=True)
    apo_zero(reward, torch.zeros(1), beta=1.0).sum().backward()
    assert reward.grad.item() == pytest.approx(-math.exp(-20), rel=1e-3)
    naive = torch.tensor([20.0], requires_grad=True)
    (1 - naive.sigmoid()).sum().backward()
    assert naive.grad.item() == 0.0  # the reason for the spelling


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_derivatives_agree_with_finite_differences_in_float64(objective):
    described = resolve_objective(objective)
    first = torch.linspace(-3, 3, 5, dtype=torch.float64, requires_grad=True)
    if described.kind == "unpaired":
        second = torch.tensor([True, False, True, False, True])
        assert torch.autograd.gradcheck(lambda x: described(x, second, beta=0.7, kl=1.3), (first,))
        return
    second = torch.linspace(2, -4, 5, dtype=torch.float64, requires_grad=True)
    lengths = {"chosen_len": torch.arange(1, 6), "rejected_len": torch.arange(2, 7)}
    inputs = (first, second.detach()) if objective is sft else (first, second)  # which does not read the losers
    assert torch.autograd.gradcheck(lambda winner, loser: described(winner, loser, beta=0.7, **lengths), inputs)


def test_every_public_loss_is_registered_under_its_name():
    assert sorted(OBJECTIVES) == [
        "apo_down", "apo_hinge_zero", "apo_zero", "apo_zero_unpaired", "dpo", "ipo", "kto", "robust", "sft", "simpo",
    ]  # fmt: skip
    assert all(getattr(objectives, name) is function for name, function in OBJECTIVES.items())


def test_a_users_function_is_an_objective_of_the_kind_its_parameters_say():
    def hinge(chosen, rejected, *, beta, margin=1.0):
        return (margin - beta * (chosen - rejected)).relu()

    described = resolve_objective(hinge)
    assert (described.name, described.kind, described.inputs) == ("hinge", "paired", {"beta"})
    assert described(torch.tensor([4.0]), torch.tensor([0.0]), beta=0.1, kl=0.0).tolist() == pytest.approx([0.6])
    wide = resolve_objective(functools.partial(hinge, margin=2.0))
    assert (wide.name, wide.kind) == ("hinge", "paired")
    assert not resolve_objective(lambda chosen_logp, rejected_logp: -chosen_logp).needs_reference


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "apo_zer",
            "unknown objective 'apo_zer' (did you mean 'apo_zero'?); allowed: apo_down, apo_hinge_zero, apo_zero",
        ),
        (7, "objective is int, not a name or a function"),
        (lambda a, b: a, "takes (a, b, ...); name its first two parameters (chosen, rejected, ...)"),
        (lambda chosen, rejected, kl: chosen, "requires 'kl', which a paired objective is not given"),
    ],
)
def test_an_invalid_objective_is_refused_in_one_line(spec, message):
    with pytest.raises(UserError) as error:
        resolve_objective(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_reduced_loss_is_refused():
    reduced = resolve_objective(lambda chosen, rejected: (chosen - rejected).mean())
    with pytest.raises(UserError, match="one loss each, unreduced"):
        reduced(torch.zeros(3), torch.zeros(3))
