"""Running a command line: how the two commands of the project end. Shared by `clair` and `apo`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from clair.recipe import EXIT_USER_ERROR, UserError


def run(application: Callable[[], None]) -> None:
    """Run a typer application; a UserError becomes one line on stderr and exit code 2. Typer ends Ctrl-C with 130."""
    try:
        application()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
