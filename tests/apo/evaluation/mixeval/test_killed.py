"""Evaluations that are killed or interrupted: the same score in the end, and no judgement is paid for twice."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from random import Random

import pytest

from tests.apo.evaluation.evaluating import JudgeServer, apo, final, judging, mixeval_command, start_apo
from tests.apo.evaluation.questions import FREE_FORM, MULTIPLE_CHOICE
from tests.clair.building import CommandResult, call_counts, finished

ROWS = 40
CONCURRENCY = 8
LATENCY = 0.05
REQUESTS = 4 * ROWS


def many(folder: Path) -> Path:
    """A data folder of the full benchmark, with many different questions."""
    target = folder / "2024-06-01" / "mixeval"
    target.mkdir(parents=True)
    for split, row in (("free-form", FREE_FORM[2]), ("multiple-choice", MULTIPLE_CHOICE[1])):
        rows = {str(n): {**row, "prompt": f"{row['prompt']} ({n})"} for n in range(ROWS)}
        (target / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def slow_server():
    with judging(LATENCY) as server:
        yield server


@pytest.fixture
def arguments(real, tmp_path, slow_server) -> list:
    """A command that requests answers and judgements of the full split, of which no hash is published."""
    data = many(tmp_path / "data")
    (data / "judge_prompts.json").write_bytes((real / "judge_prompts.json").read_bytes())
    names = {"model": "t", "judge": "j"}
    roles = {role: {"url": slow_server.url, "model": name, "id": name} for role, name in names.items()}
    return mixeval_command(data, tmp_path / "out", split="full", concurrency=CONCURRENCY, **roles)


def run_and(sent: signal.Signals, server: JudgeServer, arguments: list, requests: int) -> CommandResult:
    """Run the command and send it a signal after more than `requests` requests."""
    paid = server.paid()
    process = start_apo(*arguments)
    until = time.monotonic() + 60
    while server.paid() <= paid + requests and process.poll() is None:
        assert time.monotonic() < until, "the evaluation asks nothing"
        time.sleep(0.01)
    process.send_signal(sent)
    return finished(process)


def assert_survives(server: JudgeServer, arguments: list, tmp_path: Path, sent: signal.Signals, moments: list) -> None:
    assert apo(*arguments, "--out", tmp_path / "undisturbed").code == 0
    server.forget()
    stopped = 0
    for share in moments:
        result = run_and(sent, server, [*arguments, "--out", tmp_path / "out"], int(share * REQUESTS / 2))
        assert result.code in (0, -signal.SIGKILL if sent == signal.SIGKILL else 130), result
        stopped += result.code != 0
        assert result.code == 0 or not (tmp_path / "out" / "score.json").exists()
    last = finished(start_apo(*arguments, "--out", tmp_path / "out"))
    assert last.code == 0, last
    assert final(tmp_path / "out") == final(tmp_path / "undisturbed")
    twice = server.paid() - 4 * ROWS
    print(f"{stopped} stops, {server.paid()} paid, {twice} of them twice")
    assert stopped > 0
    in_flight = 2 * CONCURRENCY if sent == signal.SIGKILL else 0
    assert 0 <= twice <= stopped * in_flight


def test_killed_at_a_random_moment_the_score_is_the_same(tmp_path, slow_server, arguments):
    assert_survives(slow_server, arguments, tmp_path, signal.SIGKILL, [Random(5).random()])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment_the_score_is_the_same(tmp_path, slow_server, arguments, seed):
    assert_survives(slow_server, arguments, tmp_path, signal.SIGKILL, [Random(seed).random()])


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_in_flight_and_pays_nothing_twice(tmp_path, slow_server, arguments):
    assert_survives(slow_server, arguments, tmp_path, signal.SIGINT, [1 / 3])


@pytest.mark.slow
def test_generation_killed_between_batches_resumes_with_the_next(tmp_path, real):
    """No answer of a finished batch is made again: the ledger has it."""
    from clair.ledger.ledger import Ledger
    from tests.clair import tiny_model

    data = many(tmp_path / "data")
    model = tiny_model.save(tmp_path / "model", max_position_embeddings=1024)
    model = {"path": model, "batch_tokens": 5000}
    command = mixeval_command(data, tmp_path / "out", split="full", model=model, judge="rule")
    ledger = tmp_path / "out" / "ledger.sqlite"
    process = start_apo(*command)
    until, answered = time.monotonic() + 120, 0
    while not answered and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.05)
        if ledger.is_file() and ledger.stat().st_size:
            with Ledger(ledger) as opened:
                answered = call_counts(opened).get("done", 0)
    process.kill()
    finished(process)
    assert 0 < answered < 2 * ROWS, "killed too late to see anything"
    again = finished(start_apo(*command))
    assert again.code == 0, again
    usage = json.loads((tmp_path / "out" / "score.json").read_text())["usage"]["model"]
    assert usage["reused"] >= answered
    assert usage["calls"] + usage["reused"] == 2 * ROWS
