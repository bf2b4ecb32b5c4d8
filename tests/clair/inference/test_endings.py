"""Finish reasons: only known good endings are answers; all others are dropped by a name of their own."""

from __future__ import annotations

import json
import sqlite3

import pytest

from clair.data.records import incomplete_reason
from clair.inference.model import RequestFailed, parse_reply
from clair.ledger.schema import reply_digest
from clair.pipeline.build import build
from tests.clair.building import clair, manifest, outcomes, scripted_rows, write_prompts, write_recipe
from tests.clair.scripted import Scripted, choice, endpoint, install, recipe, revision

NAMED = {
    "length": "truncated",
    "max_tokens": "truncated",
    "model_length": "truncated",
    "MAX_TOKENS": "truncated",
    "content_filter": "content_filter",
    "SAFETY": "content_filter",
    "refusal": "refusal",
    "tool_calls": "tool_call",
    "function_call": "tool_call",
    "error": "server_error",
    "abort": "server_error",
    "insufficient_system_resource": "server_error",
    "max-tokens": "truncated",
    "maxNewTokens": "truncated",
    "context_length_exceeded": "truncated",
    "FinishReason.MAX_TOKENS": "truncated",
    "contentFilter": "content_filter",
    "IMAGE_SAFETY": "content_filter",
    "upstream_error": "server_error",
    "user_cancel": "server_error",
    "tool-calls": "tool_call",
    "of_a_new_kind": "incomplete",
    "unknown": "incomplete",
}
GOOD = [
    "stop",
    "STOP",
    "eos",
    "eos_token",
    "end_turn",
    "stop_sequence",
    "stop ",
    "FINISH_REASON_STOP",
    "FinishReason.STOP",
    "",
    None,
]


def test_only_known_endings_are_good_and_every_other_has_a_name():
    assert {ending: incomplete_reason(ending) for ending in NAMED} == NAMED
    assert [incomplete_reason(ending) for ending in GOOD] == [None] * len(GOOD)
    assert [incomplete_reason(ending, tools=True) for ending in ("tool_calls", "tool_use")] == [None, None]
    assert incomplete_reason("length", tools=True) == "truncated"


def built(tmp_path, monkeypatch, scripted_answer, rows, **models):
    """Build with a target and a reviser that reply `scripted_answer(role, prompt)` if it is not None."""

    def target(messages, sample):
        return scripted_answer("target", messages[-1]["content"]) or f"a bad answer to {messages[-1]['content']}"

    def reviser(messages, sample):
        prompt = messages[0]["content"].split("<task>\n")[1].split("\n")[0]
        return scripted_answer("reviser", prompt) or revision(messages)

    install(monkeypatch, target=Scripted("t", target), reviser=Scripted("m", reviser))
    keys = {"pipeline": "revised", "target": endpoint(), "reviser": endpoint(), **models}
    build(recipe(tmp_path / "out", [{"id": row, "prompt": row} for row in rows], **keys))
    return outcomes(tmp_path / "out")


@pytest.mark.parametrize("role", ["target", "reviser"])
def test_half_answers_and_half_revisions_are_dropped_by_how_they_ended(tmp_path, monkeypatch, role):
    def scripted_answer(asking_role, prompt):
        if asking_role != role:
            return None
        text = "a bad beginning" if role == "target" else "{teacher_reasoning}\nr\n{corrected_student_solution}\na good"
        return choice(text, None if prompt == "None" else prompt)

    rows = [*NAMED, "stop", "end_turn", "None"]
    reasons = built(tmp_path, monkeypatch, scripted_answer, rows)
    expected = {row: f"{'!' * (name == 'server_error')}{role}.{name}" for row, name in NAMED.items()}
    assert {row: reasons[row] for row in NAMED} == expected
    assert all(reasons[row].startswith("a good") for row in ("stop", "end_turn", "None"))
    assert manifest(tmp_path / "out")["tokens"][role]["without_finish_reason"] == 1


def test_a_refusal_in_a_field_of_its_own_and_a_filtered_reply_are_reported_by_name(tmp_path, monkeypatch):
    def scripted_answer(role, prompt):
        if role not in prompt:
            return None
        return choice(None, "content_filter") if "filter" in prompt else choice(None, refusal="I would rather not.")

    rows = ["target", "reviser", "target filter", "reviser filter"]
    reasons = built(tmp_path, monkeypatch, scripted_answer, rows)
    assert reasons == {
        "target": "target.refusal",
        "reviser": "reviser.refusal",
        "target filter": "target.content_filter",
        "reviser filter": "reviser.content_filter",
    }
    details = [json.loads(line)["detail"] for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert all("I would rather not." in detail for detail in details[:2])


def test_an_answer_beside_an_empty_refusal_field_is_an_answer():
    for refusal in (None, "", "I would rather not."):
        reply = parse_reply(json.dumps({"choices": [choice("Yes.", refusal=refusal)]}))
        assert (reply.text, reply.refusal, reply.finish_reason) == ("Yes.", "", "stop")


def test_a_reply_that_the_server_broke_off_is_requested_again_also_where_an_older_ledger_holds_it(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"]))
    file = write_recipe(tmp_path, server.url)
    assert clair("build", file).code == 0
    broken = json.dumps({"choices": [choice("half an", "error")]})
    with pytest.raises(RequestFailed):
        parse_reply(broken)
    with sqlite3.connect(tmp_path / "out" / "ledger.sqlite") as ledger:
        ((key,),) = ledger.execute("SELECT key FROM calls")
        ledger.execute("UPDATE calls SET reply = ?, digest = ?", (broken, reply_digest(key, broken)))
    result = clair("build", file)
    assert (result.code, len(server.requests())) == (0, 2)
    assert outcomes(tmp_path / "out") == {"row-0": "good answer 0"}


def test_a_server_without_finish_reasons_is_reported_once(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["nofinish", "nofinish", "ok"]))
    result = clair("build", write_recipe(tmp_path, server.url))
    assert result.code == 0
    assert result.out.count("finish_reason") == 1
    assert "reviser: 2 replies have no finish_reason" in result.out
