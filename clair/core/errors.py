"""Errors a user can act on: `UserError`, exit codes, one-line messages and near-miss names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from clair.core.progress import printable

E = TypeVar("E", bound=BaseException)
EXIT_USER_ERROR = 2
"""An error of the user, reported in one line before any work. Existing outputs are unharmed."""
EXIT_SOME_FAILED = 3
"""Some rows failed, for the reasons in dropped.jsonl. All other rows are complete."""
EXIT_BUDGET = 4
"""The budget, or a limit of a server, is used up. Everything paid for is kept: run the same command with a larger
budget, or later, to continue."""
EXIT_STOPPED = 5
"""Training stopped itself: a guard's limit, a loss that is not finite, or no memory left. The last good checkpoint is
kept, and the message says what to change."""
EXIT_INTERRUPTED = 130
"""Ctrl-C: everything finished is kept. Run the same command again to continue."""


class UserError(ValueError):
    """An error of the user. Its message is one line: what was found, what is allowed, what to do."""

    exit_code = EXIT_USER_ERROR


def one_line(value: object, max_length: int = 400) -> str:
    """The text of an error or of a server's reply, on one line of at most `max_length` printable characters."""
    return printable(" ".join(str(value).split())[:max_length])


def error_chain(error: BaseException) -> str:
    """The messages of an error and of its causes, on one line. A library's own message often hides the cause."""
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        if (message := one_line(cause)) and not any(message in previous for previous in messages):
            messages.append(message)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return one_line(": ".join(messages) or type(error).__name__)


def find_cause(error: BaseException | None, kind: type[E]) -> E | None:
    """The error or the first of its causes that is of this kind, else None. Libraries wrap each other's errors."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def list_some(values: Sequence[object], max_count: int) -> str:
    """The first values, such as `'a', 'b' and 3 more`."""
    more = f" and {len(values) - max_count} more" if len(values) > max_count else ""
    return ", ".join(map(repr, values[:max_count])) + more


def check_name(problem: str, name: str, allowed: Collection[str], listed: str = "allowed") -> None:
    """Raise UserError unless a name is allowed: "`problem` 'name' (did you mean 'x'?); `listed`: x, y"."""
    if name not in allowed:
        raise UserError(f"{problem} {name!r}{near_miss(name, allowed)}; {listed}: {', '.join(allowed) or 'none'}")


def near_miss(name: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the allowed name that is most similar, or nothing if none is."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
