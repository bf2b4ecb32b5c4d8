"""A reviser that may change the arguments of tool calls: what is accepted, what is refused, what a reader sees."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from clair.core.errors import UserError
from clair.core.recipe import load_recipe
from clair.data.dataset import read_rows
from clair.pipeline.build import build
from clair.pipeline.config import BuildConfig
from clair.prompting.calls import with_calls
from recipes.world.running import running
from recipes.world.tides import TOOL
from tests.clair.building import ROOT, clair, drops
from tests.clair.scripted import Scripted, choice, endpoint, install, recipe

CALL = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Brest", "day": "3"}'}}
GOOD = '{"name": "tide", "arguments": {"port": "Brest", "day": 3}}'
ROWS = [{"id": "r", "prompt": "When is high water in Brest on day 3?", "tools": [TOOL]}]


def reply(text):
    return "{teacher_reasoning}\nwhy\n\n{corrected_student_solution}\n" + text


def built(tmp_path, monkeypatch, replies, text="", call=CALL, rows=ROWS, **keys):
    """Build with a target that calls the tool and a reviser with these replies in order. Returns the reviser."""
    texts = iter(replies)
    reviser = Scripted("m", lambda messages, sample: next(texts))
    target = Scripted("t", lambda messages, sample: choice(text, "tool_calls", tool_calls=[call]))
    install(monkeypatch, target=target, reviser=reviser)
    keys = {"reviser": endpoint(tool_calls="revise")} | keys
    build(recipe(tmp_path / "out", rows, pipeline="revised", target=endpoint(), **keys))
    return reviser


def test_the_arguments_of_a_call_are_revised_and_written_as_they_came(tmp_path, monkeypatch):
    reviser = built(tmp_path, monkeypatch, [reply(f"Tool calls:\n{GOOD}")])
    (row,) = read_rows(tmp_path / "out")
    assert row["rejected"] == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    (call,) = row["chosen"][0]["tool_calls"]
    assert call == CALL | {"function": {"name": "tide", "arguments": '{"port": "Brest", "day": 3}'}}
    assert row["contrast"]["levenshtein"] > 0
    shown = reviser.requests[0]["messages"][0]["content"]
    assert 'Tool calls:\n{"name": "tide", "arguments": {"port": "Brest", "day": "3"}}' in shown


def test_text_and_calls_are_revised_together_also_by_edits(tmp_path, monkeypatch):
    edit = (
        "{teacher_reasoning}\nwhy\n\n{minimal_edits}\n<<<<<<< FIND\nbad\n=======\ngood\n>>>>>>> REPLACE\n"
        '<<<<<<< FIND\n"day": "3"\n=======\n"day": 3\n>>>>>>> REPLACE'
    )
    keys = {"reviser": endpoint(tool_calls="revise", mode="edits")}
    built(tmp_path, monkeypatch, [edit], text="A bad word.", **keys)
    (row,) = read_rows(tmp_path / "out")
    assert row["chosen"][0]["content"] == "A good word."
    assert json.loads(row["chosen"][0]["tool_calls"][0]["function"]["arguments"]) == {"port": "Brest", "day": 3}


@pytest.mark.parametrize(
    ("line", "reason", "named"),
    [
        (
            '{"name": "tide", "arguments": {"port": "Brest", "day": "4"}}',
            "arguments_invalid",
            "day: '4' is not of",
        ),
        ('{"name": "tide", "arguments": {"port": "Atlantis", "day": 4}}', "arguments_invalid", "port: 'Atlantis'"),
        ('{"name": "tide", "arguments": {"port": "Brest"}}', "arguments_invalid", "'day' is a required property"),
        ('{"name": "moon", "arguments": {"port": "Brest", "day": 3}}', "calls_changed", 'expected {"name": "tide"'),
        ('{"name": "tide", "arguments": {"port": "Brest", "day": 3}', "calls_changed", "is not JSON"),
        (f"{GOOD}\n{GOOD}", "calls_changed", "expected 1 under"),
    ],
)
def test_a_call_that_does_not_fit_is_requested_again_by_name_and_then_dropped(
    tmp_path, monkeypatch, line, reason, named
):
    reviser = built(tmp_path, monkeypatch, [reply(f"Tool calls:\n{line}")] * 2)
    assert [(d["stage"], d["reason"]) for d in drops(tmp_path / "out")] == [("reviser", reason)]
    assert named in reviser.requests[1]["messages"][2]["content"]


def test_a_call_that_is_right_already_gives_no_pair(tmp_path, monkeypatch):
    right = CALL | {"function": {"name": "tide", "arguments": '{"port":"Brest","day":3}'}}
    built(tmp_path, monkeypatch, [reply(f"Tool calls:\n{GOOD}")], call=right)
    assert [(d["stage"], d["reason"]) for d in drops(tmp_path / "out")] == [("filter", "identical")]


def test_without_the_key_calls_are_kept_as_ever(tmp_path, monkeypatch):
    built(tmp_path, monkeypatch, [], reviser=endpoint())
    assert [(d["stage"], d["reason"]) for d in drops(tmp_path / "out")] == [("target", "tool_call")]


def test_a_tool_without_a_json_schema_is_refused_by_its_row_before_any_request(tmp_path, monkeypatch):
    tool = {"type": "function", "function": {"name": "tide", "parameters": {"type": "objekt"}}}
    with pytest.raises(UserError, match=r"row with id r: the parameters of tool 'tide' are no JSON schema: 'objekt'"):
        built(tmp_path, monkeypatch, [], rows=[ROWS[0] | {"tools": [tool]}])


def test_report_and_terminal_show_calls_as_calls(tmp_path, monkeypatch):
    built(tmp_path, monkeypatch, [reply(f"Tool calls:\n{GOOD}")])
    assert with_calls("", [CALL]) == 'Tool calls:\n{"name": "tide", "arguments": {"port": "Brest", "day": "3"}}'
    assert "Tool calls:" in clair("show", tmp_path / "out").out
    assert clair("report", tmp_path / "out").code == 0
    assert "Tool calls:" in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_the_worlds_recipe_gives_its_expected_numbers_on_a_real_server(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    command = [sys.executable, "-m", "recipes.world.tides", "--count", "100", "--out", str(prompts)]
    subprocess.run(command, check=True, cwd=ROOT)
    with running() as server:
        urls = [f"{role}.url={server.url}" for role in ("target", "reviser")]
        overrides = [f"prompts.path={prompts}", f"out={tmp_path / 'pairs'}", *urls]
        result = build(load_recipe(BuildConfig, ROOT / "recipes/tools/revise.yaml", overrides))
    assert result.manifest["counts"]["pairs"] == 45
    assert set(result.manifest["drop_reasons"]) == {"filter.identical"}
