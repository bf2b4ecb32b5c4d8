"""`apo eval judge-stability`: known flip rates are found, and a judge's noise widens an interval as predicted."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from random import Random
from statistics import fmean, stdev

import pytest

from apo.evaluation.stability.config import StabilityConfig, load_inputs
from apo.evaluation.stability.run import measure_stability
from apo.evaluation.stability.summary import difference, disagreement, flip_rate
from clair.core.errors import UserError
from clair.core.recipe import resolve
from tests.apo.evaluation.evaluating import apo, evaluated, judging, start_apo, write_recipe
from tests.apo.evaluation.questions import responses_of
from tests.clair.building import finished

ANSWERS = {"base": "no <<[[0]]|[[0]]|[[1]]>>", "tuned": "yes <<[[1]]|[[0.9]]|[[1]]>>"}
"""A judge of free-form answers flips once in three times for the base, and only changes the score for the tuned."""


def judge(server, name="j", **more):
    return {"url": server.url, "model": name, "id": name, **more}


def make_folders(data: Path, out: Path, server, **changes) -> dict:
    """Result folders of two models; multiple-choice answers have no script."""
    folders = {}
    for side, text in ANSWERS.items():
        say = lambda row, text=text: text if not row.options else f"{row.right[0]} ({text[:3]})"  # noqa: E731
        responses = responses_of(data, out / f"{side}-responses", say)
        evaluated(data, out / side, responses=str(responses), judge=judge(server), **changes)
        folders[side] = str(out / side)
    server.forget()
    return folders


def config(data: Path, out: Path, folders: dict, server, **changes) -> StabilityConfig:
    values = {"data": str(data), **folders, "judge": judge(server), "repeats": 3, "out": str(out)}
    return resolve(StabilityConfig, {**values, **changes})


def test_flips_are_counted_with_each_request_sent_once(data, tmp_path, server):
    folders = make_folders(data, tmp_path, server)
    settings = config(data, tmp_path / "out", folders, server)
    result = measure_stability(settings).result
    assert result is not None
    # Three different free-form questions and two of multiple choice, two answers each; repeated rows share a reply.
    assert server.paid() == 3 * 2 * (3 + 2)
    free_form = result["judges"]["judge"]["flips"]["free-form"]
    assert free_form["flips"]["mean"] == pytest.approx((2 / 3 + 0) / 2)
    assert free_form["changes"]["mean"] == pytest.approx(2 / 3)
    assert free_form["unanimous"]["mean"] == pytest.approx(1 / 2)
    assert result["judges"]["judge"]["flips"]["multiple-choice"]["flips"]["mean"] == 0
    assert result["answers"] == 14
    assert result["between"] is None
    rows = [json.loads(line) for line in (tmp_path / "out/judgements.jsonl").read_text().splitlines()]
    assert len(rows) == 14
    assert sorted(rows[0]["judge_scores"]) == [0, 0, 1]
    assert measure_stability(settings).result is not None
    assert server.paid() == 30  # all from the ledger


def test_two_judges_are_compared_and_the_first_judgement_of_an_evaluation_is_not_paid_again(data, tmp_path, server):
    ledger = str(tmp_path / "ledger.sqlite")
    folders = make_folders(data, tmp_path, server, ledger=ledger)
    out = tmp_path / "out"
    recipe = write_recipe(
        tmp_path / "recipe.yaml", data=data, **folders, judge=judge(server), second_judge=judge(server, "j2"),
        repeats=3, ledger=ledger, out=out,
    )  # fmt: skip
    dry = apo("eval", "judge-stability", recipe, "--dry-run")
    assert dry.code == 0, dry
    assert "7 rows, 84 judgements" in dry.out
    assert not out.exists()
    shown = apo("eval", "judge-stability", recipe)
    assert shown.code == 0, shown
    assert server.paid() == 20 + 30  # the first judge's first time is in the ledger
    assert "between the two judges: flips, %" in shown.out
    assert "judged once, the difference is known to +-" in " ".join(shown.out.split())
    result = json.loads((out / "stability.json").read_text())
    assert set(result["judges"]) == {"judge", "second_judge"}
    assert len(result["judges"]["judge"]["difference"]["by_repeat"]) == 3
    again = apo("eval", "judge-stability", recipe)
    assert again.code == 0
    assert server.paid() == 50


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_measurement_goes_on_and_pays_nothing_twice(real, tmp_path, sent):
    from tests.apo.evaluation.mixeval.test_killed import many

    data = many(tmp_path / "data")
    (data / "judge_prompts.json").write_bytes((real / "judge_prompts.json").read_bytes())
    with judging(0.05) as server:
        folders = {}
        for side in ("base", "tuned"):
            evaluated(data, tmp_path / side, split="full", judge="rule", model=judge(server, side))
            folders[side] = str(tmp_path / side)
        server.forget()
        recipe = write_recipe(
            tmp_path / "recipe.yaml", data=data, **folders, judge=judge(server), repeats=2, concurrency=4, limit=12,
            out=tmp_path / "out",
        )  # fmt: skip
        process = start_apo("eval", "judge-stability", recipe)
        until = time.monotonic() + 120
        while server.paid() < 10 and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(sent)
        assert finished(process).code == (130 if sent == signal.SIGINT else -signal.SIGKILL)
        assert not (tmp_path / "out/stability.json").exists()
        last = apo("eval", "judge-stability", recipe)
        assert last.code == 0, last
        requests = [json.dumps(body, sort_keys=True) for body in server.requests()]
        distinct = 2 * len(set(requests))  # equal requests of two repeats
        assert distinct <= len(requests) <= distinct + (4 if sent == signal.SIGKILL else 0)


def problem(settings: StabilityConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_inputs(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_inputs_are_refused_in_one_line_before_a_request(data, tmp_path, server):
    folders = make_folders(data, tmp_path, server)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="second_judge is the same as judge"):
        config(data, out, folders, server, second_judge=judge(server))
    with pytest.raises(UserError, match="repeats: Input should be greater than or equal to 2"):
        config(data, out, folders, server, repeats=1)
    assert "holds no score.json" in problem(config(data, out, {**folders, "tuned": str(tmp_path)}, server))
    other = responses_of(data, tmp_path / "other-responses")
    evaluated(data, tmp_path / "short", responses=str(other), judge="rule", limit=2)
    assert "differ in limit" in problem(config(data, out, {**folders, "tuned": str(tmp_path / "short")}, server))
    assert server.paid() == 0


# ---- the statistics


def draws(rows: int, repeats: int, flip: float, random: Random, right: list[bool]) -> list[list[float]]:
    return [[float(right[row] != (random.random() < flip)) for _ in range(repeats)] for row in range(rows)]


def test_the_flip_rate_of_a_simulated_judge_is_found():
    random = Random(0)
    right = [random.random() < 0.5 for _ in range(2000)]
    clusters = [f"c{row // 2}" for row in range(2000)]
    scores = draws(2000, 4, 0.1, random, right)
    rates = flip_rate(scores, clusters)
    low, high = rates["flips"]["ci95"]
    assert low < 2 * 0.1 * 0.9 < high
    assert high - low < 0.03
    steady = [[float(value)] * 4 for value in right]
    apart = disagreement(steady, scores, clusters)
    low, high = apart["flips"]["ci95"]
    assert low < 0.1 < high


def test_the_width_with_one_judgement_is_what_other_judgements_of_the_same_answers_scatter():
    """The judge's standard error is the standard deviation over judgings of the same answers; the widths follow."""
    random = Random(1)
    rows = 400
    clusters = [f"c{row // 2}" for row in range(rows)]
    truth = {side: [random.random() < share for _ in range(rows)] for side, share in (("base", 0.4), ("tuned", 0.5))}
    base, tuned = (draws(rows, 300, 0.15, random, truth[side]) for side in ("base", "tuned"))
    everything = difference(base, tuned, clusters)
    assert everything["judge_se"] == pytest.approx(stdev(everything["by_repeat"]), rel=0.1)
    few = difference([row[:5] for row in base], [row[:5] for row in tuned], clusters)
    assert few["judge_se"] == pytest.approx(everything["judge_se"], rel=0.15)
    single = [
        difference([row[k : k + 2] for row in base], [row[k : k + 2] for row in tuned], clusters) for k in range(9)
    ]
    assert fmean(one["half_width"]["one"] for one in single) == pytest.approx(few["half_width"]["one"], rel=0.05)
    widths = few["half_width"]
    assert widths["steady"] < widths["all"] < widths["one"]
    assert few["widening"] == pytest.approx(widths["one"] / widths["steady"] - 1)


def test_a_steady_judge_widens_nothing():
    random = Random(2)
    base, tuned = ([[float(random.random() < 0.5)] * 3 for _ in range(50)] for _ in range(2))
    result = difference(base, tuned, [str(row) for row in range(50)])
    assert result["judge_se"] == 0
    assert result["widening"] == 0
    assert len(set(result["by_repeat"])) == 1
