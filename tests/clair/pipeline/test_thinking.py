"""Thinking models as targets: their mode reaches model and dataset, their thoughts stay out of the answers."""

from __future__ import annotations

import asyncio
import json

import pytest
from datasets import load_dataset

from clair.cluster.merge import merge
from clair.core.errors import UserError
from clair.data.dataset import load_pairs, read_rows, split_file
from clair.inference.config import ModelConfig
from clair.inference.local import LocalModel
from clair.inference.model import parse_reply
from clair.inference.open import check_models
from clair.pipeline.build import build
from clair.pipeline.export import convert_rows, next_round
from clair.pipeline.shards import Shard, shards_location
from tests.clair import tiny_model
from tests.clair.scripted import Scripted, choice, endpoint, install, oracle_verdict, recipe, revision

MODE = {"enable_thinking": True}
ROWS = [{"id": f"r{n}", "prompt": f"task {n}"} for n in range(4)]


def built(tmp_path, monkeypatch, reply, mode=MODE, name="out", **keys):
    """Build with a target that always replies `reply`. Returns the rows and the models."""
    models = {
        "target": Scripted("t", lambda messages, sample: reply),
        "reviser": Scripted("m", revision),
        "judge": Scripted("j", oracle_verdict),
    }
    install(monkeypatch, **models)
    config = recipe(
        tmp_path / name, ROWS, **{"pipeline": "revised", "reviser": endpoint(), "test_fraction": 0.5, **keys},
        target=endpoint(**({"chat_template_kwargs": mode} if mode else {})),
    )  # fmt: skip
    build(config)
    return list(read_rows(tmp_path / name)), models


@pytest.mark.parametrize(
    "reply", ["<think>\nhm\n</think>\n\na bad answer", choice("a bad answer", reasoning_content="hm")]
)
def test_the_mode_is_sent_and_written_and_thoughts_are_kept_apart_from_the_answer(tmp_path, monkeypatch, reply):
    rows, models = built(tmp_path, monkeypatch, reply)
    assert all(request["chat_template_kwargs"] == MODE for request in models["target"].requests)
    assert not any("chat_template_kwargs" in request for request in models["reviser"].requests)
    assert all("hm" not in request["messages"][0]["content"] for request in models["reviser"].requests)
    for row in rows:
        assert row["chat_template_kwargs"] == MODE
        assert row["rejected"] == [{"role": "assistant", "content": "a bad answer", "reasoning_content": "hm"}]
        assert row["chosen"] == [{"role": "assistant", "content": "a good answer", "reasoning_content": "hm"}]
    files = {split: str(tmp_path / "out" / split_file(split)) for split in ("train",)}
    read = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    assert read[0]["chat_template_kwargs"] == MODE  # a mapping, as TRL passes on
    assert json.loads(load_pairs(tmp_path / "out")[0]["chat_template_kwargs"]) == MODE
    exported = list(convert_rows("preference", tmp_path / "out", "train"))
    assert exported[0]["chat_template_kwargs"] == MODE


def test_without_a_mode_rows_are_written_as_ever(tmp_path, monkeypatch):
    rows, _ = built(tmp_path, monkeypatch, "<think>\nhm\n</think>\n\na bad answer", mode=None)
    assert rows[0]["rejected"] == [{"role": "assistant", "content": "a bad answer"}]
    assert "chat_template_kwargs" not in rows[0]


def test_shards_and_a_further_round_keep_the_mode(tmp_path, monkeypatch):
    built(tmp_path, monkeypatch, "<think>\nhm\n</think>\n\na bad answer")
    target = endpoint(chat_template_kwargs=MODE)
    config = recipe(tmp_path / "parts", ROWS, pipeline="revised", reviser=endpoint(), target=target, test_fraction=0.5)
    for index in (1, 2):
        build(config, shard=Shard(index, 2))
    merge(shards_location(config.out))
    for split in ("train", "test"):
        assert (tmp_path / "parts" / split_file(split)).read_bytes() == (
            tmp_path / "out" / split_file(split)
        ).read_bytes()
    tuned = tiny_model.save(tmp_path / "tuned")
    file, _, _ = next_round(tmp_path / "out", str(tuned), tmp_path / "again")
    assert "enable_thinking: true" in file.read_text("utf-8")


THINKING = (
    "{% for m in messages %}<|start|> {{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant "
    "{% if enable_thinking is defined and not enable_thinking %}one one {% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinking")
    tiny_model.make_model().save_pretrained(folder)
    tiny_model.make_tokenizer(chat_template=THINKING).save_pretrained(folder)
    return folder


def test_a_local_model_writes_its_prompt_in_the_mode_of_the_request(thinking_model):
    async def counts():
        model = LocalModel(thinking_model)
        request = {"messages": [{"role": "user", "content": "what"}], "max_tokens": 2, "temperature": 0}
        modes = [{}, {"chat_template_kwargs": {"enable_thinking": False}}]
        try:
            return [json.loads(await model.complete(request | mode))["usage"]["prompt_tokens"] for mode in modes]
        finally:
            await model.close()

    thinking, plain = asyncio.run(counts())
    assert plain == thinking + 2


def test_a_variable_that_a_local_template_does_not_have_is_refused(thinking_model, tmp_path):
    for name in ("enable_thinkin", "reasoning"):
        config = ModelConfig(path=str(thinking_model), chat_template_kwargs={"enable_thinking": False, name: "low"})
        with pytest.raises(UserError, match=rf"target: chat_template_kwargs\.{name} would be ignored"):
            check_models({"target": config}, None, 0)
    with pytest.raises(ValueError, match=r"extra\.chat_template_kwargs is a key of the model itself"):
        ModelConfig(url="http://127.0.0.1:9/v1", model="m", extra={"chat_template_kwargs": MODE})


def test_a_tokenizer_that_calls_the_marks_of_thinking_special_does_not_mix_thoughts_with_the_answer():
    from clair.inference.local import _decode

    tokenizer = tiny_model.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think> one two </think> three <|pad|>", add_special_tokens=False)["input_ids"]
    reply = parse_reply(json.dumps({"choices": [{"message": {"content": _decode(tokenizer, ids)}}]}))
    assert (reply.thinking, reply.text.strip()) == ("one two", "three")
