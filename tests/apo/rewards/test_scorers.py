"""The rewards: by hand, their invariances, and what each infers about populations with known tastes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from apo.rewards.bradley_terry import BradleyTerry
from apo.rewards.model_selection import _min_tastes, new_scorer, select
from apo.rewards.model_selection import fit_best as best_fit
from apo.rewards.pal import PAL
from apo.rewards.scorer import Comparisons, Projection, accuracy, fit, flush_denormals, nll, split, win_rate
from apo.rewards.vpl import VPL, next_question
from clair.core.errors import UserError
from recipes.world import toy


def comparisons(synthetic: toy.ToyComparisons) -> Comparisons:
    def tensor(array):
        return torch.tensor(array, dtype=torch.float32)

    prompt = torch.zeros(len(synthetic.user), 1) if synthetic.prompt is None else tensor(synthetic.prompt)
    users = tuple(str(number) for number in range(len(synthetic.group)))
    return Comparisons(
        prompt, tensor(synthetic.chosen), tensor(synthetic.rejected), torch.tensor(synthetic.user), users
    )


def fit_best(kind: str, synthetic: toy.ToyComparisons, seed: int = 0, **options):
    data = comparisons(synthetic)
    training, held_out = split(data, (0.9, 0.1), seed)
    return fit(new_scorer(kind, data, seed=seed, **options), training, held_out, seed=seed)


def few_shot(scorer, synthetic: toy.ToyComparisons, shots: int) -> float:
    """Accuracy on later comparisons of new users, each located by their first `shots` ones."""
    data, right = comparisons(synthetic), []
    for user in range(len(synthetic.group)):
        user_data = data.by_user(user)
        state = scorer.adapt(user_data.select(range(shots)))
        held_out = user_data.select(range(20, len(user_data)))
        right.append(accuracy(scorer, held_out, state.expand(len(held_out), -1)))
    return float(np.mean(right))


# ---- by hand


def test_standard_keeps_the_directions_in_which_the_answers_of_a_pair_differ():
    standard = Projection(3)
    points = torch.tensor([[5.0, 1.0, 0.0], [5.0, 3.0, 0.0]])
    standard.fit(points, torch.tensor([[0.0, 2.0, 0.0], [0.0, -2.0, 0.0]]))
    directions = standard(points)
    # A spread of 2 in one direction and of 0 in two is a mean square of 4 / 3; 1 from the mean becomes sqrt(3 / 4).
    assert directions.shape == (2, 3)
    assert directions[:, 0].abs().tolist() == pytest.approx([0.75**0.5] * 2)
    assert directions[:, 1:].abs().max() < 1e-6
    assert Projection(100)(torch.zeros(4, 100)).shape == (4, 64)


def test_pal_a_is_nearer_to_the_ideal_point():
    pal = PAL((1, 2), users=1, prototypes=2)
    with torch.no_grad():
        for parameter in pal.f.parameters():
            parameter.zero_()
        pal.prototypes.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    first, second, prompt = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.zeros(1, 1)
    # f is the identity: the squared distances are 0 and 2, over the 2 dimensions.
    assert pal.margin(prompt, first, second, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(1.0)
    assert pal.margin(prompt, first, second, torch.tensor([[0.0, 1.0]])).item() == pytest.approx(-1.0)
    assert pal.margin(prompt, first, second, torch.tensor([[0.5, 0.5]])).item() == pytest.approx(0.0)
    with torch.no_grad():
        pal.f[-1].bias.copy_(torch.tensor([3.0, 0.0]))
    # Answers and prototypes go through the same f: moved together, they are as far apart as before.
    assert pal.margin(prompt, first, second, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(1.0)


def test_pal_b_points_where_the_prompt_says():
    pal = PAL((2, 2), users=1, prototypes=2, by_prompt=True)
    with torch.no_grad():
        for parameter in [*pal.f.parameters(), *pal.g.parameters()]:
            parameter.zero_()
        pal.g[0].linear.weight.copy_(torch.eye(2))
        pal.g[1].linear.weight.copy_(-torch.eye(2))
        pal.scale.fill_(0.0)
    prompt, first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert pal.margin(prompt, first, second, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(1.0)
    assert pal.margin(prompt, first, second, torch.tensor([[0.0, 1.0]])).item() == pytest.approx(-1.0)
    assert pal.margin(prompt.flip(1), first, second, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(-1.0)


def test_win_rate_by_hand_and_free_of_scale_offset():
    class Linear(BradleyTerry):
        def reward(self, prompt, answer, state):
            return 2 * answer[:, 0] + 7

    rate = win_rate(
        Linear((1, 1)), torch.zeros(1, 1), torch.tensor([[1.0]]), torch.zeros(1, 0), torch.tensor([[1.0], [0.0]])
    )
    assert rate.item() == pytest.approx((0.5 + 1 / (1 + np.exp(-2))) / 2)


def test_vpls_kl_and_answers_by_hand():
    """At z = mu with no spread the loss is the targets' -log P and beta times the KL of the formula."""
    vpl = VPL((1, 2), latent=2, beta=2.0)
    with torch.no_grad():
        vpl.mean.weight.zero_()
        vpl.mean.bias.copy_(torch.tensor([1.0, 0.0]))
        vpl.log_variance.weight.zero_()
        vpl.log_variance.bias.fill_(-6.0)
        vpl.decoder[-1].weight.zero_()
    data = Comparisons(*(torch.ones(4, n) for n in (1, 2, 2)), torch.zeros(4, dtype=torch.long), ("a",))
    kl = 0.5 * (1.0 + 2 * (-1 + 6 + np.exp(-6)))
    assert vpl.loss(data, step=10_000).item() == pytest.approx(np.log(2) + 2 * kl, rel=1e-5)
    assert vpl.loss(data, step=0).item() == pytest.approx(np.log(2))


def test_vpl_never_conditions_on_the_comparison_that_it_predicts():
    vpl = VPL((1, 2), latent=2, beta=0.0)
    with torch.no_grad():
        vpl.mean.weight.zero_()  # the context says nothing, so it must not matter
        vpl.log_variance.weight.zero_()
    points = torch.arange(8.0).view(2, 2, 2)

    def loss(shift, seed=0):
        torch.manual_seed(seed)
        user = torch.zeros(2, dtype=torch.long)
        return vpl.loss(Comparisons(torch.ones(2, 1), points[0] + shift, points[1], user, ("a",)), 0).item()

    first, second = torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert loss(first) == pytest.approx(loss(0.0), rel=1e-6)
    assert loss(second) != pytest.approx(loss(0.0), rel=1e-3)
    assert loss(0.0, seed=1) != pytest.approx(loss(0.0), rel=1e-6)  # z is drawn


def test_the_next_question_is_one_that_tastes_differ_on_and_not_one_that_nobody_cares_for():
    class Two(VPL):
        def sample(self, given, samples, random):
            return torch.tensor([[1.0], [-1.0]]).repeat(samples // 2, 1)

        def reward(self, prompt, answer, state):
            return 3 * answer[:, 0] * state[:, 0]

    # Everybody is undecided about the first: p is 1/2 for both tastes. About the second each is sure, of the opposite.
    pool = Comparisons(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1), torch.tensor([-1, -1]), ())
    index, gain = next_question(Two((1, 1), latent=1), pool, pool.select([]))
    sure = 1 / (1 + np.exp(-3))
    assert index == 1
    assert gain == pytest.approx(np.log(2) + sure * np.log(sure) + (1 - sure) * np.log(1 - sure), abs=1e-4)
    assert next_question(Two((1, 1), latent=1), pool, pool.select([]), excluded={1})[0] == 0


def test_the_order_of_a_context_does_not_matter_and_its_orientation_does():
    vpl = VPL((1, 8))
    data = comparisons(toy.four_types(1, 8))
    z = vpl.adapt(data)
    assert torch.allclose(vpl.adapt(data.select([3, 1, 7, 0, 2, 6, 5, 4])), z, atol=1e-5)
    assert not torch.allclose(vpl.adapt(replace(data, chosen=data.rejected, rejected=data.chosen)), z, atol=1e-3)


def test_a_bounded_latent_is_clamped_and_has_one_length_in_training_and_for_a_user():
    data = comparisons(toy.four_types(4, 16))
    vpl = VPL((1, 8), latent=4, bounded=True)
    with torch.no_grad():
        vpl.mean.bias.copy_(torch.tensor([9.0, -9.0, 0.5, 0.0]))
        vpl.mean.weight.zero_()
        vpl.log_variance.bias.fill_(-9.0)
    mu, log_variance = vpl.encode(data.chosen[None], data.rejected[None])
    assert torch.equal(mu, torch.tensor([[1.0, -1.0, 0.5, 0.0]]))
    assert log_variance.min() == -1
    expected = 2 * mu[0] / 1.5
    assert torch.allclose(vpl.adapt(data), expected)
    vpl.states = vpl.user_states(data)
    assert torch.allclose(vpl.states, expected.expand(4, -1))
    draws = vpl.sample(data, 8, torch.Generator().manual_seed(0))
    assert torch.allclose(draws.norm(dim=-1), torch.full((8,), 2.0))
    read: list[torch.Tensor] = []
    vpl.reward = lambda prompt, answer, state: (read.append(state), answer[:, 0])[1]
    vpl.loss(vpl.batches(data, torch.Generator().manual_seed(0), 64)[0], 0)
    assert torch.allclose(read[0].norm(dim=-1), torch.tensor(2.0))
    assert VPL((1, 8)).adapt(data).norm() != pytest.approx(8**0.5)


def test_parts_have_some_of_every_user_and_little_known_users_are_fitted_only():
    user = torch.tensor([0] * 10 + [1] * 10 + [2] * 4 + [3])
    data = Comparisons(*(torch.zeros(25, 1) for _ in range(3)), user, ("a", "b", "c", "d"))
    subsets = split(data, (0.6, 0.2, 0.2))
    assert [subset.user.bincount(minlength=4).tolist() for subset in subsets] == [
        [6, 6, 4, 1],
        [2, 2, 0, 0],
        [2, 2, 0, 0],
    ]


def test_a_batch_of_vpl_never_gives_away_a_target_and_leaves_single_comparisons_out():
    user = torch.tensor([0] * 40 + [1] * 3 + [2])
    marks = torch.arange(44.0)[:, None]
    data = Comparisons(marks, marks, marks, user, ("a", "b", "c"))
    batches = VPL((1, 1)).batches(data, torch.Generator().manual_seed(0), 64)
    for batch in batches:
        for draw in batch.user.unique():
            same_user = batch.chosen[batch.user == draw].squeeze(1).long()
            assert len(same_user.unique()) == len(same_user) in (16, 3)
            assert len(user[same_user].unique()) == 1
    assert 43 not in torch.cat([batch.chosen for batch in batches])
    with pytest.raises(UserError, match="no user has two comparisons"):
        VPL((1, 1)).batches(data.select([0, 41, 43]), torch.Generator(), 64)


def test_fitting_again_gives_the_same_numbers():
    synthetic = toy.bimodal(6, 10)
    first, second = (fit_best("pal", synthetic) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_with_held_out_comparisons_the_epoch_that_predicts_them_best_is_kept():
    data = comparisons(toy.shared_taste(4, 20, noise=0.3))
    training, held_out = split(data, (0.6, 0.4))
    best, last = (fit(new_scorer("bradley_terry", data), training, validation) for validation in (held_out, None))
    assert nll(best, held_out).mean() < nll(last, held_out).mean() - 0.05


@pytest.mark.parametrize("kind", ["bradley_terry", "pal", "vpl"])
def test_every_reward_learns_one_taste_and_scores_through_one_interface(kind):
    synthetic = toy.shared_taste(8, 30)
    scorer, data = fit_best(kind, synthetic), comparisons(toy.shared_taste(8, 30, seed=1))
    assert accuracy(scorer, data) > 0.8
    states = scorer.state_rows(data.user)
    margin = scorer.margin(data.prompt, data.chosen, data.rejected, states)
    assert torch.allclose(nll(scorer, data), softplus(-margin).detach())
    assert torch.allclose(scorer.margin(data.prompt, data.rejected, data.chosen, states), -margin, atol=1e-5)
    assert scorer.state_rows(torch.tensor([-1])).shape == (1, states.shape[1])
    located = scorer.adapt(data.by_user(0))
    assert located.shape == states[0].shape
    if kind == "pal":  # weights of prototypes
        assert located.sum() == pytest.approx(1.0)
        assert (located >= 0).all()
    rates = win_rate(scorer, data.prompt[:5], data.chosen[:5], states[:5], data.rejected[:9])
    assert ((rates >= 0) & (rates <= 1)).all()


def test_the_margins_of_pal_are_differences_of_distances_and_its_losses_push_the_same_way():
    data = comparisons(toy.bimodal(4, 6))
    state = torch.tensor([[0.3, 0.7]]).expand(len(data), -1)

    def scorer(**options) -> PAL:
        return new_scorer("pal", data, seed=3, **options)

    def margins(pal: PAL) -> torch.Tensor:
        return pal.margin(data.prompt, data.chosen, data.rejected, state).detach()

    pal = scorer()
    ideal = pal.embed(state @ pal.prototypes)
    chosen, rejected = ((pal.embed(pal.answers(x)) - ideal).norm(dim=-1) for x in (data.chosen, data.rejected))
    assert torch.allclose(margins(pal), (rejected**2 - chosen**2) / 8, atol=1e-5)
    norms = margins(scorer(distance="norm"))
    assert torch.allclose(norms, (rejected - chosen) / 8**0.5, atol=1e-5)
    own_state = pal.v.softmax(-1)[data.user]
    own = pal.margin(data.prompt, data.chosen, data.rejected, own_state).detach()
    assert scorer(loss="hinge").loss(data, 0).item() == pytest.approx(float((1 - own).clamp(min=0).mean()), abs=1e-6)
    assert scorer().loss(data, 0).item() == pytest.approx(float(softplus(-own).mean()), abs=1e-6)


def test_pal_learns_and_locates_a_user_with_the_norm_and_the_hinge():
    pal, new = fit_best("pal", toy.bimodal(12, 30), distance="norm", loss="hinge"), toy.bimodal(4, 30, seed=99)
    assert few_shot(pal, new, 10) > 0.8


def test_comparisons_that_cannot_be_fitted_are_refused():
    data = comparisons(toy.bimodal(2, 3))
    with pytest.raises(UserError, match="did you mean 'pal'"):
        new_scorer("pall", data)
    with pytest.raises(UserError, match="prototypes is 0"):
        new_scorer("pal", data, prototypes=0)
    with pytest.raises(UserError, match="no comparisons to fit"):
        fit(new_scorer("pal", data), data.select([]))
    for kind in ("pal", "vpl"):
        with pytest.raises(UserError, match="no comparisons of the new user"):
            new_scorer(kind, data).adapt(data.select([]))


# ---- populations with known tastes


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a1_two_opposite_groups_one_reward_is_a_coin_and_two_prototypes_find_both(seed):
    synthetic, test = toy.bimodal(60, 50, seed), comparisons(toy.bimodal(60, 40, seed + 100))
    bradley_terry = accuracy(fit_best("bradley_terry", synthetic, seed), test)
    homogeneous = accuracy(fit_best("pal", synthetic, seed, prototypes=1), test)
    pal = fit_best("pal", synthetic, seed)
    both = accuracy(pal, test)
    group = pal.states.argmax(1).numpy() == synthetic.group
    purity = max(group.mean(), 1 - group.mean())
    print(f"Bradley-Terry {bradley_terry:.3f}, K = 1 {homogeneous:.3f}, K = 2 {both:.3f}, purity {purity}")
    assert bradley_terry <= 0.55
    assert homogeneous <= 0.55
    assert both >= 0.95
    assert purity == 1.0


@pytest.mark.slow
def test_a2_a_new_user_is_located_by_five_comparisons():
    pal, new = fit_best("pal", toy.bimodal(60, 50)), toy.bimodal(40, 60, seed=999)
    accuracies = {shots: few_shot(pal, new, shots) for shots in (1, 2, 5, 10, 20)}
    print(accuracies)
    assert accuracies[5] >= 0.93
    assert all(later > earlier - 0.01 for earlier, later in pairwise(accuracies.values()))


@pytest.mark.slow
def test_a2_prototypes_shared_by_all_beat_a_reward_for_each_user():
    synthetic, test = toy.bimodal(60, 20), comparisons(toy.bimodal(60, 40, seed=100))
    shared = accuracy(fit_best("pal", synthetic), test)
    data = comparisons(synthetic)
    alone = []
    for user in range(60):
        user_data, later = data.by_user(user), test.by_user(user)
        x = user_data.chosen - user_data.rejected
        w = torch.linalg.solve(x.T @ x + torch.eye(8), x.sum(0))  # ridge: each difference is to score 1
        alone.append(float(((later.chosen - later.rejected) @ w > 0).float().mean()))
    print(f"20 comparisons a user: shared {shared:.3f}, alone {np.mean(alone):.3f}")
    assert shared > np.mean(alone) + 0.03


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a3_tastes_that_depend_on_the_prompt(seed):
    data, test = comparisons(toy.by_prompt(60, 50, seed)), comparisons(toy.by_prompt(60, 40, seed=100 + seed))
    accuracies = {}
    for k in (1, 2):
        scorer = fit(new_scorer("pal", data, prototypes=k, by_prompt=True, seed=seed), data, seed=seed)
        accuracies[k] = accuracy(scorer, test)
    print(accuracies)
    assert accuracies[1] <= 0.55
    assert accuracies[2] >= 0.92


@pytest.fixture(scope="module")
def vpl():
    return fit_best("vpl", toy.four_types(400, 40))


@pytest.fixture(scope="module")
def new_users():
    return toy.four_types(200, 60, seed=77)


def bayes(synthetic: toy.ToyComparisons, shots: int) -> float:
    """Accuracy of whoever knows the four types and infers them exactly."""
    difference = (synthetic.chosen - synthetic.rejected).reshape(len(synthetic.group), -1, 8)[:, :, :4]
    fits = (difference[:, :shots] > 0).all(1)  # [users, types]: the types that agree with every answer
    votes = (fits[:, None] * np.sign(difference[:, 20:])).sum(-1)
    return float(np.where(votes == 0, 0.5, votes > 0).mean())


@pytest.mark.slow
def test_b1_four_types_are_read_from_a_few_comparisons(vpl, new_users):
    bradley_terry = accuracy(
        fit_best("bradley_terry", toy.four_types(400, 40)), comparisons(new_users), torch.zeros(200 * 60, 0)
    )
    accuracies = {shots: few_shot(vpl, new_users, shots) for shots in (1, 2, 4, 8)}
    exact = {shots: bayes(new_users, shots) for shots in accuracies}
    print(f"Bradley-Terry {bradley_terry:.3f}; VPL {accuracies}; exact {exact}")
    assert bradley_terry <= 0.70
    assert accuracies[4] >= 0.89
    assert accuracies[8] >= 0.95
    assert exact[4] - accuracies[4] <= 0.06


def actively(vpl: VPL, synthetic: toy.ToyComparisons, questions: int, users: int) -> float:
    """Accuracy after as many questions from a pool of 200, the most telling each time."""
    data = comparisons(synthetic)
    items = torch.tensor(np.random.default_rng(5).standard_normal((200, 2, 8)), dtype=torch.float32)
    pool = Comparisons(torch.zeros(200, 1), items[:, 0], items[:, 1], torch.full((200,), -1), ())
    right = []
    for user in range(users):
        group, answered, queried = int(synthetic.group[user]), pool.select([]), set()
        for number in range(questions):
            index, gain = next_question(vpl, pool, answered, excluded=queried, seed=number)
            assert gain >= -1e-4
            assert index not in queried
            queried.add(index)
            indices = sorted(queried)
            some = pool.select(indices)
            likes = (some.chosen[:, group] > some.rejected[:, group])[:, None]
            turned = some.chosen.where(likes, some.rejected), some.rejected.where(likes, some.chosen)
            answered = replace(some, chosen=turned[0], rejected=turned[1])
        user_data = data.by_user(user)
        right.append(accuracy(vpl, user_data, vpl.adapt(answered).expand(len(user_data), -1)))
    return float(np.mean(right))


@pytest.mark.slow
def test_b2_four_chosen_questions_are_worth_more_than_four_random_ones(vpl, new_users):
    random, active = few_shot(vpl, new_users, 4), actively(vpl, new_users, 4, 80)
    two = actively(vpl, new_users, 2, 80)
    print(f"4 random {random:.3f}, 4 chosen {active:.3f}, 2 chosen {two:.3f}")
    assert active >= random + 0.03
    assert two >= random


@pytest.mark.slow
def test_b3_a_large_beta_collapses_and_it_is_seen(vpl, new_users):
    synthetic = toy.four_types(400, 40)
    collapsed = fit_best("vpl", synthetic, beta=1.0)
    bradley_terry = accuracy(fit_best("bradley_terry", synthetic), comparisons(new_users), torch.zeros(200 * 60, 0))
    few_shot_accuracy = few_shot(collapsed, new_users, 8)
    health, good = (scorer.health(comparisons(synthetic)) for scorer in (collapsed, vpl))
    print(f"beta 1: {few_shot_accuracy:.3f}, Bradley-Terry {bradley_terry:.3f}, {health}; beta 0.001: {good}")
    assert few_shot_accuracy == pytest.approx(bradley_terry, abs=0.02)
    assert health.active_units == 0
    assert health.collapsed
    assert good.active_units > 0.5
    assert not good.collapsed


# ---- whether people differ


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_several_tastes_are_recommended_where_there_are_several_and_only_there(seed, noise):
    several = select(comparisons(toy.bimodal(40, 40, seed, noise=noise)), max_tastes=3, seed=seed)
    single = select(comparisons(toy.shared_taste(40, 40, seed, noise=noise)), max_tastes=3, seed=seed)
    print(several.conclusion, "|", single.conclusion)
    assert (several.plural, several.tastes) == (True, 2)
    assert (single.plural, single.tastes) == (False, 1)
    assert "one taste:" in single.conclusion
    assert several.gain.lo > 0.01


def test_more_tastes_are_taken_only_where_they_are_surely_better():
    users = [user for user in range(10) for _ in range(4)]
    two = torch.full((40,), 0.5)
    spread = torch.tensor([1.0, -1.0] * 20).repeat_interleave(1)
    noise = torch.tensor([[1.0, -1.0][user % 2] for user in users])
    assert _min_tastes({2: two, 3: two - 0.2 + 0.1 * spread}, users) == 3
    assert _min_tastes({2: two, 3: two - 0.2 + noise}, users) == 2
    assert _min_tastes({2: two, 3: two + 0.2}, users) == 2
    assert _min_tastes({2: two, 3: two - 0.2, 4: two - 0.2 - 0.1 * noise.abs() + 0.1}, users) == 3
    assert _min_tastes({}, users) is None


@pytest.mark.parametrize(
    ("gains", "plural"),
    [([0.3, 0.31, 0.29, 0.3, 0.3, 0.3], True), ([3.0, 0, 0, 0, 0, 0], False), ([0.0] * 6, False), ([0.005] * 6, False)],
)
def test_the_gate_goes_by_the_part_that_nothing_was_chosen_on_and_by_its_interval(monkeypatch, gains, plural):
    """Several tastes fit and choose better always; what they gain on the judging part, by user, is given."""

    def fake_nll(scorer, subset):
        tastes, others = scorer
        if any(subset is candidate for candidate in others):
            return torch.full((len(subset),), 1.0 / tastes)
        return 1.0 - (tastes > 1) * torch.tensor(gains)[subset.user]

    def fake_fitted(kind, data, training, valid, *, prototypes, **_):
        return prototypes, (training, valid)

    monkeypatch.setattr("apo.rewards.model_selection.fit_best", fake_fitted)
    monkeypatch.setattr("apo.rewards.model_selection.nll", fake_nll)
    selection = select(comparisons(toy.bimodal(6, 20)), max_tastes=2)
    assert selection.plural == plural
    assert selection.gain.mean == pytest.approx(np.mean(gains), abs=1e-6)


@pytest.mark.slow
def test_three_tastes_are_recognised_as_three():
    points = np.eye(8)[:3]
    data = comparisons(toy.ideal_points(points, 30, 40, 0))
    subsets = split(data, (0.6, 0.2, 0.2))
    stuck = fit(new_scorer("pal", data, prototypes=3), *subsets[:2])
    better = best_fit("pal", data, *subsets[:2], prototypes=3)
    assert nll(better, subsets[0]).mean() < nll(stuck, subsets[0]).mean() - 0.05
    selection = select(data, max_tastes=4)
    print(selection.conclusion, [(c.name, c.choosing) for c in selection.candidates])
    assert (selection.plural, selection.tastes) == (True, 3)


def test_too_few_users_cannot_be_distinguished():
    single = comparisons(toy.bimodal(1, 30))
    with pytest.raises(UserError, match="1 of 1 users have the five comparisons"):
        select(single)
    data = comparisons(toy.bimodal(4, 3))
    with pytest.raises(UserError, match="0 of 4 users have the five comparisons"):
        select(data)


def test_fitting_leaves_small_numbers_as_they_were():
    @flush_denormals()
    def smallest():
        return float(torch.tensor(1e-40) * 1.0)

    assert (smallest(), float(torch.tensor(1e-40) * 1.0) > 0) == (0.0, True)
