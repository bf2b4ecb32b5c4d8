"""A local checkpoint or adapter answers: as transformers would, in batches by length, and nothing twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from apo.evaluation.mixeval.run import evaluate
from apo.evaluation.results import read_results
from clair.core.errors import UserError
from clair.inference.generation.running_batch import RunningBatch
from clair.inference.local import LocalModel
from clair.ledger.ledger import Ledger
from tests.apo.evaluation.evaluating import config_for, evaluated, final
from tests.clair import tiny_model
from tests.clair.building import call_counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_model.save(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


USER = "{{ bos_token }}{% for m in messages if m['role'] != 'system' %} {{ m['content'] }}{% endfor %}"


def sampling(folder: Path, out: Path) -> Path:
    """The same model with a generation config that samples, as Llama-3-Instruct's does."""
    shutil.copytree(folder, out)
    config = json.loads((out / "generation_config.json").read_text())
    changed = config | {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 30]}
    (out / "generation_config.json").write_text(json.dumps(changed))
    return out


def model_of(folder: Path) -> dict:
    return {"path": str(folder), "max_tokens": 40, "batch_tokens": 400}


def test_a_local_model_answers_in_the_mode_of_the_recipe_and_another_mode_is_another_evaluation(data, folder, tmp_path):
    switch = "{% if enable_thinking is defined and not enable_thinking %}one one {% endif %}"
    template = tiny_model.TEMPLATE.replace("assistant {% endif %}", f"assistant {switch}{{% endif %}}")
    shutil.copytree(folder, tmp_path / "model")
    tiny_model.make_tokenizer(chat_template=template).save_pretrained(tmp_path / "model")
    plain = model_of(tmp_path / "model") | {"chat_template_kwargs": {"enable_thinking": False}}
    tokens = []
    for out, model in (("think", model_of(tmp_path / "model")), ("plain", plain)):
        evaluated(data, tmp_path / out, model=model)
        tokens.append([item.prompt_tokens for item in read_results(tmp_path / out).items])
    assert tokens[1] == [count + 2 for count in tokens[0]]
    with pytest.raises(UserError, match="another"):
        evaluated(data, tmp_path / "think", model=plain)
    with pytest.raises(UserError, match=r"model: chat_template_kwargs\.enable_thinking would be ignored"):
        evaluated(data, tmp_path / "other", model=plain | {"path": str(folder)})


def test_a_local_model_answers_in_batches_by_length_and_each_question_once(data, folder, tmp_path, monkeypatch):
    sizes, really = [], RunningBatch.join

    def watched(self, rows, on_end):
        sizes.append([len(row.prompt) for row in rows])
        assert all(row.prompt.count(1) == 1 for row in rows)  # one BOS
        return really(self, rows, on_end)

    monkeypatch.setattr(RunningBatch, "join", watched)
    score = evaluated(data, tmp_path / "out", model=model_of(folder) | {"batch_tokens": 130}).score
    assert len(sizes) > 1
    assert sum(map(len, sizes)) == 5  # greedy: rows that repeat a question share its answer
    assert [max(batch) for batch in sizes] == sorted((max(batch) for batch in sizes), reverse=True)
    items = read_results(tmp_path / "out").items
    assert items[0].response == items[3].response
    assert score.truncated == sum(item.completion_tokens == 40 for item in items if item.truncated)
    assert score.model.identity.startswith("weights:")
    assert score.model.options == {"max_tokens": 40, "seed": 42}

    def never(*_):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(LocalModel, "_load", never)
    files = final(tmp_path / "out")
    evaluated(data, tmp_path / "out", model=model_of(folder))
    assert final(tmp_path / "out") == files


def test_ctrl_c_ends_after_the_batch_that_is_being_made(data, folder, tmp_path):
    model = model_of(sampling(folder, tmp_path / "m")) | {"batch_tokens": 130}
    config = config_for(data, tmp_path / "out", model=model, samples=6)

    def interrupt(count: int, _: object) -> None:
        if count == 1:
            os.kill(os.getpid(), signal.SIGINT)

    outcome = evaluate(config, on_progress=interrupt)
    assert (outcome.score, outcome.stopped) == (None, "interrupted")
    with Ledger(tmp_path / "out" / "ledger.sqlite") as ledger:
        answered = call_counts(ledger)["done"]
    assert 1 <= answered < 20
    score = evaluate(config).score
    assert score.usage["model"].calls == 7 * 6 - answered


def test_a_model_that_samples_draws_for_every_row_and_sample_repeatably(data, folder, tmp_path):
    model = model_of(sampling(folder, tmp_path / "m"))
    evaluated(data, tmp_path / "one", model=model, samples=3)
    items = read_results(tmp_path / "one").items
    assert len(items) == 21
    same = [item.response for item in items if item.row in (0, 3) and item.split == "free-form"]
    assert len(set(same)) > 3
    evaluated(data, tmp_path / "two", model=model | {"batch_tokens": 100}, samples=3)
    assert [item.response for item in read_results(tmp_path / "two").items] == [item.response for item in items]
    assert all(item.completion_tokens <= 40 for item in items)


def test_a_question_too_long_for_the_model_is_a_named_item(data, folder, tmp_path):
    short = tiny_model.save(tmp_path / "short", max_position_embeddings=18)
    score = evaluated(data, tmp_path / "out", model=model_of(short)).score
    assert 0 < score.unresolved_reasons["answer_prompt_too_long"] < 7


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + USER,
            "refuses",
        ),
        (
            USER,
            "omits a system prompt",
        ),
    ],
)
def test_a_template_without_a_system_prompt_is_reported_before_any_work(data, folder, tmp_path, template, reason):
    model = shutil.copytree(folder, tmp_path / "m")
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=f"{reason}.*leave out --system"):
        evaluated(data, tmp_path / "out", model=model_of(model), system="Be brief.")
    assert not (tmp_path / "out").exists()
    assert evaluated(data, tmp_path / "out", model=model_of(model), limit=1).score.system is None


def test_a_folder_without_a_model_is_reported_before_any_work(data, tmp_path):
    with pytest.raises(UserError, match=r"model: model folder .* does not exist"):
        evaluated(data, tmp_path / "out", model=model_of(tmp_path / "gone"))


def test_a_missing_judge_is_reported_before_weights_are_loaded(data, folder, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the weights were loaded first")

    monkeypatch.setattr(LocalModel, "_load", never)
    with pytest.raises(UserError, match="judge: cannot reach"):
        evaluated(data, tmp_path / "out", model=model_of(folder), judge={"url": "http://127.0.0.1:9/v1", "model": "j"})
