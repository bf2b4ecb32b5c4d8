"""A lock on a URL of an object store, held by one run at a time: a lease, without synchronized clocks.

The lock is an object `hold/000007.json`, which is created by a conditional put; the object with the highest number
holds the lock. Its run rewrites it every `BEAT` seconds (a heartbeat). Another run takes over by creating the next
number, after it has watched the object for `LEASE` seconds by its own clock without a change. A run that could not
write its heartbeat for `LEASE / 2` seconds renews it before it uses another reply, and stops if it finds a higher
number.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clair.core.files import read_json, write_json
from clair.storage.object_store import AlreadyExists, InUse, StorageError, Store

LEASE = 60.0
"""Seconds without a heartbeat after which a run counts as dead."""
BEAT = 10.0
"""Seconds between two heartbeats."""
_FOLDER = "hold/"


class UrlLock:
    """A lock on a URL that this run holds. Call `check` before every use of what it guards."""

    def __init__(self, store: Store, number: int, owner: dict[str, Any]) -> None:
        self.store = store
        self._number = number
        self._owner = owner
        self._last_beat = time.monotonic()
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_released, name="url-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise StorageError if another run may hold the lock."""
        if self._lost is None and time.monotonic() - self._last_beat > LEASE / 2:
            self._beat()
        if self._lost:
            raise StorageError(self._lost)

    def release(self) -> None:
        """Release the lock. If the store does not answer, the next run waits for the lease to end."""
        self._released.set()
        self._thread.join()
        if self._lost is None:
            with suppress(StorageError):
                self.store.put(_name(self._number), _encode({**self._owner, "released": True}))

    def _beat_until_released(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(StorageError):  # check() repeats the heartbeat, and raises its error, before anything is used
                self._beat()

    def _beat(self) -> None:
        with self._lock:
            started = time.monotonic()
            self.store.put(_name(self._number), _encode({**self._owner, "beat": uuid.uuid4().hex}))
            highest = max(_numbers(self.store), default=0)
            if highest > self._number:
                successor = _describe(json.loads(self.store.get(_name(highest))))
                self._lost = (
                    f"{self.store.name} was taken over by {successor}, because this run gave no sign of life for "
                    f"{LEASE:.0f} s; what it paid for is kept, run the same command again when the other has ended"
                )
            self._last_beat = started


@contextmanager
def lock_url(store: Store, folder: Path, patience: float = 0.0) -> Iterator[UrlLock]:
    """Lock the URL of `store` for this run. This process has already locked `folder`, the local copy.

    Raises InUse, naming the owner, if another live run holds the lock and does not end within `patience` seconds.
    """
    lock = UrlLock(store, *_acquire(store, folder / ".hold.json", patience))
    try:
        yield lock
    finally:
        lock.release()


def _acquire(store: Store, record: Path, patience: float) -> tuple[int, dict[str, Any]]:
    """Create the lock object. Returns its number and its content. `record` is the local file that names its owner."""
    owner = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    numbers = _numbers(store)
    highest = max(numbers, default=0)
    if highest:
        _wait_for_release(store, highest, record, patience)
    write_json(record, owner)  # before the object, so that a later run on this machine recognizes the object
    try:
        store.create(_name(highest + 1), _encode(owner))
    except AlreadyExists:
        raise InUse(f"{store.name} was taken by another run just now; wait for it, or choose another --out") from None
    with suppress(StorageError):  # lower numbers have no effect
        store.delete([_name(number) for number in numbers])
    return highest + 1, owner


def _wait_for_release(store: Store, number: int, record: Path, patience: float) -> None:
    """Wait until the run of a lock is over. Raises InUse if it gives a sign of life after `patience` seconds."""
    patience_ends = time.monotonic() + patience
    last_content = store.get(_name(number))
    owner = json.loads(last_content)
    # An earlier run on this machine has ended if it recorded the lock here, because this process has locked the folder.
    is_over = record.is_file() and read_json(record)["owner"] == owner["owner"]
    if is_over or owner.get("released"):
        return
    lease_ends = time.monotonic() + LEASE
    while time.monotonic() < lease_ends:
        time.sleep(min(1.0, LEASE / 10))
        content = store.get(_name(number))
        if json.loads(content).get("released"):
            return
        if content != last_content and time.monotonic() < patience_ends:
            last_content, lease_ends = content, time.monotonic() + LEASE
        elif content != last_content:
            raise InUse(
                f"{store.name} is in use by {_describe(owner)}; wait for it, or choose another --out. A run that gives "
                f"no sign of life for {LEASE:.0f} s is taken over"
            )


def _describe(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}"


def _numbers(store: Store) -> list[int]:
    return [int(Path(name).stem) for name in store.names(_FOLDER)]


def _name(number: int) -> str:
    return f"{_FOLDER}{number:06}.json"


def _encode(owner: dict[str, Any]) -> bytes:
    return json.dumps(owner).encode()
