"""A policy that reads its user's state: exact against the plain model, trained by any objective, saved and loaded."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import apo
from apo.losses.divergence import rotate_responses
from apo.models.load import find_model, load_model
from apo.training.config import TrainConfig
from apo.training.plan import plan
from apo.training.train import build_trainer, train
from clair.core.errors import UserError
from clair.inference.config import ModelConfig
from clair.inference.local import LocalModel
from clair.inference.open import check_models
from tests.apo.conftest import make_pairs, make_tokenizer, write_jsonl
from tests.apo.training.trainers import apo_trainer, lora, trained

STATES = {"ann": [1.0, 0.5, 0.0], "bob": [-1.0, 0.5, 2.0], "eve": [0.0, -3.0, 1.0]}


def rows_of_users(count: int = 24) -> list[dict]:
    """Pairs of three users, and bob prefers what the others reject."""
    rows = [
        {**row, "user": (name := [*STATES][n % 3]), "state": STATES[name]} for n, row in enumerate(make_pairs(count))
    ]
    for row in rows:
        if row["user"] == "bob":
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def trainer_of_users(tmp_path, peft_config=None, **options):
    rows = Dataset.from_list(rows_of_users())
    return apo_trainer(tmp_path, make_tokenizer(), rows, peft_config=peft_config, soft_prompt="state", **options)


def first_batch(trainer, count: int = 6):
    return trainer.data_collator([dict(row) for row in trainer.train_dataset.select(range(count))])


def randomise(trainer) -> None:
    with torch.no_grad():
        trainer.soft_prompt.weight.copy_(0.1 * torch.randn(trainer.soft_prompt.weight.shape))


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("peft", [None, lora()])
def test_at_zero_it_is_the_plain_model_bit_by_bit_and_the_gradient_reaches_the_map(tmp_path, peft, shared_prefix):
    trainer = trainer_of_users(tmp_path, peft, shared_prefix=shared_prefix)
    batch = first_batch(trainer)
    policy = trainer.logps(trainer.model, batch)
    assert trainer.is_packed == shared_prefix
    for conditioned, plain in zip(policy[:2], trainer.reference_logps(batch), strict=True):
        assert torch.equal(conditioned, plain)
    (policy.chosen - policy.rejected).sum().backward()
    gradient = trainer.soft_prompt.weight.grad
    assert gradient is not None
    assert (gradient.abs().amax((0, 2)) > 0).all()  # each of the k embeddings


def test_packed_rows_padded_batches_and_embeddings_made_by_hand_agree(tmp_path):
    packed, padded = (trainer_of_users(tmp_path, shared_prefix=shared) for shared in (True, False))
    randomise(packed)
    padded.model.load_state_dict(packed.model.state_dict())
    batch, prompt = first_batch(packed), packed.soft_prompt
    with torch.no_grad():
        policy = packed.logps(packed.model, batch)
        torch.testing.assert_close(
            padded.logps(padded.model, first_batch(padded))[:2], policy[:2], rtol=1e-4, atol=1e-4
        )
        assert not torch.allclose(policy.chosen, packed.reference_logps(batch)[0], atol=1e-2)
        for number, example in enumerate(batch.examples):
            z = torch.tensor(example["state"]) - torch.tensor(packed.train_dataset["state"][:]).mean(0)
            ids = torch.tensor([example["prompt_ids"] + example["chosen_ids"]])
            embedded = padded.model.get_input_embeddings()(ids).clone()
            offsets = torch.tensordot(z * prompt.scale, prompt.weight, 1)
            embedded[0, : len(offsets)] += offsets
            start = len(example["prompt_ids"])
            logps = padded.model(inputs_embeds=embedded).logits[0, start - 1 : -1].log_softmax(-1)
            expected = logps.gather(-1, ids[0, start:, None]).sum()
            assert float(policy.chosen[number]) == pytest.approx(float(expected), abs=1e-3)


def test_the_mean_user_and_rows_without_a_user_are_answered_by_the_plain_model(tmp_path):
    trainer = trainer_of_users(tmp_path)
    randomise(trainer)
    rows = [dict(row) for row in trainer.train_dataset.select(range(3))]
    nobody, mean = trainer.data_collator([{**row, "state": None} for row in rows]), trainer.soft_prompt.mean.tolist()
    of_mean = trainer.data_collator([{**row, "state": mean} for row in rows])
    with torch.no_grad():
        plain = trainer.logps(trainer.model, nobody, for_users=False).chosen
        assert torch.equal(trainer.logps(trainer.model, nobody).chosen, plain)
        torch.testing.assert_close(trainer.logps(trainer.model, of_mean).chosen, plain, rtol=1e-5, atol=1e-5)


def test_an_answer_of_another_pair_keeps_the_user_of_the_prompt(tmp_path):
    batch = first_batch(trainer_of_users(tmp_path), 3)
    (rotated,) = rotate_responses([batch])
    assert [e["user_state"] for e in rotated.examples] == [e["user_state"] for e in batch.examples]
    assert rotated.examples[0]["chosen_ids"] == batch.examples[1]["chosen_ids"]


@pytest.mark.parametrize("objective", ["apo_zero", "kto", "simpo"])
def test_any_objective_trains_it_to_tell_opposite_users_apart(tmp_path, objective):
    beta = {"simpo": 2.0}.get(objective, 0.1)
    trainer = trainer_of_users(tmp_path, objective=objective, beta=beta, max_steps=12)
    trained(trainer)
    rows = [dict(trainer.train_dataset[0])]
    margins = []
    with trainer.evaluation_mode():
        for state in STATES.values():
            policy = trainer.logps(trainer.model, trainer.data_collator([{**row, "state": state} for row in rows]))
            margins.append(float(policy.chosen - policy.rejected))
    assert margins[1] < min(margins[0], margins[2])


@pytest.fixture
def conditioned_recipe(recipe, tmp_path):
    """The recipe of a policy with a soft prompt."""
    return {**recipe, "dataset": str(write_jsonl(tmp_path / "p.jsonl", rows_of_users())), "soft_prompt": {}}


def config(recipe, **more) -> TrainConfig:
    return TrainConfig.model_validate({**recipe, **more})


def answers(model: LocalModel) -> list[str]:
    async def ask():
        request = {"messages": [{"role": "user", "content": "what is one plus two"}], "max_tokens": 8, "temperature": 0}
        text = json.loads(await model.complete(request))["choices"][0]["message"]["content"]
        await model.close()
        return text

    return asyncio.run(ask())


@pytest.mark.parametrize("adapter", [False, True])
def test_it_is_saved_beside_the_model_and_loaded_for_a_user(conditioned_recipe, adapter, tmp_path):
    more = {"lora": {"r": 4}} if adapter else {}
    out = Path(conditioned_recipe["out"])
    train(config(conditioned_recipe, **more), log=lambda _: None)
    weights = load_file(out / ("adapter_model.safetensors" if adapter else "model.safetensors"))
    assert not any("soft_prompt" in name for name in weights)
    facts = json.loads((out / "soft_prompt.json").read_text())
    assert (facts["users"], facts["state"]) == ([*STATES], 3)
    model, tokenizer, prompt = apo.load_for_user(out, "bob")
    assert prompt.opening == tokenizer.apply_chat_template([{"role": "user", "content": "x"}])["input_ids"][:4]
    assert prompt.weight.abs().sum() > 0
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "what is one plus two"}],
                                        add_generation_prompt=True)["input_ids"]  # fmt: skip
    with torch.no_grad():
        plain, bob = (model(input_ids=torch.tensor([row])).logits[0, -1] for row in (ids, prompt.mark(ids)))
        reloaded = load_model(find_model(str(out), soft_prompt=True))(input_ids=torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(plain, reloaded, atol=1e-5)
    assert not torch.allclose(plain, bob, atol=1e-3)
    out_ids = model.generate(torch.tensor([prompt.mark(ids)]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    local = LocalModel(out, dtype="float32", user="bob")
    assert answers(local) == tokenizer.decode(out_ids, skip_special_tokens=True)
    assert local.identity != LocalModel(out, user="ann").identity != LocalModel(out, user=[0.0, 0.0, 1.0]).identity
    with pytest.raises(UserError, match=r"knows no user 'bop' \(did you mean 'bob'\?\)"):
        apo.load_for_user(out, "bop")
    with pytest.raises(UserError, match="a state of 2 numbers; the soft prompt was trained on 3"):
        apo.load_for_user(out, [0.0, 1.0])
    with pytest.raises(UserError, match="the prompt begins with the tokens"):
        prompt.mark(ids[1:])
    with pytest.raises(UserError, match="has a soft prompt of its users"):
        find_model(str(out))
    with pytest.raises(UserError, match=r"set target\.user"):
        check_models({"target": ModelConfig(path=str(out))}, None, 0)


def test_a_stopped_run_resumes_bit_by_bit(conditioned_recipe, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1}
    trainer = {**conditioned_recipe["trainer"], **options}
    whole = build_trainer(
        plan(config(conditioned_recipe, trainer=trainer, out=str(tmp_path / "whole"))), log=lambda _: None
    )
    whole.train()
    again = build_trainer(
        plan(config(conditioned_recipe, trainer=trainer, out=str(tmp_path / "whole"))), log=lambda _: None
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    weight = whole.soft_prompt.weight
    assert torch.equal(again.soft_prompt.weight, weight)
    assert not torch.equal(load_file(tmp_path / "whole/checkpoint-2/soft_prompt.safetensors")["weight"], weight)


def test_what_cannot_work_is_refused_in_one_line_before_any_work(conditioned_recipe, tmp_path, monkeypatch):
    def problem(rows=None, **more) -> str:
        changed = {} if rows is None else {"dataset": str(write_jsonl(tmp_path / "bad.jsonl", rows))}
        with pytest.raises(UserError) as error:
            plan(config(conditioned_recipe, **changed, **more))
        assert "\n" not in str(error.value)
        return str(error.value)

    rows = rows_of_users()
    assert "has no column 'state'" in problem(make_pairs())
    assert "'state' of row 1 of the train dataset is None" in problem([rows[0], {**rows[1], "state": None}, *rows[2:]])
    assert "row 1 of the train dataset has 2 numbers" in problem([rows[0], {**rows[1], "state": [1.0, 2.0]}, *rows[2:]])
    assert "has the latent collapsed?" in problem([{**row, "state": [1.0]} for row in rows])
    assert "share only the first 4 tokens" in problem(soft_prompt={"tokens": 5})
    held_out = str(write_jsonl(tmp_path / "held.jsonl", [{**row, "state": [1.0, 2.0]} for row in rows]))
    assert "has another width in the eval dataset" in problem(eval=held_out)
    with pytest.raises(ValueError, match="which no server knows; leave it out"):
        ModelConfig(url="http://localhost/v1", model="m", user="ann")
    with pytest.raises(UserError, match=r"user would be ignored: .* has no soft prompt"):
        check_models({"target": ModelConfig(path=conditioned_recipe["model"], user="ann")}, None, 0)
    monkeypatch.setattr("apo.training.soft_prompt.fsdp_requested", lambda args: True)
    assert "leave FSDP and DeepSpeed out" in problem()


@pytest.mark.slow
def test_a_real_model_is_trained_saved_loaded_and_answers_for_each_user(real_model, tmp_path):
    tastes = {"short": ("It is 4.", "Let me think about it at length: the answer to your question is 4, I believe.")}
    tastes["long"] = tastes["short"][::-1]
    rows = [
        {"prompt": f"What is {n} plus {4 - n}?", "chosen": pair[0], "rejected": pair[1], "user": user,
         "state": [1.0 if user == "short" else -1.0]}
        for n in range(4) for user, pair in tastes.items()
    ]  # fmt: skip
    recipe = {
        "model": str(real_model), "dataset": str(write_jsonl(tmp_path / "p.jsonl", rows)), "out": str(tmp_path / "run"),
        "lora": {"r": 8}, "soft_prompt": {"tokens": 8}, "samples": 0, "probe": 0,
        "trainer": {"max_steps": 12, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "use_cpu": True},
    }  # fmt: skip
    run = train(config(recipe), log=lambda _: None)
    assert run["metrics"]["rewards/margins"] > 0
    texts = {}
    for user in tastes:
        model, tokenizer, prompt = apo.load_for_user(tmp_path / "run", user)
        turn = [{"role": "user", "content": "What is 3 plus 3?"}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        new = model.generate(torch.tensor([prompt.mark(ids)]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        texts[user] = tokenizer.decode(new, skip_special_tokens=True)
    print(texts)
    assert texts["short"] != texts["long"]
