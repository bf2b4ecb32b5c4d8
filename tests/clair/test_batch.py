"""Requests through a Batch API: no row gets another's reply, and no reply that was paid for is lost."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal

import pytest

from clair.build import build
from clair.estimate import estimate
from clair.ledger import Ledger
from tests.clair.building import (
    BatchService,
    batch_service,
    config_for,
    final_bytes,
    outcomes,
    scripted_rows,
    write_prompts,
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


# ---- the plain way


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


def test_a_reply_that_cannot_be_read_is_asked_again_in_a_second_batch(tmp_path, service):
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
    told = build(config).manifest["cost"]["reviser"]
    # 3 live by the probe at 0.001 + 0.02 each, 5 in a batch at half of that
    assert Decimal(told) == Decimal("0.021") * 3 + Decimal("0.0105") * 5


# ---- bad days


def check_schedule(tmp_path, service, seed):
    """One random schedule: a build, broken off and resumed at random, on a service with random trouble."""
    draw = random.Random(seed)
    odds = {name: draw.choice([0, 0, 0.1, 0.3]) for name in ("lose", "double", "error", "expire", "garble", "half")}
    calls = {name: draw.choice([0, 0.1, 0.3]) for name in ("unwell", "silent")}
    ends = {name: draw.choice([0, 0.2]) for name in ("expired", "cancelled", "failed")}
    service.trouble(**odds, **calls, **ends, seed=seed, looks=draw.randint(0, 4), foreign=draw.randint(0, 2))
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
        done = {key for (key,) in ledger.read("SELECT key FROM calls WHERE state = 'done'")}
        assert ledger.read("SELECT count(*) FROM batched") == [(0,)]
    assert delivered <= done, "a paid result is lost"
    assert totals(config)[0] >= 30 * runs, "the ledger knows of less than was billed"


@pytest.mark.parametrize("seed", range(4))
def test_on_random_bad_days_no_row_is_misaligned_and_no_paid_result_is_lost(tmp_path, running, seed):
    check_schedule(tmp_path, running, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, int(os.environ.get("CLAIR_BATCH_SCHEDULES", "50"))))
def test_on_many_random_bad_days_too(tmp_path, running, seed):
    check_schedule(tmp_path, running, seed)
