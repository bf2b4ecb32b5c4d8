"""Distinguishability: the closed forms, the order in which things are learned, and the warnings."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from apo.analysis.bootstrap import Interval, bootstrap_weights
from apo.analysis.clusters import check_labels, clusters_of, indices_of_shared_prompts, kmeans
from apo.analysis.distinguishability import (
    Cluster,
    Literal,
    _pair_level,
    _speeds,
    distinguish,
    distinguishability,
    warnings_of,
)
from apo.analysis.features import EncodedPairs, Features, encode
from apo.analysis.gradients import _sketch, head_gradients, logp_gradients
from apo.losses.mixture import resolve_mixture
from apo.losses.objectives import apo_down, apo_zero, dpo
from apo.packing.logps import PairLogps
from apo.rewards.scorer import flush_denormals
from clair.core.errors import UserError
from recipes.world import toy
from tests.apo.conftest import make_model, make_pairs
from tests.apo.recipe_command import failure, run

YES, NO = 1, 2


# ---- closed forms


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("dpo", (-0.05, 0.05)), ("apo_zero", (-0.025, 0.025)), ("apo_down", (0.0, 0.025)), ("sft", (-1 / 3, 0.0))],
)
def test_c1_how_an_objective_pulls_at_first(objective, expected):
    sums, lengths = ([-4.0, -9.0], [-2.0, -1.0]), ([3, 3], [1, 2])
    logps = PairLogps(*map(torch.tensor, (*sums, *lengths)))
    pulled = logp_gradients(resolve_mixture(objective), 0.1, logps)
    assert [tensor.tolist() for tensor in pulled] == [pytest.approx([value] * 2, abs=1e-8) for value in expected]


def test_c1_dpo_starts_twice_as_fast_as_apo_zero_exactly():
    logps = PairLogps(*torch.randn(2, 5), *torch.ones(2, 5))
    fast, slow = (logp_gradients(resolve_mixture(name), 0.3, logps) for name in ("dpo", "apo_zero"))
    assert all(torch.equal(faster, 2 * slower) for faster, slower in zip(fast, slow, strict=True))


def head_losses(W, reference, sets, objective, beta=0.1):
    """The loss of each behaviour under an LM head W [V, D] on frozen features, rows 0 and 1 of it Yes and No."""
    losses = []
    for behaviour in sets:
        h, yes = torch.tensor(behaviour.hidden), torch.tensor(behaviour.sign > 0)
        ratio = ((h @ W.T).log_softmax(-1) - (h @ reference.T).log_softmax(-1))[:, :2]
        chosen, rejected = ratio[:, 0].where(yes, ratio[:, 1]), ratio[:, 1].where(yes, ratio[:, 0])
        losses.append(objective(chosen, rejected, beta=beta).mean())
    return torch.stack(losses)


def new_head(dimensions: int, seed: int = 0):
    return torch.randn(12, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.1


def train_head(sets, objective, *, steps=20, rate=1.0):
    """The fall of each behaviour's loss, and the distance that the head moved."""
    reference = new_head(sets[0].hidden.shape[1])
    W = reference.clone()
    initial = head_losses(W, reference, sets, objective)
    for _ in range(steps):
        W.requires_grad_()
        (gradient,) = torch.autograd.grad(head_losses(W, reference, sets, objective).mean(), W)
        W = (W - rate * gradient).detach()
    return (initial - head_losses(W, reference, sets, objective)).tolist(), float((W - reference).norm())


def difference(behaviour) -> np.ndarray:
    return behaviour.hidden[behaviour.sign > 0].mean(0) - behaviour.hidden[behaviour.sign < 0].mean(0)


@pytest.mark.parametrize(("objective", "share"), [(dpo, 1.0), (apo_zero, 0.5)])
def test_c1_the_first_gradient_of_the_head_is_beta_quarter_of_the_difference_of_means(objective, share):
    (behaviour,) = toy.behaviours([2.0])
    W = new_head(32).requires_grad_()
    (gradient,) = torch.autograd.grad(head_losses(W, W.detach(), [behaviour], objective)[0], W)
    expected = -share * 0.1 / 4 * torch.tensor(difference(behaviour))
    assert torch.allclose(gradient[0], expected, rtol=1e-5)
    assert torch.allclose(gradient[1], -expected, rtol=1e-5)
    assert gradient[2:].abs().max() < 1e-15


def test_c1_apo_down_moves_along_something_else():
    (behaviour,) = toy.behaviours([2.0])
    W = new_head(32).requires_grad_()
    (gradient,) = torch.autograd.grad(head_losses(W, W.detach(), [behaviour], apo_down)[0], W)
    d = torch.tensor(difference(behaviour))
    assert abs(torch.nn.functional.cosine_similarity(gradient[0], d, dim=0)) < 0.98
    assert gradient[2:].abs().max() > 1e-4


def test_the_literal_distance_by_hand():
    hidden = torch.tensor([[3.0, 0.0], [3.0, 2.0], [0.0, 1.0], [0.0, 1.0]])
    distance = distinguishability(hidden, [True, True, False, False])
    assert (distance.delta, distance.trace, distance.concentration, distance.scaled) == pytest.approx(
        (3.0, 1.0, 1.0, 3.0)
    )
    assert distance.positive == 0.5
    # d = (3, 0): no spread along it. The concentration is 1, so the bound is 1 - 1 / (1 + 9 / 4).
    assert (distance.accuracy, distance.accuracy_bound) == pytest.approx((1.0, 1 - 4 / 13))


def test_the_accuracy_along_the_difference_is_that_of_gaussian_classes_and_above_its_bound():
    (behaviour,) = toy.behaviours([2.0], n=20_000, dimensions=4)
    distance = distinguishability(torch.tensor(behaviour.hidden), (behaviour.sign > 0).tolist())
    along = behaviour.hidden @ difference(behaviour)
    accuracy = float(((along > along.mean()) == (behaviour.sign > 0)).mean())
    assert distance.accuracy == pytest.approx(accuracy, abs=0.01)  # Phi(1) = 0.84
    assert 0.4 < distance.accuracy_bound < accuracy


def test_a_common_mean_that_is_long_moves_no_speed():
    """Balanced answers: the mean of all hidden states cancels, however long it is, and so do the intervals' parts."""
    (behaviour,) = toy.behaviours([2.0], n=40, dimensions=8)
    sign = torch.tensor(behaviour.sign).float()
    cells = [(0, (sign > 0).nonzero()[:, 0]), (0, (sign < 0).nonzero()[:, 0])]
    speeds = []
    for length in (0.0, 100.0):
        steps = sign[:, None] * (torch.tensor(behaviour.hidden).float() + length)
        (speed,), _ = _speeds(steps, cells, 200, 0)
        speeds.append(speed)
    assert speeds[1].value == pytest.approx(speeds[0].value, rel=0.02)
    assert speeds[1].hi - speeds[1].lo == pytest.approx(speeds[0].hi - speeds[0].lo, rel=0.5)


# ---- from tokens


def behaviours_in_tokens(model, shares, seed=0, n=64) -> EncodedPairs:
    """Pairs of Yes and No after prompts of token ids, with the features of `model`."""
    rows, tokenized = [], []
    for number, (prompts, yes) in enumerate(toy.token_behaviours(shares, n=n, seed=seed)):
        for prompt, is_yes in zip(prompts, yes, strict=True):
            sides = (YES, NO) if is_yes else (NO, YES)
            texts = [[{"role": "assistant", "content": {YES: "Yes", NO: "No"}[side]}] for side in sides]
            rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1], "behaviour": str(number)})
            tokenized.append({"prompt_ids": prompt, "chosen_ids": [sides[0]], "rejected_ids": [sides[1]]})
    return EncodedPairs(rows, Features("", *encode(model, tokenized)), tokenized, model)


def small_llama(seed: int):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    return make_model(seed, vocab_size=64, tie_word_embeddings=False, **sizes)


def test_head_gradients_are_autograds_and_their_sketch_keeps_inner_products(pairs, tokenizer):
    from apo.data.tokenize import eos_ids, tokenize
    from apo.packing.logps import response_logps

    tokenized = tokenize(pairs, tokenizer, None, eos_ids(tokenizer)).dataset
    model = make_model(tie_word_embeddings=False)
    chosen, rejected, logps = head_gradients(model, tokenized)
    assert chosen.shape == (24, 40 * 32)
    for index in range(3):
        row = tokenized[index]
        for side, computed in (("chosen", chosen), ("rejected", rejected)):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            mask = torch.arange(ids.shape[1])[None] >= len(row["prompt_ids"])
            logp = response_logps(model, ids, torch.ones_like(ids), mask.long())
            (gradient,) = torch.autograd.grad(logp, model.lm_head.weight)
            assert torch.allclose(computed[index], gradient.flatten(), atol=1e-4)
            assert float(getattr(logps, side)[index]) == pytest.approx(float(logp.detach()), abs=1e-4)
            assert int(getattr(logps, f"{side}_len")[index]) == len(row[f"{side}_ids"])
    sketched, _, _ = head_gradients(model, tokenized, dimensions=1024)
    assert sketched.shape == (24, 1024)
    norms = chosen.norm(dim=1)
    error = (sketched @ sketched.T - chosen @ chosen.T) / (norms[:, None] * norms)
    assert 1e-4 < error.pow(2).mean().sqrt() < 0.09  # sqrt(8 / 1024) at the most


def test_predicted_speed_is_what_the_other_pairs_gradients_do_to_a_pairs_loss():
    """By autograd on the LM head, pair by pair, exactly (the head is small enough not to be sketched)."""
    model = small_llama(0)
    encoded = behaviours_in_tokens(model, [0.2, 0.8], n=16)
    report = distinguish(encoded, "behaviour", "apo_zero", draws=50)
    gradients = []
    head = model.lm_head.requires_grad_(True)
    for hidden, row in zip(encoded.features.prompt, encoded.tokenized, strict=True):
        logps = head(hidden).log_softmax(-1)
        ratio = logps - logps.detach()
        loss = apo_zero(ratio[row["chosen_ids"][0]], ratio[row["rejected_ids"][0]], beta=0.1)
        gradients.append(torch.autograd.grad(loss, head.weight)[0].flatten())
    # The other pairs, cell by cell: 8 pairs of each behaviour prefer Yes, 8 prefer No; of a pair's own cell 7 others.
    products = torch.stack(gradients) @ torch.stack(gradients).T
    cell = torch.tensor([2 * int(row["behaviour"]) + (row["chosen"][0]["content"] == "Yes") for row in encoded.rows])
    same = (cell[:, None] == cell).float() - torch.eye(32)
    others = (products * (cell[:, None] != cell)).sum(1) / 32 + (products * same).sum(1) * 8 / 7 / 32
    predicted = {cluster.name: cluster.speed.value for cluster in report.clusters}
    assert [predicted["0"], predicted["1"]] == pytest.approx(
        [float(others[:16].mean()), float(others[16:].mean())], rel=1e-4
    )


def test_pair_level_numbers_by_hand():
    # u = (3, 0), (1, 0), (2, 3): products of different ones 3, 6 and 2, mean 11/3; mean square (9 + 1 + 13) / 3.
    u = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 3.0]])
    delta, scaled, coherence = _pair_level(u, bootstrap_weights(3, 10, 0))
    assert delta.value == pytest.approx((11 / 3) ** 0.5)
    assert coherence.value == pytest.approx(11 / 23)
    assert scaled == pytest.approx((11 / 12) ** 0.5)


# ---- what is learned first


@pytest.mark.slow
@pytest.mark.parametrize("objective", [dpo, apo_zero])
def test_c2_alone_the_more_distinguishable_behaviour_falls_faster_and_moves_the_head_further(objective):
    fell, moved = [], []
    for seed in range(5):
        sets = toy.behaviours([0.5 * n for n in range(1, 9)], seed=seed)
        trained = [train_head([group], objective) for group in sets]
        delta = [np.linalg.norm(difference(group)) for group in sets]
        fell.append(spearmanr(delta, [drop[0] for drop, _ in trained]).statistic)
        moved.append(spearmanr(delta, [distance for _, distance in trained]).statistic)
    print(objective.__name__, fell, moved)
    assert min(np.mean(fell), np.mean(moved)) >= 0.95


@pytest.mark.slow
def test_c2_together_what_agrees_with_the_mixture_falls_faster():
    agreement, distance = [], []
    for seed in range(20):
        sets = toy.behaviours([1, 1.5, 2, 2.5, 3], seed=seed, dimensions=8)
        d = np.stack([difference(group) for group in sets])
        drops, _ = train_head(sets, dpo)
        agreement.append(spearmanr(d @ d.mean(0), drops).statistic)
        distance.append(spearmanr(np.linalg.norm(d, axis=1), drops).statistic)
    print(f"<mean d, d_i> {np.mean(agreement):.3f}, delta {np.mean(distance):.3f}")
    assert np.mean(agreement) >= 0.95
    assert np.mean(distance) < np.mean(agreement)  # delta alone does not see who agrees with whom


def train_model(encoded: EncodedPairs, objective, optimizer: str, *, steps=15, beta=0.1) -> list[float]:
    """Falls of the loss of each behaviour when the whole model is trained on all together."""
    model = encoded.model.requires_grad_(True)
    ids = torch.tensor([row["prompt_ids"] for row in encoded.tokenized])
    yes = torch.tensor([row["chosen_ids"][0] == YES for row in encoded.tokenized])
    groups = torch.tensor([int(row["behaviour"]) for row in encoded.rows])

    def answers():
        return model(ids).logits[:, -1].log_softmax(-1)[:, [YES, NO]]

    reference = answers().detach()

    def losses():
        ratio = answers() - reference
        both = objective(ratio[:, 0].where(yes, ratio[:, 1]), ratio[:, 1].where(yes, ratio[:, 0]), beta=beta)
        return torch.stack([both[groups == group].mean() for group in groups.unique()])

    kind, rate = {"sgd": (torch.optim.SGD, 0.1), "adam": (torch.optim.Adam, 1e-4)}[optimizer]
    taken = kind(model.parameters(), lr=rate)
    initial = losses().detach()
    for _ in range(steps):
        taken.zero_grad()
        losses().mean().backward()
        taken.step()
    return (initial - losses().detach()).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("objective", [dpo, apo_zero, apo_down])
@flush_denormals()
def test_c3_in_a_tiny_language_model_the_order_is_predicted(objective, optimizer):
    literal, gram = [], []
    for seed in range(5):
        encoded = behaviours_in_tokens(small_llama(seed).eval(), [0.1, 0.2, 0.35, 0.5, 0.8], seed=seed)
        report = distinguish(encoded, "behaviour", objective.__name__, draws=50)
        drops = train_model(encoded, objective, optimizer)
        clusters = {int(cluster.name): cluster for cluster in report.clusters}
        literal.append(spearmanr([clusters[n].literal.delta for n in range(5)], drops).statistic)
        gram.append(spearmanr([clusters[n].speed.value for n in range(5)], drops).statistic)
    print(f"{objective.__name__} {optimizer}: delta {np.mean(literal):.2f}, gradient {np.mean(gram):.2f}")
    assert np.mean(gram) >= 0.8
    if objective is not apo_down:
        assert np.mean(literal) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_c4_an_aligned_models_head_unlearns_faster(seed):
    """Features of a model fully trained by DPO, frozen: with flipped labels its head's loss falls much faster."""
    model = small_llama(seed).eval()

    def flipped_loss() -> tuple[float, float]:
        encoded = behaviours_in_tokens(model, [0.1], seed=seed, n=128)
        hidden = encoded.features.prompt.double().numpy()
        sign = np.array([1 if row["chosen_ids"][0] == YES else -1 for row in encoded.tokenized])
        sets = [toy.Behaviour(hidden, -sign)]
        reference = new_head(hidden.shape[1])
        start = float(head_losses(reference, reference, sets, dpo)[0])
        drops, _ = train_head(sets, dpo)
        return start - drops[0], distinguishability(encoded.features.prompt, (sign > 0).tolist()).delta

    base_loss, base_delta = flipped_loss()
    encoded = behaviours_in_tokens(model, [0.1], seed=seed, n=128)
    for _ in range(2):
        train_model(encoded, dpo, "adam", steps=60)
    aligned_loss, aligned_delta = flipped_loss()
    print(f"delta {base_delta:.2f} -> {aligned_delta:.2f}, flipped loss {base_loss:.3f} -> {aligned_loss:.3f}")
    assert aligned_delta > 2 * base_delta
    assert aligned_loss < 0.2 * base_loss


# ---- warnings


def test_a_cluster_that_the_mixture_hurts_is_reported_with_the_one_it_conflicts_with():
    """Two behaviours with the same prompts and opposite answers, one three times as large."""
    model = small_llama(0)
    encoded = behaviours_in_tokens(model, [0.6], n=90)
    flipped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"], "behaviour": "small"} for row in encoded.rows[:30]
    ]
    turned = [
        {**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in encoded.tokenized[:30]
    ]
    tokenized = encoded.tokenized + turned
    both = EncodedPairs(encoded.rows + flipped, Features("", *encode(model, tokenized)), tokenized, model)
    report = distinguish(both, "behaviour")
    by_name = {cluster.name: cluster for cluster in report.clusters}
    assert by_name["0"].speed.lo > 0 > by_name["small"].speed.hi
    assert any(warning.startswith("small is hurt at first") for warning in report.warnings)
    assert [cluster.name for cluster in report.clusters] == ["0", "small"]
    conflicts = [warning for warning in report.warnings if "conflict" in warning]
    assert len(conflicts) == (by_name["small"].conflict < -0.1)


def test_objectives_whose_distance_misleads_or_whose_speed_differs_are_noted():
    encoded = behaviours_in_tokens(small_llama(0), [0.5], n=16)
    assert "has a gradient on the rejected alone" in distinguish(encoded, "behaviour", "apo_down", draws=20).warnings[0]
    assert (
        "beta 0.2 starts as fast as DPO at 0.1" in distinguish(encoded, "behaviour", "apo_zero", draws=20).warnings[0]
    )
    assert distinguish(encoded, "behaviour", "dpo", draws=20).warnings == []


def cluster(name: str, speed: float, half: float, **more) -> Cluster:
    interval, none = Interval(speed, speed - half, speed + half), Interval(0.0, 0.0, 0.0)
    defaults = {"relative": speed, "rank": (1, 1), "conflict": float("nan"), "conflict_with": "", "literal": None}
    return Cluster(name, 9, none, 0.0, none, 0.0, interval, **defaults | more)


def test_warnings_by_hand():
    warnings = warnings_of(
        "dpo", 0.1, (-0.05, 0.05), [
            cluster("fast", 1.0, 0.1, conflict=-0.5, conflict_with="slow"),
            cluster("slow", 0.05, 0.1, conflict=-0.5, conflict_with="fast"),
            cluster("unsure", -0.1, 0.2),
            cluster("hurt", -0.3, 0.2, literal=Literal(1.0, 1.0, 1.0, 1.0, 0.7, 0.5, 0.5)),
        ],
    )  # fmt: skip
    assert [line.split(":")[0] for line in warnings] == [
        "fast and slow conflict (cosine -0.50)",
        "slow has 5.0% of the fastest cluster's speed",
        "unsure may be hurt at first",
        "hurt is hurt at first",
        "hurt prefers one answer in 70% of its prompts",
    ]


def test_a_sketch_keeps_products_of_what_has_one_sign():
    a, c = torch.zeros(1, 64), torch.zeros(1, 64)
    a[:, :32], c[:, 32:] = 1.0, 1.0
    b = torch.ones(1, 64)
    products = []
    for seed in range(100):
        sketch = _sketch(64, 64, 256, seed)
        products.append(float(sketch(a, b) @ sketch(c, b)))
    assert abs(np.mean(products)) < 4 * np.std(products) / 10
    assert np.std(products) < 2 * 32 * 64 * (8 / 256) ** 0.5


def test_neglect_and_imbalance_are_reported():
    model = small_llama(0)
    encoded = behaviours_in_tokens(model, [0.9, 0.0], n=60)
    indices = [p for p in range(120) if p < 60 or encoded.tokenized[p]["chosen_ids"] == [YES] or p % 4 == 1]
    rows, tokenized = ([column[index] for index in indices] for column in (encoded.rows, encoded.tokenized))
    some = EncodedPairs(rows, encoded.features.select(indices), tokenized, model)
    report = distinguish(some, "behaviour")
    warnings = " ".join(report.warnings)
    weak = next(cluster for cluster in report.clusters if cluster.name == "1")
    assert weak.literal.positive > 0.6 or weak.literal.positive < 0.4
    assert "1 prefers one answer in" in warnings


def test_intervals_hold_the_truth_where_it_is_known():
    """u is N(m, I) with |m| = 1: the interval of delta holds 1, and of the coherence 1/17, in most of 200 draws."""
    m, held = torch.zeros(16), [0, 0]
    m[0] = 1.0
    for seed in range(200):
        u = m + torch.randn(200, 16, generator=torch.Generator().manual_seed(seed))
        delta, _, coherence = _pair_level(u, bootstrap_weights(200, 300, seed))
        held[0] += delta.lo <= 1.0 <= delta.hi
        held[1] += coherence.lo <= 1 / 17 <= coherence.hi
    print(f"held {held} of 200")
    assert min(held) >= 170


def test_kmeans_finds_what_is_apart_and_refuses_too_many():
    random = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centres.repeat_interleave(20, 0) + torch.randn(60, 2, generator=random)
    labels = kmeans(points, 3)
    assert [len(set(labels[start : start + 20])) for start in (0, 20, 40)] == [1, 1, 1]
    assert len(set(labels)) == 3
    assert kmeans(points, 3) == labels
    with pytest.raises(UserError, match="kmeans:31 of 60 pairs"):
        kmeans(points, 31)


def test_labels_that_are_missing_or_unknown_are_refused_with_what_there_is():
    rows = [{"user": "a", "behaviour": "x"}, {"user": "a", "behaviour": None}]
    prompts = torch.zeros(2, 2)
    assert clusters_of(rows, "user", prompts) == ["a", "a"]
    with pytest.raises(UserError, match="1 of 2 pairs have no 'behaviour'; all have: user"):
        clusters_of(rows, "behaviour", prompts)
    with pytest.raises(UserError, match="did you mean 'behaviour'"):
        clusters_of(rows, "behavior", prompts)
    with pytest.raises(UserError, match="cluster 'b' has one pair"):
        clusters_of([*rows, {"user": "b"}], "user", torch.zeros(3, 2))


def test_a_behaviour_with_equal_answers_or_one_row_is_refused_before_anything_is_computed():
    rows = [{"behaviour": name, "chosen": "Yes", "rejected": "No"} for name in "aabb"]
    check_labels(rows, "behaviour")
    check_labels(rows, "kmeans:2")
    for broken in ([*rows[:3], {**rows[3], "rejected": "Yes"}], rows[:3]):
        with pytest.raises(UserError, match=r"^behaviour 'b' has 1 pair\(s\) with different answers, too few"):
            check_labels(broken, "behaviour")


def test_sources_are_compared_on_the_prompts_that_all_of_them_have():
    rows = [
        {"prompt": p, "source": s} for p, s in (("a", "revised"), ("b", "revised"), ("b", "judged"), ("c", "judged"))
    ]
    assert indices_of_shared_prompts(rows) == [1, 2]


def test_the_command_prints_a_table_warnings_and_writes_a_picture(model_dir, tmp_path):
    rows = make_pairs(24)
    for index, row in enumerate(rows):
        row["behaviour"] = ["plus", "minus"][index % 2]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({**row, "id": f"o{row['id']}"}) + "\n" for row in rows[:10])
    )
    recipe = {"dataset": tmp_path / "one.jsonl", "model": model_dir, "by": "behaviour"}
    result = run("distinguish", **recipe, out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "beta 0.2 starts as fast as DPO" in result.output
    assert re.search(r"Prediction: under apo_zero, (minus|plus) is learned first; (minus|plus) last", result.output)
    assert "Its rank with a 95 % interval" in result.output
    report = json.loads((tmp_path / "out/distinguish.json").read_text())
    assert sorted(cluster["name"] for cluster in report["clusters"]) == ["minus", "plus"]
    assert (tmp_path / "out/distinguish.png").read_bytes().startswith(b"\x89PNG")
    recipe["dataset"] = [tmp_path / "one.jsonl", tmp_path / "other.jsonl"]
    result = run("distinguish", **{**recipe, "by": "source"})
    assert "comparing sources on the 20 of 34 pairs" in result.output
    assert "did you mean 'apo_zero'" in failure("distinguish", **recipe, objective="apo_zer")
