"""A local path or the URL of an object store: its local copy, and the name that outputs may contain."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator

from clair.core.errors import UserError
from clair.core.files import content_hash, file_sha256, read_json, write_atomically
from clair.core.urls import public_url
from clair.storage.object_store import PASSWORD_IN_URL, Store


class Location(str):
    """A local path or the URL of an object store: the text of a recipe's key or of an argument.

    It is text in JSON and in YAML. As the type of a recipe's key it refuses an empty text and a URL with a password.
    """

    __slots__ = ()

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> Any:
        from pydantic_core import core_schema

        as_text = core_schema.plain_serializer_function_ser_schema(_as_text, info_arg=True)
        text = core_schema.str_schema(min_length=1)
        return core_schema.no_info_after_validator_function(cls._parse, text, serialization=as_text)

    @classmethod
    def _parse(cls, text: str) -> Location:
        if "://" in text and urlsplit(text).password:
            raise ValueError(PASSWORD_IN_URL)
        return cls(text)

    def __truediv__(self, name: str) -> Location:
        """The location of `name` below this folder or URL."""
        return Location(f"{self.rstrip('/')}/{name}" if self.is_url else Path(self) / name)

    @property
    def is_url(self) -> bool:
        """True for a URL of an object store, False for a local path."""
        return "://" in self

    @property
    def public(self) -> str:
        """The text as outputs may contain it: a URL without its query, which may hold a signature."""
        return public_url(self) if self.is_url else str(self)

    @property
    def account(self) -> str:
        """The account that a run with this output is billed to. For a URL it is the same on every machine."""
        return public_url(self) if self.is_url else str(Path(self).resolve())

    @property
    def folder(self) -> Path:
        """The local folder that a run works in: the path itself, or the folder of the local copy of a URL."""
        return self.cache_folder("runs") if self.is_url else Path(self)

    def cache_folder(self, kind: str) -> Path:
        """The folder of the local copy of a URL. `kind` is the subfolder of the cache."""
        name = re.sub(r"[^\w.-]+", "-", Path(urlsplit(self).path).name)[-40:]
        return cache_root() / kind / f"{content_hash(public_url(self))[:16]}-{name}"

    @contextmanager
    def local_copy(self) -> Iterator[Path]:
        """The local file or dataset folder. A URL is fetched if it has changed, without its ledger.

        Raises UserError. UserErrors of the block that name the local copy are raised with the URL instead.
        """
        if not self.is_url:
            yield Path(self)
            return
        store = Store(self)
        copy = self._copy_dataset(store) if store.is_folder() else self._copy_file(store)
        with report_as(copy, store.name):
            yield copy

    def manifest(self) -> Path:
        """The local file of the manifest of a dataset folder or URL. Raises UserError if there is none."""
        location = self / "manifest.json"
        file = Path(location)
        if self.is_url and (store := Store(location)).names():
            file = location._copy_file(store)
        if not file.is_file():
            raise UserError(
                f"{self.public} holds no finished dataset (no manifest.json); give a folder made by `clair build`"
            )
        return file

    def _copy_file(self, store: Store) -> Path:
        folder, name = self.cache_folder("files"), Path(urlsplit(self).path)
        suffix = name.with_suffix("").suffix + name.suffix if name.suffix == ".gz" else name.suffix
        copy = folder / f"{store.mark()[:16]}{suffix}"
        if not copy.is_file():
            store.fetch("", copy)
            for old in set(folder.glob("[!.]*")) - {copy}:  # another process is fetching files with a leading dot
                old.unlink(missing_ok=True)
        return copy

    def _copy_dataset(self, store: Store) -> Path:
        """Copy the files that the manifest lists. The manifest is copied last, so that a copy with it is complete."""
        manifest = self.manifest()
        files = read_json(manifest).get("files")
        if not isinstance(files, dict) or not all(map(_is_below, files)):
            raise UserError(f"{store.name}: its manifest.json is none of `clair build`; give a folder that it made")
        copies = self.cache_folder("datasets")
        folder = copies / manifest.stem / copies.name[17:]  # ends like the URL, because a report is named after it
        if (folder / "manifest.json").is_file():
            return folder
        for old in copies.glob("*"):
            if old.name != manifest.stem:
                shutil.rmtree(old, ignore_errors=True)
        for name, sha256 in files.items():
            store.fetch(name, folder / name)
            if file_sha256(folder / name) != sha256:
                raise UserError(
                    f"{store.name}: {name} does not match its manifest.json; a run is writing there or was cut off: "
                    f"let it end, or run it again"
                )
        store.fetch("README.md", folder / "README.md")
        write_atomically(folder / "manifest.json", manifest.read_bytes())
        return folder


def _as_text(location: Any, info: Any) -> str:
    return Location(location).public if (info.context or {}).get("public") else str(location)


def cache_root() -> Path:
    """`$CLAIR_CACHE`, else `~/.cache/clair-apo`."""
    return Path(os.environ.get("CLAIR_CACHE") or Path.home() / ".cache" / "clair-apo")


def local(path: Path | None) -> Path | None:
    """`path` itself, for outputs that are local only; also a typer callback. Raises UserError for a URL."""
    if path is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # Path removes one of two slashes
        url = Location(str(path).replace(":/", "://", 1)).public
        raise UserError(f"{url} is a URL, and this is written to local files only; give a path, and copy it there")
    return path


LocalPath = Annotated[Path, AfterValidator(local)]
"""The type of a recipe's key that names a local output."""


def _is_below(name: str) -> bool:
    """True if a file of this name stays inside the folder that it is written to."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


@contextmanager
def report_as(copy: Path, name: str) -> Iterator[None]:
    """Replace the path of a local copy by `name` in UserErrors of the block."""
    try:
        yield
    except UserError as error:
        if str(copy) not in str(error):
            raise
        raise UserError(str(error).replace(str(copy), name)) from error
