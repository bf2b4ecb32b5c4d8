"""The sources of a training recipe, and how several become one dataset."""

from __future__ import annotations

import csv
import json

import pytest

from apo.data.sources import Source, load_eval, load_train
from apo.training.config import TrainConfig
from apo.training.plan import plan
from clair.core.errors import UserError
from clair.data.preference_rows import read_row
from tests.apo.conftest import make_pairs, write_jsonl


def test_an_id_may_be_a_number_in_one_source_and_text_in_the_other(tmp_path):
    first = write_jsonl(tmp_path / "one.jsonl", [{**row, "id": number} for number, row in enumerate(make_pairs(2))])
    second = write_jsonl(tmp_path / "two.jsonl", make_pairs(2))
    assert load_train([Source(path=str(path)) for path in (first, second)], 0)["id"][:] == ["0", "1", "p0", "p1"]


def test_messages_may_have_more_keys_in_one_source(tmp_path):
    plain, called = make_pairs(2), make_pairs(2, seed=1)
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "seven"}}}]
    more = [{**row, "chosen": [{**row["chosen"][0], "tool_calls": calls}], "tools": calls} for row in called]
    more[1]["prompt"] = [{**more[1]["prompt"][0], "name": "ann"}]
    paths = [write_jsonl(tmp_path / f"{number}.jsonl", rows) for number, rows in enumerate((plain, more))]
    for order in (paths, paths[::-1]):
        rows = load_train([Source(path=str(path)) for path in order], 0)
        expected = [*plain, *more] if order == paths else [*more, *plain]
        assert [read_row(row)[0] for row in rows] == expected


def test_text_and_messages_are_not_put_together(tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [{"chosen": "Wool is warm.", "rejected": "Wool is cold."}] * 2)
    chat = write_jsonl(tmp_path / "chat.jsonl", make_pairs(2))
    with pytest.raises(UserError, match=r"cannot be put together: 'prompt' of .*chat.jsonl is List"):
        load_train([Source(path=str(path)) for path in (text, chat)], 0)


def test_held_out_rows_may_lie_in_a_file_of_their_own(tmp_path):
    rows = [{"ask": "a", "good": f"b{number}", "bad": "c", "user": name} for number, name in enumerate(("ann", "bob"))]
    paths = [write_jsonl(tmp_path / name, rows) for name in ("train.jsonl", "held.jsonl")]
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    source = Source(path=str(paths[0]), columns=columns, where={"user": "bob"})
    held = load_eval([source], str(paths[1]))
    assert [row["chosen"][0]["content"] for row in held] == ["b1"]
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist"):
        load_eval([source], str(tmp_path / "gone.jsonl"))


def test_a_configuration_of_a_source_is_named(tmp_path):
    for number, name in enumerate(("calm", "wild")):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", make_pairs(2, seed=number))
        write_jsonl(tmp_path / name / "test.jsonl", make_pairs(3, seed=number))
    card = "".join(
        f"- config_name: {name}\n  data_files:\n" + "".join(f"  - split: {split}\n    path: {name}/{split}.jsonl\n"
                                                         for split in ("train", "test"))
        for name in ("calm", "wild")
    )  # fmt: skip
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    source = Source(path=str(tmp_path), name="wild")
    assert load_train([source], 0)["chosen"][:] == [row["chosen"] for row in make_pairs(2, seed=1)]
    assert len(load_eval([source], True)) == 3
    with pytest.raises(UserError, match="several configurations: calm, wild"):
        load_train([Source(path=str(tmp_path))], 0)


def test_repairs_are_reported_before_training(tmp_path, model_dir):
    rows = make_pairs(8)
    rows[3]["chosen"] = rows[3]["prompt"] + rows[3]["chosen"]
    rows[3]["rejected"] = rows[3]["prompt"] + rows[3]["rejected"]
    rows[5] = {**rows[5], "prompt": rows[5]["prompt"][0]["content"]}
    keys = {
        "model": str(model_dir),
        "dataset": str(write_jsonl(tmp_path / "p.jsonl", rows)),
        "out": str(tmp_path / "r"),
    }
    planned = plan(TrainConfig(**keys))
    note = "1 of 8 rows repeated the prompt in their answers; read once"
    assert planned.train.notes == [f"train: {note}"]
    two = [{"path": keys["dataset"]}, {"path": str(write_jsonl(tmp_path / "o.jsonl", make_pairs(8, seed=1)))}]
    assert plan(TrainConfig(**{**keys, "dataset": two, "eval": keys["dataset"]})).train.notes == [
        f"train: {keys['dataset']}: {note}", f"eval: {note}"
    ]  # fmt: skip
    keys["dataset"] = str(write_jsonl(tmp_path / "q.jsonl", make_pairs(8)))
    clean = plan(TrainConfig(**keys))
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert planned.train.dataset[column][:] == clean.train.dataset[column][:]


def test_tables_of_csv_train_as_the_same_rows_of_json(tmp_path, model_dir):
    rows = make_pairs(4)
    names = ("prompt", "chosen", "rejected")
    with open(tmp_path / "p.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *([json.dumps(row[name]) for name in names] for row in rows)])
    write_jsonl(tmp_path / "p.jsonl", rows)
    plans = [plan(TrainConfig(model=str(model_dir), dataset=str(tmp_path / name), out=str(tmp_path / "r")))
             for name in ("p.csv", "p.jsonl")]  # fmt: skip
    assert plans[0].train.dataset["chosen_ids"][:] == plans[1].train.dataset["chosen_ids"][:]
