"""Conversations with tools: every turn reaches the models and the dataset unchanged."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clair.cluster.merge import merge
from clair.core.errors import UserError
from clair.data.dataset import load_pairs, read_rows, schema, split_file
from clair.data.prompt_sources import PromptSource, read_prompts
from clair.data.records import task_text
from clair.data.row_files import load_split
from clair.inference.model import parse_reply
from clair.pipeline.build import build
from clair.pipeline.shards import Shard, shards_location
from clair.reporting.review import fingerprint
from tests.clair.building import clair, drops, manifest, write_prompts
from tests.clair.scripted import Scripted, choice, endpoint, install, oracle_verdict, recipe, revision

CALL = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": {"port": "Brest", "at": None}}}
SECOND_CALL = {"id": "c2", "type": "function", "function": {"name": "moon", "arguments": '{"day": 3}'}}
TURNS = [
    {"role": "user", "content": "When is high water?", "name": "Anna"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, SECOND_CALL], "reasoning_content": "I must look."},
    {"role": "tool", "tool_call_id": "c1", "content": "at noon"},
]
TOOLS = [
    {"type": "function", "function": {"name": "tide", "parameters": {"properties": {"port": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "moon", "parameters": {"properties": {"day": {"type": "integer"}}}}},
]
ROWS = [
    {"id": "tools", "prompt": TURNS, "tools": TOOLS},
    {"id": "text", "prompt": "Hello?"},
    {"id": "json", "prompt": "And the moon?", "tools": json.dumps(TOOLS[1:])},
]


def built(tmp_path, monkeypatch, target, rows=ROWS, name="out", **keys):
    """Build with a target that replies `target(messages, sample)`. Returns the pairs by id and the models."""
    models = {
        "target": Scripted("t", target),
        "reviser": Scripted("m", revision),
        "judge": Scripted("j", oracle_verdict),
    }
    install(monkeypatch, **models)
    keys = {"pipeline": "revised", "reviser": endpoint()} | keys
    build(recipe(tmp_path / name, rows, target=endpoint(), **keys))
    return {row["id"]: row for row in read_rows(tmp_path / name)}, models


def test_tool_calls_their_results_and_the_tools_reach_every_model_and_the_dataset_whole(tmp_path, monkeypatch):
    by_id, models = built(tmp_path, monkeypatch, lambda messages, sample: "a bad answer")
    sent = {request["messages"][0]["content"]: request for request in models["target"].requests}
    assert (sent[TURNS[0]["content"]]["messages"], sent[TURNS[0]["content"]]["tools"]) == (TURNS, TOOLS)
    assert "tools" not in sent["Hello?"]
    revisers = [request["messages"][0]["content"] for request in models["reviser"].requests]
    assert all("tools" not in request for request in models["reviser"].requests)
    (task,) = [text for text in revisers if "high water" in text]
    for text in ("Anna", "tide", "Brest", "moon", '\\"day\\": 3', "c1", "at noon", "I must look.", '"port": {"type"'):
        assert text in task, text
    assert (by_id["tools"]["prompt"], by_id["tools"]["tools"]) == (TURNS, TOOLS)
    assert (by_id["json"]["tools"], by_id["text"]["tools"]) == (TOOLS[1:], None)
    assert by_id["text"]["prompt"] == [{"role": "user", "content": "Hello?"}]
    read = {row["id"]: row for row in load_split(str(tmp_path / "out"), "train")}  # as any reader gets them
    assert read == by_id
    trained = {row["id"]: row for row in load_pairs(tmp_path / "out")}
    assert json.loads(trained["tools"]["tools"]) == TOOLS
    calls = json.loads(trained["tools"]["prompt"][1]["tool_calls"])
    assert calls[0] == CALL
    assert "at noon" in str(trained["tools"]["prompt"][2])


def test_rows_without_tools_are_written_as_ever(tmp_path, monkeypatch):
    built(tmp_path, monkeypatch, lambda messages, sample: "a bad answer", ROWS[1:2])
    for split in ("train", "test"):
        assert pq.read_schema(tmp_path / "out" / split_file(split)).equals(schema())
    assert task_text(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})) == (
        "System:\nBe brief.\n\nUser:\nHi"
    )


def test_calling_a_tool_ends_an_answer_well_only_where_the_row_has_tools(tmp_path, monkeypatch):
    def target(messages, sample):
        text = messages[-1]["content"]
        return choice(None if "moon" in text else "a bad answer", "tool_calls", tool_calls=[CALL])

    by_id, _ = built(tmp_path, monkeypatch, target)
    assert by_id["tools"]["rejected"] == [{"role": "assistant", "content": "a bad answer", "tool_calls": [CALL]}]
    assert by_id["tools"]["chosen"] == [{"role": "assistant", "content": "a good answer", "tool_calls": [CALL]}]
    assert load_split(str(tmp_path / "out"), "train")[0] == by_id["tools"]
    assert {row["id"]: (row["stage"], row["reason"]) for row in drops(tmp_path / "out")} == {
        "text": ("target", "tool_call"),
        "json": ("target", "tool_call"),
    }


def test_the_first_answer_that_calls_a_tool_may_come_late_and_shards_give_the_same_bytes(tmp_path, monkeypatch):
    def target(messages, sample):
        calls = {"tool_calls": [CALL]} if messages[-1]["content"] == "task 7" else {}
        return choice("a bad answer", "tool_calls" if calls else "stop", **calls)

    monkeypatch.setattr("clair.data.dataset.ROWS_PER_GROUP", 3)
    rows = [{"id": f"r{n}", "prompt": f"task {n}", "tools": TOOLS} for n in range(10)]
    by_id, _ = built(tmp_path, monkeypatch, target, rows)
    assert {id for id, row in by_id.items() if "tool_calls" in row["chosen"][0]} == {"r7"}
    assert [row["id"] for row in load_split(str(tmp_path / "out"), "train")] == [row["id"] for row in rows]
    config = recipe(tmp_path / "parts", rows, pipeline="revised", reviser=endpoint(), target=endpoint())
    for index in (1, 2, 3):
        build(config, shard=Shard(index, 3))
    merge(shards_location(config.out))
    names = [split_file(split) for split in ("train", "test")]
    assert [(tmp_path / "parts" / n).read_bytes() for n in names] == [
        (tmp_path / "out" / n).read_bytes() for n in names
    ]
    assert not list((tmp_path / "out" / "data").glob(".*"))


def test_a_judge_sees_the_calls_of_answers_and_the_pair_has_them(tmp_path, monkeypatch):
    calls = [{**SECOND_CALL, "id": "bad"}, {**SECOND_CALL, "id": "good"}]

    def target(messages, sample):
        return choice("", "tool_calls", tool_calls=[calls[sample]])

    by_id, _ = built(tmp_path, monkeypatch, target, ROWS[:1], pipeline="judged", reviser=None, judge=endpoint(),
                     filters={"empty": False, "identical": False, "length": False})  # fmt: skip
    assert by_id["tools"]["chosen"][0]["tool_calls"] == calls[1:]
    assert by_id["tools"]["rejected"][0]["tool_calls"] == calls[:1]


def test_prompts_of_parquet_come_without_the_nulls_that_arrow_fills_in(tmp_path):
    table = pa.Table.from_pylist([{"prompt": [TURNS[0], {**TURNS[1], "tool_calls": [CALL]}, TURNS[2]], "tools": TOOLS}])
    pq.write_table(table, tmp_path / "p.parquet")
    (prompt,) = read_prompts(PromptSource(path=str(tmp_path / "p.parquet")))
    assert [sorted(turn) for turn in prompt.messages] == [sorted(turn) for turn in TURNS]
    assert list(prompt.tools) == TOOLS


def test_the_prompts_of_a_dataset_with_tools_are_read_back_whole(tmp_path, monkeypatch):
    built(tmp_path, monkeypatch, lambda messages, sample: "a bad answer")
    for path in (tmp_path / "out", tmp_path / "out" / split_file("train")):
        by_id = {prompt.id: prompt for prompt in read_prompts(PromptSource(path=str(path)))}
        assert (list(by_id["tools"].messages), list(by_id["tools"].tools)) == (TURNS, TOOLS)


@pytest.mark.parametrize(
    ("turn", "match"),
    [
        ({"role": "user", "content": "Hi", "weight": 0.5}, "'weight'"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "user", "content": "Hi", "tool_calls": "none"}, "tool_calls"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content"),
    ],
)
def test_turns_that_cannot_be_sent_are_refused_by_name_before_any_request(tmp_path, turn, match):
    file = write_prompts(
        tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": [turn, {"role": "user", "content": "?"}]}]
    )
    with pytest.raises(UserError, match=f"line 2: .*{match}"):
        list(read_prompts(PromptSource(path=str(file))))


def test_turns_in_parts_of_text_are_text(tmp_path):
    blocks = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
    file = write_prompts(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": blocks}]}])
    (prompt,) = read_prompts(PromptSource(path=str(file)))
    assert prompt.messages == ({"role": "user", "content": "What is this?"},)


def test_a_dataset_with_tools_is_shown_reviewed_exported_and_merged(tmp_path, monkeypatch):
    by_id, _ = built(tmp_path, monkeypatch, lambda messages, sample: "a bad answer")
    out = tmp_path / "out"
    results = [
        clair("show", out),
        clair("report", out),
        clair("export", out, tmp_path / "x.jsonl"),
        clair("stats", out),
    ]
    assert [end.code for end in results] == [0] * 4, results
    exported = {row["id"]: row for row in map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())}
    assert (exported["tools"]["tools"], exported["tools"]["prompt"]) == (TOOLS, TURNS)
    marks = {"format": 1, "dataset": fingerprint(manifest(out)), "decisions": {"text": "drop"}}
    (tmp_path / "d.json").write_text(json.dumps(marks))
    assert clair("keep", out, tmp_path / "d.json", "--out", tmp_path / "kept").code == 0
    assert {row["id"]: row for row in read_rows(tmp_path / "kept")} == {id: by_id[id] for id in ("tools", "json")}
    config = recipe(tmp_path / "merged", ROWS, pipeline="revised", reviser=endpoint(), target=endpoint())
    for index in (1, 2):
        build(config, shard=Shard(index, 2))
    merge(shards_location(config.out))
    assert (tmp_path / "merged" / split_file("train")).read_bytes() == (out / split_file("train")).read_bytes()
    assert clair("next", out, "--model", "runs/x", "--out", tmp_path / "next").code == 0
    again = {prompt.id: prompt for prompt in read_prompts(PromptSource(path=str(tmp_path / "next-prompts.jsonl")))}
    assert (list(again["tools"].messages), list(again["tools"].tools)) == (TURNS, TOOLS)


def test_a_reply_with_text_keeps_its_calls(tmp_path):
    reply = parse_reply(json.dumps({"choices": [choice("Yes.", "tool_calls", tool_calls=[CALL])]}), tools=True)
    assert (reply.text, reply.tool_calls) == ("Yes.", (CALL,))
