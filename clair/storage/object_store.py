"""Object stores through fsspec: `s3://bucket/run`, `gs://...`, `file:///...` in place of a folder or a file.

Credentials come from the environment, as each implementation reads them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...), and
leave it nowhere: a URL that holds a password is refused, and what an implementation says of an error is told without
the environment's secrets.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from clair.core.errors import UserError, one_line
from clair.core.files import content_hash, file_sha256, read_json, write_atomically
from clair.core.urls import public_url

_EXTRAS = {"s3": "s3", "s3a": "s3"}
"""The extra of ours that brings an implementation; for others fsspec tells what to install."""
_LOCAL = ("file", "local")
_SECRET = re.compile(r"secret|token|password|key", re.IGNORECASE)
_PATIENCE = 30.0  # seconds, for a store that does not answer
_FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
_FULL = re.compile(r"quota|no space|storage ?full|insufficient storage|EntityTooLarge", re.IGNORECASE)
T = TypeVar("T")


class StorageError(UserError):
    """An object store cannot be used; what was paid for is kept, in it or on this machine."""


class InUse(StorageError):
    """Another run holds a folder or URL."""


class AlreadyExists(Exception):
    """The object that was to be created exists already."""


def is_url(text: str) -> bool:
    """Whether a recipe's path is a URL of an object store, and no path of this machine."""
    return "://" in text


def local(path: Path | None) -> Path | None:
    """A path that is written on this machine only, as it is; also a callback of typer. Raises UserError for a URL."""
    if path is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # a Path has one slash left of two
        url = public_path(str(path).replace(":/", "://", 1))
        raise UserError(f"{url} is a URL, and this is written to local files only; give a path, and copy it there")
    return path


def check_url(key: str, text: str) -> None:
    """Raises ValueError, without repeating it, where a URL holds a password."""
    if is_url(text) and urlsplit(text).password:
        raise ValueError(f"{key} is a URL with a password in it; give credentials by the environment")


def public_path(text: str) -> str:
    """A recipe's path as it may be written down: a URL without a signature or whatever else its query holds."""
    return public_url(text) if is_url(text) else text


def joined(out: str, name: str) -> str:
    """A name below a folder or URL."""
    return f"{out.rstrip('/')}/{name}" if is_url(out) else str(Path(out) / name)


def default_folder() -> Path:
    """`$CLAIR_CACHE`, else `~/.cache/clair-apo`."""
    return Path(os.environ.get("CLAIR_CACHE") or Path.home() / ".cache" / "clair-apo")


def folder_of(out: str | Path) -> Path:
    """The folder of this machine that a run works in: `out` itself, or where the copy of a URL's lies."""
    return copy_of(str(out), "runs") if is_url(str(out)) else Path(out)


def account_of(out: str) -> str:
    """On whose bill a run goes: the same on every machine for a URL."""
    return public_url(out) if is_url(out) else str(Path(out).resolve())


def copy_of(url: str, kind: str) -> Path:
    """Where this machine keeps its copy of what is at a URL."""
    name = re.sub(r"[^\w.-]+", "-", Path(urlsplit(url).path).name)[-40:]
    return default_folder() / kind / f"{content_hash(public_url(url))[:16]}-{name}"


class Store:
    """What is below one URL. Every method raises StorageError in words for the user, without secrets."""

    def __init__(self, url: str) -> None:
        """Raises StorageError for a protocol that nothing here speaks, with what to install. Asks nothing yet."""
        self.name = public_url(url)
        try:
            check_url(self.name, url)
        except ValueError as error:
            raise StorageError(str(error)) from None
        self._secrets = tuple(value for _, value in parse_qsl(urlsplit(url).query))
        self._is_local = url.partition("://")[0] in _LOCAL
        self._fs, self._root = self._opened(url)

    def _opened(self, url: str) -> tuple[Any, str]:
        import fsspec

        protocol = url.partition("://")[0]
        try:
            options = {"auto_mkdir": True} if self._is_local else {}
            fs, root = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
        except ImportError as error:
            if protocol in _EXTRAS:
                told = f"{protocol}:// needs s3fs: pip install 'clair-apo[{_EXTRAS[protocol]}]'"
            else:
                told = f"{protocol}:// needs a package that is not installed: {error}"
            raise StorageError(f"{self.name}: {told}") from error
        except Exception as error:
            raise StorageError(f"{self.name} cannot be opened: {self.words(error)}") from error
        return fs, root.rstrip("/")

    # ---- reading

    def names(self, prefix: str = "") -> list[str]:
        """The names of the objects below `prefix`, sorted; none where nothing is there."""
        where = f"{self._root}/{prefix}".rstrip("/")
        found = self._tried("list", lambda: self._found(where))
        unfinished = re.compile(r"/\.[^/]+\.tmp$")  # local ones that a killed run left
        return sorted(name.removeprefix(f"{self._root}/") for name in found if not unfinished.search(name))

    def _found(self, where: str) -> list[str]:
        try:
            return self._fs.find(where)
        except FileNotFoundError:
            return []

    def get(self, name: str) -> bytes:
        """The content of an object. Raises StorageError where it is not there."""
        return self._tried("read", lambda: self._fs.cat_file(self._path(name)))

    def get_all(self, names: Sequence[str]) -> list[bytes]:
        """The contents of several objects, fetched at the same time where the implementation can."""
        paths = [self._path(name) for name in names]
        found = self._tried("read", lambda: self._fs.cat(paths)) if paths else {}
        return [found[path] for path in paths]

    def fetch(self, name: str, file: Path) -> None:
        """Copy an object, however large, to a file of this machine: wholly or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            self._tried("read", lambda: self._fs.get_file(self._path(name), str(temporary)))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def is_folder(self) -> bool:
        """Whether objects lie below the URL, and none at it."""
        return bool(self._tried("read", lambda: self._fs.info(self._root))["type"] == "directory")

    def mark(self, name: str = "") -> str:
        """What changes when an object does: its size and version, as far as the store tells them."""
        info = self._tried("read", lambda: self._fs.info(self._path(name)))
        names = ("size", "ETag", "etag", "mtime", "LastModified", "created", "version_id", "generation")
        return content_hash([str(info.get(name)) for name in names])

    # ---- writing

    def put(self, name: str, data: bytes) -> None:
        """Write an object, wholly or not at all."""
        self._tried("write", lambda: self._write(name, data))

    def create(self, name: str, data: bytes) -> None:
        """Write an object that is not there yet. Raises Taken where it is, and holds something else."""

        def write() -> None:
            try:
                self._write(name, data, new=True)
            except FileExistsError:
                # Our own try before this one may have arrived, and only its answer got lost.
                if self._fs.cat_file(self._path(name)) != data:
                    raise AlreadyExists(name) from None

        self._tried("write", write)

    def _write(self, name: str, data: bytes, *, new: bool = False) -> None:
        if self._is_local:  # fsspec writes these in place, and looks before it creates
            write_atomically(self._path(name), data, new=new)
        else:
            self._fs.pipe_file(self._path(name), data, mode="create" if new else "overwrite")

    def upload(self, name: str, file: Path) -> None:
        """Write a file of this machine as an object."""
        self._tried("write", lambda: self._fs.put_file(str(file), self._path(name)))

    def delete(self, names: Sequence[str]) -> None:
        """Take objects away."""
        if names:
            self._tried("delete", lambda: self._fs.rm([self._path(name) for name in names]))

    # ---- errors

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _tried(self, verb: str, work: Callable[[], T]) -> T:
        """The result of `work`, tried again for a while where the store does not answer."""
        give_up, pause = time.monotonic() + _PATIENCE, 0.25
        while True:
            try:
                return work()
            except AlreadyExists:
                raise
            except Exception as error:  # implementations raise their libraries' own errors
                if _final(error) or time.monotonic() + pause > give_up:
                    raise StorageError(self._told(verb, error)) from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _told(self, verb: str, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            what = "nothing is there" if verb == "read" else "the bucket is not there"
        elif isinstance(error, PermissionError) or "credentials" in str(error).lower():
            what = "no permission; give the environment credentials that may list, read and write there"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error)):
            what = "no room is left there"
        else:
            what = "it cannot be reached or fails"
        words = self.words(error)
        return f"cannot {verb} {self.name}: {what}" + (f" ({words})" if words else "")

    def words(self, error: Exception) -> str:
        """What an error says, in one line and without secrets."""
        told = str(error)
        named = [value for name, value in os.environ.items() if _SECRET.search(name) and len(value) > 5]
        for secret in sorted((*named, *self._secrets), key=len, reverse=True):
            told = told.replace(secret, "***") if secret else told
        return one_line(re.sub(r"://[^/@\s'\"]*:[^/@\s'\"]*@", "://***@", told), 300)


def _final(error: Exception) -> bool:
    """Whether another try cannot help."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return True
    told = str(error)
    return getattr(error, "errno", None) in _FINAL or bool(_FULL.search(told)) or "credentials" in told.lower()


@contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """The file or dataset folder of this machine that holds what is at a path or URL; a URL's is fetched where it has
    changed, of a dataset all but its ledger.

    Raises UserError; what is said of the copy inside the block is said of the URL.
    """
    if not is_url(path):
        yield Path(path)
        return
    store = Store(path)
    copy = _dataset_here(store, path) if store.is_folder() else _file_here(store, path)
    with report_as(copy, store.name):
        yield copy


def _file_here(store: Store, url: str) -> Path:
    folder, name = copy_of(url, "files"), Path(urlsplit(url).path)
    suffix = name.with_suffix("").suffix + name.suffix if name.suffix == ".gz" else name.suffix
    copy = folder / f"{store.mark()[:16]}{suffix}"
    if not copy.is_file():
        store.fetch("", copy)
        for old in set(folder.glob("[!.]*")) - {copy}:  # what starts with a dot another process is fetching
            old.unlink(missing_ok=True)
    return copy


def local_manifest(folder: str) -> Path:
    """The file of this machine that holds the manifest of a dataset folder or URL. Raises UserError where none is."""
    file = Path(folder) / "manifest.json"
    if is_url(folder):
        url = joined(folder, file.name)
        store = Store(url)
        file = _file_here(store, url) if store.names() else file
    if not file.is_file():
        told = public_path(folder)
        raise UserError(f"{told} holds no finished dataset (no manifest.json); give a folder made by `clair build`")
    return file


def _dataset_here(store: Store, url: str) -> Path:
    """The copy of what the manifest tells of. Its own manifest is copied last: with it, the copy is whole."""
    manifest = local_manifest(url)
    files = read_json(manifest).get("files")
    if not isinstance(files, dict) or not all(map(_is_below, files)):
        raise UserError(f"{store.name}: its manifest.json is none of `clair build`; give a folder that it made")
    copies = copy_of(url, "datasets")
    folder = copies / manifest.stem / copies.name[17:]  # ends as the URL does: the report is named after it
    if (folder / "manifest.json").is_file():
        return folder
    for old in copies.glob("*"):
        if old.name != manifest.stem:
            shutil.rmtree(old, ignore_errors=True)
    for name, sha256 in files.items():
        store.fetch(name, folder / name)
        if file_sha256(folder / name) != sha256:
            raise UserError(
                f"{store.name}: {name} is not the one that its manifest.json tells of; a run is writing there or was "
                f"cut off: let it end, or run it again"
            )
    store.fetch("README.md", folder / "README.md")
    write_atomically(folder / "manifest.json", manifest.read_bytes())
    return folder


def _is_below(name: str) -> bool:
    """Whether a file of this name lies inside the folder that it is put into."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


@contextmanager
def report_as(copy: Path, name: str) -> Iterator[None]:
    """What UserErrors say of a copy inside the block is said of the URL of this name."""
    try:
        yield
    except UserError as error:
        if str(copy) not in str(error):
            raise
        raise UserError(str(error).replace(str(copy), name)) from error
