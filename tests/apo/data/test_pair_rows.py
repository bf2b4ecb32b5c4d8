"""The pairs of a dataset as plain rows: all splits, all columns, and one id wherever they are read."""

from __future__ import annotations

import json

import pytest

from apo.analysis.features import read_rows
from apo.data.pair_rows import read_pair_rows
from apo.guarantees.calibrate import check_no_overlap, read_ids
from clair.core.errors import UserError
from tests.apo.conftest import make_pairs, write_jsonl


@pytest.fixture
def folder(tmp_path):
    """A folder with train and test rows that have no id."""
    (tmp_path / "pairs").mkdir()
    rows = [{**row, "id": None, "weight": 0.5} for row in make_pairs(12)]
    write_jsonl(tmp_path / "pairs/train.jsonl", rows[:8])
    write_jsonl(tmp_path / "pairs/test.jsonl", rows[8:])
    return tmp_path / "pairs"


def test_all_splits_of_a_folder_are_read_with_all_columns(folder):
    rows = read_pair_rows(folder)
    assert [row["split"] for row in rows] == ["train"] * 8 + ["test"] * 4
    assert {row["weight"] for row in rows} == {0.5}
    assert {row["source"] for row in rows} == {"pairs"}
    assert len(set(read_ids(folder))) == 12


def test_a_dataset_without_ids_overlaps_with_itself_once_it_was_scored(folder, tmp_path):
    scored = [{**row, "score_chosen": 1.0} for row in read_rows([str(folder)])]
    write_jsonl(tmp_path / "scored.jsonl", scored)
    with pytest.raises(UserError, match="take these 12 of 12 rows out"):
        check_no_overlap(read_pair_rows(tmp_path / "scored.jsonl"), read_ids(folder))


def test_an_id_of_zero_is_an_id(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [{**row, "id": index} for index, row in enumerate(make_pairs(3))])
    assert [row["id"] for row in read_pair_rows(tmp_path / "pairs.jsonl")] == ["0", "1", "2"]


def test_a_folder_without_train_and_test_is_one_line(folder):
    (folder / "train.jsonl").rename(folder / "validation.jsonl")
    (folder / "test.jsonl").unlink()
    with pytest.raises(UserError, match="has the splits validation; needed: train or test; give one file"):
        read_pair_rows(folder)


def test_the_ids_of_a_reward_include_those_of_users_who_were_added(tmp_path):
    (tmp_path / "users").mkdir()
    (tmp_path / "reward.json").write_text(json.dumps({"trained_on": ["a"]}))
    (tmp_path / "users/x.json").write_text(json.dumps({"user": "ann", "answers": [{"id": "b", "chosen": True}]}))
    assert read_ids(tmp_path) == ["a", "b"]
    with pytest.raises(UserError, match="the judge was trained on 'b'"):
        check_no_overlap([{"id": "b"}], read_ids(tmp_path))
