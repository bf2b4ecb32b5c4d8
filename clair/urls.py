"""Endpoints and their secrets: what comes from the environment, and what may be written down."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit, urlunsplit

from clair.recipe import UserError

_ENVIRONMENT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_HEADER = re.compile(r"authorization|key|token|secret|cookie", re.IGNORECASE)


def public_url(url: str) -> str:
    """The URL without user name, password, query and trailing slash: what may be written down."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def environment_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers with `${NAME}` filled in from the environment. Raises UserError for an unset name or a bare secret."""
    filled = {}
    for header, value in headers.items():
        names = _ENVIRONMENT.findall(value)
        if not names and _SECRET_HEADER.search(header):
            raise UserError(
                f"extra.headers.{header} looks like a secret written into the recipe; put it into an environment "
                f"variable and write ${{NAME}}"
            )
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise UserError(f"extra.headers.{header} needs the environment variable {missing[0]}, which is not set")
        filled[header] = _ENVIRONMENT.sub(lambda match: os.environ[match[1]], value)
    return filled


def api_key(variable: str | None, role: str) -> str | None:
    """The key in an environment variable; None where the recipe names none. Raises UserError where it is not set."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{role} needs the environment variable {variable}, which is not set; export it and run again")
    return key
