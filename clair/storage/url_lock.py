"""One run at a time on a URL: a hold that dies with its run, without trusting any clock.

A hold is an object `hold/000007.json`, created only where no object of that name is there (a conditional put); the
highest number holds the URL. Its run writes it anew every few seconds. Another run takes over by creating the next
number, after it has watched the object for `LEASE` seconds by its own clock and it did not change; a run that could
not write its object for that long counts itself as lost before it uses another reply, and stops where it finds a higher
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
"""Seconds without a sign of life after which a run counts as dead."""
BEAT = 10.0
"""Seconds between two signs of life."""
_FOLDER = "hold/"


class UrlLock:
    """A URL that this run holds. `check` before every use of what it guards."""

    def __init__(self, store: Store, number: int, told: dict[str, Any]) -> None:
        self.store = store
        self._number = number
        self._told = told
        self._seen = time.monotonic()
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="hold", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises StorageError where another run may hold the URL by now."""
        if self._lost is None and time.monotonic() - self._seen > LEASE / 2:
            self._beat()
        if self._lost:
            raise StorageError(self._lost)

    def release(self) -> None:
        """Let the URL go; where the store does not hear it, the next run waits for the lease to end."""
        self._over.set()
        self._thread.join()
        if self._lost is None:
            with suppress(StorageError):
                self.store.put(_name(self._number), _content({**self._told, "released": True}))

    def _keep(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(StorageError):  # check() beats again, and tells, before anything is used
                self._beat()

    def _beat(self) -> None:
        with self._lock:
            began = time.monotonic()
            self.store.put(_name(self._number), _content({**self._told, "beat": uuid.uuid4().hex}))
            highest = max(_numbers(self.store), default=0)
            if highest > self._number:
                other = _owner(json.loads(self.store.get(_name(highest))))
                self._lost = (
                    f"{self.store.name} was taken over by {other}, because this run gave no sign of life for "
                    f"{LEASE:.0f} s; what it paid for is kept, run the same command again when the other has ended"
                )
            self._seen = began


@contextmanager
def held(store: Store, folder: Path, patience: float = 0.0) -> Iterator[UrlLock]:
    """Hold the URL of `store` for this run; `folder`, where its copy lies, is held by this process already.

    Raises InUse, naming who it is, where another run holds it and lives, or lives still after `patience` seconds.
    """
    mine = folder / ".hold.json"
    hold = UrlLock(store, *_taken(store, mine, patience))
    try:
        yield hold
    finally:
        hold.release()


def _taken(store: Store, mine: Path, patience: float) -> tuple[int, dict[str, Any]]:
    told = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    numbers = _numbers(store)
    highest = max(numbers, default=0)
    if highest:
        _wait(store, highest, mine, patience)
    write_json(mine, told)  # before it is taken: what is found of it later is known to be this machine's
    try:
        store.create(_name(highest + 1), _content(told))
    except AlreadyExists:
        raise InUse(f"{store.name} was taken by another run just now; wait for it, or choose another --out") from None
    with suppress(StorageError):  # lower numbers do not count
        store.delete([_name(number) for number in numbers])
    return highest + 1, told


def _wait(store: Store, number: int, mine: Path, patience: float) -> None:
    """Until the run of a hold is known to be over. Raises InUse where it gives a sign of life after `patience`."""
    give_up = time.monotonic() + patience
    first = store.get(_name(number))
    owner = json.loads(first)
    ours = mine.is_file() and read_json(mine)["owner"] == owner["owner"]  # it had the folder that we hold now
    if ours or owner.get("released"):
        return
    until = time.monotonic() + LEASE
    while time.monotonic() < until:
        time.sleep(min(1.0, LEASE / 10))
        content = store.get(_name(number))
        if json.loads(content).get("released"):
            return
        if content != first and time.monotonic() < give_up:
            first, until = content, time.monotonic() + LEASE
        elif content != first:
            raise InUse(
                f"{store.name} is in use by {_owner(owner)}; wait for it, or choose another --out. A run that gives no "
                f"sign of life for {LEASE:.0f} s is taken over"
            )


def _owner(told: dict[str, Any]) -> str:
    return f"process {told['pid']} on {told['host']}"


def _numbers(store: Store) -> list[int]:
    return [int(Path(name).stem) for name in store.names(_FOLDER)]


def _name(number: int) -> str:
    return f"{_FOLDER}{number:06}.json"


def _content(told: dict[str, Any]) -> bytes:
    return json.dumps(told).encode()
