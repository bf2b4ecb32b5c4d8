"""Two processes train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
from datasets import Dataset
from apo.trainer import APOConfig, APOTrainer
from tests.apo.conftest import make_model, make_pairs, make_tokenizer
from tests.apo.test_unpaired import make_rows
out, case, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
rows = make_rows(24) if "unpaired" in case else make_pairs(24)
args = APOConfig(
    output_dir=out + ".d", objective=case.split(", ")[0], max_steps=6, logging_steps=1, beta=0.5,
    per_device_train_batch_size=size, gradient_accumulation_steps=2, learning_rate=0.1, optim="sgd",
    save_strategy="no", disable_tqdm=True,
)
trainer = APOTrainer(make_model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer())
trainer.train()
if trainer.is_world_process_zero():
    with open(out, "w") as file:
        json.dump([row for row in trainer.state.log_history if "grad_norm" in row], file)
trainer.accelerator.end_training()
os._exit(0)  # gloo's threads may abort a process that ends while they run
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["apo_zero", "kto", "kto, unpaired"])
def test_two_processes_train_as_one(case, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, str(script), str(out), case, str(4 // processes)]
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(out.read_text()))
    for one, two in zip(*found, strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "chosen_falls", "kl/mismatched"):
            if key in one:
                assert two[key] == pytest.approx(one[key], abs=1e-4, rel=1e-5), key
    if case != "apo_zero":  # so that there was an anchor to agree on
        assert max(row["kl/mismatched"] for row in found[0]) > 0.01
