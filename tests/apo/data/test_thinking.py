"""Thinking models: a pair is trained as its chat template writes the mode that the row or the recipe names."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
from datasets import Dataset
from trl.data_utils import maybe_apply_chat_template

from apo.analysis.features import encode_rows, read_rows
from apo.data.sources import Source, load_eval, load_train
from apo.data.tokenize import encode, eos_ids, tokenize
from apo.evaluation.pairs import PairsConfig, evaluate_pairs
from apo.training.config import TrainConfig
from apo.training.plan import plan
from clair.core.errors import UserError
from tests.apo.conftest import make_model, write_jsonl
from tests.apo.data.letters import letters, turn

TEMPLATES = {
    "Qwen3": Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja",
    "SmolLM3": Path(__file__).parent / "templates" / "smollm3.jinja",
}
ENDS = {"Qwen3": "\n", "SmolLM3": ""}
"""What stands between the end of the thoughts and the answer, beside one line break."""


@pytest.fixture(params=TEMPLATES)
def name(request):
    return request.param


def tokenizer_of(name):
    return letters(TEMPLATES[name].read_text("utf-8"), eos="<|im_end|>")


def row(mode=None, thoughts=("", "")):
    def answer(text, thought):
        return [turn("assistant", text, **({"reasoning_content": thought} if thought else {}))]

    pair = {"prompt": [turn("user", "Name a fruit.")], "chosen": answer("Pear.", thoughts[0]),
            "rejected": answer("Chair.", thoughts[1])}  # fmt: skip
    return pair if mode is None else {**pair, "chat_template_kwargs": {"enable_thinking": mode}}


def texts(name, row):
    """The text of the prompt and of both answers, as they are trained."""
    tokenizer = tokenizer_of(name)
    encoding = encode(row, tokenizer, sorted(eos_ids(tokenizer, None)), None)
    return [tokenizer.decode(encoding[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")]


def test_an_answer_without_thinking_follows_the_empty_thoughts_that_the_model_is_given(name):
    prompt, chosen, rejected = texts(name, row(mode=False))
    tokenizer = tokenizer_of(name)
    generated = tokenizer.apply_chat_template(
        row()["prompt"], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert prompt == generated
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n" + ENDS[name])
    assert (chosen, rejected) == ("Pear.<|im_end|>", "Chair.<|im_end|>")


def test_an_answer_with_thinking_is_trained_with_its_thoughts(name):
    prompt, chosen, rejected = texts(name, row(mode=True, thoughts=("Is it sweet?", "What has legs?")))
    assert prompt.endswith("<|im_start|>assistant\n") or prompt.endswith("<think>\n")
    assert (prompt + chosen).endswith(f"<think>\nIs it sweet?\n</think>\n{ENDS[name]}Pear.<|im_end|>")
    assert (prompt + rejected).endswith(f"<think>\nWhat has legs?\n</think>\n{ENDS[name]}Chair.<|im_end|>")


@pytest.mark.parametrize("mode", [False, True])
def test_text_and_mode_are_those_of_trl(name, mode):
    """TRL passes the column `chat_template_kwargs` to the template of the prompt and of the whole conversation."""
    tokenizer = tokenizer_of(name)
    theirs = maybe_apply_chat_template(row(mode), tokenizer)
    prompt, chosen, rejected = texts(name, row(mode))
    assert prompt + chosen == (theirs["prompt"] + theirs["chosen"]).removesuffix("\n")
    assert prompt + rejected == (theirs["prompt"] + theirs["rejected"]).removesuffix("\n")


def test_thoughts_in_the_text_of_an_answer_are_trained_as_they_stand():
    inside = row(mode=True)
    inside["chosen"] = [turn("assistant", "<think>\nIs it sweet?\n</think>\nPear.")]
    assert texts("SmolLM3", inside)[1] == "<think>\nIs it sweet?\n</think>\nPear.<|im_end|>"


def test_a_source_names_the_mode_of_the_rows_that_have_none(tmp_path):
    rows = [row(), row(mode=True), row()]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows)
    sources = [
        Source(path=str(tmp_path / "a.jsonl"), chat_template_kwargs={"enable_thinking": False}),
        Source(path=str(tmp_path / "b.jsonl")),
    ]
    tokenizer = tokenizer_of("SmolLM3")

    def modes(pairs):
        data = tokenize(pairs, tokenizer, None, eos_ids(tokenizer, None), "train").dataset
        return ["no_think" if "/no_think" in tokenizer.decode(r["prompt_ids"]) else "think" for r in data]

    assert modes(load_train(sources, seed=0)) == ["no_think", "think", "no_think", "think", "think", "think"]
    assert modes(load_eval(sources[:1], str(tmp_path / "b.jsonl"))) == ["no_think", "think", "no_think"]


def test_a_variable_that_the_template_does_not_have_is_refused(tmp_path, recipe):
    dataset = [{"path": recipe["dataset"], "chat_template_kwargs": {"enable_thinking": False}}]
    with pytest.raises(UserError, match=r"dataset\.chat_template_kwargs\.enable_thinking would be ignored"):
        plan(TrainConfig(**{**recipe, "dataset": dataset}))


def test_a_run_and_its_evaluation_use_the_mode_of_the_recipe(tmp_path):
    from apo.training.train import train

    tokenizer = tokenizer_of("SmolLM3")
    make_model(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", [row(thoughts=("", "")) for _ in range(4)])
    source = {"path": str(tmp_path / "pairs.jsonl"), "chat_template_kwargs": {"enable_thinking": False}}
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2}
    config = TrainConfig(
        model=str(tmp_path / "model"), dataset=[source], eval=False, out=str(tmp_path / "run"), trainer=trainer,
        probe=0, samples=0,
    )  # fmt: skip
    assert "/no_think" in tokenizer.decode(plan(config).train.dataset[0]["prompt_ids"])
    train(config, log=lambda _: None)
    write_jsonl(tmp_path / "modes.jsonl", [row(mode=False), row(mode=True), row()])
    measured = encode_rows(read_rows([str(tmp_path / "modes.jsonl")]), str(tmp_path / "model")).tokenized
    assert ["/no_think" in tokenizer.decode(pair["prompt_ids"]) for pair in measured] == [True, False, False]
    settings = PairsConfig.model_validate({"model": config.out, "split": "train", "out": str(tmp_path / "pairs")})
    assert settings.chat_template_kwargs == {"enable_thinking": False}
    modes = [settings, settings.model_copy(update={"chat_template_kwargs": None, "out": str(tmp_path / "other")})]
    first, second = (evaluate_pairs(mode)["margin"]["mean"] for mode in modes)
    assert first != second
    assert Dataset.from_list([row(mode=False)]).features["chat_template_kwargs"]  # as TRL reads it
