"""E1: one policy for two groups that want opposite things, and one for each group that a reward infers."""

from __future__ import annotations

import pytest
import torch

from apo.losses.objectives import apo_zero
from recipes.experiments.tastes import run
from recipes.experiments.tastes.users import comparisons, group_of, liking, mean_win_rates, win_rate
from recipes.world import toy
from tests.apo.rewards import test_scorers as scorers


def policy(chosen, rejected, steps: int = 150):
    """theta of the policy p(x) ~ exp(theta . x) over points of the sphere, trained by APO-zero from the even one."""
    theta = torch.zeros(8, requires_grad=True)
    points = sphere(1)
    optimizer = torch.optim.Adam([theta], lr=0.3)
    for _ in range(steps):
        even = (points @ theta).logsumexp(0) - torch.tensor(float(len(points))).log()
        loss = apo_zero(chosen @ theta - even, rejected @ theta - even, beta=0.1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return theta.detach()


def sphere(seed: int):
    points = torch.randn(2000, 8, generator=torch.Generator().manual_seed(seed))
    return points / points.norm(dim=1, keepdim=True)


def wins(theta, ideal) -> float:
    """The rate at which a draw from the policy is nearer to the ideal point than a draw from the uniform one."""
    points = sphere(2)
    liked = points @ ideal
    above = (liked[:, None] > liked[None]).float().mean(1)
    return float(((points @ theta).softmax(0) * above).sum())


@pytest.mark.slow
def test_e1_pooled_apo_zero_serves_nobody_and_inferred_groups_are_served():
    synthetic = toy.bimodal(40, 40)
    groups = scorers.fit_best("pal", synthetic).states.argmax(1)
    data = scorers.comparisons(synthetic)
    ideal = torch.tensor(toy.bimodal(1, 4000).chosen - toy.bimodal(1, 4000).rejected, dtype=torch.float32).mean(0)
    ideals = [ideal, -ideal]
    pooled = policy(data.chosen, data.rejected)
    rates = [wins(pooled, ideal) for ideal in ideals]
    by_group = {}
    for group in groups.unique().tolist():
        members = data.select((groups[data.user] == group).nonzero().squeeze(1))
        theta = policy(members.chosen, members.rejected)
        by_group[str(group)] = [wins(theta, ideal) for ideal in ideals]
    of = {f"u{user}": str(int(group)) for user, group in enumerate(groups)}
    best = mean_win_rates(of, by_group, 2)
    print(f"pooled {rates}, by group {best}")
    assert sum(rates) / 2 == pytest.approx(0.5, abs=0.01)
    assert max(rates) < 0.7
    assert min(best) >= 0.95


def test_win_rates_of_users_by_hand():
    engaging, plain, padded = "Good question! It is 2.", "It is 2.", "Let me see what you asked for. It is 2."
    assert [liking(text, 0) for text in (engaging, plain, padded)] == [2, 1, 0]
    assert [liking(text, 1) for text in (engaging, plain, padded)] == [0, 1, 2]
    answers, against = [engaging, plain, padded, padded], [plain, plain, plain, engaging]
    assert win_rate(answers, against, 0) == 1.5 / 4
    assert win_rate(answers, against, 1) == 2.5 / 4
    # u0, u2 and u4 are of group 0, u1 and u3 of group 1; u4 was put with the others.
    groups = {"u0": "a", "u1": "b", "u2": "a", "u3": "b", "u4": "b"}
    assert mean_win_rates(groups, {"a": [0.9, 0.1], "b": [0.3, 0.8]}, 2) == [pytest.approx(0.7), 0.8]


def test_users_say_what_they_like_but_for_the_noise():
    rows = comparisons(6, 20, 0, noise=0.0)
    assert all(
        liking(row["chosen"], group_of(row["user"], 2)) > liking(row["rejected"], group_of(row["user"], 2))
        for row in rows
    )
    noisy = comparisons(20, 40, 0, noise=0.2)
    wrong = sum(
        liking(r["chosen"], group_of(r["user"], 2)) < liking(r["rejected"], group_of(r["user"], 2)) for r in noisy
    )
    assert 0.15 < wrong / 800 < 0.25
    single_taste = comparisons(6, 20, 0, groups=1, noise=0.0)
    assert all(liking(row["chosen"], 0) > liking(row["rejected"], 0) for row in single_taste)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tastes") / "base"
    run.make_base(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_end_to_end_groups_are_inferred_and_served_and_one_taste_stays_one(base, tmp_path, monkeypatch, seed):
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))
    result = run.run_experiment(base, tmp_path / "two", seed)
    alone = run.select_tastes(base, tmp_path / "one", seed, groups=1)
    print(result, alone)
    assert (result["plural"], result["tastes"], result["purity"]) == (True, 2, 1.0)
    assert sum(result["pooled"]) == pytest.approx(1.0)
    assert min(result["pooled"]) <= 0.5
    assert min(result["by_group"]) >= 0.9
    assert (alone["plural"], alone["tastes"]) == (False, 1)
