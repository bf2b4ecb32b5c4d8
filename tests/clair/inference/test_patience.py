"""Servers that refuse: what holds for one row is a row's failure, what holds for all ends the run in their words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clair.inference.model import LimitReached, Refused, Unreachable
from clair.inference.rate_limit import Limiter
from clair.pipeline.build import build
from tests.clair.building import (
    clair,
    config_for,
    drops,
    manifest,
    outcomes,
    pairs,
    scripted_rows,
    write_prompts,
    write_recipe,
)
from tests.clair.scripted import Scripted, endpoint, install, recipe, revision


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("clair.inference.client._FIRST_BACKOFF", 0.01)
    monkeypatch.setattr("clair.inference.rate_limit.PAUSE", 0.05)


def built(tmp_path, server, scripts: list[str], **keys: Any):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(scripts))
    reviser = {"url": server.url, "model": "m", **keys.pop("reviser", {})}
    return build(config_for(tmp_path, server.url, reviser=reviser, **keys))


# ---- a refusal of one row, and of all


@pytest.mark.parametrize("refusal", ["403", "403flagged", "403html"])
@pytest.mark.parametrize("index", [0, 2])
def test_one_forbidden_row_among_answered_ones_is_a_row(tmp_path, server, refusal, index):
    scripts = ["ok"] * 5
    scripts[index] = refusal
    assert built(tmp_path, server, scripts, concurrency=1).failed == 1
    assert len(pairs(tmp_path / "out")) == 4
    assert [(row["id"], row["reason"]) for row in drops(tmp_path / "out")] == [(f"row-{index}", "http_403")]


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_a_403_to_everything_is_the_keys(tmp_path, server, rows):
    with pytest.raises(Refused) as caught:
        built(tmp_path, server, ["403"] * rows, concurrency=4)
    assert f"reviser: {server.url} refuses the key (403: You may not use this model.)" in str(caught.value)
    assert "check api_key_env" in str(caught.value)
    assert len(server.requests()) <= 5 + 4
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("rows", [2, 200])
def test_the_same_refusal_of_the_first_rows_ends_the_run_in_its_words(tmp_path, server, rows):
    with pytest.raises(Refused, match=r"refuses every request .*\(400: This prompt is too long\.\)"):
        built(tmp_path, server, ["400"] * rows, concurrency=4)
    assert len(server.requests()) <= 5 + 4


@pytest.mark.parametrize("scripts", [["400"], ["400"] * 4 + ["422"] + ["400"] * 4, ["ok"] + ["400"] * 20])
def test_other_refusals_are_those_of_their_rows(tmp_path, server, scripts):
    assert built(tmp_path, server, scripts, concurrency=1).failed == sum(script != "ok" for script in scripts)


def test_rows_that_are_moderated_one_after_the_other_end_no_run(tmp_path, server):
    assert built(tmp_path, server, ["403flagged"] * 8 + ["ok"], concurrency=1).failed == 8
    assert len(pairs(tmp_path / "out")) == 1


def test_rows_that_stay_refused_do_not_end_a_run_whose_other_rows_were_answered_before(tmp_path, server):
    scripts = ["ok", *["400"] * 6]
    for _ in range(2):
        assert built(tmp_path, server, scripts, concurrency=1).failed == 6
    assert server.steps().count("ok") == 1


def test_a_content_filters_refusal_is_an_outcome_and_not_requested_again(tmp_path, server):
    for _ in range(2):
        assert built(tmp_path, server, ["ok", "400filter"]).failed == 0
    assert outcomes(tmp_path / "out") == {"row-0": "good answer 0", "row-1": "reviser.content_filter"}
    assert sorted(server.steps()) == ["400filter", "ok"]
    assert manifest(tmp_path / "out")["tokens"]["reviser"]["completion"] == 20  # a refusal costs nothing


# ---- limits


def test_a_server_that_refuses_for_ever_ends_the_run_in_its_words_and_what_there_is_is_kept(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"] * 3 + ["429"] * 5))
    reviser = {"url": server.url, "model": "m", "patience": 0.5}
    result = clair("build", write_recipe(tmp_path, server.url, reviser=reviser))
    first, *_, last = result.err.splitlines()
    assert result.code == 4
    assert first == "reviser: the server says 429: Slow down."
    assert last.startswith("error: reviser: the server refuses since ")
    assert "(429: Slow down.), and reviser.patience is 0.5 s; every reply so far is kept" in last
    assert "run the same command again" in last
    assert "Traceback" not in result.err
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"] * 3))
    assert clair("build", tmp_path / "recipe.yaml").code == 0
    assert server.steps().count("ok") == 3


def test_a_wait_that_is_longer_than_our_patience_ends_the_run_at_once_and_says_when_to_come_back(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["429:40000"] * 100))
    result = clair("build", write_recipe(tmp_path, server.url, concurrency=4))
    assert result.code == 4
    assert "reviser: the server says 429: Slow down.; wait for 11.1 h" in result.err
    assert "asks to wait for 11.1 h (429: Slow down.), and reviser.patience is 300 s; every reply" in result.err
    assert "run the same command again after 20" in result.err
    assert len(server.requests()) <= 4


def test_a_longer_patience_waits(tmp_path, server):
    assert built(tmp_path, server, ["429:1.5 ok"], reviser={"patience": 2}).failed == 0
    with pytest.raises(LimitReached):
        built(tmp_path, server, ["429:1.5 429:1.5 429 ok", "other"], reviser={"patience": 1})


def test_no_patience_is_lost_while_the_server_works_on_another_request(tmp_path, server):
    scripts = [*["wait:0.3"] * 20, "wait:3", "429:0.4 429:0.4 429:0.4 429:0.4 429:0.4 ok"]
    assert built(tmp_path, server, scripts, reviser={"patience": 1.0}).failed == 0


def test_a_servers_warning_is_printed_once_however_often_it_repeats(tmp_path, server, capsys):
    built(tmp_path, server, ["429:0.05 429:0.06 ok"] * 10)
    assert capsys.readouterr().err.count("the server says") <= 1


def test_an_error_429_in_a_reply_of_status_200_slows_down_and_is_requested_again_as_any_error(
    tmp_path, server, monkeypatch
):
    waits, refused = [], Limiter.refused
    monkeypatch.setattr(Limiter, "refused", lambda self, wait: waits.append(wait) or refused(self, wait))
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["body429 body429 body429 ok"] * 3))
    build(config_for(tmp_path, server.url))
    assert len(waits) == 9
    assert len(pairs(tmp_path / "out")) == 3


# ---- a server that answers one at a time


def test_no_row_is_lost_to_a_server_that_answers_one_at_a_time(tmp_path, server):
    """All of them are sent at once, the last waits for three timeouts there, and none has a second try."""
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["wait:0.1"] * 45))
    reviser = {"url": server.url.replace("/v1", "/one/v1"), "model": "m", "timeout": 1.5}
    assert build(config_for(tmp_path, server.url, reviser=reviser, attempts=1)).failed == 0
    assert len(server.requests()) == 45


def test_target_and_reviser_wait_for_each_other_at_a_server_that_answers_one_at_a_time(tmp_path, server):
    rows = [{"id": n, "prompt": f"bad {n} [[wait:0.1]]"} for n in range(20)]
    write_prompts(tmp_path / "prompts.jsonl", rows)
    server_config = {"url": server.url.replace("/v1", "/one/v1"), "model": "m", "timeout": 1.5}
    assert (
        build(
            config_for(tmp_path, server.url, target={**server_config, "model": "t"}, reviser=server_config, attempts=1)
        ).failed
        == 0
    )
    assert len(server.requests()) == 40


class Busy(Scripted):
    """Takes no connection at first, while it answers others; has too much to do."""

    def __init__(self, waiting: int) -> None:
        super().__init__("busy", revision)
        self.left = waiting

    async def complete(self, request: Any, sample: int = 0) -> str:
        if self.left and "Task 1" in request["messages"][0]["content"]:
            self.left -= 1
            error = Unreachable("timeout", busy=True)
            error.waiting = True
            raise error
        return await super().complete(request, sample)


def test_a_connection_that_is_not_taken_while_others_are_answered_is_no_try(tmp_path, monkeypatch):
    model = Busy(8)
    install(monkeypatch, reviser=model)
    rows = [{"id": n, "prompt": f"Task {n}", "answer": f"bad {n}"} for n in range(3)]
    limits = []
    config = recipe(tmp_path / "out", rows, pipeline="revised", reviser=endpoint(), attempts=1)
    result = build(config, on_progress=lambda _, clients: limits.append(clients["reviser"].limiter.limit))
    assert (result.failed, model.left) == (0, 0)
    assert limits[-1] < 64


@pytest.mark.slow
def test_a_server_that_answers_one_request_at_a_time_is_reported_and_gets_fewer(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["wait:0.3"] * 60))
    result = clair("build", write_recipe(tmp_path, server.url.replace("/v1", "/one/v1")))
    assert result.code == 0
    assert "reviser: the server answers one request at a time, so that more than 2 would only wait there" in result.err


# ---- starting


def test_a_server_that_loads_its_model_is_waited_for_at_the_first_look(tmp_path, server, capsys):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"] * 3))
    build(config_for(tmp_path, server.url.replace("/v1", "/loading/v1"), attempts=1))
    assert len(pairs(tmp_path / "out")) == 3
    assert capsys.readouterr().err.count("reviser: the server says 503: Loading model") == 1


def test_a_server_that_lists_its_models_while_it_loads_is_waited_for_too(tmp_path, server):
    assert built(tmp_path, server, ["503 503 503 ok"] * 3, attempts=1).failed == 0


def test_a_server_that_loads_for_ever_ends_the_run(tmp_path, server):
    with pytest.raises(Refused, match=r"no answer for .* s \(503: Overloaded\.\)"):
        built(tmp_path, server, ["503"] * 3, attempts=1, reviser={"patience": 0.3})


def test_each_role_has_its_own_patience_and_it_is_no_part_of_the_dataset(tmp_path, server):
    built(tmp_path, server, ["ok"], reviser={"patience": 10})
    built(tmp_path, server, ["ok"], reviser={"patience": 20})
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text("utf-8"))
    assert recipe["reviser"]["patience"] == 20
