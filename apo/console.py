"""What a command says on the way: lines on stderr, and quiet from the libraries below."""

from __future__ import annotations

import sys

from clair.recipe import EXIT_BUDGET, EXIT_INTERRUPTED, EXIT_SOME_FAILED


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
    import warnings

    import datasets
    from transformers.utils import logging

    # peft 0.21 and TRL 1.16 still use the old name, and nobody who trains can change that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
