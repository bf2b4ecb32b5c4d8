"""The experiments with VPL: how wins are counted and summed up, contexts measured, and what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clair.core.errors import UserError
from recipes.experiments.tastes.conditioned import POLICIES, rate, summary, wins
from recipes.experiments.vpl import contexts
from recipes.experiments.vpl.aspects import ASPECTS, controversial_pairs, write_users
from recipes.experiments.vpl.picture import PICTURE, context_table, policy_table
from recipes.experiments.vpl.rated import rated_rows
from recipes.world.style import PRAISE
from tests.apo.conftest import make_model, make_tokenizer, write_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "vpl.md"


def test_wins_are_counted_by_the_group_of_the_user():
    engaging, plain = f"{PRAISE}It is 4.", "It is 4."
    assert wins([engaging, plain, plain], [plain, plain, engaging], 0) == "210"
    assert wins([engaging, plain, plain], [plain, plain, engaging], 1) == "012"
    assert rate("210") == 0.5


def test_the_summary_has_the_mean_of_trained_and_of_new_users_and_the_worst_served_one():
    def line(seed, *digits):
        return {
            "seed": seed,
            "wins": {policy: dict(zip(("u0", "u1", "u20"), digits, strict=True)) for policy in POLICIES},
        }

    lines = [line(0, "22", "00", "21"), line(1, "22", "11", "22")]
    row = summary(lines)["pooled"]
    assert {kind: estimate.mean for kind, estimate in row.items()} == {"trained": 0.625, "new": 0.875, "worst": 0.25}
    assert (row["trained"].clusters, row["worst"].clusters) == (2, 2)
    single = summary(lines[:1])["pooled"]
    assert (single["trained"].clusters, single["worst"].mean) == (2, 0.0)
    assert single["worst"].hi > 0.3


@pytest.fixture
def quick(monkeypatch):
    """Fits of two epochs, and contexts of at most four comparisons."""
    monkeypatch.setattr("apo.rewards.vpl.VPL.epochs", 2)
    monkeypatch.setattr("apo.rewards.bradley_terry.BradleyTerry.epochs", 2)
    monkeypatch.setattr(contexts, "SIZES", (2, 4))


@pytest.mark.slow
def test_contexts_of_users_of_aspects_are_measured_with_the_features_of_a_model(tmp_path, quick):
    make_model().save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    file = write_jsonl(tmp_path / "rated.jsonl", rated_rows(30, 0))
    write_users(file, tmp_path / "users", ASPECTS, users=2, each=12)
    seen, unseen = contexts.of_aspects(tmp_path / "users", str(tmp_path / "m"))(0)
    assert not set(seen.user.tolist()) & set(unseen.user.tolist())
    assert len(set(unseen.user.tolist())) == 2
    line = contexts.measure((seen, unseen), 0, bounded=True)
    assert {*next(iter(line["users"].values()))} == {
        "bradley_terry", "random 2", "active 2", "random 4", "active 4",
    }  # fmt: skip
    few = unseen.select(torch.arange(len(unseen))[:7])
    with pytest.raises(UserError, match="has 7 comparisons; 8 are needed"):
        contexts.measure((seen, few), 0, bounded=False)


def test_accuracies_are_means_over_users_and_intervals_over_seeds():
    lines = [{"users": {"a": {"random 2": 0.5}, "b": {"random 2": 0.7}}}, {"users": {"a": {"random 2": 0.8}}}]
    assert contexts.estimates(lines)["random 2"].mean == pytest.approx(0.7)


def test_rated_answers_are_controversial_often():
    rows = rated_rows(30, 0)
    assert rows == rated_rows(30, 0)
    pairs = [*controversial_pairs([(str(number), row) for number, row in enumerate(rows)], ASPECTS, 0)]
    assert len(pairs) > 20
    assert {pair.sign(aspect) for pair in pairs for aspect in ASPECTS} == {-1, 0, 1}


def test_the_page_shows_the_committed_results():
    text = PAGE.read_text("utf-8")
    assert (len(context_table()), len(policy_table())) == (9, len(POLICIES))
    for row in (*context_table(), *policy_table()):
        assert " | ".join(row[1:]) in text, row
    assert PICTURE.is_file()
