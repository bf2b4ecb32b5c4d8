"""Worker processes with one thread each. They end when their parent ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from clair.core.errors import UserError

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "HF_HUB_OFFLINE": "1",
}
"""The environment of the workers."""


def make_pool(workers: int, log: Path | None = None) -> ProcessPoolExecutor:
    """Start processes with one thread each, which exit when this process does. Their output is appended to `log`."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(os.getpid(), log))


def _begin(parent: int, log: Path | None) -> None:
    import torch

    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
    os.setsid()  # the parent handles Ctrl-C; and Linux divides the CPU among sessions
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


def completed(
    pool: ProcessPoolExecutor, work: Callable[..., dict[str, Any]], jobs: Mapping[str, tuple[Any, ...]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each job's name and line when it completes. If a job fails or the caller stops, start no further job.

    Raises UserError if a worker was killed.
    """
    names = {pool.submit(work, *job): name for name, job in jobs.items()}
    try:
        for future in as_completed(names):
            yield names[future], future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, perhaps because memory ran out; run the same command with fewer --workers: finished "
            "runs are kept"
        ) from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
