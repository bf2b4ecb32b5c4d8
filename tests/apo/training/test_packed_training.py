"""The trainer in packed rows: on by default, the same training as TRL's batch, cut up as one likes."""

from __future__ import annotations

import types

import pytest
import torch

from apo.monitoring import failures as faults
from apo.packing import packed_model as prefix
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from clair.core.errors import UserError
from tests.apo.conftest import make_model


def trained(out, tokenizer, pairs, model=None, adapter=False, **options):
    from peft import LoraConfig

    args = APOConfig(
        output_dir=str(out), report_to="none", logging_steps=1, learning_rate=1e-2, optim="sgd", num_train_epochs=2,
        save_strategy="no", disable_tqdm=True, **{"per_device_train_batch_size": 8, **options},
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    trainer = APOTrainer(
        model or make_model(), args=args, train_dataset=pairs, processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row and "train_loss" not in row]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return trainer, logs, weights


def same(ours, theirs):
    (_, our_logs, our_weights), (_, their_logs, their_weights) = ours, theirs
    assert len(our_logs) == len(their_logs) >= 5
    for row, expected in zip(our_logs, their_logs, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
    assert (our_weights - their_weights).norm() < 1e-5 * their_weights.norm()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reference", [False, True], ids=["online", "precomputed"])
def test_packed_training_is_padded_training(tmp_path, tokenizer, pairs, adapter, reference):
    options = {"adapter": adapter, "precompute_ref_log_probs": reference}
    packed = trained(tmp_path / "a", tokenizer, pairs, **options)
    padded = trained(tmp_path / "b", tokenizer, pairs, **options, shared_prefix=False)
    assert packed[0].is_packed
    assert not padded[0].is_packed
    same(packed, padded)


@pytest.mark.parametrize("limit", [1, 40, 10_000])
def test_a_token_budget_changes_how_pairs_are_laid_out_and_nothing_else(tmp_path, tokenizer, pairs, limit):
    unbounded = trained(tmp_path / "a", tokenizer, pairs)
    same(trained(tmp_path / "b", tokenizer, pairs, pack_tokens=limit), unbounded)


def test_one_big_batch_in_passes_is_accumulation(tmp_path, tokenizer, pairs):
    big = trained(tmp_path / "a", tokenizer, pairs, pack_tokens=60)
    small = trained(tmp_path / "b", tokenizer, pairs, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    same(big, small)


def test_gradient_checkpointing_is_the_same_training(tmp_path, tokenizer, pairs):
    on = trained(tmp_path / "a", tokenizer, pairs, gradient_checkpointing=True)
    same(on, trained(tmp_path / "b", tokenizer, pairs))


def test_a_model_that_cannot_share_falls_back_to_trls_batch_and_says_why_once(tmp_path, tokenizer, pairs, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    plain = trained(tmp_path / "b", tokenizer, pairs)
    original = LlamaAttention.forward

    def forgetful(self, *args, shared_prefix=None, **options):  # an attention that drops its options
        return original(self, *args, **options)

    monkeypatch.setattr(LlamaAttention, "forward", forgetful)
    fallen = trained(tmp_path / "a", tokenizer, pairs)
    assert not fallen[0].is_packed
    assert fallen[0].model.config._attn_implementation == "sdpa"
    assert len([note for note in fallen[0].notes if "does not hand its options on" in note]) == 1
    same(fallen, plain)


def test_pack_tokens_without_packing_is_refused():
    with pytest.raises(UserError, match="pack_tokens would be ignored"):
        APOConfig(output_dir="x", shared_prefix=False, pack_tokens=100)


def test_rounding_of_mixed_precision_is_no_reason_to_pad(tmp_path, tokenizer, pairs):
    """Weights in float32 and products in bfloat16: what a GPU trains by default."""

    def longer(turns):
        return [{**turn, "content": " ".join([turn["content"]] * 8)} for turn in turns]

    names = ("prompt", "chosen", "rejected")
    pairs = pairs.select(range(8)).map(lambda pair: {name: longer(pair[name]) for name in names})
    packs = []
    for seed in range(8):
        args = APOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True, per_device_train_batch_size=4)
        model = make_model(seed, hidden_size=128, intermediate_size=256, initializer_range=0.2)
        trainer = APOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
        assert next(trainer.model.parameters()).dtype == torch.float32
        packs.append(trainer.is_packed)
    assert packs == [True] * 8


@pytest.mark.parametrize("backend", ["split", "varlen"])
def test_a_pass_of_a_step_copies_no_number_from_the_device(tmp_path, tokenizer, pairs, monkeypatch, backend):
    # The meta device has none to give. So everything a pass needs to know of its batch is known on the host.
    options = {"weights": "weight", "pack_tokens": 64, "precompute_ref_log_probs": True, "report_to": "none"}
    pairs = pairs.add_column("weight", [1.0 + (row % 2) for row in range(len(pairs))])
    args = APOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, **options)
    trainer = APOTrainer(make_model(), args=args, train_dataset=pairs, processing_class=tokenizer)
    assert trainer.is_packed
    prefix.disable_packing(trainer.model)
    prefix.enable_packing(trainer.model.to("meta"), backend)
    monkeypatch.setattr(type(args), "device", property(lambda _: torch.device("meta")))
    monkeypatch.setattr(faults, "HostCopy", lambda _: types.SimpleNamespace(value=lambda: torch.zeros(1)))
    trainer._losses = faults.NonFiniteLossCheck(args.device)
    batches, weight = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, args.device)
    loss = trainer.training_step(trainer.model, batches[0], weight)
    assert len(trainer._split_into_passes(batches[0])) > 1
    assert (loss.device.type, weight.device.type) == ("meta", "meta")
    assert all(p.grad.device.type == "meta" for p in trainer.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_in_bfloat16_packed_training_is_padded_training_to_its_rounding(tmp_path, tokenizer, pairs, adapter):
    options = {"packed": {"bf16": True}, "padded": {"bf16": True, "shared_prefix": False}, "float32": {}}
    runs = {
        name: trained(tmp_path / name, tokenizer, pairs, adapter=adapter, use_cpu=True, **how)
        for name, how in options.items()
    }
    assert [runs[name][0].is_packed for name in options] == [True, False, True]
    for row, expected in zip(runs["packed"][1], runs["padded"][1], strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            assert row[name] == pytest.approx(expected[name], rel=4e-3)  # half of the distance of two bfloat16 numbers
    packed, padded, exact = (run[2] for run in runs.values())
    off, rounding = (packed - padded).norm(), (padded - exact).norm()
    assert 0 < off < 2 * rounding


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_model_trains_the_same_in_packed_rows(tmp_path, tokenizer, pairs):
    plain = trained(tmp_path / "plain", tokenizer, pairs)
    options = {"torch_compile": True, "torch_compile_backend": "eager"}  # traced as for any other, and not generated
    compiled = trained(tmp_path / "compiled", tokenizer, pairs, **options)
    assert compiled[0].is_packed
    same(plain, compiled)
