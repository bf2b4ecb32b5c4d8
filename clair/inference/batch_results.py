"""Lines of a batch's result files: what each says about which request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from clair.core.errors import one_line
from clair.inference.batch_queue import NOTHING, Outcome
from clair.inference.model import RequestFailed, encodable, reply_of
from clair.ledger.ledger import Tokens

_NOT_RUN = ("batch_expired", "batch_cancelled")
_ANOTHER_TRY = (408, 409, 425, 429)


def outcome_of(line: str, redacted: Callable[[str], str]) -> Outcome | None:
    """The outcome that a line of the output or the error file tells; None where it cannot be read.

    What is said of an error is `redacted`; a model's words stay as they are.
    """
    try:
        result = json.loads(line)
        key, response, error = result["custom_id"], result.get("response") or {}, result.get("error")
        status, body = response.get("status_code"), response.get("body")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(key, str):
        return None
    if not error and isinstance(status, int) and 200 <= status < 300:
        raw = json.dumps(body, ensure_ascii=False)
        return _answered(key, raw if raw == encodable(raw) else json.dumps(body), redacted)
    code, words = _why(error or (body.get("error") if isinstance(body, Mapping) else None))
    words = redacted(words)
    if code in _NOT_RUN or not isinstance(status, int) or status >= 500 or status in _ANOTHER_TRY:
        return again(key, words, NOTHING, listed=code in _NOT_RUN)
    return Outcome(key, None, NOTHING, f"http_{status}: {status}: {words}")


def again(key: str, why: str, billed: Tokens | None, *, listed: bool = False) -> Outcome:
    """The outcome of a request that is worth another try."""
    return Outcome(key, None, billed, f"again: {why}", listed)


def _answered(key: str, raw: str, redacted: Callable[[str], str]) -> Outcome:
    try:
        usage = reply_of(raw, tools=True).usage  # whether the request has tools is known where the reply is read
    except RequestFailed as error:
        return Outcome(key, redacted(raw), None, redacted(f"{error.reason}: {error.detail}"))
    if "prompt_tokens" in usage and "completion_tokens" in usage:
        return Outcome(key, raw, Tokens(usage["prompt_tokens"], usage["completion_tokens"]))
    return Outcome(key, raw, None)


def _why(error: Any) -> tuple[str | None, str]:
    """(code, words) of an error object, or of whatever a server put in its place."""
    if not isinstance(error, Mapping):
        return None, encodable(one_line(error or "no reply", 300))
    code = error.get("code")
    words = one_line(error.get("message") or code or "no reply", 300)
    return code if isinstance(code, str) else None, encodable(words)
