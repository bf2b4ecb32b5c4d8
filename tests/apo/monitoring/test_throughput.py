"""The cost of a log line, and its arithmetic: model FLOPs, padding, shared tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer.dpo_trainer import DataCollatorForPreference

from apo.cost import memory as fit
from apo.cost import sizes as shapes
from apo.monitoring.metrics import COLUMNS, token_counts
from apo.monitoring.throughput import ComputeScale, Meter, compute_scale
from apo.packing.layout import pack_pairs
from tests.apo.conftest import make_model, make_pairs
from tests.apo.training.trainers import apo_trainer, lora

CPU = torch.device("cpu")


def stacked(examples):
    """TRL's batch of pairs given as ids."""
    return DataCollatorForPreference(pad_token_id=0)(examples)


EXAMPLES = [
    {"prompt_ids": [1, 5, 6], "chosen_ids": [7, 8, 3], "rejected_ids": [7, 9, 9, 3]},
    {"prompt_ids": [1, 5], "chosen_ids": [8, 3], "rejected_ids": [3]},
]


def test_work_by_hand():
    # First pair: sequences of 6 and 7 with 4 tokens in common; second: 4 and 3 with 2.
    assert pack_pairs(EXAMPLES).counts == [[13, 9, 9, 3 + 3, 36 + 3 * 7], [7, 5, 5, 2 + 1, 16 + 1 * 3]]
    # Unpaired rows: one sequence of 5 with a chosen and one of 4 with a rejected response.
    alone = [{**EXAMPLES[0], "chosen_ids": [7, 3], "rejected_ids": []}, {**EXAMPLES[1], "chosen_ids": []}]
    alone[1]["rejected_ids"] = [9, 3]
    assert pack_pairs(alone).counts == [[5, 5, 5, 2, 25], [4, 4, 4, 2, 16]]
    assert token_counts(stacked(alone)).tolist() == [[5, 5, 5, 2, 25], [4, 5, 4, 2, 16]]
    counts = token_counts(stacked(EXAMPLES))
    assert counts.tolist() == [[13, 14, 13, 7, 36 + 49], [7, 14, 7, 3, 16 + 9]]


def test_work_in_packed_rows_is_that_of_the_layout_and_of_the_estimate():
    layout = pack_pairs(EXAMPLES)
    rows = fit.pass_costs(EXAMPLES, 2, None, True, seed=0)
    useful, labels, products = torch.tensor(layout.counts)[:, 2:].sum(0).tolist()
    assert useful == layout.input_ids.numel() == sum(row.tokens for row in rows)
    assert labels == len(layout.labels) == sum(row.labels for row in rows)
    assert products == sum(row.products for row in rows)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_model_flops_are_those_that_torch_counts(adapter):
    from peft import get_peft_model

    model = make_model(attn_implementation="eager")  # whose products are plain matrix products
    if adapter:
        model = get_peft_model(model, lora())
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora_" in name or "embed_tokens" in name)  # so that gradients go all the way down
    scale = compute_scale(model, CPU)
    ids = torch.arange(5, 29)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(scale.flops(24, 24, 24**2), rel=0.01)


def test_recomputation_is_counted_by_the_estimate_and_not_by_the_utilisation():
    model = make_model()
    scale, sizes = compute_scale(model, CPU), shapes.count_sizes(model)
    for labels in (60, 4_000_000):  # of the many, logits are not kept for backward
        row = fit.PassCost(100, labels, 5000)
        job = fit.Job(sizes, (row,), 0, 1, 1, 1, 4, 4, 2, False, False, False, None)
        again = 0.5 * 4 * scale.attention * row.products + 2 * scale.head * labels * (labels > 1e6)
        assert fit.step_flops(job, row) == pytest.approx(scale.flops(100, labels, 5000) + again)


def test_a_model_whose_arithmetic_is_not_known_has_no_utilisation(tmp_path, tokenizer, pairs):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    moe = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=40, num_key_value_heads=1, num_local_experts=2))
    assert compute_scale(moe, CPU) == "it is a mixture of experts"
    assert compute_scale(make_model(), torch.device("meta")) == "the peak speed of this device is unknown"
    trainer = apo_trainer(tmp_path, tokenizer, pairs, max_steps=1)
    assert 0 < logged(trainer)[0]["mfu"] < 1
    trainer = apo_trainer(tmp_path, tokenizer, pairs, max_steps=1)
    trainer.meter.scale = "it is a mixture of experts"
    assert "mfu" not in logged(trainer)[0]


def logged(trainer):
    trainer.train()
    return [row for row in trainer.state.log_history if "grad_norm" in row]


def test_padding_and_shared_tokens_are_logged_as_the_batches_were(tmp_path, tokenizer):
    pairs = Dataset.from_list(make_pairs(8))
    more = {"max_steps": 1, "per_device_train_batch_size": 8}
    packed = apo_trainer(tmp_path, tokenizer, pairs, **more)
    rows = [packed.train_dataset[i] for i in range(8)]
    plain_tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    longest = max(len(row["prompt_ids"]) + len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids"))
    (logged_row,) = logged(packed)
    assert logged_row["padding"] == 0
    assert logged_row["shared"] == pytest.approx(1 - pack_pairs(rows).input_ids.numel() / plain_tokens)
    (logged_row,) = logged(apo_trainer(tmp_path, tokenizer, pairs, shared_prefix=False, **more))
    assert logged_row["padding"] == pytest.approx(1 - plain_tokens / (16 * longest))
    assert logged_row["shared"] == 0
    assert logged_row["lengths/chosen"] == pytest.approx(sum(len(row["chosen_ids"]) for row in rows) / 8)


def test_the_clock_stands_still_in_a_pause(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    meter = Meter(SimpleNamespace(num_processes=1), ComputeScale(1, 0, 0, 0, False, peak=10.0))
    with meter.pause():  # an evaluation before the first step
        now = 50.0
    meter.start()
    now = 55.0
    with meter.pause():
        now = 155.0
    now = 156.0
    rows = torch.zeros(12, len(COLUMNS))
    rows[:, COLUMNS.index("tokens")], rows[:, COLUMNS.index("useful")] = 10, 5
    rates = meter.speed(rows)
    assert rates == {"pairs_per_second": 2.0, "tokens_per_second": 20.0, "mfu": 2 * 2 * 60 / 6 / 10}


# Several processes

SCRIPT = """
import json, os, sys
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback
from apo.training.trainer_config import APOConfig
from apo.training.trainer import APOTrainer
from tests.apo.conftest import make_model, make_pairs, make_tokenizer

calls, steps = [], []
NAMES = "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier", "reduce"
for name in NAMES:
    def counted(*args, _name=name, _own=getattr(dist, name), **options):
        calls.append(_name)
        return _own(*args, **options)
    setattr(dist, name, counted)

class Count(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        steps.append(list(calls)); calls.clear()
    def on_log(self, args, state, control, **_):
        steps.append({"log": list(calls)}); calls.clear()

args = APOConfig(
    output_dir=sys.argv[1] + ".d", max_steps=6, logging_steps=3, logging_first_step=False, save_strategy="no",
    per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_tqdm=True,
)
trainer = APOTrainer(
    make_model(), args=args, train_dataset=Dataset.from_list(make_pairs(24)), processing_class=make_tokenizer(),
    callbacks=[Count()],
)
trainer.train()
if trainer.is_world_process_zero():
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    with open(sys.argv[1], "w") as file:
        json.dump({"steps": steps, "rows": rows}, file)
trainer.accelerator.end_training()
os._exit(0)
"""


@pytest.mark.slow
def test_nothing_is_gathered_off_logging_steps(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(script), str(out)]
    result = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(out.read_text())
    assert [row["step"] for row in record["rows"]] == [3, 6]
    collectives = [entry for entry in record["steps"] if isinstance(entry, list)]
    # One sum of a single number, by which the step's loss is divided: nothing of the logs.
    assert collectives == [["all_reduce"]] * 6
    logs = [entry["log"] for entry in record["steps"] if isinstance(entry, dict)]
    # transformers' loss and its own summary, and two of ours: how many pairs, and the pairs.
    assert logs == [["all_gather"] * 4] * 2 + [["all_gather"]]


def test_a_read_meter_holds_the_pairs_of_all_processes_and_is_empty():
    class Two:
        num_processes = 2
        call_count = 0

        def pad_across_processes(self, rows):
            return torch.cat([rows, torch.zeros(1, rows.shape[1])])  # the other process has one pair more

        def gather(self, rows):
            self.call_count += 1
            return torch.cat([rows, rows + 1.0 * (rows[:, -1:] == 7)])

    meter = Meter(Two(), "none")
    meter.add("train", torch.full((2, 3), 5.0))
    meter.add("train", torch.full((1, 3), 6.0))
    assert not meter.has("eval")
    assert meter.gather("train").tolist() == [[5.0] * 3, [5.0] * 3, [6.0] * 3] * 2
    assert not meter.has("train")
    assert meter.accelerator.call_count == 1
