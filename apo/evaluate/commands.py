"""apo eval: what is typed to evaluate. Heavy imports stay inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure a model: how good it is, and how sure that is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _eval() -> None:
    """Measure a model: how good it is, and how sure that is."""


@app.command()
def show(
    results: Annotated[list[Path], typer.Argument(help="Result folders of `apo eval mixeval`.")],
) -> None:
    """Print the scores of result folders, with intervals and what is unresolved."""
    from apo.evaluate.results import read_results
    from apo.evaluate.tables import score_table
    from clair.terminal import show as print_

    for folder in results:
        print_(score_table(read_results(folder)))
