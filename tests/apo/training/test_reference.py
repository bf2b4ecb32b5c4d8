"""Reference log-probs: computed once, shared by runs, never stale, never lost."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from apo.models import tensor_cache as cache
from apo.models.tensor_cache import hash_model
from apo.training import reference
from apo.training.reference import COLUMNS, add_reference_logps, chunk_key
from apo.training.trainer import APOTrainer
from apo.training.trainer_config import APOConfig
from tests.apo.conftest import make_model, make_pairs


def prepared(out, tokenizer, pairs, model=None, **options):
    from peft import LoraConfig

    adapter = options.pop("adapter", False)
    args = APOConfig(
        output_dir=str(out / "out"), report_to="none", disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=4, precompute_ref_log_probs=True, reference_cache=str(out / "cache"), **options,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    return APOTrainer(
        model or make_model(), args=args, train_dataset=pairs, processing_class=tokenizer, peft_config=lora
    )


def columns(trainer):
    return torch.tensor([trainer.train_dataset[column] for column in COLUMNS])


def test_a_second_run_with_another_rate_beta_and_objective_computes_nothing(tmp_path, tokenizer, pairs):
    first = prepared(tmp_path, tokenizer, pairs)
    assert first.reference_computed == {"train": len(pairs)}
    for options in ({"learning_rate": 0.5}, {"beta": 0.7}, {"objective": "dpo"}, {"adapter": True}):
        again = prepared(tmp_path, tokenizer, pairs, **options)
        assert again.reference_computed == {"train": 0}
        torch.testing.assert_close(columns(again), columns(first), rtol=0, atol=0)


def test_weights_are_hashed_once_and_not_by_trl_for_a_cache_that_is_not_used(tmp_path, tokenizer, pairs, monkeypatch):
    hashed = []
    monkeypatch.setattr(dpo_trainer, "hash_module", hashed.append)
    prepared(tmp_path, tokenizer, pairs)
    assert not hashed
    assert dpo_trainer.hash_module == hashed.append
    same = {"output_dir": str(tmp_path / "trl"), "report_to": "none", "use_cpu": True, "bf16": False}
    args = DPOConfig(**same, activation_checkpointing=False, precompute_ref_log_probs=True)
    DPOTrainer(make_model(), args=args, train_dataset=pairs, processing_class=tokenizer)
    assert len(hashed) == 1


def test_cached_log_probs_are_the_online_ones(tmp_path, tokenizer, pairs):
    cached = columns(prepared(tmp_path, tokenizer, pairs))
    online = prepared(tmp_path, tokenizer, pairs)
    rows = [online.train_dataset[i] for i in range(len(pairs))]
    bare = [{key: row[key] for key in row if key not in COLUMNS} for row in rows]
    actual = torch.stack(online.reference_logps(online.data_collator(bare)))
    torch.testing.assert_close(cached.float(), actual, rtol=1e-5, atol=1e-5)


def test_every_ingredient_of_the_key_makes_a_new_one(tmp_path, tokenizer, pairs):
    """Weights, their use, ids, their order and number, types, attention, packing: each changed
    alone.
    """
    prepared(tmp_path, tokenizer, pairs)
    another = make_model()
    with torch.no_grad():
        another.model.norm.weight[0] += 1e-3
    changed = {
        "weights": {"model": another},
        "positions": {"model": make_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})},
        "what a layer computes": {"model": make_model(hidden_act="gelu")},
        "order": {"pairs": pairs.select([1, 0, *range(2, len(pairs))])},
        "products": {"bf16": True},
        "ids": {"pairs": Dataset.from_list(make_pairs(seed=9))},
        "fewer": {"pairs": pairs.select(range(20))},
        "type": {"model": make_model().to(torch.bfloat16)},
        "layout": {"shared_prefix": False},
        "attention": {"model": _eager(), "shared_prefix": False},  # packed rows have one attention of their own
    }
    for options in changed.values():
        options = dict(options)
        trainer = prepared(tmp_path, tokenizer, options.pop("pairs", pairs), options.pop("model", None), **options)
        assert trainer.reference_computed["train"] == len(trainer.train_dataset)


def _eager():
    model = make_model()
    model.config._attn_implementation = "eager"
    return model


def test_a_new_adapter_has_the_reference_of_the_model_below_and_its_training_changes_nothing():
    from peft import LoraConfig, get_peft_model

    plain = hash_model(make_model())
    adapted = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert hash_model(adapted) == plain
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(1.0)
    assert hash_model(adapted) == plain


def test_an_adapter_that_is_gone_on_with_has_a_reference_of_its_own_weights_and_scale(tmp_path, tokenizer, pairs):
    from peft import LoraConfig, PeftModel, get_peft_model

    def adapter(alpha, weight):
        lora = LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        peft_model = get_peft_model(make_model(), lora)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(weight)
        peft_model.save_pretrained(tmp_path / f"{alpha} {weight}")
        return PeftModel.from_pretrained(make_model(), tmp_path / f"{alpha} {weight}", is_trainable=True)

    computed = [
        prepared(tmp_path, tokenizer, pairs, adapter(*peft_model)).reference_computed["train"]
        for peft_model in ((8, 0.01), (8, 0.02), (16, 0.01), (8, 0.01))
    ]
    assert computed == [24, 24, 24, 0]


def test_another_kind_of_device_has_other_numbers(tmp_path, tokenizer, pairs):
    trainer = prepared(tmp_path, tokenizer, pairs)
    identity = trainer.logps.identity(trainer.ref_model or trainer.model)
    assert trainer.args.device.type in identity
    trainer.logps.args = SimpleNamespace(device=torch.device("meta"))
    assert trainer.logps.identity(trainer.ref_model or trainer.model) != identity


def test_settings_that_do_not_change_a_models_numbers_are_in_no_key():
    plain, named = make_model(), make_model()
    named.config.use_cache, named.config._name_or_path, named.config.pad_token_id = False, "elsewhere", 3
    assert hash_model(named) == hash_model(plain)


def tiny_dataset(n=10):
    return Dataset.from_list([{"prompt_ids": [1, i], "chosen_ids": [3], "rejected_ids": [4, i]} for i in range(n)])


def lengths(pairs, advance):
    return tuple(torch.tensor([float(p["prompt_ids"][1] + shift) for p in pairs]) for shift in (0, 100))


def test_a_killed_pass_keeps_its_finished_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 4)
    batch_sizes = []

    def dies(pairs, advance):
        batch_sizes.append(len(pairs))
        if len(batch_sizes) == 3:
            raise KeyboardInterrupt
        return lengths(pairs, advance)

    with pytest.raises(KeyboardInterrupt):
        add_reference_logps(tiny_dataset(), ["m"], dies, tmp_path, print)
    dataset, computed = add_reference_logps(tiny_dataset(), ["m"], lengths, tmp_path, print)
    assert computed == 2
    assert dataset[COLUMNS[0]] == [float(i) for i in range(10)]
    assert dataset[COLUMNS[1]] == [float(i + 100) for i in range(10)]


def test_processes_share_the_parts_out_and_write_each_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 4)
    folders = [tmp_path / "machine 0", tmp_path / "machine 1"]  # no file system in common
    by_rank, handed, computed = {}, [], []

    def run(rank, exchange):
        dataset, count = add_reference_logps(
            tiny_dataset(), ["m"], lengths, folders[rank], print, rank=rank, processes=2, gather=exchange
        )
        computed.append(count)
        return dataset

    class Interrupted(Exception):
        pass

    def keep(values):
        by_rank[1] = values
        raise Interrupted

    with pytest.raises(Interrupted):
        run(1, keep)
    dataset = run(0, lambda value: handed.append(value) or [value, by_rank[1]])
    assert dataset[COLUMNS[0]] == [float(i) for i in range(10)]
    assert dataset[COLUMNS[1]] == [float(i + 100) for i in range(10)]
    assert (list(handed[0]), list(by_rank[1]), computed) == ([0, 8], [4], [6])
    assert [len(list(folder.rglob("*.safetensors"))) for folder in folders] == [2, 1]


@pytest.mark.parametrize("harm", ["cut", "garbage", "not numbers", "other shape"])
def test_a_damaged_file_is_computed_anew_and_reported(tmp_path, harm):
    dataset, _ = add_reference_logps(tiny_dataset(), ["m"], lengths, tmp_path, print)
    file = cache.file_path(tmp_path, chunk_key(["m"], [dict(row) for row in tiny_dataset()]))
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif harm == "garbage":
        file.write_bytes(b"\xff" * 200)
    else:
        values = torch.full((10,), torch.nan) if harm == "not numbers" else torch.ones(3)
        cache.store(tmp_path, file.stem, dict.fromkeys(COLUMNS, values.double()))
    messages = []
    again, computed = add_reference_logps(tiny_dataset(), ["m"], lengths, tmp_path, messages.append)
    assert computed == 10
    assert again[COLUMNS[0]] == dataset[COLUMNS[0]]
    assert "damaged and computed again" in messages[0]


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    messages = []
    dataset, computed = add_reference_logps(tiny_dataset(), ["m"], lengths, blocked, messages.append)
    assert computed == 10
    assert dataset[COLUMNS[0]][3] == 3.0
    assert "cannot be written" in messages[0]


# The real thing, in processes of their own


KEEPS = """
import sys
import torch
from pathlib import Path
from apo.models import tensor_cache as cache

numbers = dict.fromkeys(("a", "b"), torch.arange(1000, dtype=torch.float64))
while True:
    assert cache.store(Path(sys.argv[1]), sys.argv[2], numbers) is None
"""


@pytest.mark.slow
def test_a_cache_file_is_complete_at_any_moment_also_if_two_writers_are_killed(tmp_path):
    key, shapes = "ab" * 32, {"a": (1000,), "b": (1000,)}
    both = [
        subprocess.Popen([sys.executable, "-c", KEEPS, str(tmp_path), key], cwd=Path(__file__).parents[3])
        for _ in range(2)
    ]
    try:
        end = time.monotonic() + 120
        while not cache.file_path(tmp_path, key).exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        for process in both:
            for _ in range(500):
                assert cache.load(tmp_path, key, shapes) is not None
            assert process.poll() is None
            process.kill()
            process.wait()
    finally:
        [process.kill() for process in both]
        [process.wait() for process in both]
    cached = cache.load(tmp_path, key, shapes)
    assert cached is not None
    assert cached["b"].tolist() == list(range(1000))
