"""Endpoints and their secrets: what comes from the environment, and what may be written down."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from clair.recipe import UserError

_ENVIRONMENT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_HEADER = re.compile(r"authorization|key|token|secret|cookie", re.IGNORECASE)


def public_url(url: str) -> str:
    """The URL without user name, password, query and trailing slash: what may be written down."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


class Endpoint(NamedTuple):
    """What a URL says: where to ask, and what is not written down."""

    base: str
    authorization: str | None
    """The header that the URL's user name and password make."""
    query: dict[str, str]
    secrets: tuple[str, ...]
    """Everything in the URL that may be secret, in each form in which a server could repeat it."""


def endpoint_of(url: str) -> Endpoint:
    """The parts of an http(s) URL. Raises ValueError where it has no host or a port that is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"url {public_url(url)!r} is no http(s) URL, such as http://127.0.0.1:8000/v1")
    if not parts.hostname or parts.port == 0:
        raise ValueError(f"url {public_url(url)!r} has no host, such as http://127.0.0.1:8000/v1")
    query = dict(parse_qsl(parts.query))
    user, password = parts.username or "", parts.password or ""
    if not (user or password):
        return Endpoint(public_url(url), None, query, tuple(query.values()))
    basic = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    hidden = password or user  # a lone user name is somebody's key
    return Endpoint(public_url(url), f"Basic {basic}", query, (basic, hidden, unquote(hidden), *query.values()))


def environment_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    """Headers with `${NAME}` filled in from the environment. Raises UserError for an unset name or a bare secret."""
    filled = {}
    for header, value in headers.items():
        if not isinstance(value, str):
            raise UserError(f"extra.headers.{header} is {type(value).__name__}, not text; put it into quotes")
        names = _ENVIRONMENT.findall(value)
        if not names and _SECRET_HEADER.search(header):
            raise UserError(
                f"extra.headers.{header} looks like a secret written into the recipe; put it into an environment "
                f"variable and write ${{NAME}}"
            )
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise UserError(f"extra.headers.{header} needs the environment variable {missing[0]}, which is not set")
        filled[header] = _ENVIRONMENT.sub(lambda match: os.environ[match[1]].strip(), value)
        if not _sendable(filled[header]):
            raise UserError(f"extra.headers.{header} holds characters that no header can: only printable ASCII is sent")
    return filled


def header_secrets(headers: Mapping[str, str]) -> tuple[str, ...]:
    """What `environment_headers` takes from the environment."""
    return tuple(os.environ.get(name, "").strip() for value in headers.values() for name in _ENVIRONMENT.findall(value))


def environment_names(headers: Mapping[str, Any]) -> list[str]:
    """The environment variables that headers name."""
    return [name for value in headers.values() if isinstance(value, str) for name in _ENVIRONMENT.findall(value)]


def _sendable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def api_key(variable: str | None, role: str) -> str | None:
    """The key in an environment variable; None where the recipe names none. Raises UserError where it is not set."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{role} needs the environment variable {variable}, which is not set; export it and run again")
    if not _sendable(key) or " " in key:
        raise UserError(
            f"{role}: the key in the environment variable {variable} is none: it has spaces, line breaks or characters "
            f"that are not ASCII"
        )
    return key
