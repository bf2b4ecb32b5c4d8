"""Running a command line: how the two commands of the project end. Shared by `clair` and `apo`."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from clair.core.errors import EXIT_USER_ERROR, UserError, one_line
from clair.core.progress import printable

OF_THE_SYSTEM = {
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
"""What a disk or a folder does to the user; any other OSError is a mistake of ours, and its traceback is wanted."""


def run(application: Callable[[], None]) -> None:
    """Run a typer application; a UserError becomes one line on stderr and its exit code. Typer ends Ctrl-C with 130."""
    try:
        application()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if (told := of_the_system(error)) is None:
            raise
        print(f"error: {printable(told)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def of_the_system(error: OSError) -> str | None:
    """What a disk or a folder did to the user, and what to do, in one line; None where it is a mistake of ours."""
    if error.errno not in OF_THE_SYSTEM:
        return None
    return f"{one_line(error)}; make room or permissions, then run the same command again"
