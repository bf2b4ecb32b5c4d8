"""Lock files of the runs that have a ledger open. The kernel unlocks such a file when the process of its run ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def lock_path(ledger: Path, run: str) -> Path:
    """The lock file of a run, beside the ledger."""
    return ledger.with_name(f"{ledger.name}.run-{run}")


def acquire_lock(lock: Path) -> int:
    """Create and lock the lock file of this run. Returns its open file descriptor."""
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)  # another run saw the file before it was locked, and removed it as that of a dead run


def is_locked(lock: Path) -> bool:
    """True if the process of a run still holds its lock file. The kernel decides, so clocks do not matter.

    Removes the lock file of a dead run.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        lock.unlink(missing_ok=True)
        return False
    finally:
        os.close(descriptor)


def count_live_runs(ledger: Path) -> int:
    """The number of processes that have the ledger open. Removes the lock files of dead ones."""
    return sum(is_locked(lock) for lock in ledger.parent.glob(f"{ledger.name}.run-*"))
