"""PAL's experiment: what the personas compare, and that its page is made of the committed results."""

from __future__ import annotations

import pytest

from clair.core.errors import UserError
from recipes.experiments.neighbours import encoder, pal
from recipes.experiments.neighbours.personas import COUNTS, PERSONAS, TRAITS, comparisons, read_statements


def test_users_say_what_their_persona_says_and_no_pair_is_in_both_splits():
    statements = {text: (trait, key) for trait, key, text in read_statements()}
    assert len(statements) == 120
    splits = comparisons(6, 0)
    pairs = {split: {frozenset((row["chosen"], row["rejected"])) for row in rows} for split, rows in splits.items()}
    assert not pairs["train"] & pairs["test"]
    for split, rows in splits.items():
        assert len(rows) == 6 * COUNTS[split]
        for row in rows:
            signs = dict(zip(TRAITS, PERSONAS[int(row["user"][1:]) % 3], strict=True))
            agreeing = [key == signs[trait] for trait, key in (statements[row["chosen"]], statements[row["rejected"]])]
            assert agreeing == [True, False]
    assert comparisons(6, 0) == splits != comparisons(6, 1)


def test_the_page_has_the_tables_of_the_committed_results():
    results, page = pal.read_json(pal.RESULTS), pal.PAGE.read_text("utf-8")
    assert {name: curve["settings"] for name, curve in results["curves"].items()} == pal.CURVES
    for table in (pal.curve_table(results["curves"]), pal.options_table(results["curves"])):
        assert table in page
    for curve in results["curves"].values():  # a summary is the mean of its raw rows
        for point in curve["summary"]["points"]:
            rows = [row for row in curve["rows"] if row["shots"] == point["shots"]]
            assert abs(sum(row["adapted"] for row in rows) / len(rows) - point["adapted"]["mean"]) < 1e-9


def test_a_folder_without_a_model_is_no_encoder(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json; give the folder of a model by --encoder"):
        encoder.embed(tmp_path, ["a text"])
