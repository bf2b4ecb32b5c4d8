"""What a command says on the way: lines on stderr, and quiet from the libraries below."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from clair.recipe import EXIT_BUDGET, EXIT_INTERRUPTED, EXIT_SOME_FAILED

EVERY = 5.0
"""Seconds between two lines of `pace`."""


def tell(message: str) -> None:
    """One line to a person, on stderr."""
    print(message, file=sys.stderr, flush=True)


def end_early(stopped: str | None, failed: str | None) -> None:
    """End a command whose work was stopped, or (`failed`: what to say) came to no result; go on where neither is."""
    import typer

    if stopped:
        tell(f"{stopped}: every reply so far is kept; run the same command again to go on")
        raise typer.Exit(EXIT_INTERRUPTED if stopped == "interrupted" else EXIT_BUDGET)
    if failed:
        tell(failed)
        raise typer.Exit(EXIT_SOME_FAILED)


def quieten() -> None:
    """One bar is enough: transformers and datasets keep theirs, and their advice, to themselves."""
    import logging as plain
    import warnings

    import datasets
    from transformers.utils import logging

    # bitsandbytes 0.50 looks for a faster kernel when peft imports it, and says that there is none.
    plain.getLogger("bitsandbytes.backends.cpu.ops").setLevel(plain.ERROR)
    # peft 0.21 and TRL 1.16 still use the old name, and nobody who trains can change that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def bar(**options: Any) -> Any:
    """A rich progress bar on stderr that fits a narrow terminal: what, how far, how long to go."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), **options)


@contextmanager
def pace(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """How far a long piece of work is, by what is called with every few that are done: a bar in a terminal, which goes
    at the end, else a line every `EVERY` seconds. Nothing unless `shown`, as of all processes but the first.
    """
    drawn, done, due = bar(transient=True), 0, time.monotonic() + EVERY
    task = drawn.add_task(what, total=total)
    in_terminal = shown and drawn.console.is_terminal

    def advance(count: int) -> None:
        nonlocal done, due
        done += count
        drawn.update(task, completed=done)
        if shown and not in_terminal and time.monotonic() >= due and done < total:
            tell(f"{what}: {done:,} of {total:,}")
            due = time.monotonic() + EVERY

    with drawn if in_terminal and total else nullcontext():
        yield advance
