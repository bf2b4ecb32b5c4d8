"""Prompts from every kind of file, read the same; every row that cannot be used is reported with its number."""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
import re
import subprocess
import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from clair.core.errors import UserError
from clair.data.prompt_sources import PromptSource, each_prompt, read_prompts, scan
from clair.data.records import content_id
from clair.data.row_files import file_rows

USER = {"role": "user", "content": "Hi"}
ROWS = [
    {"id": "a", "prompt": "What is 1 + 1?", "answer": "3"},
    {"id": "b", "prompt": "Sag: „é“\nund 😀", "answer": "مرحبا"},
    {"id": "c", "prompt": "{braces} {{ jinja }} {% x %} ${HOME} %s", "answer": ""},
]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the format of the file's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def prompts(path: Path, **options) -> list:
    return list(read_prompts(PromptSource(path=str(path), **options)))


def refusal_of(path: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        scan(PromptSource(path=str(path), **options))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, name):
    loaded = prompts(write(tmp_path / name, ROWS))
    assert [(p.id, p.messages, p.answer) for p in loaded] == [
        (row["id"], ({"role": "user", "content": row["prompt"]},), row["answer"] or None) for row in ROWS
    ]


def test_a_folder_that_datasets_reads_and_its_split(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-0.parquet", ROWS)
    write(tmp_path / "data" / "test-0.parquet", ROWS[:1])
    assert [p.id for p in prompts(tmp_path)] == ["a", "b", "c"]
    assert [p.id for p in prompts(tmp_path, split="test")] == ["a"]
    assert "load_dataset says" in refusal_of(tmp_path, split="dev")


def test_an_unknown_file_or_dataset_is_reported_with_the_librarys_message(tmp_path):
    assert refusal_of(tmp_path / "nobody" / "nothing").startswith(f"prompts '{tmp_path}/nobody/nothing': no such file")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet"])
def test_a_conversation_keeps_its_system_prompt_and_its_earlier_turns(tmp_path, name):
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Hello"}, USER]
    (prompt,) = prompts(write(tmp_path / name, [{"prompt": messages}]))
    assert list(prompt.messages) == messages
    assert prompt.answer is None
    assert prompt.id == content_id(tuple(messages), None)


MESSAGES = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Hello"}, USER]


@pytest.mark.parametrize("name", ["p.csv", "p.parquet", "p.jsonl"])
@pytest.mark.parametrize("as_text", [json.dumps, repr])
def test_messages_as_json_text_are_read_as_messages(tmp_path, name, as_text):
    path = write(tmp_path / name, [{"prompt": as_text(MESSAGES)}, {"prompt": "Hi"}])
    messages = write(tmp_path / "messages.jsonl", [{"prompt": MESSAGES}, {"prompt": "Hi"}])
    assert prompts(path) == prompts(messages)
    assert [scan(PromptSource(path=str(file))).json_messages for file in (path, messages)] == [1, 0]


@pytest.mark.parametrize(
    "text",
    [
        f"{json.dumps(MESSAGES)} Explain this.",
        json.dumps(USER),
        json.dumps([{"role": "user"}, USER]),
        json.dumps([{"from": "human", "value": "Hi"}]),
        json.dumps([{"name": "role", "content": "Hi"}]),
        '[{"role": "user", "content": "Hi"',
        "[]",
        "\n\nHuman: Hi\n\nAssistant: Hello",
    ],
)
def test_other_text_stays_the_text_of_one_user_turn(tmp_path, text):
    (prompt,) = prompts(write(tmp_path / "p.csv", [{"prompt": text}]))
    assert prompt.messages == ({"role": "user", "content": text},)


def test_messages_as_json_text_that_cannot_be_sent_are_refused(tmp_path):
    text = json.dumps([{"role": "robot", "content": "Hi"}])
    assert "row 1: a message of the prompt is not {role, content}" in refusal_of(
        write(tmp_path / "p.csv", [{"prompt": text}])
    )


def test_a_system_prompt_only_is_a_prompt(tmp_path):
    (prompt,) = prompts(write(tmp_path / "p.jsonl", [{"prompt": [{"role": "system", "content": "Say hi."}]}]))
    assert prompt.messages[0]["role"] == "system"


def test_an_answer_may_be_one_assistant_message(tmp_path):
    row = {"prompt": "Hi", "answer": [{"role": "assistant", "content": "Hello"}]}
    assert prompts(write(tmp_path / "p.jsonl", [row]))[0].answer == "Hello"


def test_columns_may_have_other_names(tmp_path):
    path = write(tmp_path / "p.csv", [{"instruction": "Hi", "output": "Hello", "nr": "7"}])
    (prompt,) = prompts(path, columns={"prompt": "instruction", "answer": "output", "id": "nr"})
    assert (prompt.messages[0]["content"], prompt.answer, prompt.id) == ("Hi", "Hello", "7")


def test_several_answers_with_scores_and_ultrafeedbacks_completions(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        [
            {"prompt": "a", "answers": ["x", "y"], "scores": [1, 2.5]},
            {"prompt": "b", "answers": ["x", "y"]},
            {
                "prompt": "c",
                "completions": [{"response": "x", "overall_score": 3}, {"response": "y", "overall_score": 9}],
            },
        ],
    )
    assert [(p.answers, p.scores) for p in prompts(path)] == [
        (("x", "y"), (1.0, 2.5)),
        (("x", "y"), ()),
        (("x", "y"), (3.0, 9.0)),
    ]


def test_scores_that_are_all_missing_are_none(tmp_path):
    rows = [{"prompt": "a", "answers": ["x", "y"], "scores": scores} for scores in ([None, None], [math.nan, None])]
    rows += [{"prompt": "b", "completions": [{"response": "x"}, {"response": "y", "overall_score": None}]}]
    assert [p.scores for p in prompts(write(tmp_path / "p.jsonl", rows))] == [(), (), ()]


def test_an_empty_cell_of_a_table_is_a_null(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt,user,scores,answer,id,tools,key\na,,,,,,\nb,eve,,c,7,,k\n")
    first, second = prompts(path, columns={"reference": "key"})
    assert (first.labels, first.scores, first.answer, first.reference) == ({}, (), None, None)
    assert first.id == content_id(first.messages, None)
    assert (second.labels, second.answer, second.reference) == ({"user": "eve"}, "c", "k")


def test_the_bom_of_a_windows_editor_is_no_part_of_a_file(tmp_path):
    for name in ("p.jsonl", "p.json", "p.csv"):
        path = write(tmp_path / name, ROWS)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert [p.id for p in prompts(path)] == ["a", "b", "c"]


def test_blank_lines_and_line_separators_inside_text_are_no_rows(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "a\u2028b\x85c"}\r\n\n   \n{"prompt": "d"}', "utf-8")
    assert [p.messages[0]["content"] for p in prompts(path)] == ["a\u2028b\x85c", "d"]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\\ud83d", "answer": "b\\ude00", "id": "c\\ud83d"}\n')
    (prompt,) = prompts(path)
    assert (prompt.messages[0]["content"], prompt.answer, prompt.id) == ("a\ufffd", "b\ufffd", "c\ufffd")


def test_a_prompt_of_a_megabyte_is_a_prompt(tmp_path):
    (prompt,) = prompts(write(tmp_path / "p.csv", [{"prompt": "x" * 1_000_000}]))
    assert len(prompt.messages[0]["content"]) == 1_000_000


def test_limit_reads_no_further_than_it_says(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken')
    assert [p.messages[0]["content"] for p in read_prompts(PromptSource(path=str(path)), 2)] == ["a", "b"]


def test_a_scan_counts_rows_different_prompts_and_ready_answers(tmp_path):
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "answer": "x"},
        {"prompt": "a"},
        {"prompt": "b", "answer": "x"},
        {"prompt": "b", "answer": "y"},
    ]
    counts = scan(PromptSource(path=str(write(tmp_path / "p.jsonl", rows))))
    assert (counts.rows, counts.unique, counts.answered) == (5, 3, 2)


def test_the_first_of_equal_prompts_is_kept(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "id": n} for n in range(3)])
    left_out = [(p.id, why) for p, why in each_prompt(PromptSource(path=str(path)))]
    assert left_out == [("0", None), ("1", "duplicate"), ("2", "duplicate")]


def test_near_duplicates_are_left_out_only_where_requested(tmp_path):
    text = "Write a short poem about the sea in the voice of an old sailor who never learned to swim at all"
    rows = [{"prompt": text}, {"prompt": text + " please"}, {"prompt": "Something else entirely, about a mountain"}]
    path = write(tmp_path / "p.jsonl", rows)
    assert [why for _, why in each_prompt(PromptSource(path=str(path)))] == [None, None, None]
    near = PromptSource(path=str(path), near_duplicates=0.8)
    assert [why for _, why in each_prompt(near)] == [None, "near_duplicate", None]


def test_prompts_of_a_benchmark_are_left_out(tmp_path):
    question = "Which of the following planets in our solar system has the largest number of confirmed moons today"
    benchmark = write(tmp_path / "bench.jsonl", [{"prompt": question}, {"prompt": "What is 2 + 2?"}])
    rows = [{"prompt": f"Please answer: {question}?"}, {"prompt": "what is 2 2"}, {"prompt": "What is 2 + 3?"}]
    source = PromptSource(path=str(write(tmp_path / "p.jsonl", rows)), not_in=str(benchmark))
    assert [why for _, why in each_prompt(source)] == ["in_benchmark", "in_benchmark", None]


# ---- rows that cannot be used


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "b"', "line 3: not JSON"),
        ("[1, 2]", "line 3: list, not an object with a 'prompt' field"),
        ("7", "line 3: int, not an object"),
        ('"text"', "line 3: str, not an object"),
        ("[" * 5000, "line 3: not JSON"),
        ("1" * 5000, "line 3: not JSON"),
        ('{"question": "b", "x": 1}', "line 3: no column 'prompt'; columns found: question, x"),
        ("{}", "line 3: no column 'prompt'; columns found: none"),
        ('{"prompt": 7}', "line 3: the prompt is int, not text"),
        ('{"prompt": null}', "line 3: the prompt is NoneType, not text"),
        ('{"prompt": {"role": "user", "content": "a"}}', "line 3: the prompt is dict, not text"),
        ('{"prompt": ""}', "line 3: the prompt is empty"),
        ('{"prompt": "  "}', "line 3: the prompt is empty"),
        ('{"prompt": []}', "line 3: the prompt is list"),
        ('{"prompt": ["text"]}', "line 3: a message of the prompt is not {role, content}"),
        ('{"prompt": [{"role": "robot", "content": "a"}]}', "line 3: a message of the prompt"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}', "line 3: a message of the prompt"),
        ('{"prompt": [{"role": "user", "content": null}]}', "line 3: a message of the prompt"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}', "line 3: the prompt ends with an assistant turn"),
        ('{"prompt": "b", "answer": 7}', "line 3: the answer is int, not text"),
        ('{"prompt": "b", "answers": ["x"]}', "line 3: only one entry in answers"),
        ('{"prompt": "b", "answers": ["x", 7]}', "line 3: an entry of answers is not text"),
        ('{"prompt": "b", "answers": ["x", "y"], "scores": [1]}', "line 3: 2 answers but 1 scores"),
        ('{"prompt": "b", "answers": ["x", "y"], "scores": ["high", 1]}', "line 3: a score is not a number"),
        ('{"prompt": "b", "answers": "x", "scores": [1]}', "line 3: answers and scores must be lists"),
    ],
)
def test_a_row_that_cannot_be_used_is_reported_with_its_line(tmp_path, line, reason):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n' + line + "\n")
    assert reason in refusal_of(path)
    assert str(path) in refusal_of(path)


@pytest.mark.parametrize(
    ("value", "type_name"), [(datetime(2026, 1, 1), "datetime"), (Decimal("1.5"), "Decimal"), (b"caf\xe9", "bytes")]
)
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: {"a": [value]}])
def test_a_parquet_value_that_json_has_not_is_refused_with_its_row_and_column(tmp_path, value, type_name, wrap):
    path = write(tmp_path / "p.parquet", [{"prompt": "a", "key": None}, {"prompt": "b", "key": wrap(value)}])
    assert refusal_of(path, columns={"reference": "key"}) == (
        f"{path}, row 2: key holds a {type_name}; allowed: text, numbers, true, false, null, lists and objects; store "
        f"it as text"
    )


def test_tools_and_turns_of_a_parquet_file_that_json_has_not_are_refused(tmp_path):
    moment = datetime(2026, 1, 1)
    tools = write(tmp_path / "tools.parquet", [{"prompt": "a", "tools": [{"name": "f", "made": moment}]}])
    assert f"{tools}, row 1: tools holds a datetime; allowed: text" in refusal_of(tools)
    turns = [{"role": "assistant", "content": "a", "tool_calls": [{"at": moment}]}, USER]
    calls = write(tmp_path / "calls.parquet", [{"prompt": turns}])
    assert f"{calls}, row 1: tool_calls of a message holds a datetime; allowed: text" in refusal_of(calls)


def test_a_score_that_is_too_large_for_a_number_is_refused(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "answers": ["x", "y"], "scores": [10**400, 1]}])
    assert refusal_of(path) == (
        f"{path}, line 1: a score is not a number (int too large to convert to float); give numbers below 1e308, or "
        f"null for a missing one"
    )


def latin_1(values: list[bytes]) -> pa.Array:
    """Text of a Parquet file as a program writes it that does not check its encoding."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def test_parquet_text_that_is_not_utf_8_is_reported_with_its_row_and_column(tmp_path):
    texts = latin_1([b"a"] * 1499 + [b"caf\xe9"])
    for answer in (texts, pa.StructArray.from_arrays([texts], ["content"])):
        pq.write_table(pa.table({"prompt": ["a"] * 1500, "answer": answer}), path := tmp_path / "p.parquet")
        with pytest.raises(UserError) as error:
            list(file_rows(path))
        assert str(error.value) == (f"{path}, row 1500, column 'answer': not UTF-8 (byte 0xe9); save the file as UTF-8")


def test_a_parquet_date_that_python_has_not_is_reported_with_its_row_and_column(tmp_path):
    dates = pa.array([0, 2**62], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["a", "b"], "made": dates}), path := tmp_path / "p.parquet")
    assert f"{path}, row 2, column 'made': date value out of range; " in refusal_of(path)


def test_a_folder_of_parquet_text_that_is_not_utf_8_is_reported(tmp_path):
    pq.write_table(pa.table({"prompt": latin_1([b"a", b"caf\xe9"])}), tmp_path / "train.parquet")
    assert "can't decode byte 0xe9" in refusal_of(tmp_path)


def test_a_damaged_page_of_a_parquet_file_is_reported_with_the_rows_before_it(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(
        pa.table({"prompt": [f"{n} " * 50 for n in range(4000)]}), path, row_group_size=2000, use_dictionary=False
    )
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 2000 : start + 2200] = b"\xff" * 200
    path.write_bytes(content)
    assert re.fullmatch(
        rf"{path}, after row 2000: not Parquet \(.*\); write the file again, or copy it from where it came",
        refusal_of(path),
    )


def test_one_id_for_two_different_prompts_is_refused(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}])
    assert "row 2: the id '1' stands for two different prompts" in refusal_of(path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.jsonl", b"", "is empty; give at least one row"),
        ("p.jsonl", b"\n\n", "has no rows"),
        ("p.json", b"[]", "has no rows"),
        ("p.json", b'{"prompt": "a"}', "holds dict, not a list of rows"),
        ("p.json", b"[{", "not JSON"),
        ("p.csv", b"prompt\n", "has no rows"),
        ("p.csv", b"text\nhello\n", "row 1: no column 'prompt'; columns found: text"),
        ("p.csv", b"prompt,id\na,1\n,2\n", "row 2: the prompt is empty"),
        ("p.csv", b"id,prompt\n1,a\n2\n", "row 2: the prompt is empty"),
        (
            "p.csv",
            b'prompt,id\n"a\nb",1\nWhy, then?,2\n',
            "p.csv, line 4 has more cells than the header; put texts with",
        ),
        ("p.tsv", b"prompt\na\nb\tc\n", "p.tsv, line 3 has more cells than the header; put texts with"),
        ("p.parquet", b"no parquet", "not Parquet"),
        ("p.txt", b"hello", "is of no kind that is read: .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
        ("p.xlsx", b"hello", "is of no kind that is read"),
    ],
)
def test_a_file_that_cannot_be_used_is_reported_in_one_line(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    assert reason in refusal_of(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    assert refusal_of(tmp_path / name) == f"prompt file {tmp_path / name} does not exist"


def test_a_wrong_name_under_columns_is_reported_with_the_near_miss(tmp_path):
    path = write(tmp_path / "p.jsonl", ROWS)
    assert "unknown name 'promt' (did you mean 'prompt'?)" in refusal_of(path, columns={"promt": "prompt"})


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
def test_a_column_under_columns_that_no_row_has_is_refused_with_the_near_miss(tmp_path, name):
    path = write(tmp_path / name, [{"prompt": "a", "response": "x"}, {"prompt": "b", "response": "y"}])
    problem = refusal_of(path, columns={"answer": "respnse"})
    assert problem == (
        f"prompts.columns.answer: {path} has no column 'respnse' (did you mean 'response'?); found: prompt, response"
    )
    assert "no column 'promt' (did you mean 'prompt'?); columns found" in refusal_of(path, columns={"prompt": "promt"})


def test_a_column_under_columns_may_be_in_some_rows_only(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "response": "y"}])
    source = PromptSource(path=str(path), columns={"answer": "response"})
    assert [p.answer for p in read_prompts(source)] == [None, None, "y"]
    with pytest.raises(UserError, match=r"p\.jsonl \(first 2 rows\) has no column 'response'; found: prompt"):
        scan(source, 2)


def test_a_column_that_the_recipe_maps_is_not_read_under_its_own_name_too(tmp_path):
    gsm8k = write(tmp_path / "gsm8k.jsonl", [{"question": "6 * 7?", "answer": "#### 42", "id": "a"}])
    (prompt,) = prompts(gsm8k, columns={"prompt": "question", "reference": "answer", "group": "id"})
    assert (prompt.answer, prompt.reference, prompt.labels) == (None, "#### 42", {"group": "a"})
    assert prompt.id == content_id(prompt.messages, None, reference="#### 42")
    (prompt,) = prompts(gsm8k, columns={"prompt": "question", "reference": "answer", "answer": "answer"})
    assert (prompt.answer, prompt.reference) == ("#### 42", "#### 42")
    rows = [{"prompt": "a", "answer": "x", "stronger": "y", "completions": [{"response": "z"}]}]
    swapped = write(tmp_path / "swapped.jsonl", rows)
    columns = {"answer": "stronger", "stronger": "answer", "reference": "completions"}
    (prompt,) = prompts(swapped, columns=columns)
    assert (prompt.answer, prompt.stronger, prompt.reference) == ("y", "x", [{"response": "z"}])
    for columns in ({"prompt": None}, {"reference": "prompt"}):
        assert "prompts.columns leaves no column for the prompt" in refusal_of(swapped, columns=columns)


def test_labels_are_read_and_change_what_is_known_of_the_source(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "user": 7, "source": "hand"}])
    assert prompts(path)[0].labels == {"user": "7", "source": "hand"}
    changed = write(tmp_path / "q.jsonl", [{"prompt": "a", "user": 8, "source": "hand"}])
    assert scan(PromptSource(path=str(path))).sha256 != scan(PromptSource(path=str(changed))).sha256
    odd = write(tmp_path / "r.jsonl", [{"prompt": "a", "source": {"name": "hand"}}])
    assert "source is {'name': 'hand'}, not text or a whole number" in refusal_of(odd)
    assert "name another column, or null, under prompts.columns" in refusal_of(odd)
    assert prompts(odd, columns={"source": None})[0].labels == {}


@pytest.mark.parametrize(
    ("name", "content", "location"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', ", line 2: not UTF-8 (byte 0xe9)"),
        ("p.csv", b"prompt\na\ncaf\xe9\n", ", line 3: not UTF-8 (byte 0xe9)"),
        ("p.csv", "prompt\na\n".encode("utf-16"), ", line 1: not UTF-8 (byte 0xff)"),
        ("p.json", b'[{"prompt": "caf\xe9"}]', ": not UTF-8 (byte 0xe9)"),
    ],
)
def test_a_file_that_is_not_utf_8_is_reported_with_its_line(tmp_path, name, content, location):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        prompts(path)
    assert str(error.value) == f"{path}{location}; save the file as UTF-8"


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.ndjson", "p.ndjson.gz", "p.tsv", "p.csv.gz", "p.json.gz"])
def test_these_files_hold_prompts_too(tmp_path, name):
    kind = name.split(".")[1]
    separator = "\t" if kind == "tsv" else ","
    text = {"jsonl": '{"id": "a", "prompt": "say, this"}\n', "json": '[{"id": "a", "prompt": "say, this"}]'}
    text |= {"ndjson": text["jsonl"]} | dict.fromkeys(("csv", "tsv"), f'id{separator}prompt\na{separator}"say, this"\n')
    content = text[kind].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (prompt,) = prompts(tmp_path / name)
    assert (prompt.id, prompt.messages[0]["content"]) == ("a", "say, this")


def test_a_folder_of_save_to_disk_holds_prompts_too(tmp_path):
    Dataset.from_list([{"id": "a", "prompt": "say"}]).save_to_disk(tmp_path / "saved")
    assert [prompt.id for prompt in prompts(tmp_path / "saved")] == ["a"]


def test_a_packed_file_that_is_cut_off_is_reported(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:-9])
    with pytest.raises(UserError, match=r"p\.jsonl\.gz is no whole \.gz file"):
        prompts(path)


def test_a_folder_of_shards_with_two_types_in_a_column_reports_it(tmp_path):
    for number, value in enumerate(([1, 2], ["one"])):
        table = pa.table({"prompt": ["a"] * len(value), "n": value})
        pq.write_table(table, tmp_path / f"train-{number:05d}-of-00002.parquet")
    with pytest.raises(UserError) as error:
        prompts(tmp_path)
    assert "no such file" not in str(error.value)
    assert "int64" in str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_million_rows_are_not_in_memory(tmp_path, kind):
    """Reading 40,000 rows of 2.5 kB (100 MB) takes far less memory than they have."""
    path = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        with open(path, "w") as file:
            for n in range(40_000):
                file.write(json.dumps({"prompt": f"{n} " + "x" * 2500}) + "\n")
    else:
        draw = random.Random(0)
        with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as file:
            for _ in range(40):
                file.write_table(pa.table({"prompt": [draw.randbytes(1250).hex() for _ in range(1000)]}))
    code = (
        "import resource, sys\n"
        "from clair.data.prompt_sources import PromptSource, scan\n"
        "scan(PromptSource(path=sys.argv[1]), 1000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(scan(PromptSource(path=sys.argv[1])).unique)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )
    unique, more = map(int, run.stdout.split())
    assert unique == 40_000
    assert more < 20_000  # kilobytes
