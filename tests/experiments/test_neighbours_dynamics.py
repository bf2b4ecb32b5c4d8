"""The order of learning on persona statements: statements, the published format, the head, the page's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from apo.losses.objectives import dpo
from clair.core.errors import UserError
from clair.data.dataset import load_pairs
from recipes.experiments.neighbours.dynamics import BETA, HEAD_RATE, TRAIN, read_results, train_head, write_pairs
from recipes.experiments.neighbours.dynamics_page import END, PAGE, START, fall, text
from recipes.experiments.neighbours.persona import BEHAVIOURS, MATCHING, persona_rows, read_persona


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_half_of_the_statements_are_answered_yes_and_held_out_items_are_new(behaviour):
    template, splits = BEHAVIOURS[behaviour], persona_rows(behaviour, 0, 24, 12)
    used = {}
    for split, rows in splits.items():
        assert [row[MATCHING] for row in rows].count(" Yes") == len(rows) / 2
        assert len({row["statement"] for row in rows}) == len(rows)
        statements = " | ".join(row["statement"] for row in rows)
        ends = [f"{item}{end}" for item in (*template.says, *template.denies) for end in ".,?"]
        used[split] = {end for end in ends if f" {end}" in statements}
    assert used["train"]
    assert used["test"]
    assert not used["train"] & used["test"]
    with pytest.raises(UserError, match="an even number from 2 to 24 needed"):
        persona_rows(behaviour, 0, 24, 26)


def test_a_published_file_is_read_with_the_papers_prompt_and_by_the_package(tmp_path):
    rows = persona_rows("eats-no-meat", 0, 4, 2)["train"]
    file = tmp_path / "eats-no-meat.jsonl"
    file.write_text("".join(json.dumps({**row, "label_confidence": 0.9}) + "\n" for row in rows))
    pairs = read_persona(file)
    assert {pair["behaviour"] for pair in pairs} == {"eats-no-meat"}
    assert [pair["chosen"] for pair in pairs] == [row["statement"] + "\n" + row[MATCHING] for row in rows]
    loaded = load_pairs(file)
    assert [row["chosen"][0]["content"] for row in loaded] == [row[MATCHING] for row in rows]
    assert loaded[0]["prompt"][0]["content"] == rows[0]["question"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({MATCHING: None}, r"line 2: no text in column 'answer_matching_behavior'; found: "),
        ({MATCHING: " Same", "answer_not_matching_behavior": " Same"}, r"line 2: both answers are ' Same'"),
    ],
)
def test_a_row_that_is_no_comparison_is_one_line(change, message):
    rows = persona_rows("eats-no-meat", 0, 4, 2)["train"]
    rows[1] = rows[1] | change
    with pytest.raises(UserError, match=message):
        read_persona(Path("eats-no-meat.jsonl"), rows)
    with pytest.raises(UserError, match="has 3 statement"):
        read_persona(Path("eats-no-meat.jsonl"), rows[:3])


def test_a_batch_has_one_statement_of_each_behaviour_and_answer(tmp_path):
    write_pairs(tmp_path, 0)
    pairs = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(pairs) == TRAIN * len(BEHAVIOURS)
    for start in range(0, len(pairs), 16):
        kinds = {(pair["behaviour"], pair["chosen"].endswith("Yes")) for pair in pairs[start : start + 16]}
        assert len(kinds) == 16


def test_the_first_step_of_the_head_lowers_the_loss_by_the_closed_form():
    """dL/dt = -2 (beta / 4)^2 delta^2 for DPO on balanced answers."""
    random = torch.Generator().manual_seed(0)
    yes = torch.arange(40) % 2 == 0
    hidden = torch.randn(40, 6, generator=random) + yes[:, None] * torch.tensor([1.5, 0, 0, 0, 0, 0])
    head = torch.randn(12, 6, generator=random)
    (curve,) = (train_head(dpo, head, (3, 7), [(hidden, yes), (hidden[:8], yes[:8])]),)
    delta = float((hidden[yes].mean(0) - hidden[~yes].mean(0)).norm())
    drop = curve["train_loss"][0] - curve["train_loss"][1]
    assert curve["train_loss"][0] == pytest.approx(0.69315, abs=1e-4)
    assert drop == pytest.approx(HEAD_RATE * 2 * (BETA / 4 * delta) ** 2, abs=2e-5)  # losses have five digits
    assert curve["train_right"][0] == 0.5


def test_the_fall_is_the_mean_over_training():
    assert fall([1.0, 0.5, 0.0]) == pytest.approx(0.5)
    assert fall([2.0, 2.0, 2.0]) == 0.0


def test_the_page_has_the_figures_of_the_raw_results():
    part = PAGE.read_text("utf-8").split(START)[1].split(END)[0]
    assert part.strip() == text(read_results()).strip()
