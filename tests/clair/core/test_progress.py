"""The progress of long work: rates of completed rows, lines for a file, and a display that fits 80 columns."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from clair.core import progress as module
from clair.core.progress import FIRST_LINE_AFTER, LINE_INTERVAL, CompletionRate, Progress, progress
from clair.inference.budget import Tally
from clair.pipeline.build import build
from clair.terminal import _ClientStatus
from tests.clair.building import config_for, scripted_rows, write_prompts


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drawn(work: Progress, width: int = 80) -> list[str]:
    """The lines of the display in a terminal."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(work)
    return console.file.getvalue().splitlines()


def role(calls: int, in_flight: int, *, reused: int = 0, wait_reason: str = "") -> SimpleNamespace:
    """The attributes of a client that progress reads."""
    limiter = SimpleNamespace(in_flight=in_flight)
    tally = Tally(calls=calls, reused=reused)
    return SimpleNamespace(total=tally, limiter=limiter, batch=None, wait_reason=wait_reason)


def test_a_rate_is_that_of_the_last_ten_and_falls_while_nothing_is_done():
    rate = CompletionRate(0.0)
    assert rate.per_second(5.0) is None
    for second in range(1, 101):
        rate.add(second, 4 * second)
    assert rate.per_second(100.0) == pytest.approx(4.0, rel=0.2)
    for second in range(110, 301, 10):
        rate.add(second, 400 + (second - 100) // 10)
    assert rate.per_second(300.0) == pytest.approx(0.1, rel=0.2)
    assert rate.seconds_left(300.0, 12) == pytest.approx(120.0, rel=0.2)
    assert rate.per_second(400.0) == pytest.approx(0.05, rel=0.2)


def test_a_batch_that_is_done_all_at_once_counts_from_the_end_of_the_one_before():
    rate = CompletionRate(0.0)
    rate.add(300.0, 16)
    rate.add(600.0, 32)
    assert rate.per_second(601.0) == pytest.approx(16 / 301)


def test_lines_come_within_a_second_and_then_every_thirty(capsys):
    clock, waits = Clock(), []
    work = Progress("building", 22, lambda: ["target: 5 in flight"], clock=clock)

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        clock.now += seconds
        work.update(len(waits) * 5)
        return len(waits) > 3

    work.write_lines(FIRST_LINE_AFTER, wait)
    assert waits == [FIRST_LINE_AFTER, LINE_INTERVAL, LINE_INTERVAL, LINE_INTERVAL]
    assert FIRST_LINE_AFTER < 1.0
    assert LINE_INTERVAL == 30.0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("building: 10/22, ")
    assert lines[1].endswith(" left; target: 5 in flight")


def test_outside_of_a_terminal_work_says_how_far_it_is_though_nothing_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(module, "LINE_INTERVAL", 0.0)
    output = ""
    with progress("checking the endpoint", first=0.0):
        while "checking the endpoint: " not in output:  # ends by pytest's own limit where nothing is written
            output += capsys.readouterr().err
    assert " so far" in output


def test_short_work_and_work_of_other_processes_says_nothing(capsys):
    with progress("reading", 3) as work:
        work.advance(3)
    with progress("reading", 3, first=0.0, shown=False) as work:
        work.advance(1)
    with progress("reading", 0, first=0.0):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_pushed_out_of_a_narrow_terminal(width):
    clock = Clock()
    work = Progress("evaluating", 12_345, lambda: ["word " * 60, "target: 5 in flight"], clock=clock)
    clock.now = 100.0
    work.update(1_234)
    head, *details = drawn(work, width)
    assert all(len(line) <= width for line in (head, *details))
    for text in ("evaluating", "1,234/12,345", "12.3/s", "about 15 min left")[: 2 if width < 80 else 4]:
        assert text in head
    assert ("━" in head) == (width >= 80)
    assert details[0].endswith("…")
    assert details[1].strip() == "target: 5 in flight"


def test_a_role_says_what_is_done_and_in_flight_how_fast_and_how_long():
    clock = Clock()
    status = _ClientStatus(20, {"target": 20, "reviser": 20}, clock)
    status.update(0, {"target": role(0, 8), "reviser": role(0, 0)})
    assert status.lines() == ["target: 0/20 replies, 8 in flight", "reviser: 0/20 replies, 0 in flight"]
    assert status.seconds_left() is None
    clock.now = 50.0
    both = {"target": role(15, 2, reused=1), "reviser": role(5, 6, wait_reason="the server takes 8 at once")}
    status.update(5, both)
    assert status.lines() == [
        "target: 16/20 replies, 1 of them reused, 2 in flight, 3.3 s each, about 13 s left",
        "reviser: 5/20 replies, 6 in flight, 10 s each, about 2 min left, the server takes 8 at once",
    ]
    assert status.seconds_left() == pytest.approx(150.0)
    status.rows = 19  # most rows were dropped before the reviser saw them: one is left, whatever was expected
    assert status.seconds_left() == pytest.approx(10.0)


def test_a_build_counts_rows_that_are_done_before_their_turn(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["wait:1.5 ok", *["ok"] * 5]))
    counts = []
    build(
        config_for(tmp_path, server.url), on_progress=lambda writer, _: counts.append((writer.finished, writer.pairs))
    )
    assert (0, 0) in counts
    assert (5, 0) in counts  # all but the first, which the others wait for
    assert counts[-1] == (6, 6)


def test_a_rate_that_is_first_measured_late_counts_from_the_start():
    clock = Clock()
    status = _ClientStatus(22, {"target": 22}, clock)
    target = role(0, 22)
    status.update(0, {"target": target})
    clock.now = 30.0
    target.total.calls = 3  # no row has come to its end, so nothing was reported
    assert status.lines() == ["target: 3/22 replies, 22 in flight, 10 s each, about 3 min left"]
