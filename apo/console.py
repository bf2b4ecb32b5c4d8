"""Messages of commands that end early, and silencing the libraries that commands use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clair.core.errors import EXIT_BUDGET, EXIT_INTERRUPTED, EXIT_SOME_FAILED
from clair.core.progress import print_line, progress


def end_early(stopped: str | None, failed: str | None) -> None:
    """Exit with a message if the work was stopped, or has no result (`failed` is the message); else return."""
    import typer

    if stopped:
        print_line(f"{stopped}: every reply so far is kept; run the same command again to go on")
        raise typer.Exit(EXIT_INTERRUPTED if stopped == "interrupted" else EXIT_BUDGET)
    if failed:
        print_line(failed)
        raise typer.Exit(EXIT_SOME_FAILED)


def end_without_result(outcome: Any, result: object, rows: str, missing: str) -> None:
    """Exit with a message if an evaluation was stopped, or has no result, since `rows` got no reply; else return."""
    failed = (
        f"{outcome.failed} {rows} got no reply ({outcome.first_failure}), so there is no {missing}; everything else is "
        f"kept, run the same command again"
    )
    end_early(outcome.stopped, failed if result is None else None)


@contextmanager
def ending_training_on_interrupt() -> Iterator[None]:
    """Exit with a message if training is interrupted; typer itself would exit without one."""
    import typer

    try:
        yield
    except KeyboardInterrupt as stop:
        condition = "" if str(stop) else ", if there is one"
        print_line(f"{str(stop) or 'interrupted'}; the same command goes on from the last checkpoint{condition}")
        raise typer.Exit(EXIT_INTERRUPTED) from stop


def quieten(*modules: str) -> None:
    """Import datasets, transformers and `modules`, and silence their progress bars and advice: the command has its own.

    Python's garbage collector is off meanwhile, which saves a fifth of the time: nothing that is imported is garbage.
    It is left out of later collections, which would read all of it each time.
    """
    import gc
    import importlib
    import os
    import warnings

    # peft 0.21 and TRL 1.16 still use the old name; users cannot change that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    with progress("loading", shown=os.environ.get("RANK", "0") == "0"):  # takes seconds before the first message
        gc.disable()
        try:
            import datasets
            from transformers.utils import logging

            for module in modules:
                importlib.import_module(module)
        finally:
            gc.freeze()
            gc.enable()

    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
