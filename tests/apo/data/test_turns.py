"""Answers of several turns: the model's tokens are trained and no others, in packed rows as in TRL's padded batch."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from apo.analysis.gradients import head_gradients
from apo.data.sources import hash_pairs
from apo.data.tokenize import eos_ids, tokenize
from apo.evaluation.pairs import compare_models
from apo.monitoring.token_diagnostics import TokenDiagnostics
from apo.packing.batch import PairBatch, unstack
from apo.packing.layout import pack_pairs
from apo.packing.logps import plain_logps
from apo.training.collator import PairCollator
from apo.training.preflight import check_before_training
from apo.training.reference import chunk_key
from tests.apo.conftest import NUMBERS, VOCABULARY, make_model, make_pairs
from tests.apo.training.trainers import apo_trainer, assert_same_run, lora, options, trained


def conversations(n: int = 12, seed: int = 1) -> list[dict]:
    """Pairs of which two in three have turns of tools and users in an answer."""
    rng = random.Random(seed)

    def phrase() -> str:
        return " ".join(rng.choices(VOCABULARY, k=rng.randint(1, 5)))

    rows = make_pairs(n, seed)
    for number, row in enumerate(rows):
        for side in (("chosen",), ("chosen", "rejected"), ())[number % 3]:
            extra = {"role": rng.choice(["user", "tool"]), "content": f"{rng.choice(NUMBERS)} {phrase()}"}
            row[side] = [*row[side], extra, {"role": "assistant", "content": phrase()}]
    return rows


@pytest.fixture
def talks():
    return Dataset.from_list(conversations())


def test_the_models_own_tokens_are_trained_and_no_others(tmp_path, tokenizer, talks):
    trainer = apo_trainer(tmp_path, tokenizer, talks)
    rows = [trainer.train_dataset[row] for row in range(12)]
    batch = trainer.data_collator(rows).stacked
    for number, (ids, mask) in enumerate(zip(batch["input_ids"], batch["completion_mask"].bool(), strict=True)):
        source = talks[number % 12]["chosen" if number < 12 else "rejected"]
        expected = [[*turn["content"].split(), "<|end|>"] for turn in source if turn["role"] == "assistant"]
        assert tokenizer.decode(ids[mask]).split() == [word for turn in expected for word in turn]
    assert unstack(batch) == [
        {key: row[key] for key in row if key.endswith("_ids") or (key.endswith("_mask") and row[key])}
        for row in ({key: row[key] for key in sorted(row)} for row in rows)
    ]


@pytest.mark.parametrize(("theirs", "ours"), [("apo_zero", "apo_zero"), ("sigmoid", "dpo")])
def test_a_run_is_trls_on_the_same_completion_mask(tmp_path, tokenizer, talks, model_dir, theirs, ours):
    class Masked(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    plain = {"optim": "sgd", "learning_rate": 0.1}  # Adam's first step is the sign of a gradient, rounding's too
    dataset = tokenize(talks, tokenizer, None, eos_ids(tokenizer)).dataset
    stock = Masked(
        model=str(model_dir), train_dataset=dataset, processing_class=tokenizer,
        data_collator=lambda rows: PairBatch(rows, DataCollatorForPreference(tokenizer.pad_token_id)).stacked,
        args=DPOConfig(
            **options(tmp_path, **plain), loss_type=theirs, use_cpu=True, bf16=False, gradient_checkpointing=False,
            activation_checkpointing=False, remove_unused_columns=False,
        ),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert_same_run(trained(apo_trainer(tmp_path, tokenizer, talks, model, objective=ours, **plain)), trained(stock))


@pytest.mark.slow
def test_a_real_model_trains_its_own_turns_packed_as_padded(tmp_path, real_model):
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"How warm is it in {city}?"}],
            "chosen": [
                {"role": "assistant", "content": f"I look it up: weather({city})"},
                {"role": "tool", "content": f"{degrees} degrees <|im_end|>"},
                {"role": "assistant", "content": f"It is {degrees} degrees in {city} today."},
            ],
            "rejected": [{"role": "assistant", "content": "Warm enough, I should think."}],
        }
        for city, degrees in (("Oslo", 4), ("Rome", 24))
    ]
    runs = []
    for shared in (True, False):
        model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
        trainer = apo_trainer(tmp_path, tokenizer, Dataset.from_list(rows), model, lora(), shared_prefix=shared,
                              max_steps=2, learning_rate=2e-3, per_device_train_batch_size=2)  # fmt: skip
        check_before_training(trainer)
        row = trainer.train_dataset[0]
        text = tokenizer.decode(
            [token for token, is_trained in zip(row["chosen_ids"], row["chosen_mask"], strict=True) if is_trained]
        )
        assert text == "I look it up: weather(Oslo)<|im_end|>It is 4 degrees in Oslo today.<|im_end|>"
        assert "<|im_start|>tool\n4 degrees <|im_end|><|im_end|>" in tokenizer.decode(row["chosen_ids"])
        runs.append(trained(trainer))
    assert runs[0][0][0] - runs[0][0][-1] > 0.02
    torch.testing.assert_close(torch.tensor(runs[0][0]), torch.tensor(runs[1][0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(runs[0][1]), torch.tensor(runs[1][1]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("reference", ["cached", "online"])
def test_packed_rows_train_as_the_padded_batch(tmp_path, tokenizer, talks, reference):
    options = {"max_steps": 5, "precompute_ref_log_probs": reference == "cached"}
    packed = apo_trainer(tmp_path / "packed", tokenizer, talks, **options)
    padded = apo_trainer(tmp_path / "padded", tokenizer, talks, shared_prefix=False, **options)
    cut = apo_trainer(tmp_path / "cut", tokenizer, talks, pack_tokens=60, **options)
    assert packed.is_packed
    assert not padded.is_packed
    check_before_training(packed)
    check_before_training(padded)
    actual = trained(packed)
    assert actual[0][-1] < actual[0][0]
    assert_same_run(actual, trained(padded))
    assert_same_run(actual, trained(cut))


def test_the_loss_is_that_of_the_plain_log_probs_of_the_trained_tokens(tmp_path, tokenizer, talks):
    trainer = apo_trainer(tmp_path, tokenizer, talks, max_steps=2, per_device_train_batch_size=12, beta=0.5)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(12)]).stacked
    trainer.train()
    torch.manual_seed(0)
    plain = plain_logps(make_model(), batch)
    masked = [sum(row["chosen_mask"] or [1] * len(row["chosen_ids"])) for row in trainer.train_dataset]
    assert plain.chosen_len.tolist() == masked
    first, second = (row for row in trainer.state.log_history if "grad_norm" in row)
    assert first["logps/chosen"] == pytest.approx(plain.chosen.mean().item(), abs=1e-4)
    assert first["lengths/chosen"] == pytest.approx(plain.chosen_len.float().mean().item())
    assert second["loss"] < first["loss"]


def test_kto_swaps_answers_with_their_masks(tmp_path, tokenizer, talks):
    options = {"objective": "kto", "max_steps": 4, "precompute_ref_log_probs": False}
    packed = apo_trainer(tmp_path / "packed", tokenizer, talks, **options)
    padded = apo_trainer(tmp_path / "padded", tokenizer, talks, shared_prefix=False, **options)
    assert_same_run(trained(packed), trained(padded))


def test_held_out_pairs_are_measured_alike(tmp_path, tokenizer, talks):
    losses = []
    for shared in (True, False):
        trainer = apo_trainer(
            tmp_path / str(shared), tokenizer, talks, eval_dataset=talks, shared_prefix=shared, eval_strategy="no"
        )
        losses.append(trainer.evaluate())
    for name in ("eval_loss", "eval_logps/chosen", "eval_lengths/rejected"):
        assert losses[0][name] == pytest.approx(losses[1][name], abs=1e-4)


def test_rows_of_one_turn_have_no_masks_and_the_batches_they_had(tmp_path, tokenizer):
    trainer = apo_trainer(tmp_path, tokenizer, Dataset.from_list(make_pairs(4)))
    assert not {"chosen_mask", "rejected_mask"} & set(trainer.train_dataset.column_names)
    rows = [trainer.train_dataset[row] for row in range(4)]
    assert isinstance(trainer.data_collator, PairCollator)
    packed, padded = trainer.data_collator(rows).stacked, trainer.data_collator.stack(rows)
    assert all(torch.equal(packed[key], padded[key]) for key in padded)


PAIR = {
    "prompt_ids": [1, 10, 11], "chosen_ids": [12, 13, 14, 3, 20, 21, 15, 3], "rejected_ids": [12, 15, 3],
    "chosen_mask": [1, 1, 1, 1, 0, 0, 1, 1], "rejected_mask": [],
}  # fmt: skip


def test_a_mask_is_part_of_what_is_cached_and_of_what_a_resumed_run_compares():
    empty = {**PAIR, "chosen_mask": []}
    bare = {key: value for key, value in PAIR.items() if "mask" not in key}
    assert chunk_key([], [empty]) == chunk_key([], [bare]) != chunk_key([], [PAIR])
    prints = [hash_pairs(Dataset.from_list([row])) for row in (PAIR, {**PAIR, "chosen_mask": [1] * 8}, bare)]
    assert len(set(prints)) == 3


def test_the_tokens_counted_of_a_batch_are_those_of_its_packed_row(tmp_path, tokenizer, talks):
    trainer = apo_trainer(tmp_path, tokenizer, talks)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(12)])
    layout = pack_pairs(unstack(batch.stacked))
    useful, labels, _ = trainer.logps.token_counts(batch)[:, 2:].sum(0).tolist()
    assert useful == layout.input_ids.numel()
    assert labels == len(layout.labels)


def test_measurements_of_pairs_are_of_trained_tokens(tmp_path, tokenizer):
    model = make_model().eval()
    ids = torch.tensor([[*PAIR["prompt_ids"], *PAIR["chosen_ids"]]])
    with torch.no_grad():
        logps = model(ids).logits[0, 2:-1].log_softmax(-1).gather(-1, ids[0, 3:, None])[:, 0]
    trained = logps[torch.tensor(PAIR["chosen_mask"]).bool()]
    ((_, comparison),) = compare_models(model, lambda: nullcontext(model), [PAIR], 100)
    assert comparison.chosen.tokens == 6
    assert comparison.chosen.shared_tokens == 3
    assert comparison.chosen.reference == pytest.approx(trained.sum().item(), abs=1e-4)
    trainer = apo_trainer(tmp_path, tokenizer, Dataset.from_list(make_pairs(4)))
    view = TokenDiagnostics(trainer, [PAIR]).baseline
    torch.testing.assert_close(view.tokens[0], trained, rtol=1e-4, atol=1e-4)
    assert [len(tokens) for tokens in view.tokens] == [6, 3]
    *_, sums = head_gradients(model, [PAIR])
    assert sums.chosen.item() == pytest.approx(trained.sum().item(), abs=1e-4)
    assert sums.chosen_len.tolist() == [6]


def test_a_stream_of_conversations_trains_as_the_same_rows_in_a_dataset_and_is_noted(tmp_path, tokenizer, talks):
    rows = conversations()
    rows[2]["chosen"] = [{**rows[2]["chosen"][0], "reasoning_content": "one plus one"}]
    runs = []
    for data in (IterableDataset.from_generator(lambda: iter(rows)), Dataset.from_list(rows)):
        trainer = apo_trainer(tmp_path, tokenizer, data, max_steps=3, train_sampling_strategy="sequential")
        note = "the chat template leaves out thoughts of an answer in 1 of 12 rows (first: row 2); they are not trained"
        assert [line for line in trainer.notes if note in line]
        runs.append(trained(trainer))
    assert_same_run(*runs)
