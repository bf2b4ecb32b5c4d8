"""Run a command line application, and turn its errors into messages and exit codes. For `clair` and `apo`."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from clair.core.errors import EXIT_USER_ERROR, UserError, one_line
from clair.core.progress import printable

SYSTEM_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EMFILE,
}
"""The errors of disks and folders that a user can mend. Any other OSError is a bug, and its traceback is shown."""


def run_application(application: Callable[[], None]) -> None:
    """Run a typer application. A UserError becomes one line on stderr and its exit code; Ctrl-C exits with 130."""
    try:
        application()
    except (UserError, OSError) as error:
        message = system_error_message(error) if isinstance(error, OSError) else str(error)
        if message is None:
            raise
        print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else EXIT_USER_ERROR)


def system_error_message(error: OSError) -> str | None:
    """One line on an error of `SYSTEM_ERRNOS` and what to do; None for any other error."""
    if error.errno not in SYSTEM_ERRNOS:
        return None
    return f"{one_line(error)}; make room or give permission, then run the same command again"
