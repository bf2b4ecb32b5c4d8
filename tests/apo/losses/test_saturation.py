"""Which pairs are pulled at no more: by hand, and by closed forms against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from apo.losses.mixture import resolve_mixture
from apo.losses.objectives import OBJECTIVES
from apo.losses.saturation import gradient_size, max_gradient_size, objective_notes, saturation_mask
from apo.packing.logps import PairLogps

LINE = torch.linspace(-8, 8, 65, dtype=torch.float64)
NOTHING = (torch.zeros(1, dtype=torch.float64),) * 2


def pairs_at(chosen, rejected, beta=1.0, chosen_len=3.0, rejected_len=5.0):
    """Pairs at these rewards, with a reference that is not 0."""
    chosen, rejected = torch.as_tensor(chosen).double(), torch.as_tensor(rejected).double()
    lengths = torch.full_like(chosen, chosen_len), torch.full_like(chosen, rejected_len)
    reference = torch.full_like(chosen, -7.0), torch.full_like(chosen, -9.0)
    return PairLogps(reference[0] + chosen / beta, reference[1] + rejected / beta, *lengths), reference


def saturation(objective, chosen, rejected, beta=1.0, **more):
    policy, reference = pairs_at(chosen, rejected, beta, **more)
    zero = torch.zeros_like(policy.chosen)
    share = saturation_mask(resolve_mixture(objective), policy, reference, beta=beta, kl=(zero, zero))
    return None if share is None else share.tolist()


def test_by_hand():
    # The pull of DPO is sigmoid(-margin), under 0.05 beyond log 19 = 2.944; of APO-zero sigmoid(r) sigmoid(-r) <= 1/4.
    assert saturation("dpo", [2.9, 3.0, -9.0], [0.0, 0.0, 0.0]) == [False, True, False]
    assert saturation("dpo", [29.0, 30.0], [0.0, 0.0], beta=0.1) == [True, True]
    edge = math.log((1 + math.sqrt(0.95)) / (1 - math.sqrt(0.95)))  # 4.357
    assert saturation("apo_zero", [edge - 0.01, edge + 0.01], [-9.0, -9.0]) == [False, True]
    assert saturation("apo_zero", [-9.0, 9.0, 9.0], [9.0, -9.0, 0.0]) == [True, True, False]  # lost ones too
    assert saturation("apo_hinge_zero", [1.1, 0.9], [-1.1, -1.1]) == [True, False]
    # IPO pulls by its distance from 1 / (2 beta): at the anchor as much as anywhere counts.
    assert saturation("ipo", [3 * 0.49, 3 * 0.4], [0.0, 0.0]) == [True, False]


CLOSED = {
    "apo_zero": (lambda w, g: torch.maximum(bell(w), bell(g)), 0.25),
    "apo_down": (lambda w, g: torch.maximum((bell(w) - bell(w - g)).abs(), bell(w - g)), 0.25),
    "apo_zero_unpaired": (lambda w, g: torch.maximum(bell(w), bell(g)) / 2, 0.125),
    "kto": (lambda w, g: torch.maximum(bell(w), bell(g)) / 2, 0.125),
    "apo_hinge_zero": (lambda w, g: torch.maximum((w < 1).double(), (g > -1).double()), 1.0),
    "dpo": (lambda w, g: (g - w).sigmoid(), 1.0),
}


def bell(x):
    return x.sigmoid() * (-x).sigmoid()


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("name", CLOSED)
def test_the_pull_is_its_closed_form(name, beta):
    formula, greatest = CLOSED[name]
    ((_, term),) = resolve_mixture(name).terms
    chosen, rejected = (side.flatten() + 0.01 for side in torch.meshgrid(LINE, LINE, indexing="ij"))
    policy, reference = pairs_at(chosen, rejected, beta)
    kl = (torch.zeros_like(chosen),) * 2
    pull = gradient_size(term, policy, reference, beta=beta, kl=kl)
    torch.testing.assert_close(pull, beta * formula(chosen, rejected), rtol=1e-9, atol=1e-12)
    assert max_gradient_size(term, beta) == pytest.approx(beta * greatest, rel=1e-6)


def test_lengths_do_not_decide_where_the_objective_divides_by_them():
    for objective in ("ipo", "simpo", {"apo_zero": {"length_normalised": True}}):
        short = saturation(objective, LINE * 2, -LINE * 2, chosen_len=2.0, rejected_len=2.0)
        long = saturation(objective, LINE * 20, -LINE * 20, chosen_len=20.0, rejected_len=20.0)
        assert True in short
        assert False in short
        if objective != "simpo":  # which looks at log-probs, and those of the reference stand still
            assert short == long


def test_ktos_divergence_moves_the_middle():
    policy, reference = pairs_at([6.0, 6.0], [-6.0, 6.0])
    far = torch.full_like(policy.chosen, 6.0)
    still = saturation_mask(resolve_mixture("kto"), policy, reference, beta=1.0, kl=(far * 0, far * 0))
    moved = saturation_mask(resolve_mixture("kto"), policy, reference, beta=1.0, kl=(far, far))
    assert (still.tolist(), moved.tolist()) == ([True, True], [False, False])


def test_a_mixture_is_saturated_where_all_of_its_terms_that_can_be_are():
    assert saturation({"apo_zero": 1.0, "sft": 0.1}, [9.0, 0.0], [-9.0, 0.0]) == [True, False]
    assert saturation({"apo_zero": 1.0, "apo_hinge_zero": 1.0}, [3.0, 9.0], [-3.0, -9.0]) == [False, True]
    assert saturation("sft", [9.0], [-9.0]) is None
    assert saturation("robust", [30.0], [-30.0]) is None


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_is_saturated_at_its_start(name):
    beta = 0.1
    assert saturation(name, [0.0], [0.0], beta=beta) in ([False], None)


def test_a_function_of_the_users_is_taken_by_autograd():
    def squared(chosen, rejected, *, beta):
        return (1 - beta * (chosen - rejected)).relu() ** 2

    assert saturation(squared, [0.0, 0.99, 1.5], [0.0, 0.0, 0.0]) == [False, True, True]


def test_an_unpaired_row_is_judged_by_its_one_response():
    # 4.5 is past APO-zero's edge of 4.357, 4.0 is not; whether the row has a partner changes nothing.
    for missing in ("chosen_len", "rejected_len"):
        rewards = [4.5, 4.0]
        chosen, rejected = (rewards, [0.0, 0.0]) if missing == "rejected_len" else ([0.0, 0.0], [-4.5, -4.0])
        assert saturation("apo_zero_unpaired", chosen, rejected, **{missing: 0.0}) == [True, False]


def test_the_sizes_of_a_mixtures_terms_at_these_lengths_are_reported():
    """By hand: APO-zero pulls at a nat with beta / 4 = 0.025, 0.1 sft with 0.1 / length."""
    lengths = [(10, 5)] + [(17, 9)] * 8 + [(300, 20)] * 2
    (note,) = objective_notes(resolve_mixture({"apo_zero": 1.0, "sft": 0.1}), 0.1, lengths)
    assert "the gradient of sft is 24 % of that of apo_zero on responses of 17 tokens (the median)" in note
    assert note.endswith("24 % on responses of 17, and 1.3 % on responses of 300")


def test_a_mixture_on_unpaired_rows_is_reported_per_row():
    """A row is one example: KTO pulls at it with beta / 4, twice as hard as at half of a pair."""
    (note,) = objective_notes(resolve_mixture({"kto": 1.0, "sft": 0.1}), 0.1, [(20, 0), (0, 20), (20, 0)])
    assert "is 20 % of that of kto" in note


@pytest.mark.parametrize(
    ("objective", "beta", "lead"),
    [("ipo", 0.1, "2.5"), ("simpo", 0.1, "13"), ({"dpo": {"length_normalised": True}}, 0.1, "11")],
)
def test_an_objective_that_hardly_saturates_at_this_beta_is_reported_in_nats_a_token(objective, beta, lead):
    """By hand: IPO's slope halves at half its margin of 1 / (2 beta); sigmoid(-beta d) at beta d = log 3."""
    (note,) = objective_notes(resolve_mixture(objective), beta, [(40, 40)] * 3)
    assert f"until the chosen response leads by {lead}" in note


@pytest.mark.parametrize(
    ("objective", "beta"),
    [("ipo", 1.0), ("simpo", 2.0), ({"dpo": {"length_normalised": True}}, 5.0), ("apo_zero", 0.1), ("sft", 0.1)],
)
def test_a_usual_beta_gives_no_note(objective, beta):
    assert objective_notes(resolve_mixture(objective), beta, [(4, 3)] * 3) == []
