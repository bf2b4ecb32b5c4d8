"""Properties of kernels on a CUDA device; skipped without one.

Tolerances: float32 on a GPU adds up in another order than on a CPU; bfloat16 has 8 bits.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset

from apo.cost import memory as fit
from apo.cost.sizes import count_sizes
from apo.packing import flex, packed_model
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from tests.apo.conftest import make_model, make_pairs
from tests.apo.packing.kernels import KERNELS, largest_difference

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}


@gpu
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_kernels_of_a_gpu_give_what_split_gives_in_float32_on_a_cpu(kernel):
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        torch._dynamo.reset()
        flex._flex_attention.cache_clear()
        assert largest_difference(*kernel, "cuda") < 1e-2


def trainer_on_gpu(tmp_path, tokenizer, dtype=torch.float32, **options):
    args = APOConfig(
        output_dir=str(tmp_path), report_to="none", logging_steps=1, learning_rate=1e-2, optim="sgd", max_steps=6,
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=8, **options,
    )  # fmt: skip
    pairs = Dataset.from_list([row | {"weight": 1.0 + index % 2} for index, row in enumerate(make_pairs(16))])
    return APOTrainer(make_model(**WIDE).to(dtype), args=args, train_dataset=pairs, processing_class=tokenizer)


@gpu
def test_packed_rows_train_as_trls_batch_and_as_a_cpu_in_float32(tmp_path, tokenizer):
    curves = {}
    for name, more in {
        "packed": {}, "padded": {"shared_prefix": False}, "cpu": {"use_cpu": True, "gradient_checkpointing": True},
    }.items():  # fmt: skip
        trainer = trainer_on_gpu(tmp_path / name, tokenizer, bf16=False, **more)
        assert trainer.is_packed == (name != "padded"), trainer.notes
        trainer.train()
        rows = [row for row in trainer.state.log_history if "grad_norm" in row]
        curves[name] = torch.tensor([[row["loss"], row["grad_norm"], row["logps/chosen"]] for row in rows])
    for name in ("padded", "cpu"):
        torch.testing.assert_close(curves["packed"], curves[name], rtol=1e-4, atol=1e-4)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["mixed", "bfloat16"])
def test_in_bfloat16_all_three_backends_are_measured_and_the_fastest_is_chosen(tmp_path, tokenizer, dtype):
    trainer = trainer_on_gpu(tmp_path, tokenizer, dtype, bf16=True)
    assert trainer.is_packed, trainer.notes
    (note,) = [note for note in trainer.notes if "attention of packed rows" in note]
    assert note.count(" ms") == 3, note
    assert not [note for note in trainer.notes if "is not used" in note]


@gpu
@pytest.mark.parametrize("backend", ["split", "varlen", "flex"])
def test_a_pass_waits_for_nothing(tmp_path, tokenizer, monkeypatch, backend):
    monkeypatch.setattr(packed_model, "fastest_backend", lambda *_: (backend, ""))
    trainer = trainer_on_gpu(tmp_path, tokenizer, bf16=True, precompute_ref_log_probs=True, weights="weight")
    batches, weight = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, trainer.args.device)
    trainer.training_step(trainer.model, batches[0], weight)  # compiles, and makes buffers
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(trainer.model, batches[1], weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed anew"])
def test_the_memory_estimate_of_a_gpu_is_within_a_fifth(tmp_path, tokenizer, checkpointing):
    big = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 2816}
    model = make_model(**big, num_hidden_layers=8)
    args = APOConfig(
        output_dir=str(tmp_path), report_to="none", max_steps=3, save_strategy="no", disable_tqdm=True, bf16=True,
        per_device_train_batch_size=8, precompute_ref_log_probs=True, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    sizes = count_sizes(model)
    trainer = APOTrainer(model, args=args, train_dataset=Dataset.from_list(make_pairs(16)), processing_class=tokenizer)
    job = fit.build_job(
        sizes, [*trainer.train_dataset], args, 3, reference="cached", dtype="float32", mixed=True, pack_tokens=None,
        checkpointing=checkpointing, on_gpu=True,
    )  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert sum(fit.peak_memory(job).values()) == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.2)
