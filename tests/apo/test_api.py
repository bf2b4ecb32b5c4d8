"""`apo.train`, `apo.evaluate`, `apo.compare` and `apo.advise`: as the commands, and inside a running event loop."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import yaml

import apo
from apo.evaluation.mixeval.config import MixEvalConfig
from apo.training.config import TrainConfig
from clair.core.errors import UserError
from tests.apo.advice.test_advise import settings, write_rows
from tests.apo.evaluation.conftest import data, judge_server, server  # noqa: F401  (fixtures)
from tests.apo.evaluation.questions import responses_of


def in_event_loop(call):
    """What `call()` returns where an event loop runs in this thread, as in a notebook's cell."""

    async def cell():
        return call()

    return asyncio.run(cell())


def test_train_takes_a_mapping_inside_a_loop_and_returns_the_content_of_run_json(recipe, capsys):
    lines: list[str] = []
    result = in_event_loop(lambda: apo.train(recipe, overrides={"trainer.max_steps": 2}, log=lines.append))
    out = Path(recipe["out"])
    assert result.out == out
    assert result.runs == {str(out): json.loads((out / "run.json").read_text())}
    assert result.metrics["eval_rewards/accuracies"] >= 0
    assert repr(result).startswith(f"<TrainingResult {out}: 2 steps, held-out loss ")
    assert lines[0].startswith("train: 24 pairs")
    assert capsys.readouterr().out == ""


def test_a_recipe_is_a_path_a_mapping_or_a_config(recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    for form in (file, str(file), recipe, TrainConfig(**recipe)):
        with pytest.raises(UserError, match=r"is not above 0|greater than 0"):
            apo.train(form, out=tmp_path / "other", overrides={"beta": 0})
    assert not (tmp_path / "other").exists()


def test_a_value_that_no_recipe_holds_is_named(recipe):
    with pytest.raises(UserError, match=r"^beta holds a value that is no text, number, list or mapping"):
        apo.train(recipe, overrides={"beta": object()})


def test_evaluate_scores_responses_inside_a_loop_as_the_command_does(data, tmp_path):  # noqa: F811
    folder = responses_of(data, tmp_path / "responses")
    recipe = {"data": str(data), "responses": str(folder), "judge": "rule", "out": str(tmp_path / "out")}
    outcome = in_event_loop(lambda: apo.evaluate(recipe, show_progress=False))
    assert outcome.score is not None
    assert repr(outcome) == f"<MixEvalOutcome {tmp_path / 'out'}: {outcome.headline}>"
    assert outcome.headline.startswith(f"overall {100 * outcome.score.overall:.1f} %, 95 % interval ")
    assert outcome.table().row_count > 4
    again = apo.evaluate(MixEvalConfig(**recipe), out=tmp_path / "again", show_progress=False)
    assert (tmp_path / "again/items.jsonl").read_bytes() == (tmp_path / "out/items.jsonl").read_bytes()
    assert again.score.overall == outcome.score.overall


def test_evaluate_judges_by_an_endpoint_inside_a_loop_and_pays_once(data, tmp_path, server):  # noqa: F811
    recipe = {
        "data": data,
        "responses": responses_of(data, tmp_path / "responses"),
        "judge": {"url": server.url, "model": "j"},
        "out": tmp_path / "out",
    }
    outcome = in_event_loop(lambda: apo.evaluate(recipe))
    paid = server.paid()
    assert outcome.requests == paid > 0
    assert in_event_loop(lambda: apo.evaluate(recipe)).score.overall == outcome.score.overall
    assert server.paid() == paid


def test_evaluate_without_a_score_says_why(data, tmp_path, server):  # noqa: F811
    recipe = {
        "data": data,
        "responses": responses_of(data, tmp_path / "responses"),
        "judge": {"url": server.url, "model": "j"},
        "budget": {"tokens": 1},
        "out": tmp_path / "out",
    }
    outcome = apo.evaluate(recipe, show_progress=False)
    assert outcome.score is None
    assert repr(outcome).startswith(f"<MixEvalOutcome {tmp_path / 'out'}: no result, ")
    assert repr(outcome).endswith("; run it again>")


def test_compare_writes_the_page_and_shows_the_differences(data, tmp_path):  # noqa: F811
    for name, say in (("base", None), ("tuned", lambda row: row.right[0] if row.row else "no idea")):
        folder = responses_of(data, tmp_path / f"responses-{name}", say)
        apo.evaluate({"data": data, "responses": folder, "judge": "rule", "out": tmp_path / name}, show_progress=False)
    result = apo.compare(tmp_path / "base", tmp_path / "tuned")
    assert result.out == tmp_path / "compare"
    assert json.loads((result.out / "compare.json").read_text()) == json.loads(json.dumps(result.content))
    assert result.page.read_text().startswith("<!doctype html>")
    delta = 100 * result.content["parts"][0]["tuned"][0]["delta"]
    assert repr(result) == f"<ComparisonResult {tmp_path / 'compare'}: tuned {delta:+.1f} points against base>"
    assert result.table().row_count == 3
    assert isinstance(result.notes(), list)
    with pytest.raises(UserError, match="only one result folder"):
        apo.compare(tmp_path / "base")


@pytest.mark.slow
def test_advise_without_a_judge_inside_a_loop(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAIR_CACHE", str(tmp_path / "cache"))
    config = settings(tmp_path, write_rows(tmp_path / "pairs.jsonl", 60), difference=0.2)
    lines: list[str] = []
    outcome = in_event_loop(lambda: apo.advise(config, log=lines.append))
    assert json.loads((tmp_path / "out/advice.json").read_text())["advice"] == outcome.result["advice"]
    assert repr(outcome) == f"<AdviceOutcome {tmp_path / 'out'}: {outcome.lines()[0]}>"
    assert outcome.table().row_count > 10
    assert lines[0].endswith("answers of the model's own")
