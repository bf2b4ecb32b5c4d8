"""Sample answers: what is answered, when, at what cost, and how a report shows it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from apo.monitoring.diagnosis_report import diagnosis_lines, questions, sample_lines
from apo.training.config import TrainConfig
from apo.training.train import train
from tests.apo.conftest import make_pairs, write_jsonl

MAX_TOKENS = 24
"""The random model never ends its answers."""


@pytest.fixture
def recipe(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr("apo.monitoring.sample_answers.MAX_TOKENS", MAX_TOKENS)
    trainer = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 2,
               "save_strategy": "steps", "save_steps": 8}  # fmt: skip
    dataset = str(write_jsonl(tmp_path / "pairs.jsonl", make_pairs(24)))
    return {
        "model": str(model_dir), "dataset": dataset, "trainer": trainer,
        "eval": False, "samples": 3, "out": str(tmp_path / "run"),
    }  # fmt: skip


def run(recipe, **changes):
    return train(TrainConfig(**{**recipe, **changes}), log=lambda _: None)


def samples(folder):
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]


def test_the_same_prompts_are_answered_before_the_first_step_and_ten_times(recipe):
    run(recipe)
    rows = samples(recipe["out"])
    assert [row["step"] for row in rows] == [step for step in range(0, 21, 2) for _ in range(3)]
    for number in range(3):
        assert len({row["text"] for row in rows if row["prompt"] == number}) == 1
    assert len({row["text"] for row in rows}) == 3


def test_answers_are_those_of_greedy_generation_by_the_saved_model(recipe):
    run(recipe)
    model = AutoModelForCausalLM.from_pretrained(recipe["out"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(recipe["out"])
    rows = [json.loads(line) for line in Path(recipe["dataset"]).read_text().splitlines()]
    answers = set()
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=tokenizer.pad_token_id)
        answer = output[0, ids["input_ids"].shape[1] :]
        answers.add(tokenizer.decode(answer, skip_special_tokens=True))
    last = [row["answer"] for row in samples(recipe["out"]) if row["step"] == 20]
    assert len(last) == 3
    assert set(last) <= answers


def test_weights_and_metrics_are_those_of_a_run_without_samples(recipe, tmp_path):
    with_samples = run(recipe)
    without = run(recipe, samples=0, out=str(tmp_path / "without"))
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    assert with_samples["metrics"]["loss"] == without["metrics"]["loss"]
    one, other = (Path(folder, "model.safetensors").read_bytes() for folder in (recipe["out"], tmp_path / "without"))
    assert one == other


def test_a_short_run_answers_nothing_unless_the_recipe_names_a_number(recipe):
    run(recipe, samples=None)
    assert not (Path(recipe["out"]) / "samples.jsonl").exists()


def test_a_long_run_answers_five_prompts(recipe, monkeypatch):
    monkeypatch.setattr("apo.monitoring.sample_answers.TOKENS_PER_STEP", {"cpu": 0.05, "accelerator": 0.05})
    run(recipe, samples=None)
    assert len(samples(recipe["out"])) == 11 * 5


def test_answers_end_where_the_models_positions_do_and_prompts_without_room_are_left_out(recipe, tmp_path):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"])
    rows = [json.loads(line) for line in Path(recipe["dataset"]).read_text().splitlines()]
    turns = [row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
             for row in rows]  # fmt: skip
    lengths = [len(tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]) for turn in turns]
    positions = min(lengths) + 20  # so that the longest prompts have no room, and none has any for MAX_TOKENS
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=positions, **sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    trainer = {**recipe["trainer"], "max_length": positions}
    run(recipe, model=str(tmp_path / "gpt2"), trainer=trainer, samples=2)
    answers = samples(recipe["out"])
    assert len(answers) == 22
    assert all(16 <= row["tokens"] <= 20 for row in answers)


def test_a_resumed_run_has_the_lines_of_an_unbroken_one(recipe, tmp_path):
    run(recipe)
    stopped = Path(recipe["out"])
    whole = samples(stopped)
    # A run killed at step 20, before its model was saved, whose newest checkpoint is that of step 16.
    about = json.loads((stopped / "run.json").read_text())
    for key in ("finished", "metrics", "seconds"):
        del about[key]
    (stopped / "run.json").write_text(json.dumps(about))
    shutil.rmtree(stopped / "checkpoint-20", ignore_errors=True)
    assert run(recipe)["resumed_from"] == [16]
    assert samples(stopped) == whole


def test_the_report_counts_lost_words_and_marks_the_last_diff(recipe):
    rows = [
        {"step": 0, "prompt": 0, "text": "system\nBe brief.\nuser\nName a fruit.\nassistant", "answer": "a red apple",
         "tokens": 3, "ended": True},
        {"step": 0, "prompt": 1, "text": "system\nBe brief.\nuser\nName a tree.\nassistant", "answer": "an oak",
         "tokens": 2, "ended": True},
        {"step": 5, "prompt": 0, "text": "system\nBe brief.\nuser\nName a fruit.\nassistant", "answer": "a green apple",
         "tokens": 3, "ended": True},
        {"step": 5, "prompt": 1, "text": "system\nBe brief.\nuser\nName a tree.\nassistant", "answer": "an oak or",
         "tokens": 3, "ended": False},
    ]  # fmt: skip
    text = "\n".join(sample_lines(rows))
    assert " 1. Name a fruit." in text
    assert " 2. Name a tree." in text
    assert "Be brief" not in text
    assert "33%" in text
    assert "0%" in text
    assert "a[- red-]{+ green+} apple" in text
    assert "an oak{+ or+} ..." in text


def test_a_single_prompt_keeps_its_whole_text():
    assert questions(["user\nName a fruit.\nassistant"]) == ["user Name a fruit. assistant"]


def test_diagnose_shows_the_answers_of_a_run(recipe):
    run(recipe)
    assert any(line.startswith("answers at step 20") for line in diagnosis_lines(Path(recipe["out"])))
