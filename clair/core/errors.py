"""Errors a user can act on: `UserError`, exit codes, one-line messages and near-miss names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from clair.core.progress import printable

EXIT_USER_ERROR = 2
"""The user's mistake: found before any work, told in one line; nothing already made is harmed."""
EXIT_SOME_FAILED = 3
"""Some rows failed (their reasons are in dropped.jsonl) and the rest is complete."""
EXIT_BUDGET = 4
"""The budget, or a limit of a server, is used up: everything paid for is kept; run the same command with a larger one,
or later, to go on."""
EXIT_STOPPED = 5
"""Training was stopped by what it found: a guard rail, a loss that is no number, no memory left. The last good
checkpoint is kept; the message says what to change."""
EXIT_INTERRUPTED = 130
"""Ctrl-C: everything finished so far is kept; run the same command again to go on."""


class UserError(ValueError):
    """The user's mistake, told in one line: what was found, what is allowed, what to do."""

    exit_code = EXIT_USER_ERROR


def one_line(told: object, most: int = 400) -> str:
    """What an error, a library or a server says, on one line of at most so many characters, fit for a terminal."""
    return printable(" ".join(str(told).split())[:most])


def error_chain(error: BaseException) -> str:
    """What an error says and what caused it, on one line: a library's own error may say that there was one, no more."""
    words: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        if (text := one_line(cause)) and not any(text in before for before in words):
            words.append(text)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return one_line(": ".join(words) or type(error).__name__)


def near_miss(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no allowed name is near."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
