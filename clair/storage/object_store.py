"""Object stores through fsspec: `s3://bucket/run`, `gs://...`, `file:///...` in place of a folder or a file.

Credentials come from the environment, as each implementation reads them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...), and
are never written: a URL with a password is refused, and error messages are stripped of the environment's secrets.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from clair.core.backoff import backoff
from clair.core.errors import UserError, one_line
from clair.core.files import content_hash, write_atomically
from clair.core.urls import public_url

_EXTRAS = {"s3": "s3", "s3a": "s3"}
"""The extra of this package that installs an implementation. For others fsspec names the package to install."""
_LOCAL = ("file", "local")
_NO_VERSION = ("name", "url", "size", "type", "mimetype", "partial")
"""What implementations say of an object that stays the same when its content changes."""
_SECRET_NAME = re.compile(r"secret|token|password|key", re.IGNORECASE)
_PATIENCE = 30.0  # seconds of retries for a store that does not answer
_FIRST_BACKOFF = 0.25
_MAX_BACKOFF = 5.0
_FINAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
_FULL_PATTERN = re.compile(r"quota|no space|storage ?full|insufficient storage|EntityTooLarge", re.IGNORECASE)
PASSWORD_IN_URL = "a URL with a password in it; give credentials by the environment"  # noqa: S105 (a message)
T = TypeVar("T")


class StorageError(UserError):
    """An object store cannot be used. Everything paid for is kept, in the store or on this machine."""


class InUse(StorageError):
    """Another run has locked a folder or URL."""


class AlreadyExists(Exception):
    """The object to be created exists already."""


class Store:
    """The objects below one URL. Every method raises StorageError with a message for the user, without secrets."""

    def __init__(self, url: str) -> None:
        """Make no request. Raises StorageError for an unknown protocol, with the package to install."""
        self.name = public_url(url)
        if urlsplit(url).password:
            raise StorageError(f"{self.name}: {PASSWORD_IN_URL}")
        self._secrets = tuple(value for _, value in parse_qsl(urlsplit(url).query))
        self._is_local = url.partition("://")[0] in _LOCAL
        self._fs, self._root = self._open(url)

    def _open(self, url: str) -> tuple[Any, str]:
        import fsspec

        protocol = url.partition("://")[0]
        try:
            options = {"auto_mkdir": True} if self._is_local else {}
            fs, root = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
        except ImportError as error:
            if protocol in _EXTRAS:
                problem = f"{protocol}:// needs s3fs: pip install 'clair-apo[{_EXTRAS[protocol]}]'"
            else:
                problem = f"{protocol}:// needs a package that is not installed: {error}"
            raise StorageError(f"{self.name}: {problem}") from error
        except Exception as error:
            raise StorageError(f"{self.name} cannot be opened: {self.redacted_message(error)}") from error
        return fs, root.rstrip("/")

    # ---- reading

    def names(self, prefix: str = "") -> list[str]:
        """The names of the objects below `prefix`, sorted. Empty if there are none."""
        path = f"{self._root}/{prefix}".rstrip("/")
        paths = self._retry("list", lambda: self._find(path))
        unfinished = re.compile(r"/\.[^/]+\.tmp$")  # local temporary files of a killed run
        return sorted(name.removeprefix(f"{self._root}/") for name in paths if not unfinished.search(name))

    def _find(self, path: str) -> list[str]:
        try:
            return self._fs.find(path)
        except FileNotFoundError:
            return []

    def get(self, name: str) -> bytes:
        """The content of an object. Raises StorageError if it does not exist."""
        return self._retry("read", lambda: self._fs.cat_file(self._path(name)))

    def get_all(self, names: Sequence[str]) -> list[bytes]:
        """The contents of several objects, fetched concurrently if the implementation can."""
        paths = [self._path(name) for name in names]
        contents = self._retry("read", lambda: self._fs.cat(paths)) if paths else {}
        return [contents[path] for path in paths]

    def fetch(self, name: str, file: Path) -> None:
        """Copy an object of any size to a local file, atomically."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            self._retry("read", lambda: self._fs.get_file(self._path(name), str(temporary)))
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)

    def is_folder(self) -> bool:
        """True if there are objects below the URL and none at it."""
        return bool(self._retry("read", lambda: self._fs.info(self._root))["type"] == "directory")

    def mark(self, name: str = "") -> str:
        """A hash that changes with an object: of its address and what the store says of its size and version.

        It is another one each time if the store says no version (no date, no ETag, nothing that implementations add).
        """
        path = self._path(name)
        info = self._retry("read", lambda: self._fs.info(path))
        version = {name: str(value) for name, value in info.items() if name not in _NO_VERSION and value is not None}
        return content_hash([path, info.get("size"), version or time.time_ns()])

    # ---- writing

    def put(self, name: str, data: bytes) -> None:
        """Write an object, atomically."""
        self._retry("write", lambda: self._write(name, data))

    def create(self, name: str, data: bytes) -> None:
        """Write a new object. Raises AlreadyExists if it exists with another content."""

        def write() -> None:
            try:
                self._write(name, data, new=True)
            except FileExistsError:
                # An earlier attempt of this call may have succeeded although its response was lost.
                if self._fs.cat_file(self._path(name)) != data:
                    raise AlreadyExists(name) from None

        self._retry("write", write)

    def _write(self, name: str, data: bytes, *, new: bool = False) -> None:
        if self._is_local:  # fsspec does not write local files atomically
            write_atomically(self._path(name), data, new=new)
        else:
            self._fs.pipe_file(self._path(name), data, mode="create" if new else "overwrite")

    def upload(self, name: str, file: Path) -> None:
        """Write a local file as an object."""
        self._retry("write", lambda: self._fs.put_file(str(file), self._path(name)))

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects."""
        if names:
            self._retry("delete", lambda: self._fs.rm([self._path(name) for name in names]))

    # ---- errors

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _retry(self, verb: str, work: Callable[[], T]) -> T:
        """Run `work`, with retries for `_PATIENCE` seconds if the store does not answer. Returns its result."""
        deadline, attempt = time.monotonic() + _PATIENCE, 0
        while True:
            attempt += 1
            pause = backoff(attempt, _FIRST_BACKOFF, _MAX_BACKOFF)
            try:
                return work()
            except AlreadyExists:
                raise
            except Exception as error:  # each implementation raises the errors of its own libraries
                if _is_final(error) or time.monotonic() + pause > deadline:
                    raise StorageError(self._failure_message(verb, error)) from error
            time.sleep(pause)

    def _failure_message(self, verb: str, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            problem = "nothing is there" if verb == "read" else "the bucket is not there"
        elif isinstance(error, PermissionError) or "credentials" in str(error).lower():
            problem = "no permission; give the environment credentials that may list, read and write there"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL_PATTERN.search(str(error)):
            problem = "no room is left there"
        else:
            problem = "it cannot be reached or fails"
        detail = self.redacted_message(error)
        return f"cannot {verb} {self.name}: {problem}" + (f" ({detail})" if detail else "")

    def redacted_message(self, error: Exception) -> str:
        """The message of an error, in one line and without secrets."""
        message = str(error)
        variables = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) > 5]
        for secret in sorted((*variables, *self._secrets), key=len, reverse=True):
            message = message.replace(secret, "***") if secret else message
        return one_line(re.sub(r"://[^/@\s'\"]*:[^/@\s'\"]*@", "://***@", message), 300)


def _is_final(error: Exception) -> bool:
    """True if a retry cannot help."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return True
    message, number = str(error), getattr(error, "errno", None)
    return number in _FINAL_ERRNOS or bool(_FULL_PATTERN.search(message)) or "credentials" in message.lower()
