"""Requests through a Batch API: no row gets another's reply, and no reply that was paid for is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal

import pytest

from clair.core.errors import UserError
from clair.inference import batch_service as batch_service_module
from clair.inference.batch_service import parse_outcome
from clair.ledger.ledger import Ledger
from clair.pipeline.build import build
from clair.pipeline.estimate import estimate
from tests.clair.building import (
    BatchService,
    batch_service,
    clair,
    config_for,
    drops,
    error_line,
    final_bytes,
    finished,
    manifest,
    outcomes,
    pairs,
    scripted_rows,
    start_clair,
    write_prompts,
    write_recipe,
)


@pytest.fixture(scope="module")
def running() -> Iterator[BatchService]:
    with batch_service() as service:
        yield service


@pytest.fixture
def service(running: BatchService) -> BatchService:
    running.trouble()
    return running


FAST = {"poll": 0.02}


def batched(url: str, **options: object) -> dict[str, object]:
    return {"url": url, "model": "m", "temperature": 0.7, "batch": FAST | options}


def settings(tmp_path, service, scripts, *, options=None, **changes):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(scripts))
    changes = {"reviser": batched(service.url, **(options or {}))} | changes
    return config_for(tmp_path, service.url, **changes)


def good(count: int) -> dict[str, str]:
    return {f"row-{n}": f"good answer {n}" for n in range(count)}


def totals(config) -> tuple[int, int]:
    """(billed and open tokens, open tokens) in the ledger."""
    with Ledger(config.ledger_path) as ledger:
        return ledger.read(
            "SELECT total(prompt_tokens + completion_tokens + open_prompt + open_completion), "
            "total(open_prompt + open_completion) FROM calls"
        )[0]


# ---- without faults


def test_a_build_through_batches_is_the_live_build(tmp_path, service):
    scripts = ["ok"] * 30 + ["400"] + ["ok"] * 6
    config = settings(tmp_path, service, scripts, options={"requests": 10})
    built = build(config)
    books = service.books()
    assert books["live"] == []
    assert sorted(books["files"]) == [7, 10, 10, 10]
    assert Counter(books["batches"]) == {"completed": 4}
    assert built.manifest["tokens"]["reviser"] == {
        "prompt": 360, "completion": 720, "calls": 36, "reused": 0, "retries": 0,
    }  # fmt: skip
    bytes_ = final_bytes(tmp_path / "out")
    live = build(config_for(tmp_path, service.url, out=str(tmp_path / "live")))
    assert final_bytes(tmp_path / "live") == bytes_
    assert live.manifest["counts"] == built.manifest["counts"]
    assert outcomes(tmp_path / "out")["row-30"] == "!reviser.http_400"


def test_the_queue_on_disk_holds_no_secret_and_the_file_that_is_sent_holds_them_all(tmp_path, service, monkeypatch):
    monkeypatch.setenv("PLANTED", "planted-one")
    extra = {"user": "${PLANTED}", "api_key": "planted-two", "metadata": {"token": "planted-three", "note": "open"}}
    sent, queued, upload = [], [], batch_service_module.BatchService.upload

    async def upload_and_record(self, name, file):
        file.seek(0)
        sent.extend(json.loads(line)["body"] for line in file)
        queued.append(b"".join(path.read_bytes() for path in (tmp_path / "out").glob("ledger.sqlite*")))
        return await upload(self, name, file)

    monkeypatch.setattr(batch_service_module.BatchService, "upload", upload_and_record)
    reviser = batched(service.url, requests=2) | {"extra": extra}
    build(settings(tmp_path, service, ["ok"] * 3, reviser=reviser))
    assert outcomes(tmp_path / "out") == good(3)
    assert [{name: body[name] for name in extra} for body in sent] == [extra | {"user": "planted-one"}] * 3
    assert len(queued) == 2
    for ledger in queued:
        assert b"${PLANTED}" in ledger
        assert b"[secret]" in ledger
        assert b"planted-" not in ledger


def test_requests_with_long_secrets_fill_no_file_beyond_its_size(tmp_path, service, monkeypatch):
    monkeypatch.setenv("PLANTED", "planted" * 400)
    reviser = batched(service.url, megabytes=0.009) | {"extra": {"user": "${PLANTED}"}}
    build(settings(tmp_path, service, ["ok"] * 6, reviser=reviser))
    assert outcomes(tmp_path / "out") == good(6)
    assert max(service.books()["files"]) <= 2


def test_built_again_it_finds_everything_and_needs_no_service(tmp_path, service):
    config = settings(tmp_path, service, ["ok"] * 6)
    build(config)
    events = service.books()["events"]
    assert build(config).manifest["tokens"]["reviser"]["reused"] == 6
    assert service.books()["events"] == events


def test_a_chain_of_roles_goes_through_batches_role_by_role(tmp_path, service):
    write_prompts(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"Task {n}"} for n in range(9)])
    target = batched(service.url) | {"model": "t", "temperature": 1.0}
    config = config_for(tmp_path, service.url, target=target, reviser=batched(service.url))
    build(config)
    assert outcomes(tmp_path / "out") == {str(n): f"good answer to: Task {n}" for n in range(9)}
    assert service.books()["files"] == [9, 9]


def test_a_reply_that_cannot_be_read_is_requested_again_in_a_second_batch(tmp_path, service):
    config = settings(tmp_path, service, ["ok", "unlabelled", "empty ok", "empty"])
    build(config)
    assert outcomes(tmp_path / "out") == good(2) | {
        "row-2": "good answer 2",  # no completion at all: the same request once more
        "row-3": "!reviser.malformed_reply",
    }
    assert service.books()["files"] == [4, 3]


def test_the_price_is_half(tmp_path, service):
    price = {"input": "100", "output": "1000"}
    config = settings(tmp_path, service, ["ok"] * 8, reviser=batched(service.url) | {"price": price, "max_tokens": 64})
    reviser = {"url": service.url, "model": "m", "price": price, "max_tokens": 64, "temperature": 0.7}
    live = settings(tmp_path, service, ["ok"] * 8, out=str(tmp_path / "live"), reviser=reviser)
    half, full = (estimate(c, probe=3)["reviser"].cost for c in (config, live))
    assert half.value == pytest.approx(full.value / 2)
    cost = build(config).manifest["cost"]["reviser"]
    # 3 live by the probe at 0.001 + 0.02 each, 5 in a batch at half of that
    assert Decimal(cost) == Decimal("0.021") * 3 + Decimal("0.0105") * 5


# ---- bad days


def check_schedule(tmp_path, service, seed):
    """One random schedule: a build, broken off and resumed at random, on a service with random trouble."""
    draw = random.Random(seed)
    odds = {name: draw.choice([0, 0, 0.1, 0.3]) for name in ("lose", "double", "error", "expire", "garble", "half")}
    calls = {name: draw.choice([0, 0.1, 0.3]) for name in ("unwell", "silent")}
    chances = {name: draw.choice([0, 0.2]) for name in ("expired", "cancelled", "failed")}
    service.trouble(**odds, **calls, **chances, seed=seed, looks=draw.randint(0, 4), foreign=draw.randint(0, 2))
    scripts = [draw.choice(["ok"] * 8 + ["400", "empty ok"]) for _ in range(draw.randint(5, 40))]
    config = settings(
        tmp_path, service, scripts, attempts=30,
        options={"requests": draw.randint(2, 20), "live_below": draw.choice([0, 0, 3]), "poll": 0.005},
    )  # fmt: skip

    class Broken(Exception):
        pass

    def break_off(*_):
        if draw.random() < 0.01:
            raise Broken

    for _ in range(3):
        try:
            build(config, on_progress=break_off)
        except Broken:
            continue
        break
    build(config)
    ok = {f"row-{n}": f"good answer {n}" for n, script in enumerate(scripts) if script != "400"}
    refused = {f"row-{n}": "!reviser.http_400" for n, script in enumerate(scripts) if script == "400"}
    assert outcomes(tmp_path / "out") == ok | refused, "a row is misaligned"
    events, delivered, runs = service.books()["events"], set(), 0
    for kind, key in events:
        assert kind != "ran" or key not in delivered, "a result that was delivered was bought again"
        runs += kind == "ran"
        if kind == "delivered" and not key.startswith("nobody"):
            delivered.add(key)
    with Ledger(config.ledger_path) as ledger:
        answered = {key for (key,) in ledger.read("SELECT key FROM calls WHERE state = 'done'")}
        assert ledger.read("SELECT count(*) FROM batched") == [(0,)]
    assert delivered <= answered, "a paid result is lost"
    assert totals(config)[0] >= 30 * runs, "the ledger knows of less than was billed"


@pytest.mark.parametrize("seed", range(4))
def test_on_random_bad_days_no_row_is_misaligned_and_no_paid_result_is_lost(tmp_path, running, seed):
    check_schedule(tmp_path, running, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, int(os.environ.get("CLAIR_BATCH_SCHEDULES", "50"))))
def test_on_many_random_bad_days_too(tmp_path, running, seed):
    check_schedule(tmp_path, running, seed)


# ---- killed, interrupted, away for days


def start(tmp_path, service, count, **options):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"] * count))
    recipe = write_recipe(tmp_path, service.url, reviser=batched(service.url, **options))
    return recipe, start_clair("build", recipe)


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_while_batches_are_open_it_fetches_them_and_buys_nothing_twice(tmp_path, service):
    service.trouble(hold=True)
    recipe, process = start(tmp_path, service, 30, requests=10)
    until(lambda: len(service.books()["batches"]) == 3)
    until(lambda: "batch-2" in ids(tmp_path))
    process.send_signal(signal.SIGKILL)
    finished(process)
    service.end("completed")
    result = finished(start_clair("build", recipe))
    assert result.code == 0, result
    assert outcomes(tmp_path / "out") == good(30)
    assert service.books()["files"] == [10, 10, 10]
    assert manifest(tmp_path / "out")["tokens"]["reviser"]["reused"] == 0


def ids(tmp_path) -> list[str]:
    """The batches that the ledger knows by the service's names; none where there is no ledger yet."""
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(f"file:{tmp_path / 'out' / 'ledger.sqlite'}?mode=ro", uri=True)) as ledger,
    ):
        return [id for (id,) in ledger.execute("SELECT id FROM batches WHERE id IS NOT NULL")]
    return []


@pytest.mark.parametrize("lists", [True, False])
def test_killed_before_the_batch_id_is_written_it_is_found_in_the_list(tmp_path, service, lists):
    config = settings(tmp_path, service, ["ok"] * 5)
    build(config)
    with sqlite3.connect(config.ledger_path) as connection:  # as it was just after the batch was begun
        connection.execute("UPDATE batches SET id = NULL, over = 0, run = 'dead'")
        name = connection.execute("SELECT name FROM batches").fetchone()[0]
        connection.execute(
            "INSERT INTO batched SELECT key, ?, 'dead', ?, 1000, 500, 'x' FROM calls",
            (f"reviser: m at {service.url}", name),
        )
        connection.execute(
            "UPDATE calls SET state = 'asked', run = 'dead', reply = NULL, digest = NULL, batch = '', "
            "prompt_tokens = 0, completion_tokens = 0, open_prompt = 1000, open_completion = 500"
        )
    connection.close()
    if not lists:
        service.trouble(lists=False)
    build(config)
    assert outcomes(tmp_path / "out") == good(5)
    assert totals(config) == (150, 0)
    assert service.books()["files"] == [5]  # the one of before, or, where it cannot be known, a new one


def test_interrupted_while_it_waits_it_ends_at_once_and_resumes_later(tmp_path, service):
    service.trouble(hold=True)
    recipe, process = start(tmp_path, service, 12, poll=3600)
    until(lambda: ids(tmp_path) == ["batch-0"])
    process.send_signal(signal.SIGINT)
    result = finished(process)
    assert result.code == 130, result
    assert "run the same command again" in result.err
    service.end("completed")
    assert finished(start_clair("build", recipe)).code == 0
    assert service.books()["files"] == [12]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_moment_it_ends_with_the_same_rows(tmp_path, running, seed):
    draw = random.Random(seed)
    running.trouble(looks=3, seed=seed)
    recipe, process = start(tmp_path, running, 60, requests=7)
    for _ in range(2):
        time.sleep(1.0 + 1.5 * draw.random())
        process.send_signal(signal.SIGKILL)
        finished(process)
        process = start_clair("build", recipe)
    assert finished(process).code == 0
    assert outcomes(tmp_path / "out") == good(60)
    runs = Counter(key for kind, key in running.books()["events"] if kind == "ran")
    assert set(runs.values()) == {1}, "something was bought twice"


# ---- money


def test_a_budget_waits_for_open_batches_which_come_cheaper(tmp_path, service):
    # One request is set aside at about 1,060 + 64 tokens and takes 30: seven fit at once, and all in the end.
    config = settings(tmp_path, service, ["ok"] * 40, reviser=batched(service.url) | {"max_tokens": 64},
                      budget={"tokens": 8_400})  # fmt: skip
    assert build(config).stopped is None
    files = service.books()["files"]
    assert len(files) > 3
    assert max(files) <= 7
    assert totals(config) == (1200, 0)


def test_a_budget_that_is_used_up_ends_the_run_with_what_it_has(tmp_path, service):
    config = settings(tmp_path, service, ["ok"] * 40, reviser=batched(service.url) | {"max_tokens": 64},
                      budget={"tokens": 1_500})  # fmt: skip
    built = build(config)
    assert "budget reached" in built.stopped
    spent = totals(config)[0]
    assert 0 < spent <= 1_500
    more = build(config.model_copy(update={"budget": None}))
    assert more.stopped is None
    assert outcomes(tmp_path / "out") == good(40)
    assert totals(config) == (1200, 0)


def test_results_that_a_service_has_lost_stay_on_the_bill(tmp_path, service):
    service.trouble(lose=1.0)
    config = settings(tmp_path, service, ["ok"] * 3, attempts=2)
    assert build(config).failed == 3
    assert {row["reason"] for row in drops(tmp_path / "out")} == {"unreachable"}
    all_, open_ = totals(config)
    assert all_ == open_ >= 2 * 3 * 4096


@pytest.mark.parametrize("counts", [True, False])
def test_a_result_file_that_breaks_off_is_read_again_before_anything_is_bought_again(tmp_path, service, counts):
    service.trouble(half=1.0, seed=4, counts=counts)
    build(settings(tmp_path, service, ["ok"] * 20))
    assert outcomes(tmp_path / "out") == good(20)
    books = service.books()
    assert books["files"] == [20]
    assert sum(kind == "ran" for kind, _ in books["events"]) == 20


def test_exactly_n_pairs_are_accepted_and_few_more_are_requested(tmp_path, service):
    config = settings(tmp_path, service, ["400", "ok"] * 60, accept=20, concurrency=1)
    built = build(config)
    assert [row["id"] for row in sorted(pairs(tmp_path / "out"), key=lambda row: int(row["id"][4:]))] == [
        f"row-{n}" for n in range(1, 41, 2)
    ]
    assert built.manifest["counts"]["prompts"] == 40
    assert 40 <= sum(service.books()["files"]) <= 50


def test_stragglers_are_requested_live_if_the_recipe_says_so(tmp_path, service):
    config = settings(tmp_path, service, ["ok"] * 20 + ["unlabelled"] * 2, options={"live_below": 5})
    service.trouble()
    build(config)
    books = service.books()
    assert books["files"] == [22]
    assert books["live"] == ["ok"] * 2  # the two that are requested again
    # Live, this server follows the script again; in a batch it would have answered well.
    assert Counter(outcomes(tmp_path / "out").values())["reviser.label_inline"] == 2


# ---- bad input


def refusal(config) -> str:
    with pytest.raises(UserError) as caught:
        build(config)
    return str(caught.value)


def test_a_file_that_the_service_refuses_ends_the_run_in_its_words(tmp_path, service):
    service.trouble(refuse_files=413)
    recipe, process = start(tmp_path, service, 3)
    message = error_line(finished(process))
    assert "cannot upload a batch file" in message
    assert "413: The file is not to our liking." in message
    assert "no request was run" in message
    service.trouble()
    assert clair("build", recipe).code == 0
    assert service.books()["files"] == [3]


def test_a_batch_that_is_refused_as_a_whole_ends_the_run_in_the_services_words(tmp_path, service):
    service.trouble(failed=1.0, errors=[{"code": "model_not_found", "message": "No model m for you.", "line": None}])
    config = settings(tmp_path, service, ["ok"] * 3)
    message = refusal(config)
    assert "refuses the file of batch batch-0 (No model m for you.); no request was run" in message
    assert totals(config) == (0, 0)


def test_a_request_that_the_service_blames_fails_alone(tmp_path, service):
    service.trouble(failed=0.7, seed=3, errors=[{"code": "invalid", "message": "Line 2 is too long.", "line": 2}])
    config = settings(tmp_path, service, ["ok"] * 8)
    build(config)
    failed = [row for row in drops(tmp_path / "out") if row["failed"]]
    books = service.books()
    assert len(failed) == books["batches"].count("failed") > 0
    assert {row["reason"] for row in failed} == {"http_400"}
    assert "Line 2 is too long." in failed[0]["detail"]
    assert len(pairs(tmp_path / "out")) == 8 - len(failed)


def test_files_become_smaller_where_the_service_takes_fewer_tokens(tmp_path, service):
    service.trouble(max_lines=5)
    config = settings(tmp_path, service, ["ok"] * 32)
    build(config)
    books = service.books()
    assert books["files"][:4] == [32, 16, 8, 4]
    assert outcomes(tmp_path / "out") == good(32)
    assert totals(config) == (960, 0)


def test_a_service_that_accepts_no_request_is_reported(tmp_path, service):
    service.trouble(max_lines=0)
    message = refusal(settings(tmp_path, service, ["ok"] * 4, attempts=3))
    assert "does not take even one request in a batch (Enqueued token limit reached.)" in message


def test_an_endpoint_without_a_batch_api_is_reported(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["ok"] * 3))
    message = refusal(config_for(tmp_path, server.url, reviser=batched(server.url)))
    assert f"{server.url} has no Batch API" in message
    assert "set reviser.batch: false" in message
    assert build(config_for(tmp_path, server.url)).failed == 0


@pytest.mark.parametrize("files", [False, True])
def test_a_batch_that_is_gone_is_reported_and_requested_again_only_on_demand(tmp_path, service, files):
    service.trouble(hold=True)
    recipe, process = start(tmp_path, service, 6)
    until(lambda: ids(tmp_path) == ["batch-0"])
    process.send_signal(signal.SIGKILL)
    finished(process)
    if files:
        service.end("completed")
        service.poll_batches()
        service.lose(files=True)
    else:
        service.lose()
    message = error_line(clair("build", recipe))
    assert "batch-0" in message
    assert "6 requests in it may have been paid for" in message
    assert "reviser.batch.lost: ask_again" in message
    service.end("completed")
    assert clair("build", recipe, "--set", "reviser.batch.lost=ask_again").code == 0
    assert outcomes(tmp_path / "out") == good(6)


def test_a_role_whose_replies_are_in_a_batch_gets_no_live_requests(tmp_path, service):
    service.trouble(hold=True)
    recipe, process = start(tmp_path, service, 6)
    until(lambda: ids(tmp_path) == ["batch-0"])
    process.send_signal(signal.SIGKILL)
    finished(process)
    message = error_line(clair("build", recipe, "--set", "reviser.batch=false"))
    assert "set reviser.batch: true to fetch them" in message
    assert service.books()["live"] == []
    with batch_service() as second:
        command = ["build", recipe, "--set", f"reviser.url={second.url}", "--set", "reviser.id=same"]
        assert "holds the run of another recipe" in error_line(clair(*command))
    service.end("cancelled")
    assert clair("build", recipe).code == 0
    assert outcomes(tmp_path / "out") == good(6)


@pytest.mark.parametrize(
    ("reviser", "match"),
    [
        ({"path": "model", "batch": True}, "batch needs one url whose server has a Batch API, and there are 0"),
        ({"url": ["http://a/v1", "http://b/v1"], "model": "m", "batch": True}, "and there are 2"),
        ({"url": "http://a/v1", "model": "m", "batch": {"requests": 50_001}}, "less than or equal to 50000"),
        ({"url": "http://a/v1", "model": "m", "batch": {"request": 5}}, "did you mean 'requests'"),
    ],
)
def test_batches_that_cannot_be_are_refused_before_anything_is_done(tmp_path, reviser, match):
    with pytest.raises(UserError, match=match):
        config_for(tmp_path, "http://a/v1", reviser=reviser)


def test_a_request_larger_than_a_file_fails_alone(tmp_path, service):
    rows = scripted_rows(["ok"] * 3)
    rows[1]["prompt"] += " word" * 3000
    write_prompts(tmp_path / "prompts.jsonl", rows)
    build(config_for(tmp_path, service.url, reviser=batched(service.url, megabytes=0.01)))
    assert outcomes(tmp_path / "out") == {k: v for k, v in good(3).items() if k != "row-1"} | {
        "row-1": "!reviser.prompt_too_long"
    }


# ---- result lines by hand


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("", None),
        ("null", None),
        ("[]", None),
        ('{"custom_id": 7}', None),
        ('{"response": {"status_code": 200}}', None),
        ('{"custom_id": "k"}', "again: no reply"),
        ('{"custom_id": "k", "response": null, "error": {"code": "batch_expired"}}', "again: batch_expired"),
        ('{"custom_id": "k", "response": {"status_code": 429, "body": null}}', "again: no reply"),
        ('{"custom_id": "k", "response": {"status_code": 503, "body": "down"}}', "again: no reply"),
        (
            '{"custom_id": "k", "response": {"status_code": 400, "body": {"error": {"message": "too\\n long"}}}}',
            "http_400: 400: too long",
        ),
        ('{"custom_id": "k", "response": {"status_code": 200, "body": {"choices": []}}}', "malformed_reply"),
        ('{"custom_id": "k", "response": {"status_code": "200", "body": {}}}', "again: no reply"),
    ],
)
def test_a_result_line_has_one_outcome_or_none(line, error):
    outcome = parse_outcome(line, str)
    if error is None:
        assert outcome is None
    else:
        assert outcome.key == "k"
        assert outcome.error.startswith(error)


def test_a_good_line_gives_the_reply_as_it_came_and_its_usage():
    line = (
        '{"id": "l", "custom_id": "k", "error": null, "response": {"status_code": 200, "request_id": "r", "body": '
        '{"choices": [{"message": {"content": "caf\\u00e9 \\ud83d\\ude00"}}], '
        '"usage": {"prompt_tokens": 3, "completion_tokens": 5}}}}'
    )
    outcome = parse_outcome(line, str)
    assert outcome.error is None
    assert outcome.billed == (3, 5)
    assert "café \U0001f600" in outcome.raw
    half = parse_outcome(line.replace("\\ude00", ""), str)
    assert half.error.startswith("malformed_reply")
    assert half.raw.isascii()
