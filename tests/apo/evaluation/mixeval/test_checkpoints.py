"""Many checkpoints and one judge: what each comes to is what it comes to alone, and no judgement is paid for twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from apo.evaluation.checkpoints import configs_by_model, folder_names
from apo.evaluation.records.mixeval import MAX_NEW_TOKENS
from apo.evaluation.results import read_results
from clair.core.errors import UserError
from clair.inference.local import LocalModel
from tests.apo.evaluation.evaluating import apo, config_for, evaluated, final, mixeval_command
from tests.clair import tiny_model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """Two models of other weights, both called checkpoint-1."""
    runs = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        folder = runs / name / "checkpoint-1"
        folder.mkdir(parents=True)
        tiny_model.save(folder, seed=seed, max_position_embeddings=1024)
    return [runs / name / "checkpoint-1" for name in "ab"]


def command(data, out, checkpoints, server, *more):
    models = [word for folder in checkpoints for word in ("--model", folder)]
    judge = {"url": server.url, "model": "j"}
    return (*mixeval_command(data, out, judge=judge, profile="strict"), *models, *more)


def alone(data, out, folder, server) -> dict:
    model = {"path": str(folder), "max_tokens": MAX_NEW_TOKENS, "batch_tokens": 2048}
    judge = {"url": server.url, "model": "j"}
    assert evaluated(data, out, model=model, judge=judge, profile="strict").failed == 0
    return final(out)


def judgements(server) -> list[str]:
    return [json.dumps(body["messages"]) for body in server.requests()]


def assert_as_alone(data, tmp_path, checkpoints, server):
    assert len(judgements(server)) == len(set(judgements(server))) > 0
    for folder in checkpoints:
        name = f"{folder.parent.name}-checkpoint-1"
        assert final(tmp_path / "many" / name) == alone(data, tmp_path / name, folder, server)
        assert read_results(tmp_path / "many" / name).score.model.identity.startswith("weights:")


def test_models_are_named_by_as_much_of_their_path_as_distinguishes_them():
    assert folder_names(["/m/base"]) == ["base"]
    assert folder_names(["/m/a/last", "/m/b/last"]) == ["a-last", "b-last"]
    assert folder_names(["/m/a/b-c", "/n/a-b/c", "/m/z/c"]) == ["m-a-b-c", "n-a-b-c", "m-z-c"]
    with pytest.raises(UserError, match="the same folder twice"):
        folder_names(["/m/a", "/m/../m/a"])
    with pytest.raises(UserError, match="/m/a/b-c and /m/a-b/c would share a folder of results"):
        folder_names(["/m/a/b-c", "/m/a-b/c", "/z/c"])


def test_each_of_several_models_may_spend_its_part_and_endpoints_are_refused(data, tmp_path):
    judge = {"url": "http://127.0.0.1:9/v1", "model": "j"}
    config = config_for(data, tmp_path, model={"path": "m/a", "temperature": 0}, judge=judge, budget={"tokens": 10})
    first, second = configs_by_model(config, ["m/a", "m/b"])
    assert (second.model.path, second.model.temperature) == ("m/b", 0)
    assert (first.budget.tokens, Path(second.out).name) == (5, "b")
    assert first.ledger == second.ledger == str(tmp_path / "ledger.sqlite")
    assert [each.model.path for each in configs_by_model(config, [])] == ["m/a"]
    with pytest.raises(UserError, match="for model folders; evaluate an endpoint alone"):
        configs_by_model(config, ["m/a", "http://127.0.0.1:9/v1"])


@pytest.mark.slow
def test_several_models_in_this_process_share_one_judge_and_are_printed_in_order(data, tmp_path, checkpoints, server):
    arguments = command(data, tmp_path / "many", checkpoints, server, "--set", "model.batch_tokens=2048")
    result = apo(*arguments)
    assert result.code == 0, result.err
    assert f"apo compare {tmp_path}/many/a-checkpoint-1 {tmp_path}/many/b-checkpoint-1" in result.out
    paid = server.paid()
    assert apo(*arguments).code == 0
    assert server.paid() == paid
    assert_as_alone(data, tmp_path, checkpoints, server)


@pytest.mark.slow
def test_on_a_ray_of_its_own_they_answer_there_and_are_judged_here(data, tmp_path, checkpoints, server, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with monkeypatch.context() as patch:
        patch.setattr(LocalModel, "_load", lambda self: pytest.fail("the driver must not load a checkpoint"))
        result = apo(
            *command(
                data, tmp_path / "many", checkpoints, server, "--set", "model.batch_tokens=2048", "--runner", "ray"
            )
        )
    assert result.code == 0, result.err
    assert os.path.isfile(tmp_path / "many" / "a-checkpoint-1" / "answers" / "score.json")
    assert_as_alone(data, tmp_path, checkpoints, server)


def test_an_unknown_runner_is_refused(data, tmp_path, checkpoints, server):
    for options, reason in (
        (["--runner", "dask"], "unknown runner 'dask'; allowed: ray"),
        (["--address", "auto"], "--address is for --runner ray"),
        (["--runner", "ray", "--estimate"], "--estimate is for one model in this process"),
    ):
        result = apo(*command(data, tmp_path / "out", checkpoints[:1], server, *options))
        assert result.code == 2
        assert reason in result.err
