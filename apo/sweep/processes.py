"""Train the runs of a sweep, each in its own process: one at a time on each GPU, or one after another on a CPU."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apo.monitoring.metrics import series
from apo.run_dir.files import METRICS, RUN, read_log
from apo.sweep.grid import SweepRun
from clair.core.errors import EXIT_INTERRUPTED, one_line
from clair.core.progress import Progress
from clair.core.watched_process import WatchedProcess

_POLL_SECONDS = 0.2


def visible_devices() -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES for each process that runs at the same time; [None]: one process, unchanged."""
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = listed[:count] if any(listed) else [str(index) for index in range(count)]
    return [*names] if count > 1 else [None]


def train_runs(
    runs: Sequence[SweepRun], arguments: Sequence[str], devices: Sequence[str | None], progress: Progress
) -> dict[str, str]:
    """Train the unfinished runs by `apo train` with these `arguments`. Returns the errors by run.

    Runs that may share reference log-probs start one after another: the first computes them, the others read them from
    the cache. After Ctrl-C, raises KeyboardInterrupt when each process has saved a checkpoint.
    """
    waiting = [run for run in runs if run.status != "finished"]
    free, running, errors = list(devices), dict[WatchedProcess, tuple[SweepRun, str | None]](), dict[str, str]()
    with _stop_at_end(running):
        while waiting or running:
            starting = {run.reference for run, _ in running.values() if not (run.out / RUN).exists()}
            ready = next((run for run in waiting if run.reference not in starting), None)
            if ready and free:
                waiting.remove(ready)
                device = free.pop(0)
                running[_start(ready, arguments, device)] = ready, device
                continue
            for process in [process for process in running if process.poll() is not None]:
                run, device = running.pop(process)
                free.append(device)
                progress.advance()
                code = process.stop()
                if code == EXIT_INTERRUPTED:
                    raise KeyboardInterrupt
                if code:
                    errors[run.name] = _last_line(log_file(run)) or f"ended with code {code}"
            progress.details = lambda: [_describe(run) for run, _ in list(running.values())]
            time.sleep(_POLL_SECONDS)
    return errors


def log_file(run: SweepRun) -> Path:
    """Return the file with the messages of a run."""
    return run.out.with_name(f"{run.name}.log")


def train_command(run: SweepRun, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `apo` that train a run; `arguments` are the recipe and the `--set` of all runs."""
    sets = [argument for override in run.overrides for argument in ("--set", override)]
    return ["train", *arguments, *sets, "--out", run.config.out]


def _start(run: SweepRun, arguments: Sequence[str], device: str | None) -> WatchedProcess:
    visible = [] if device is None else ["env", f"CUDA_VISIBLE_DEVICES={device}"]
    with open(log_file(run), "ab") as log:
        return WatchedProcess([*visible, sys.executable, "-m", "apo", *train_command(run, arguments)], log)


@contextmanager
def _stop_at_end(running: dict[WatchedProcess, tuple[SweepRun, str | None]]) -> Iterator[None]:
    """If the block ends early, stop all processes; each saves a checkpoint. SIGTERM acts as Ctrl-C."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        try:
            for process in running:
                process.send_signal(signal.SIGINT)
            for process in running:
                process.wait()
        finally:  # also after a second Ctrl-C
            for process in running:
                process.stop()
            signal.signal(signal.SIGTERM, previous)


def _describe(run: SweepRun) -> str:
    steps = series(read_log(run.out / METRICS), "loss")[0]
    return f"{run.name}: step {steps[-1] if steps else 0:,} of {run.steps:,}"


def _last_line(file: Path) -> str:
    lines = file.read_text("utf-8", "replace").strip().splitlines()
    return one_line(lines[-1].removeprefix("error: ")) if lines else ""
