"""Atomic writes of files, canonical JSON, and hashes of content."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from clair.core.errors import UserError

_CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, in UTF-8. Equal values give equal bytes. Lone surrogates are encoded too."""
    return _CANONICAL.encode(value).encode("utf-8", "surrogatepass")


def content_hash(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_atomically(path: str | Path, content: str | bytes, *, new: bool = False) -> None:
    """Write a file so that it has the old or the new content at any instant, also after a power cut.

    With `new`, raises FileExistsError if the file exists. Of several processes that create it, one succeeds.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        publish(temporary, target, new=new)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def publish(temporary: str | Path, target: str | Path, *, new: bool = False) -> None:
    """Flush a finished temporary file to disk, then rename it to `target`.

    With `new`, raises FileExistsError if the target exists.
    """
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    if new:
        os.link(temporary, target)
        os.unlink(temporary)
    else:
        os.replace(temporary, target)
    directory = os.open(Path(target).parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Raises UserError that names a line which is not UTF-8."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data[: error.start].count(10) + 1, data[error.start]
        raise UserError(f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, remedy: str = "delete it and run the same command again") -> dict[str, Any]:
    """Read a JSON object of an output. Raises UserError with the `remedy` if the file is damaged."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged ({type(value).__name__}); {remedy}")
    return value
