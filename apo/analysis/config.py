"""The recipe of `apo distinguish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from apo.cli_recipe import OutFolder
from clair.core.recipe import Recipe

Datasets = Annotated[
    list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), Field(min_length=1)
]
"""One dataset folder, file or hub name, or several."""


class DistinguishConfig(Recipe):
    """Pairs, their clusters, and the training whose first steps are predicted."""

    dataset: Datasets
    model: str
    by: str = "kmeans:8"
    objective: str | dict[str, Any] = "apo_zero"
    beta: float = Field(default=0.1, gt=0)
    features: Path | None = None
    seed: int = 0
    out: OutFolder | None = None
