"""What a command says on the way: what ended early, and quiet from the libraries below."""

from __future__ import annotations

import sys

from clair.core.errors import EXIT_BUDGET, EXIT_INTERRUPTED, EXIT_SOME_FAILED
from clair.core.progress import progress, tell


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
    import os
    import warnings

    with progress("loading", shown=os.environ.get("RANK", "0") == "0"):  # seconds, and before anything else is said
        import datasets
        from transformers.utils import logging

    # bitsandbytes 0.50 looks for a faster kernel when peft imports it, and says that there is none.
    plain.getLogger("bitsandbytes.backends.cpu.ops").setLevel(plain.ERROR)
    # peft 0.21 and TRL 1.16 still use the old name, and nobody who trains can change that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
