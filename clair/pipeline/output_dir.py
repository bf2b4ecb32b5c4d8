"""Where a run writes: a folder, or a URL of an object store and its copy on this machine; for one run at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clair.core.errors import UserError
from clair.core.files import file_sha256
from clair.ledger.ledger import Ledger
from clair.ledger.replication import LedgerReplica
from clair.storage.object_store import InUse, Store, folder_of, is_url
from clair.storage.url_lock import UrlLock, held

DATASET_FILES = ("recipe.json", "manifest.json")
"""What a dataset folder is known by."""
CURRENT_ROW = ".row"
"""The row that a shard was at, where it kept killing its process."""
LOCK = ".lock"
"""The file that the process which holds a folder has locked, and written its number into."""
_LEDGER = "ledger.sqlite"


@dataclass(frozen=True)
class Output:
    """A folder held by this process, and the store that it is the copy of, if it is one."""

    folder: Path
    store: Store | None = None
    url_lock: UrlLock | None = None

    def ledger(self, path: Path, *, send_all: bool = False) -> Ledger:
        """The ledger at `path`; that of an object store's copy writes everything there too."""
        if self.store is None or self.url_lock is None:
            return Ledger(path)
        return Ledger(path, LedgerReplica(self.store, self.url_lock.check), send_all=send_all)

    def upload(self, name: str) -> None:
        """Put a file of the folder into the store, where there is one."""
        if self.store and self.url_lock:
            self.url_lock.check()
            self.store.upload(name, self.folder / name)

    def remove(self, name: str) -> None:
        """Take a file away that may be there, from the store too."""
        (self.folder / name).unlink(missing_ok=True)
        if self.store and self.store.names(name):
            self.store.delete([name])

    def publish(self) -> None:
        """Put all files of the folder but the ledger into the store, where there is one; the manifest last, and what
        was dropped before the pairs, as `clair keep` needs it to go on.
        """
        if self.store is None:
            return
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        names = [str(file.relative_to(self.folder)) for file in files]
        names_to_upload = [name for name in names if not name.startswith((".", _LEDGER, "data/."))]
        for name in sorted(names_to_upload, key=lambda name: (name == "manifest.json", name.startswith("data/"), name)):
            self.upload(name)

    def fetch(self, hashes: Mapping[str, str]) -> None:
        """Bring files by name from the store, where there is one and those here have not these SHA-256."""
        for name, sha256 in hashes.items() if self.store else ():
            file = self.folder / name
            if not file.is_file() or file_sha256(file) != sha256:
                self.store.fetch(name, file)


@contextmanager
def lock_output(out: str | Path, patience: float = 0.0) -> Iterator[Output]:
    """Hold an output for this process. Raises InUse naming the process that holds it already.

    `patience`: the seconds to wait for that one first, where it is known to be ending.
    What tells of earlier runs (recipe, manifest, ledger, last row) is brought from a URL into the folder.
    """
    folder = folder_of(out)
    with ExitStack() as stack:
        stack.enter_context(_lock_folder(folder, str(out), patience))
        if not is_url(str(out)):
            yield Output(folder)
            return
        store = Store(str(out))
        output = Output(folder, store, stack.enter_context(held(store, folder, patience)))
        names = store.names()
        for name in (*DATASET_FILES, CURRENT_ROW):
            if name in names:
                store.fetch(name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        output.ledger(folder / _LEDGER).close()
        yield output


@contextmanager
def _lock_folder(folder: Path, name: str, patience: float) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="ascii") as file:
        if not _flock(file, patience):
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise InUse(f"{name} is in use by process {owner}; wait for it, or choose another --out")
        if not os.fstat(file.fileno()).st_nlink:  # taken away by the process that had it locked
            raise InUse(f"{name} was let go by another process just now; run the same command again")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _flock(file: TextIO, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(0.1)


def check_output(out: str | Path) -> None:
    """Raises UserError where `out` is neither empty nor a dataset's, or is a URL that cannot be looked at."""
    if is_url(str(out)):
        store = Store(str(out))
        names, name = store.names(), store.name
    else:
        path, name = Path(out), str(out)
        if path.exists() and not path.is_dir():
            raise UserError(f"out {out} is a file, not a folder; choose another --out")
        names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    known_names = (LOCK, _LEDGER, "ledger/", "hold/")
    unknown = sorted(name for name in names if not name.startswith(known_names))
    if unknown and not set(DATASET_FILES) & set(names):
        raise UserError(f"{name} is no dataset folder and not empty (it holds {unknown[0]}); choose another --out")
