"""Endpoints and their secrets: read values from the environment, and keep secrets out of outputs.

A secret is the value of `${NAME}`, a value under a secret name (`api_key`, `Authorization`, `password`), or a text with
the form of a key (`sk-...`, `Bearer ...`). Nothing else is secret, such as the `api-version` of a URL. A long run of
letters and digits has the form of a key too, except in the query of a URL, where deployments have such names.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from clair.core.errors import UserError

_ENVIRONMENT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_HEADER_SIGNS = "!#$%&'*+-.^_`|~"
_HEADER_NAME = re.compile(rf"[A-Za-z0-9{re.escape(_HEADER_SIGNS)}]+")
_SECRET_HEADER = re.compile(r"authorization|key|token|secret|cookie", re.IGNORECASE)
_SECRET_NAME_PATTERN = re.compile(
    r"(?:auth|authorization|key|token|secret|passw(?:or)?d|passphrase|credentials?|cookie|signature|sig|bearer)s?$",
    re.IGNORECASE,
)
_SECRET_WORD_PATTERN = re.compile(
    "(?:auth|authorization|secrets?|passwords?|passwd|passphrase|pass|pwd|credentials?|cookies?|signature|sig|"
    "bearer|jwt|hmac|otp|apikey)",
    re.IGNORECASE,
)
"""Words that make a name secret at any position: `X-Auth-Value`, `clientSecret2`."""
_SECRET_KEY_PATTERN = re.compile(r"(?:api|access|private|secret|subscription)[_-]?keys?(?![a-z])", re.IGNORECASE)
# Tokens and keys of a model or of a cache, not of a user.
_PUBLIC_NAME_PATTERN = re.compile(
    r"(?:eos|bos|pad|unk|stop|end|start|special|cache|sort|max|min)[_-]?(?:token|key)s?$", re.IGNORECASE
)
_KEY_FORMATS = (
    r"\bsk[-_][\w-]{6,}"
    r"|\b(?:pk|rk|gsk|gh[opusr]|github_pat|hf|xox[abprs]|glpat|nvapi|r8|pplx|xai|csk|lsv2|npm|pypi|fw|tgp)[-_][\w-]{16,}"
    r"|\bAKIA[0-9A-Z]{12,}|\bAIza[\w-]{20,}|\beyJ[\w-]{10,}(?:\.[\w-]+)*|\bya29\.[\w-]{10,}|\bSG\.[\w-]{10,}\.[\w-]{10,}"
    r"|\b(?:Bearer|Basic)\s+[\w.~+/=-]{8,}|\b(?i:token|api-?key)\s+(?=\S*\d)[\w.~+/=-]{8,}"
    r"|(?<=://)[^\s/@]+(?=@)|(?<=[?&])(?i:[\w-]*(?:key|token|secret|password|sig|signature))=[^\s&#]{6,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*)"
)
_KNOWN_KEY_PATTERN = re.compile(_KEY_FORMATS)
_KEY_PATTERN = re.compile(_KEY_FORMATS + r"|\b(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{32,}\b=*")
_CODE = "code"
"""The query parameter that holds a function key on Azure, and other values on other servers."""
SECRET = "[secret]"  # noqa: S105 (the text that replaces a secret)


def public_url(url: str) -> str:
    """The URL without user name, password, query and trailing slash, so that it may be written to outputs."""
    split = urlsplit(url)
    host = split.netloc.rpartition("@")[2]
    return urlunsplit((split.scheme, host, split.path.rstrip("/"), "", ""))


class Endpoint(NamedTuple):
    """The parts of an endpoint's URL."""

    base: str
    public: str
    """The base with the public parameters of the query. It identifies a deployment, and may be written to outputs."""
    authorization: str | None
    """The header value for the user name and password of the URL."""
    query: dict[str, str]
    secrets: tuple[str, ...]
    """All possible secrets of the URL, in each form in which a server could repeat them."""


def parse_endpoint(url: str) -> Endpoint:
    """Parse an http(s) URL. Raises ValueError if it has no host or an invalid port."""
    split = urlsplit(url)
    if split.scheme not in ("http", "https"):
        raise ValueError(f"url {public_url(url)!r} is no http(s) URL, such as http://127.0.0.1:8000/v1")
    if not split.hostname or split.port == 0:
        raise ValueError(f"url {public_url(url)!r} has no host, such as http://127.0.0.1:8000/v1")
    base, query = public_url(url), dict(parse_qsl(split.query))
    secrets = {name: _secrets_of_parameter(name, value) for name, value in query.items()}
    public_query = {name: value for name, value in query.items() if not secrets[name]}
    public = f"{base}?{urlencode(sorted(public_query.items()), safe='${}')}" if public_query else base
    secret_values = [*(secret for values in secrets.values() for secret in values), *environment_values(query)]
    user, password = split.username or "", split.password or ""
    if not (user or password):
        return Endpoint(base, public, None, query, tuple(secret_values))
    basic = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    secret = password or user  # a user name without a password is a key
    return Endpoint(base, public, f"Basic {basic}", query, (basic, secret, unquote(secret), *secret_values))


def _secrets_of_parameter(name: str, value: str) -> list[str]:
    """The secrets in the value of a query parameter. `${NAME}` is not secret."""
    if _is_secret_name(name):
        return [value] if value and not _ENVIRONMENT.search(value) else []
    return (_KEY_PATTERN if name.lower() == _CODE else _KNOWN_KEY_PATTERN).findall(value)


def without_secrets(value: Any, removed: list[str] | None = None, *, secret: bool = False) -> Any:
    """A copy of `value` with `[secret]` in place of each secret. `${NAME}` stays, because it is not secret.

    The secrets are appended to `removed`. With `secret`, all texts of the value are secrets.
    """
    if isinstance(value, Mapping):
        return {
            name: without_secrets(inner, removed, secret=secret or _is_secret_name(str(name)))
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(inner, removed, secret=secret) for inner in value]
    if not isinstance(value, str):
        return value
    secrets = [value] if secret and value and not _ENVIRONMENT.search(value) else _KEY_PATTERN.findall(value)
    if removed is not None:
        removed += secrets
    for text in secrets:
        value = value.replace(text, SECRET)
    return value


def secrets_pattern(secrets: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches secrets in a text, as they are and as URLs, JSON and HTML encode them."""
    longest_first = sorted(set(secrets), key=len, reverse=True)
    return re.compile("|".join("".join(map(_as_written, secret)) for secret in longest_first) or r"(?!)")


def _as_written(character: str) -> str:
    if character.isalnum() and character.isascii():
        return character
    code = ord(character)
    in_url = "".join(f"%{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
    in_html = html.escape(character)
    forms = [re.escape(character), f"(?i:{in_url}|u{code:04x}|&#0*{code};|&#x0*{code:x};)"]
    if in_html != character:
        forms.append(re.escape(in_html))
    if character == " ":
        forms.append(r"\+")
    return rf"(?:\\*(?:{'|'.join(forms)}))"


def _is_secret_name(name: str) -> bool:
    tokens = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    secret = _SECRET_NAME_PATTERN.search(name) or _SECRET_KEY_PATTERN.search(name)
    secret = secret or any(map(_SECRET_WORD_PATTERN.fullmatch, tokens))
    return bool(secret) and not _PUBLIC_NAME_PATTERN.search(name)


def expand_environment(value: Any, location: str) -> Any:
    """`value` with each `${NAME}` in its texts replaced by the environment variable.

    Raises UserError for an unset variable, and for `[secret]`, which replaces secrets in outputs. `location` names the
    value in errors.
    """
    if isinstance(value, Mapping):
        return {name: expand_environment(inner, f"{location}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [expand_environment(inner, location) for inner in value]
    if not isinstance(value, str):
        return value
    if value == SECRET:
        raise UserError(
            f"{location} is {SECRET}, which replaced a secret that is not written to outputs; put it in again"
        )
    missing = [name for name in _ENVIRONMENT.findall(value) if name not in os.environ]
    if missing:
        raise UserError(f"{location} needs the environment variable {missing[0]}, which is not set")
    return _ENVIRONMENT.sub(lambda match: os.environ[match[1]].strip(), value)


def environment_names(value: Any) -> list[str]:
    """The environment variables that the texts of a value name."""
    if isinstance(value, Mapping | list | tuple):
        inner = value.values() if isinstance(value, Mapping) else value
        return [name for item in inner for name in environment_names(item)]
    return _ENVIRONMENT.findall(value) if isinstance(value, str) else []


def environment_values(value: Any) -> list[str]:
    """The values of the environment variables that the texts of a value name."""
    return [os.environ.get(name, "").strip() for name in environment_names(value)]


def environment_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    """Headers with each `${NAME}` replaced. Raises UserError for an unset variable or a secret in the recipe itself."""
    for header, value in headers.items():
        if not _HEADER_NAME.fullmatch(header):
            raise UserError(f"extra.headers has the name {header!r}; allowed are letters, digits and {_HEADER_SIGNS}")
        if not isinstance(value, str):
            raise UserError(f"extra.headers.{header} is {type(value).__name__}, not text; put it into quotes")
        if not _ENVIRONMENT.search(value) and _SECRET_HEADER.search(header):
            raise UserError(
                f"extra.headers.{header} looks like a secret written into the recipe; put it into an environment "
                f"variable and write ${{NAME}}"
            )
    sent = expand_environment(headers, "extra.headers")
    for header, value in sent.items():
        if not _sendable(value):
            raise UserError(f"extra.headers.{header} holds characters that no header can: only printable ASCII is sent")
    return sent


def _sendable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def api_key(variable: str | None, role: str) -> str | None:
    """The key in an environment variable, or None if the recipe names none. Raises UserError if it is not set."""
    if variable is None:
        return None
    if without_secrets(variable) != variable:
        raise UserError(
            f"{role}.api_key_env is the name of an environment variable, and what stands there looks like a key"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{role} needs the environment variable {variable}, which is not set; export it and run again")
    if not _sendable(key) or " " in key:
        raise UserError(
            f"{role}: the key in the environment variable {variable} is none: it has spaces, line breaks or characters "
            f"that are not ASCII"
        )
    return key
