"""One recipe, a run for each value of a column of its pairs: `by: group`, a policy for each group of users."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from apo.data.sources import column_values
from apo.run_dir.files import RUN
from clair.core.errors import UserError

if TYPE_CHECKING:
    from apo.training.config import TrainConfig

_LONGEST = 80


def expand_runs(config: TrainConfig, tell: Callable[[str], None] = lambda _: None) -> list[TrainConfig]:
    """The runs that a recipe asks for: itself, or with `by` one for each value, on its rows, in its folder of `out`.

    Raises UserError where two values would share a folder, and where `out` is the folder of one run already.
    """
    if config.by is None:
        return [config]
    values, missing = column_values(config.dataset, config.by)
    if missing:
        tell(f"note: {missing:,} rows have no {config.by} and are in no run")
    out = Path(config.out)
    if (out / RUN).exists() or (out.exists() and not out.is_dir()):
        raise UserError(f"out: {out} is a file or one run; with `by` it holds a folder a run: choose another")
    folders: dict[str, str | int | bool] = {}
    runs = []
    for value in values:
        name = value_folder(value)
        if (other := folders.setdefault(name.casefold(), value)) is not value:
            raise UserError(f"by: the values {other!r} and {value!r} would share the folder {out / name}; rename one")
        sources = [s.model_copy(update={"where": {**(s.where or {}), config.by: value}}) for s in config.dataset]
        runs.append(config.model_copy(update={"by": None, "dataset": sources, "out": str(out / name)}))
    return runs


def value_folder(value: str | int | bool) -> str:
    """A value as a folder's name: all but letters, digits, `_`, `.` and `-` as `-`; never hidden, never a way up."""
    return re.sub(r"[^\w.-]+", "-", str(value)).strip(".-")[:_LONGEST] or "-"
