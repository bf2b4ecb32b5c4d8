"""The estimate of an evaluation: exact requests, and intervals of tokens and money that hold the true values."""

from __future__ import annotations

import pytest

from apo.evaluation.mixeval.estimate import estimate
from clair.core.errors import UserError
from tests.apo.evaluation.evaluating import apo, config_for, evaluated, mixeval_command
from tests.apo.evaluation.questions import responses_of


def test_requests_are_known_without_asking_and_nothing_is_written(data, tmp_path, server):
    folder = responses_of(data, tmp_path / "responses")
    judge = {"url": server.url, "model": "j"}
    config = config_for(data, tmp_path / "out", responses=str(folder), judge=judge)
    assert estimate(config)["judge"].max_calls == 5
    each = config.model_copy(update={"independent_judgements": True})
    assert estimate(each)["judge"].max_calls == 7
    model = {"url": server.url, "model": "t", "temperature": 0}
    estimates = estimate(config_for(data, tmp_path / "out", model=model, judge=judge, samples=2))
    assert {role: usage.max_calls for role, usage in estimates.items()} == {"model": 10, "judge": 10}
    assert estimate(config_for(data, tmp_path / "out", responses=str(folder))) == {}
    assert server.paid() == 0
    assert not (tmp_path / "out").exists()


def test_a_probe_estimates_the_cost_of_the_real_run(real, tmp_path, server):
    options = {
        "responses": str(real / "responses" / "gemma-1.1-7b-it"),
        "judge": {"url": server.url, "model": "j", "price": {"input": "0.5", "output": "1.5"}},
    }
    estimated = estimate(config_for(real, tmp_path / "out", **options), probe=12)["judge"]
    assert server.paid() == 12
    usage = evaluated(real, tmp_path / "out", **options).score.usage["judge"]
    assert (estimated.max_calls, server.paid()) == (451, 451)  # the probe's replies are kept
    assert estimated.prompt.lo <= usage.prompt <= estimated.prompt.hi
    assert estimated.prompt.value == pytest.approx(usage.prompt, rel=0.1)
    assert estimated.cost.lo <= float(usage.cost) <= estimated.cost.hi


def test_the_command_prints_the_estimate(data, tmp_path, server):
    folder = responses_of(data, tmp_path / "responses")
    judge = {"url": server.url, "model": "j"}
    arguments = mixeval_command(data, tmp_path / "out", responses=folder, judge=judge)
    result = apo(*arguments, "--estimate")
    assert (result.code, server.paid()) == (0, 0)
    assert "judge" in result.out
    with pytest.raises(UserError, match="at least 3"):
        estimate(config_for(data, tmp_path / "o", responses=str(folder), judge={"url": server.url, "model": "j"}), 2)
