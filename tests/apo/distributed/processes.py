"""Training runs as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAIRS = 22
# 3 steps an epoch of 8 pairs, the last of 6: of two processes with 2 pairs each, one is idle at its end.
TRAINER = {
    "learning_rate": 1e-2, "num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "logging_steps": 1, "save_steps": 4, "lr_scheduler_type": "cosine",
}  # fmt: skip


def launched(folder, *arguments, **environment):
    """Start Python with these arguments in a folder. `outcome` waits for it."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"),
        "CLAIR_CACHE": str(folder / "cache"), "TORCH_CPP_LOG_LEVEL": "ERROR", **environment,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def outcome(process):
    """Wait for the process. Returns its exit code and its standard error."""
    try:
        _, output = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, output
