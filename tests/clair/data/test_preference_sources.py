"""Preference rows from every kind of source: a value is what the file says, and what cannot be read has a place."""

from __future__ import annotations

import gzip
import json
import logging

import datasets
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from clair.core.errors import UserError
from clair.data.dataset import load_pairs
from clair.data.preference_rows import read_row
from clair.data.preference_sources import load_preferences, split_names
from tests.browser.synthetic import synthetic_pairs, write_dataset


def turns(role, text, **more):
    return [{"role": role, "content": text, **more}]


ROWS = [
    {"id": f"r{number}", "prompt": turns("user", f"Name a {kind}."), "chosen": turns("assistant", good),
     "rejected": turns("assistant", bad)}
    for number, (kind, good, bad) in enumerate((("gem", "Opal.", "Brick."), ("tree", "Larch.", "Moss.")))
]  # fmt: skip
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def as_table(separator):
    rows = [[row["id"], *(row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))] for row in ROWS]
    return "".join(separator.join(row) + "\n" for row in [["id", "prompt", "chosen", "rejected"], *rows])


FILES = {
    "p.jsonl": LINES, "p.ndjson": LINES, "p.json": json.dumps(ROWS), "lines.json": LINES, "p.csv": as_table(","),
    "p.tsv": as_table("\t"),
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_kind_holds_the_same_rows(tmp_path, name, packed):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(FILES[name].encode()) if packed else FILES[name].encode())
    assert load_preferences(path).dataset.to_list() == ROWS
    assert split_names(str(path)) == ["train"]


def test_a_folder_of_save_to_disk_is_read_with_its_splits(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert load_preferences(tmp_path / "one").dataset.to_list() == ROWS
    assert load_preferences(tmp_path / "two", "dev").dataset.to_list() == ROWS[1:]
    assert split_names(str(tmp_path / "two")) == ["train", "dev"]
    with pytest.raises(UserError, match="has no split 'test'; found: train, dev"):
        load_preferences(tmp_path / "two", "test")


def test_a_configuration_is_named_where_there_are_several(tmp_path):
    for number, name in enumerate(("calm", "wild")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(LINES.splitlines()[number] + "\n")
    card = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("calm", "wild"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    assert load_preferences(tmp_path, name="wild").dataset.to_list() == ROWS[1:]
    assert split_names(str(tmp_path), "calm") == ["train"]
    for name, match in ((None, "calm, wild; say which by `name:`"), ("wide", r"'wide' \(did you mean 'wild'\?\)")):
        with pytest.raises(UserError, match=match):
            load_preferences(tmp_path, name=name)


def test_columns_are_called_as_the_source_says(tmp_path):
    (tmp_path / "p.csv").write_text("ask,good,bad,prompt\nName a gem.,Opal.,Brick.,7\n")
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    expected = [{name: row for name, row in ROWS[0].items() if name != "id"}]
    assert load_preferences(tmp_path / "p.csv", columns=columns).dataset.to_list() == expected
    Dataset.from_csv(str(tmp_path / "p.csv")).to_parquet(tmp_path / "p.parquet")
    assert load_pairs(tmp_path / "p.parquet", columns=columns).to_list() == expected
    with pytest.raises(UserError, match=r"no column 'goood' \(did you mean 'good'\?\); found: "):
        load_preferences(tmp_path / "p.csv", columns={**columns, "chosen": "goood"})
    with pytest.raises(UserError, match=r"columns: unknown name 'choosen' \(did you mean 'chosen'\?\)"):
        load_preferences(tmp_path / "p.csv", columns={"choosen": "good"})


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_two_columns_may_change_their_names(tmp_path, name):
    if name == "p.jsonl":
        (tmp_path / name).write_text(LINES)
    else:
        Dataset.from_list(ROWS).to_parquet(tmp_path / name)
    read = load_preferences(tmp_path / name, columns={"chosen": "rejected", "rejected": "chosen"}).dataset
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    assert read.to_list() == swapped


@pytest.mark.parametrize(
    ("name", "reason"),
    [("p.xlsx", "is of no kind that is read: .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
     ("gone.jsonl", "does not exist"), ("gone.csv.gz", "does not exist")],
)  # fmt: skip
def test_a_file_that_is_not_there_or_of_another_kind_is_reported(tmp_path, name, reason):
    (tmp_path / "p.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError) as error:
        load_pairs(tmp_path / name)
    assert str(error.value).startswith(f"dataset {tmp_path / name} {reason}")


@pytest.mark.parametrize("late", [1, 1500])
def test_a_key_that_one_row_has_is_in_no_other(tmp_path, late):
    """In any batch: nothing is guessed from earlier rows."""
    calls = [{"type": "function", "function": {"name": "weigh", "arguments": {"unit": None, "grams": 0.1 + 0.2}}}]
    rows = [ROWS[0]] * late + [{**ROWS[1], "chosen": turns("assistant", "", tool_calls=calls), "tools": calls[:1]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_preferences(tmp_path / "p.jsonl").dataset
    assert read_row(read[0])[0] == rows[0]
    assert read_row(read[late])[0] == rows[late]


def test_other_columns_keep_their_values_and_those_of_several_types_become_text(tmp_path):
    rows = [
        {**ROWS[0], "id": 7, "score": 1, "good": True, "models": {"chosen": "a"}, "mixed": [1], "none": None},
        {**ROWS[1], "id": "b", "score": 2.5, "good": False, "models": {"rejected": "b"}, "mixed": {"a": "é"}},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_preferences(tmp_path / "p.jsonl").dataset
    assert read["id"][:] == ["7", "b"]
    assert read["score"][:] == [1.0, 2.5]
    assert read["good"][:] == [True, False]
    assert read[1]["models"] == {"chosen": None, "rejected": "b"}
    assert read["mixed"][:] == ["[1]", '{"a": "é"}']
    (tmp_path / "p.csv").write_text("prompt,completion,label,score,id\na,b,true,1,01\nc,d,False,2.5,x\n")
    read = load_preferences(tmp_path / "p.csv").dataset
    assert (read["label"][:], read["score"][:], read["id"][:]) == ([True, False], [1.0, 2.5], ["01", "x"])


def test_a_wrong_name_of_a_column_is_reported_with_the_names_of_the_file(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"ask": "a", "good": "b", "bad": "c"}\n')
    with pytest.raises(UserError, match=r"no column 'goood' \(did you mean 'good'\?\); found: ask, good, bad"):
        load_preferences(tmp_path / "p.jsonl", columns={"prompt": "ask", "chosen": "goood", "rejected": "bad"})


def test_files_of_a_folder_that_are_not_read_are_noted(tmp_path):
    for name, text in (("a.jsonl", LINES), ("b.jsonl", LINES), ("c.csv", as_table(",")), ("README.md", "# Pairs")):
        (tmp_path / name).write_text(text)
    read = load_preferences(tmp_path)
    assert len(read.dataset) == 2 * len(ROWS)
    assert [note for note in read.notes if "c.csv" in note] == [
        "c.csv is not read: of a folder one kind of file is, here .jsonl; name it as a source"
    ]
    (tmp_path / "c.csv").unlink()
    assert not any("is not read" in note for note in load_preferences(tmp_path).notes)


def test_a_table_with_separators_at_the_ends_of_its_lines_is_read(tmp_path):
    (tmp_path / "p.csv").write_text("".join(f"{line},,\n" for line in as_table(",").splitlines()))
    assert load_preferences(tmp_path / "p.csv").dataset["chosen"][:] == [row["chosen"] for row in ROWS]


# name: (file, its text, the words of the error)
BAD = {
    "no JSON": ("p.jsonl", LINES + '{"prompt": \n', "line 3: not JSON"),
    "no object": ("p.jsonl", LINES + "[1]\n", "row 2 (line 3): list, not an object with columns"),
    "half a pair": ("p.jsonl", LINES + json.dumps({**ROWS[0], "id": "x", "chosen": "a \ud83d"}),
                    "p.jsonl, row 2 (line 3) (id x): 'chosen' holds half of a surrogate pair"),
    "half a pair in a tool": ("p.jsonl", json.dumps({**ROWS[0], "tools": [{"name": "a \ud83d"}]}),
                              "p.jsonl, row 0 (line 1): a tool or a key of a message holds half of a surrogate pair"),
    "an empty cell": ("p.csv", as_table(",") + "c,Name a fish.,,Boot.\n", "p.csv, row 2 (id c): 'chosen' is empty"),
    "a cell too many": ("p.csv", as_table(",") + "c,Name, a fish.,Eel.,Boot.\n",
                         "p.csv, line 4 has more cells than the header; put texts with the separator in quotes"),
    "no column": (
        "p.jsonl", '{"ask": "a", "chosen": "b"}\n',
        "has no column 'rejected'; found: ask, chosen; needed: prompt, chosen, rejected; say by `columns` what",
    ),
    "a list of rows": ("p.jsonl", json.dumps(ROWS), "list, not an object with columns; a list of rows is a .json"),
    "half a pair in a name": (
        "p.jsonl", json.dumps({**ROWS[0], "a \ud83d": 1}), "row 0 (line 1): the name of a column holds half of a",
    ),
    "a quote that is not closed": ("p.csv", as_table(",") + 'c,Name a fish.,"Eel.,Boot.\nd,e,f,g\n',
                                   "p.csv, line 4: not CSV (a quote opens a cell and none closes it)"),
    "a quote within a cell": ("p.csv", as_table(",") + 'c,"Name a "fish".",Eel.,Boot.\n',
                              "p.csv, line 4: not CSV (text follows a cell in quotes)"),
    "a name twice": ("p.csv", "prompt,chosen,rejected,chosen\na,b,c,d\n", "line 1: two columns are called 'chosen'"),
    "no rows": ("p.csv", "prompt,chosen,rejected\n", "has no rows"),
    "empty": ("p.jsonl", "", "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_unreadable_rows_are_reported_with_file_and_line(tmp_path, case):
    name, text, reason = BAD[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_pairs(tmp_path / name)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_changed_file_is_never_read_as_it_was(tmp_path):
    for row in ROWS:
        (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
        assert load_pairs(tmp_path / "p.jsonl").to_list() == [row]


def test_shards_of_a_folder_may_have_other_types_and_what_fails_keeps_its_cause(tmp_path):
    for number, row in enumerate(({**ROWS[0], "id": 1}, ROWS[1])):
        (tmp_path / "j").mkdir(exist_ok=True)
        (tmp_path / "j" / f"train-{number}.jsonl").write_text(json.dumps(row) + "\n")
        Dataset.from_list([{**row, "n": [number, "one"][number]}]).to_parquet(
            tmp_path / "t" / f"train-{number}.parquet"
        )
    assert load_preferences(tmp_path / "j").dataset["id"][:] == ["1", "r1"]
    with pytest.raises(UserError) as error:
        load_preferences(tmp_path / "t")
    assert "no such file" not in str(error.value)
    assert "int64" in str(error.value)


def test_repairs_are_logged_if_no_caller_reports_them(tmp_path, caplog):
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "Who?", "system": "Brief.", "chosen": "A", "rejected": "B"})
    )
    with caplog.at_level(logging.WARNING, "clair"):
        assert load_pairs(tmp_path / "p.jsonl")[0]["prompt"][0] == {"role": "system", "content": "Brief."}
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'p.jsonl'}: 1 of 1 rows have a column of system texts; read as the system turn"
    ]


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_folder_without_pairs_in_a_split_is_read_by_datasets(tmp_path, fraction):
    folder = write_dataset(tmp_path / "pairs", synthetic_pairs(4, characters=20), 3, test_fraction=fraction)
    full = "test" if fraction else "train"
    assert {split: len(rows) for split, rows in datasets.load_dataset(str(folder)).items()} == {full: 4}
    assert pq.read_table(folder / "data" / "train-00000-of-00001.parquet").num_rows == (0 if fraction else 4)
