"""Endpoints and their secrets: what comes from the environment, and what may be written down.

A secret is the value of `${NAME}`, a value under a secret's name (`api_key`, `Authorization`, `password`), or one that
looks like a key wherever it stands (`sk-...`, `Bearer ...`). Everything else, a URL's `api-version` too, is no secret.
A long value of letters and digits looks like a key too, but not in a URL's query, where deployments have such names.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from clair.recipe import UserError

_ENVIRONMENT = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_HEADER_SIGNS = "!#$%&'*+-.^_`|~"
_HEADER_NAME = re.compile(rf"[A-Za-z0-9{re.escape(_HEADER_SIGNS)}]+")
_SECRET_HEADER = re.compile(r"authorization|key|token|secret|cookie", re.IGNORECASE)
_SECRET_NAME = re.compile(
    r"(?:auth|authorization|key|token|secret|passw(?:or)?d|passphrase|credentials?|cookie|signature|sig|bearer)s?$",
    re.IGNORECASE,
)
_SECRET_WORDS = re.compile(
    "(?:auth|authorization|secrets?|passwords?|passwd|passphrase|pass|pwd|credentials?|cookies?|signature|sig|"
    "bearer|jwt|hmac|otp|apikey)",
    re.IGNORECASE,
)
"""Words that make a name a secret's wherever they stand in it: `X-Auth-Value`, `clientSecret2`."""
_SECRET_PAIR = re.compile(r"(?:api|access|private|secret|subscription)[_-]?keys?(?![a-z])", re.IGNORECASE)
# Of a model or of a cache, not of a user.
_OPEN_NAME = re.compile(
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
_KEY_OF_KNOWN_FORMAT = re.compile(_KEY_FORMATS)
_KEY = re.compile(_KEY_FORMATS + r"|\b(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{32,}\b=*")
_CODE = "code"
"""The query parameter of a function key at Azure, and of other things elsewhere."""
SECRET = "[secret]"  # noqa: S105 (what is written in the place of one)


def public_url(url: str) -> str:
    """The URL without user name, password, query and trailing slash: what may be written down."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


class Endpoint(NamedTuple):
    """What a URL says: where to ask, and what is not written down."""

    base: str
    public: str
    """The base with what of the query is no secret: it may be written down, and tells one deployment from another."""
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
    base, query = public_url(url), dict(parse_qsl(parts.query))
    secrets = {name: _secrets_of_parameter(name, value) for name, value in query.items()}
    shown = {name: value for name, value in query.items() if not secrets[name]}
    public = f"{base}?{urlencode(sorted(shown.items()), safe='${}')}" if shown else base
    hidden = [*(secret for values in secrets.values() for secret in values), *environment_values(query)]
    user, password = parts.username or "", parts.password or ""
    if not (user or password):
        return Endpoint(base, public, None, query, tuple(hidden))
    basic = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    secret = password or user  # a lone user name is somebody's key
    return Endpoint(base, public, f"Basic {basic}", query, (basic, secret, unquote(secret), *hidden))


def _secrets_of_parameter(name: str, value: str) -> list[str]:
    """What is secret in the value of a URL's query, but for `${NAME}`."""
    if _is_secret_name(name):
        return [value] if value and not _ENVIRONMENT.search(value) else []
    return (_KEY if name.lower() == _CODE else _KEY_OF_KNOWN_FORMAT).findall(value)


def without_secrets(value: Any, found: list[str] | None = None, *, secret: bool = False) -> Any:
    """A copy of `value` with `[secret]` in the place of each secret; `${NAME}` stays, which is none.

    `found` gets what was taken out. `secret`: all of its texts are secrets.
    """
    if isinstance(value, Mapping):
        return {
            name: without_secrets(inner, found, secret=secret or _is_secret_name(str(name)))
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(inner, found, secret=secret) for inner in value]
    if not isinstance(value, str):
        return value
    secrets = [value] if secret and value and not _ENVIRONMENT.search(value) else _KEY.findall(value)
    if found is not None:
        found += secrets
    for one in secrets:
        value = value.replace(one, SECRET)
    return value


def secrets_pattern(secrets: Iterable[str]) -> re.Pattern[str]:
    """What finds secrets in a text, as they are and as URLs, JSON and HTML write them."""
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
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    secret = _SECRET_NAME.search(name) or _SECRET_PAIR.search(name) or any(map(_SECRET_WORDS.fullmatch, words))
    return bool(secret) and not _OPEN_NAME.search(name)


def filled(value: Any, where: str) -> Any:
    """`value` with each `${NAME}` in its texts filled in from the environment. Raises UserError for an unset name.

    And for `[secret]`, which an output has in the place of what it does not tell.
    """
    if isinstance(value, Mapping):
        return {name: filled(inner, f"{where}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [filled(inner, where) for inner in value]
    if not isinstance(value, str):
        return value
    if value == SECRET:
        raise UserError(f"{where} is {SECRET}, which stands for a secret that was not written down; put it in again")
    missing = [name for name in _ENVIRONMENT.findall(value) if name not in os.environ]
    if missing:
        raise UserError(f"{where} needs the environment variable {missing[0]}, which is not set")
    return _ENVIRONMENT.sub(lambda match: os.environ[match[1]].strip(), value)


def environment_names(value: Any) -> list[str]:
    """The environment variables that the texts of a value name."""
    if isinstance(value, Mapping | list | tuple):
        inner = value.values() if isinstance(value, Mapping) else value
        return [name for one in inner for name in environment_names(one)]
    return _ENVIRONMENT.findall(value) if isinstance(value, str) else []


def environment_values(value: Any) -> list[str]:
    """What the texts of a value take from the environment."""
    return [os.environ.get(name, "").strip() for name in environment_names(value)]


def environment_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    """Headers with `${NAME}` filled in from the environment. Raises UserError for an unset name or a bare secret."""
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
    sent = filled(headers, "extra.headers")
    for header, value in sent.items():
        if not _sendable(value):
            raise UserError(f"extra.headers.{header} holds characters that no header can: only printable ASCII is sent")
    return sent


def _sendable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def api_key(variable: str | None, role: str) -> str | None:
    """The key in an environment variable; None where the recipe names none. Raises UserError where it is not set."""
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
