"""The output of a run: a folder, or a URL of an object store with its local copy. One run at a time holds it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from clair.core.files import file_sha256
from clair.core.out_folder import check_entries, check_out_folder
from clair.ledger.ledger import Ledger
from clair.ledger.replication import LedgerReplica
from clair.storage.location import Location
from clair.storage.object_store import InUse, Store
from clair.storage.url_lock import UrlLock, lock_url

DATASET_FILES = ("recipe.json", "manifest.json")
"""The files that identify a dataset folder."""
CURRENT_ROW = ".row"
"""The file with the id of the row that a shard is building, written after its process was killed repeatedly."""
LOCK = ".lock"
"""The file that the process holding a folder has locked; it contains the process id."""
_LEDGER = "ledger.sqlite"


@dataclass(frozen=True)
class Output:
    """A folder that this process has locked; if it is the copy of a URL, also the lock of the URL in its store."""

    folder: Path
    url_lock: UrlLock | None = None

    def ledger(self, path: Path, *, send_all: bool = False) -> Ledger:
        """Open the ledger at `path`. If the folder is the copy of a URL, every write goes to the object store too."""
        if self.url_lock is None:
            return Ledger(path)
        return Ledger(path, LedgerReplica(self.url_lock.store, self.url_lock.check), send_all=send_all)

    def upload(self, name: str) -> None:
        """Upload a file of the folder to the object store, if there is one."""
        if self.url_lock:
            self.url_lock.check()
            self.url_lock.store.upload(name, self.folder / name)

    def remove(self, name: str) -> None:
        """Delete a file, if it exists, from the folder and the object store."""
        (self.folder / name).unlink(missing_ok=True)
        if self.url_lock and self.url_lock.store.names(name):
            self.url_lock.store.delete([name])

    def publish(self) -> None:
        """Upload all files of the folder but the ledger to the object store, if there is one.

        dropped.jsonl goes before the pairs, as `clair keep` needs it to resume, and the manifest goes last.
        """
        if self.url_lock is None:
            return
        names = [str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()]
        names_to_upload = [name for name in names if not name.startswith((".", _LEDGER, "data/."))]
        for name in sorted(names_to_upload, key=lambda name: (name == "manifest.json", name.startswith("data/"), name)):
            self.upload(name)

    def fetch(self, hashes: Mapping[str, str]) -> None:
        """Download the files whose local copy does not have the given SHA-256, if there is an object store."""
        if self.url_lock is None:
            return
        for name, sha256 in hashes.items():
            file = self.folder / name
            if not file.is_file() or file_sha256(file) != sha256:
                self.url_lock.store.fetch(name, file)


@contextmanager
def lock_output(out: str | Path, patience: float = 0.0) -> Iterator[Output]:
    """Lock an output for this process. Raises InUse with the id of the process that holds the lock.

    `patience`: seconds to wait for that process, if it is known to be ending. If `out` is a URL, the files of earlier
    runs (recipe, manifest, ledger, last row) are downloaded into the folder.
    """
    out = Location(out)
    folder = out.folder
    with ExitStack() as stack:
        stack.enter_context(_lock_folder(folder, out, patience))
        if not out.is_url:
            yield Output(folder)
            return
        store = Store(out)
        output = Output(folder, stack.enter_context(lock_url(store, folder, patience)))
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
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    owner = file.read().strip() or "unknown"
                    raise InUse(f"{name} is in use by process {owner}; wait for it, or choose another --out") from None
            time.sleep(0.1)
        if not os.fstat(file.fileno()).st_nlink:  # deleted by the process that held the lock
            raise InUse(f"{name} was released by another process just now; run the same command again")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def check_output(out: str | Path) -> None:
    """Check that `out` is empty or a dataset folder. Raises UserError, also for a file or a URL that cannot be read."""
    out = Location(out)
    if out.is_url:
        store = Store(out)
        check_entries(store.name, "dataset folder", DATASET_FILES, store.names())
    else:
        check_out_folder(out.folder, "dataset folder", DATASET_FILES)
