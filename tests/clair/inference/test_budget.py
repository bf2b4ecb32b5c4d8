"""Money: never more than the budget, whatever goes wrong; and an estimate that comes true."""

from __future__ import annotations

import random
from decimal import Decimal

import pytest

from clair.core.errors import UserError
from clair.inference.budget import Budget, BudgetConfig, BudgetExceeded, Price, max_billed_tokens
from clair.inference.config import ModelConfig
from clair.ledger.ledger import Ledger, Tokens
from clair.pipeline.build import build
from clair.pipeline.estimate import (
    Range,
    RoleEstimate,
    _total,
    estimate,
    sample_by_size,
    time_range,
    total_cost,
    total_time,
)
from tests.clair.building import clair, scripted_rows, write_prompts, write_recipe
from tests.clair.scripted import Scripted, between, endpoint, install, recipe, revision, verdict


def rows(n, seed=0):
    draw = random.Random(seed)
    return [
        {"prompt": f"question {i} " + "word " * draw.randint(1, 60), "answer": "bad " * draw.randint(1, 80) + str(i)}
        for i in range(n)
    ]


def test_the_price_of_tokens_by_hand():
    assert Price(input="2.50", output="10").cost(Tokens(1000, 200)) == Decimal("0.0045")


def test_the_worst_case_counts_bytes_and_max_tokens():
    request = {"messages": [{"role": "user", "content": "né 🙂"}], "max_tokens": 7, "temperature": 0.5}
    assert max_billed_tokens(request) == Tokens(len("né 🙂".encode()) + 32, 7)


async def _reserve_too_much(budget):
    await budget.reserve("reviser", Tokens(60, 0))
    with pytest.raises(BudgetExceeded, match=r"0 tokens of 100 spent, and the next call may cost 101"):
        await budget.reserve("reviser", Tokens(101, 0))
    budget.settle("reviser", Tokens(60, 0), Tokens(30, 0))
    await budget.reserve("reviser", Tokens(70, 0))


def test_requests_beyond_the_budget_are_refused_and_cheaper_replies_free_some_of_it():
    import asyncio

    asyncio.run(_reserve_too_much(Budget(BudgetConfig(tokens=100), {}, {})))


@pytest.mark.parametrize("seed", range(10))
def test_the_budget_is_never_passed_over_random_runs_with_trouble_and_resumes(tmp_path, monkeypatch, seed):
    _random_run(tmp_path, monkeypatch, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 210))
def test_the_budget_is_never_passed_over_200_random_runs(tmp_path, monkeypatch, seed):
    _random_run(tmp_path, monkeypatch, seed)


def _random_run(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    prompt_rows = rows(draw.randint(5, 40), seed)
    billed = 0
    limit = draw.randint(2_000, 40_000)
    for resume in range(3):
        model = Scripted("reviser", revision, trouble=0.3, seed=seed + resume, latency=0.002)
        install(monkeypatch, reviser=model)
        config = recipe(
            tmp_path / "out", prompt_rows, pipeline="revised", reviser=endpoint(max_tokens=200),
            budget={"tokens": limit}, concurrency=draw.randint(1, 16), attempts=3,
        )  # fmt: skip
        built = build(config)
        billed += model.billed
        assert billed <= limit
        with Ledger(config.ledger_path) as ledger:
            spent = ledger.spent(str((tmp_path / "out").resolve())).get("reviser", Tokens(0, 0))
        assert billed <= sum(spent)
        if not built.stopped:
            break
        assert "budget reached" in built.stopped
        limit += draw.randint(0, 20_000)


def test_a_build_stopped_by_its_budget_resumes_with_a_larger_one_and_requests_nothing_twice(tmp_path, monkeypatch):
    model = Scripted("reviser", revision)
    install(monkeypatch, reviser=model)
    keys = {"pipeline": "revised", "reviser": endpoint(max_tokens=100), "concurrency": 4}
    stopped = build(recipe(tmp_path / "out", rows(30), **keys, budget={"tokens": 8_000}))
    assert "budget reached" in stopped.stopped
    assert 0 < len(model.requests) < 30
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert build(recipe(tmp_path / "out", rows(30), **keys, budget={"tokens": 10**6})).stopped is None
    assert len(model.requests) == 30


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"budget": {"money": 1}, "reviser": endpoint()}, "needs reviser.price"),
        ({"budget": {"tokens": 9}, "reviser": endpoint(max_tokens=None)}, "needs reviser.max_tokens"),
        ({"budget": {"tokens": 9, "money": 1}, "reviser": endpoint()}, "either money or tokens"),
        ({"budget": {"money": -1}, "reviser": endpoint()}, "greater than 0"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_spent(tmp_path, keys, match):
    with pytest.raises(UserError, match=match):
        build(recipe(tmp_path / "out", rows(2), pipeline="revised", **keys))


# ---- estimates


def long_and_short(seed, n=400):
    """Answers of 3 to 3,000 words, most of them short: the mean is 2.5 times the median."""
    draw = random.Random(seed)
    return [
        {"prompt": f"question {i} " + "word " * draw.randint(1, 60), "answer": "bad " * _words(draw) + str(i)}
        for i in range(n)
    ]


def _words(draw):
    return min(3000, max(3, int(draw.lognormvariate(4.0, 1.3))))


def talkative(messages, sample=0):
    """A revision with reasoning of 40 to 1,000 characters, and an answer that is up to a fifth shorter."""
    draw = random.Random(messages[0]["content"])
    answer = between(messages[0]["content"], "student_solution").replace("bad", "good")
    reasoning = "why " * int(min(250, max(10, draw.lognormvariate(4.0, 0.5))))
    solution = answer[int(len(answer) * 0.2 * draw.random()) :]
    return f"{{teacher_reasoning}}\n{reasoning}\n\n{{corrected_student_solution}}\n{solution}"


@pytest.mark.parametrize(("script", "probe"), [(revision, 5), (talkative, 20)])
@pytest.mark.parametrize("seed", range(4))
def test_an_estimate_comes_within_15_percent_on_prompts_of_widely_varying_length_and_its_replies_are_kept(
    tmp_path, monkeypatch, seed, script, probe
):
    model = Scripted("reviser", script)
    install(monkeypatch, reviser=model)
    price = {"input": "2.5", "output": "10"}
    config = recipe(tmp_path / "out", long_and_short(seed), pipeline="revised", reviser=endpoint(price=price))
    estimated = total_cost(estimate(config, probe))
    assert len(model.requests) == probe
    tokens = build(config).manifest["tokens"]["reviser"]
    assert (tokens["calls"], tokens["reused"]) == (400 - probe, probe)
    truth = (tokens["prompt"] * 2.5 + tokens["completion"] * 10) / 1e6
    print(f"estimated {estimated}, was {truth}")
    assert abs(estimated.value / truth - 1) < 0.15
    assert estimated.lo <= truth <= estimated.hi


def test_a_cost_linear_in_the_length_is_estimated_exactly():
    sizes = [100, 5000, 700, 700, 90_000, 12, 3000]
    estimated = _total(sizes, [sizes[0], sizes[2], sizes[4]], [2 + 0.5 * sizes[index] for index in (0, 2, 4)])
    exact = sum(2 + 0.5 * size for size in sizes)
    assert estimated == pytest.approx(Range(exact, exact, exact))


def test_the_rows_of_a_probe_stand_for_equal_shares_of_all_bytes():
    # Each row counts 1000 bytes more: 2000, 2000, 4000, 8000 of 16000; the middles of two halves are 4000 and 12000.
    assert sample_by_size([1000, 7000, 1000, 3000], 2) == [2, 1]
    assert sorted(sample_by_size([5, 10**9, 6, 7], 3)) == [1, 2, 3]  # a giant is taken once
    assert sorted(sample_by_size([5, 6], 5)) == [0, 1]


@pytest.mark.parametrize("probe", [5, 20])
def test_intervals_hold_the_truth_about_as_often_as_they_say(probe):
    """Costs that deviate by a third of themselves, on rows that differ a hundredfold: 300 draws."""
    held = near = 0
    for seed in range(300):
        draw = random.Random(seed)
        sizes = [int(draw.lognormvariate(6.5, 1.0)) for _ in range(1000)]
        costs = [(500 + size) * draw.lognormvariate(0, 0.3) for size in sizes]
        chosen = sorted(sample_by_size(sizes, probe))
        estimated = _total(sizes, [sizes[index] for index in chosen], [costs[index] for index in chosen])
        held += estimated.lo <= sum(costs) <= estimated.hi
        near += abs(estimated.value / sum(costs) - 1) < 0.15
    print(f"{held} of 300 intervals hold the truth, {near} of 300 estimates are within 15 %")
    assert held >= 0.92 * 300
    assert near >= (0.7 if probe == 5 else 0.95) * 300


def test_the_time_lies_between_all_at_once_and_the_probes_own_pace():
    model = ModelConfig(url="http://127.0.0.1:9/v1", model="m")
    seconds = [1.0, 2.0, 3.0, 4.0, 5.0]  # each waits for those before it
    assert time_range(model, 1000, seconds, 64) == pytest.approx((1000 * 3 / 64, 1000.0))
    assert time_range(model, 1000, [2.0] * 5, 50) == pytest.approx((40.0, 400.0))
    limited = model.model_copy(update={"requests_per_minute": 60})
    assert time_range(limited, 1000, [2.0] * 5, 50) == pytest.approx((1000.0, 1000.0))
    assert time_range(model, 1000, [], 50) is None
    assert time_range(model.model_copy(update={"batch": True}), 1000, [2.0], 50) is None
    both = {
        "target": RoleEstimate(9, None, None, None, (10, 60)),
        "reviser": RoleEstimate(9, None, None, None, (30, 90)),
    }
    assert total_time(both) == (30, 150)


def test_an_estimate_with_a_probe_prints_the_time(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", scripted_rows(["wait:0.2 ok"] * 12))
    result = clair("estimate", write_recipe(tmp_path, server.url), "--probe", "3")
    assert result.code == 0, result
    assert "time: the shorter if the servers answer 64 concurrent requests" in result.out
    assert "note: " not in result.err
    assert time_of_the_table(result.out) != "?"


def test_an_estimate_says_where_rows_of_the_probe_ended_before_every_role_was_asked(tmp_path, server):
    write_prompts(tmp_path / "prompts.jsonl", [{"prompt": f"Task {n} [[400filter]]"} for n in range(4)])
    target = {"url": server.url, "model": "t"}
    result = clair("estimate", write_recipe(tmp_path, server.url, target=target), "--probe", "3")
    assert result.code == 0, result
    assert "3 of the probe's 3 rows ended before every role had answered (3 target.content_filter)" in result.err


def time_of_the_table(out):
    return next(line for line in out.splitlines() if "reviser" in line).split("│")[-2].strip()


def test_an_estimate_without_a_probe_requests_nothing_and_prints_the_maximum_of_calls(tmp_path, monkeypatch):
    model = Scripted("reviser", revision)
    install(monkeypatch, reviser=model)
    config = recipe(tmp_path / "out", rows(20), pipeline="revised", reviser=endpoint(mode="edits"))
    assert estimate(config)["reviser"].max_calls == 20 * 4
    assert not model.requests


FOUR = ["aaaa", "bbb", "cc", "d"]


def longest(messages, sample=0):
    """A judge that prefers the longer answer."""
    shown = [between(messages[0]["content"], f"student_solution_{n}") for n in (1, 2)]
    return verdict("[1]" if len(shown[0]) > len(shown[1]) else "[2]")


def score_by_length(messages, sample=0):
    """A judge that gives an answer its length as the score."""
    answer = between(messages[0]["content"], "student_solution")
    return "{teacher_reasoning}\nhm\n\n{student_solution_score}\n" + str(len(answer))


@pytest.mark.parametrize(
    ("script", "judging", "rows", "calls"),
    [
        (longest, {"judge": endpoint(ask_again=False)}, [{"answers": FOUR}], {"judge": 12}),
        (longest, {"judge": endpoint(ask_again=False, order="random")}, [{"answers": FOUR}], {"judge": 6}),
        (longest, {"judge": endpoint(ask_again=False), "target": endpoint(), "samples": 3},
         [{"answers": FOUR}, {"answers": FOUR[:2]}, {}], {"target": 3, "judge": 12 + 2 + 6}),
        (longest, {"judge": endpoint(ask_again=False)}, [{"answers": FOUR, "scores": [4, 3, 2, 1]},
         {"answers": FOUR, "scores": [4, 3, 2, None]}], {"judge": 12}),
        (score_by_length, {"scores": {"judges": [endpoint(ask_again=False)]}}, [{"answers": FOUR}], {"judge": 4}),
    ],
)  # fmt: skip
def test_an_estimate_counts_the_calls_for_the_ready_answers_of_each_row(
    tmp_path, monkeypatch, script, judging, rows, calls
):
    install(monkeypatch, judge=Scripted("judge", script), target=Scripted("target", lambda m, n: "word " * (n + 1)))
    numbered = [{"prompt": f"question {n}", **row} for n, row in enumerate(rows)]
    config = recipe(tmp_path / "out", numbered, pipeline="judged", **judging)
    assert {role: of_role.max_calls for role, of_role in estimate(config).items()} == calls
    assert {role: tokens["calls"] for role, tokens in build(config).manifest["tokens"].items()} == calls


def test_an_estimate_counts_no_calls_for_answers_that_the_rows_have(tmp_path, monkeypatch):
    install(
        monkeypatch, target=Scripted("target", lambda m, n: "bad"), stronger=Scripted("stronger", lambda m, n: "good")
    )
    ready = [{"answer": "bad"}, {"gold": "good"}, {"answer": "bad", "gold": "good"}, {}]
    rows = [{"prompt": f"question {n}", **row} for n, row in enumerate(ready)]
    prompts = {"path": str(tmp_path / "out-prompts.jsonl"), "columns": {"stronger": "gold"}}
    models = {"target": endpoint(), "stronger": endpoint()}
    config = recipe(tmp_path / "out", rows, pipeline="stronger", prompts=prompts, **models)
    assert {role: of_role.max_calls for role, of_role in estimate(config).items()} == {"target": 2, "stronger": 2}
    tokens = build(config).manifest["tokens"]
    assert {role: of_role["calls"] for role, of_role in tokens.items()} == {"target": 2, "stronger": 2}


def test_an_estimate_says_that_accept_may_end_the_build_before_all_rows(tmp_path, capsys):
    config = recipe(tmp_path / "out", rows(12), pipeline="revised", reviser=endpoint(), accept=2)
    assert estimate(config)["reviser"].max_calls == 24
    assert "for all 12 rows; accept ends the build at 2 pairs" in capsys.readouterr().err
    estimate(config.model_copy(update={"accept": 12}))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("temperature", "prefix", "sent"), [(0.5, "", 3), (1.0, "other ", 0)])
def test_an_estimate_counts_the_replies_that_it_used_in_a_ledger_shared_with_other_builds(
    tmp_path, monkeypatch, temperature, prefix, sent
):
    """Another request for rows with the same ids; and the same requests for rows with other ids."""
    target = Scripted("target", lambda m, n: "bad " * 9, latency=0.01)
    install(monkeypatch, target=target, reviser=Scripted("reviser", revision))
    shared = {"pipeline": "revised", "reviser": endpoint(), "ledger": str(tmp_path / "shared.sqlite")}
    questions = [{"id": f"r{n}", "prompt": f"question {n}"} for n in range(3)]
    first = estimate(recipe(tmp_path / "a", questions, target=endpoint(temperature=1.0), **shared), 3)
    assert first["target"].prompt.value > 0
    renamed = [row | {"id": prefix + row["id"]} for row in questions]
    config = recipe(tmp_path / "b", renamed, target=endpoint(temperature=temperature), **shared)
    second = estimate(config, 3)
    assert len(target.requests) == 3 + sent
    for role in ("target", "reviser"):
        assert (second[role].prompt, second[role].completion) == (first[role].prompt, first[role].completion)
        assert second[role].time is not None
    tokens = build(config).manifest["tokens"]["target"]
    assert (second["target"].prompt.value, second["target"].completion.value) == (
        tokens["prompt"],
        tokens["completion"],
    )


def test_prices_come_from_the_table_if_the_recipe_says_so(tmp_path):
    from clair.inference.budget import role_prices

    pytest.importorskip("genai_prices", reason="pip install 'clair-apo[prices]'")
    reviser = endpoint(url="https://api.openai.com/v1", model="gpt-4o", price="table")
    config = recipe(tmp_path / "out", rows(1), pipeline="revised", reviser=reviser)
    price = role_prices(config.models)["reviser"]
    assert price.input > 0
    assert price.output > price.input
    unknown = recipe(tmp_path / "no", rows(1), pipeline="revised", reviser=endpoint(price="table"))
    with pytest.raises(UserError, match="genai-prices does not know 'scripted'"):
        build(unknown)


def test_a_table_that_is_not_installed_gives_the_command_that_installs_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "genai_prices", None)
    config = recipe(tmp_path / "out", rows(1), pipeline="revised", reviser=endpoint(price="table"))
    with pytest.raises(UserError, match=r"pip install 'clair-apo\[prices\]'"):
        build(config)
