"""Requests over HTTP: every answer of an endpoint has a named outcome, and no row gets another's reply."""

from __future__ import annotations

import json
import sqlite3

import pytest

from clair.core.errors import UserError
from clair.inference.openai import retry_after
from clair.pipeline.build import build
from tests.clair.building import (
    config_for,
    drops,
    manifest,
    outcomes,
    pairs,
    scripted_rows,
    write_prompts,
)

GOOD = "good answer {n}"
FAILED = "!reviser."

# The server's script for one row, and the row's outcome; {n} is its number.
OUTCOMES = {
    "ok": GOOD,
    # the server's own words about a request: final
    "400": FAILED + "http_400",
    "400surrogate": FAILED + "http_400",
    "400big": FAILED + "http_400",
    "400text": FAILED + "http_400",
    "403": FAILED + "http_403",
    "403flagged": FAILED + "http_403",
    "403html": FAILED + "http_403",
    "413": FAILED + "http_413",
    "422": FAILED + "http_422",
    "400filter": "reviser.content_filter",
    # too many: requested again until it is answered
    "429 ok": GOOD,
    "429 429 429 429 429 429 429 ok": GOOD,
    "429:0.2 ok": GOOD,
    "429:-5 ok": GOOD,
    "429:nan ok": GOOD,
    "429ms ok": GOOD,
    "429date ok": GOOD,
    "429words ok": GOOD,
    "429html ok": GOOD,
    # no answer: requested again, up to `attempts`
    "500 ok": GOOD,
    "502 ok": GOOD,
    "503 ok": GOOD,
    "529 ok": GOOD,
    "408 ok": GOOD,
    "409 ok": GOOD,
    "drop ok": GOOD,
    "half ok": GOOD,
    "wait:30 ok": GOOD,
    "gzip ok": GOOD,
    "garbled ok": GOOD,
    "trickle ok": GOOD,
    "500": FAILED + "unreachable",
    "502": FAILED + "unreachable",
    "drop": FAILED + "unreachable",
    "half": FAILED + "unreachable",
    "wait:30": FAILED + "unreachable",
    "gzip": FAILED + "unreachable",
    "garbled": FAILED + "unreachable",
    "trickle": FAILED + "unreachable",
    # 200, and an error of the server inside
    "body429 ok": GOOD,
    "body503 ok": GOOD,
    "body429": FAILED + "unreachable",
    "body503": FAILED + "unreachable",
    "bodyerror": FAILED + "malformed_reply",
    # 200, but no chat completion: requested once more
    "html ok": GOOD,
    "html": FAILED + "malformed_reply",
    "bightml": FAILED + "malformed_reply",
    "nothing": FAILED + "malformed_reply",
    "204": FAILED + "malformed_reply",
    "badjson": FAILED + "malformed_reply",
    "badjson ok": GOOD,
    "list": FAILED + "malformed_reply",
    "nulljson": FAILED + "malformed_reply",
    "deep": FAILED + "malformed_reply",
    "empty": FAILED + "malformed_reply",
    "empty ok": GOOD,
    "nochoices": FAILED + "malformed_reply",
    "nullchoice": FAILED + "malformed_reply",
    "textchoice": FAILED + "malformed_reply",
    "tool": FAILED + "tool_call",
    "stream": FAILED + "malformed_reply",
    "stream ok": GOOD,
    "surrogate": FAILED + "malformed_reply",
    "surrogate ok": GOOD,
    "utf8": FAILED + "malformed_reply",
    "utf8 ok": GOOD,
    # a chat completion with one oddity
    "nousage": GOOD,
    "infinite": GOOD,
    "nan": GOOD,
    "huge": GOOD,
    "negative": GOOD,
    "othername": GOOD,
    "noname": GOOD,
    "reasoning": GOOD,
    "think": GOOD,
    "closethink": GOOD,
    "parts": GOOD,
    "nofinish": GOOD,
    "nul": "go\x00od answer {n}",
    "openthink": "reviser.empty_reply",
    "null": "reviser.empty_reply",
    "number": "reviser.empty_reply",
    "nocontent": "reviser.empty_reply",
    "length": "reviser.truncated",
    "big": GOOD + " " + "x" * 5_000_000,
}


def test_every_answer_of_an_endpoint_has_a_named_outcome_and_no_row_is_misaligned(tmp_path, server):
    scripts = [script for named in OUTCOMES for script in (named, "ok")]  # a good row between any two odd ones
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(scripts))
    reviser = {"url": server.url, "model": "m", "timeout": 2.0, "ask_again": False}
    built = build(config_for(tmp_path, server.url, reviser=reviser, attempts=2, concurrency=40))
    by_id = outcomes(tmp_path / "out")
    expected = {f"row-{n}": OUTCOMES[script].format(n=n) for n, script in enumerate(scripts)}
    wrong = {scripts[int(id[4:])]: (by_id[id][:100], want) for id, want in expected.items() if by_id[id] != want}
    assert not wrong
    for row in pairs(tmp_path / "out"):
        n = int(row["id"][4:])
        assert row["prompt"][0]["content"] == f"Task {n} [[{scripts[n]}]]"
        assert row["rejected"][0]["content"] == f"bad answer {n}"
        assert row["reasoning"] == "why"
    assert built.failed == sum(outcome.startswith("!") for outcome in expected.values())
    assert [row["id"] for row in drops(tmp_path / "out")] == [
        f"row-{n}" for n, script in enumerate(scripts) if "answer" not in OUTCOMES[script]
    ]
    assert manifest(tmp_path / "out")["counts"]["prompts"] == len(scripts)


def test_final_errors_are_requested_once_and_others_as_often_as_allowed(tmp_path, server):
    scripts = ["400", "422", "500", "drop", "html", "empty", "tool", "429 429 429 ok", "ok"]
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(scripts))
    build(config_for(tmp_path, server.url, attempts=3))
    request_counts = dict.fromkeys(scripts, 0)
    for request in server.requests():
        content = request["body"]["messages"][-1]["content"]
        request_counts[content[content.index("[[") + 2 : content.index("]]")]] += 1
    assert request_counts == {
        "400": 1,
        "422": 1,
        "500": 3,
        "drop": 3,
        "html": 2,
        "empty": 2,
        "tool": 2,
        "429 429 429 ok": 4,
        "ok": 1,
    }


@pytest.mark.parametrize(("step", "seconds"), [("429:1.5", 1.5), ("429ms", 0.3), ("429date", 1.0)])
def test_a_refused_request_waits_as_long_as_the_server_says(tmp_path, server, step, seconds):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows([f"{step} ok"]))
    build(config_for(tmp_path, server.url))
    first, second = (request["at"] for request in server.requests())
    assert seconds <= second - first <= seconds + 2.0


def test_other_rows_go_on_while_one_is_refused_for_its_own_sake(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["429:3 ok"] + ["ok"] * 40))
    build(config_for(tmp_path, server.url, concurrency=8))
    requests = server.requests()
    assert [request["step"] for request in requests][-1] == "ok"
    assert len(requests) == 42
    times = sorted(request["at"] for request in requests)
    assert times[-1] - times[0] >= 3.0


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("401", "refuses the key (401: Incorrect API key provided.); check api_key_env"),
        ("402", "wants to be paid (402: Insufficient credits.)"),
        ("body402", "wants to be paid (402: Insufficient credits.)"),
        ("404", "has no model 'm'"),
        ("404html", "is not the base URL of an OpenAI-compatible API (404"),
        ("quota", "has no quota left: You exceeded your current quota."),
    ],
)
def test_an_error_that_concerns_all_requests_ends_the_run_at_once_in_one_line(tmp_path, server, step, message):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows([step] + ["wait:0.5"] * 200))
    with pytest.raises(UserError) as error:
        build(config_for(tmp_path, server.url, concurrency=4))
    assert message in str(error.value)
    assert server.url in str(error.value)
    assert "\n" not in str(error.value)
    assert len(server.requests()) <= 5
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_replies_in_flight_when_the_run_ended_are_stored_and_not_requested_again(tmp_path, server):
    rows = scripted_rows(["401 ok", "wait:1", "wait:1", "wait:1"])
    write_prompts(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(UserError):
        build(config_for(tmp_path, server.url, concurrency=4))
    build(config_for(tmp_path, server.url, concurrency=4))
    assert sorted(server.steps()) == ["401", "ok", "wait:1", "wait:1", "wait:1"]
    assert outcomes(tmp_path / "out") == {f"row-{n}": f"good answer {n}" for n in range(4)}


def test_equal_requests_of_two_roles_are_one_call_that_is_paid_once(tmp_path, server):
    rows = [{"id": f"row-{n}", "prompt": f"Task {n} [[wait:0.5]]"} for n in range(5)]
    write_prompts(tmp_path / "prompts.jsonl", rows)
    same = {"url": server.url, "model": "m", "temperature": 1.0}
    judge = {"url": server.url, "model": "t"}
    config = config_for(
        tmp_path, server.url, pipeline="judged", reviser=None, target=same, candidates=[same], judge=judge, samples=2
    )
    built = build(config)
    assert len(server.requests()) == 10
    tokens = built.manifest["tokens"]
    assert tokens["target"]["calls"] + tokens["candidate_1"]["calls"] == 10


def test_the_raw_reply_and_the_failure_stand_in_the_ledger(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok", "html", "400", "tool"]))
    build(config_for(tmp_path, server.url))
    connection = sqlite3.connect(tmp_path / "out" / "ledger.sqlite")
    rows = {
        row: (state, reply, error)
        for row, state, reply, error in connection.execute("SELECT row, state, reply, error FROM calls")
    }
    connection.close()
    assert rows["row-0"][0] == "done"
    assert json.loads(rows["row-0"][1])["choices"][0]["message"]["content"].endswith("good answer 0")
    assert rows["row-1"][0] == "failed"
    assert rows["row-1"][1].startswith("<!DOCTYPE html>")
    assert rows["row-2"] == ("failed", None, "400: This prompt is too long.")
    assert "tool_calls" in rows["row-3"][1]


def test_hidden_reasoning_is_never_part_of_an_answer(tmp_path, server):
    """In a target's answer, a reasoning model's thoughts are neither rejected text nor shown to the reviser."""
    scripts = ("think", "closethink", "reasoning")
    write_prompts(tmp_path / "prompts.jsonl", [{"id": s, "prompt": f"bad task [[{s}]]"} for s in scripts])
    target = {"url": server.url, "model": "t"}
    build(config_for(tmp_path, server.url, target=target, filters={"identical": False}))
    for row in pairs(tmp_path / "out"):
        assert "idea" not in row["rejected"][0]["content"]
    assert all("idea" not in json.dumps(r["body"]) for r in server.requests())


def test_options_are_passed_through_as_they_are(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    extra = {"top_p": 0.9, "max_completion_tokens": 77, "reasoning_effort": "low", "logit_bias": {"5": -1}}
    reviser = {
        "url": server.url,
        "model": "m",
        "max_tokens": None,
        "temperature": None,
        "extra": extra | {"headers": {"X-Team": "pairs"}},
        "system": "Be brief.",
    }
    build(config_for(tmp_path, server.url, reviser=reviser))
    (request,) = server.requests()
    body = request["body"]
    messages = body.pop("messages")
    assert body == {"model": "m", **extra}
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1]["role"] == "user"
    assert len(messages) == 2
    assert {name.lower(): value for name, value in request["headers"].items()}["x-team"] == "pairs"


def test_headers_go_with_the_first_look_at_the_models_too(tmp_path, server, monkeypatch):
    """An endpoint may want them before it shows anything."""
    monkeypatch.setenv("TEAM", "pairs")
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    reviser = {"url": server.url, "model": "m", "extra": {"headers": {"X-Team": "${TEAM}"}}}
    build(config_for(tmp_path, server.url, reviser=reviser))
    (headers,) = server.model_requests()
    assert {name.lower(): value for name, value in headers.items()}["x-team"] == "pairs"


def test_of_a_server_that_cannot_list_its_models_a_token_is_requested_instead(tmp_path, server):
    """`transformers serve` does so where there is no hub cache, and closes the connection after it."""
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"] * 3))
    build(config_for(tmp_path, server.url.replace("/v1", "/broken/v1")))
    assert len(pairs(tmp_path / "out")) == 3
    first = server.requests()[0]["body"]
    assert first["messages"] == [{"role": "user", "content": "Hello"}]
    assert first["max_tokens"] == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": " 3 "}, 3.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "1.2.3"}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT", "date": "Thu, 01 Jan 1970 00:00:50 GMT"}, 10.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT", "date": "today"}, None),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "nan"}, 0.0),
    ],
)
def test_retry_after_is_read_in_every_form(headers, seconds):
    assert retry_after(headers) == seconds


@pytest.mark.parametrize("value", ["inf", "9" * 400, "99999999999"])
def test_no_server_makes_us_wait_for_ever(value):
    for name in ("retry-after", "retry-after-ms"):
        assert (retry_after({name: value}) or 0) <= 86_400


@pytest.mark.parametrize(("failure", "billed"), [("reset", True), ("hang", True), ("nobody", False)])
def test_a_request_that_may_have_arrived_may_be_billed_and_one_without_a_connection_not(failure, billed):
    import asyncio

    from clair.inference.model import Unreachable
    from clair.inference.openai import OpenAIModel

    async def answer(reader, writer):
        await reader.read(100)
        if failure == "reset":
            writer.transport.abort()
        else:
            await reader.read()
            writer.close()

    async def ask():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        if failure == "nobody":
            server.close()
            await server.wait_closed()
        model = OpenAIModel(f"http://127.0.0.1:{port}/v1", "m", timeout=0.5)
        try:
            with pytest.raises(Unreachable) as caught:
                await model.complete({"messages": []})
            return caught.value.billed
        finally:
            await model.close()
            server.close()
            await asyncio.sleep(0.05)  # the server's side closes its connection

    assert asyncio.run(ask()) is billed
