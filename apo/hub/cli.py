"""The command `apo push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apo.console import quieten


def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    name: Annotated[str, typer.Argument(help="org/name on the hub.")],
    checkpoint: Annotated[
        int | None, typer.Option(help="Push the checkpoint of this step instead of the final model.")
    ] = None,
    evidence: Annotated[
        list[Path] | None,
        typer.Option(help="A result folder of apo eval or apo compare, for the card; repeatable."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model's name on the hub, if the run was trained on a folder.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; without it, it is private.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send the files.")] = False,
) -> None:
    """Send a run's model or adapter to the hub, with a card. Without --yes, only show the files and the card."""
    quieten()
    from apo.hub.push import files_to_push
    from apo.run_dir.files import CARD
    from clair.core.console import show
    from clair.storage.hub import push_files, sending_nothing

    files = files_to_push(run, name, checkpoint=checkpoint, base=base, evidence=evidence or [])
    if yes:
        show(push_files(files, name, kind="model", private=not public, message="Trained with clair-apo"))
        return
    for path, content in sorted(files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        show(f"{path}  {size:,} bytes")
    card = files[CARD]
    assert isinstance(card, bytes), "the card is written for each push"
    show(card.decode())
    show(sending_nothing(len(files), name, private=not public))
