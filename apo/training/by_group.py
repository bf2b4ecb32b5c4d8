"""One recipe, one run per value of a column: with `by: group`, one policy for each group of users."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from apo.data.sources import column_values
from apo.run_dir.files import RUN
from clair.core.errors import UserError

if TYPE_CHECKING:
    from apo.training.config import TrainConfig

_MAX_NAME = 80
"""Characters of a folder's name."""


def expand_runs(config: TrainConfig, log: Callable[[str], None] = lambda _: None) -> list[TrainConfig]:
    """The runs of a recipe: the recipe itself or, with `by`, one per value, on its rows, in a subfolder of `out`.

    Raises UserError if two values would share a folder, or if `out` already is the folder of one run.
    """
    if config.by is None:
        return [config]
    values, missing = column_values(config.dataset, config.by)
    if missing:
        log(f"note: {missing:,} rows have no {config.by} and are in no run")
    out = Path(config.out)
    if (out / RUN).exists() or (out.exists() and not out.is_dir()):
        raise UserError(f"out: {out} is a file or one run; with `by` it holds one folder per run: choose another")
    folders: dict[str, str | int | bool] = {}
    runs = []
    for value in values:
        name = value_folder(value)
        if (previous := folders.setdefault(name.casefold(), value)) is not value:
            raise UserError(
                f"by: the values {previous!r} and {value!r} would share the folder {out / name}; rename one"
            )
        sources = [s.model_copy(update={"where": {**(s.where or {}), config.by: value}}) for s in config.dataset]
        runs.append(config.model_copy(update={"by": None, "dataset": sources, "out": str(out / name)}))
    return runs


def value_folder(value: str | int | bool) -> str:
    """A value as a folder name: `-` for all but letters, digits, `_`, `.` and `-`; never hidden, never a parent.

    A long value is cut, and ends with eight digits of its hash: two paths often differ at their ends alone.
    """
    name = re.sub(r"[^\w.-]+", "-", str(value)).strip(".-")
    if len(name) > _MAX_NAME:
        name = f"{name[: _MAX_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name or "-"
