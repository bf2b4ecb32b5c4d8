"""The configs of several checkpoints that one recipe evaluates: a folder each, a common ledger, a shared budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from apo.evaluation.config import BenchmarkConfig
from clair.core.errors import UserError
from clair.storage.location import Location

Config = TypeVar("Config", bound=BenchmarkConfig)


def folder_names(models: Sequence[str]) -> list[str]:
    """A distinct folder name for each model: the shortest end of its path.

    Raises UserError for equal paths, and for paths that differ only in where `-` stands for `/`.
    """
    paths = [Path(model).resolve() for model in models]
    if len(set(paths)) < len(paths):
        raise UserError("--model names the same folder twice; leave one out")
    names: list[str] = []
    for length in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["-".join(path.parts[-length:]).strip("/") for path in paths]
        if len(set(names)) == len(names):
            return names
    alike = [str(path) for path, name in zip(paths, names, strict=True) if names.count(name) > 1]
    raise UserError(f"--model: {' and '.join(alike)} would share a folder of results; rename one")


def configs_by_model(config: Config, folders: Sequence[str]) -> list[Config]:
    """The config of each model: its own folder under `config.out`, the common ledger, its share of the budget.

    `folders` are the models; none: the model of `config`. Raises UserError if `config.model` is no folder.
    """
    model = config.model
    if model is None or model.path is None or any(Location(folder).is_url for folder in folders):
        raise UserError("several models, and --runner, are for model folders; evaluate an endpoint alone")
    folders = list(folders) or [model.path]
    return [
        config.model_copy(
            update={
                "model": model.model_copy(update={"path": folder}),
                "out": config.out / name,
                "ledger": config.ledger or str(config.ledger_path),
                "budget": config.budget and config.budget.share(len(folders)),
            }
        )
        for folder, name in zip(folders, folder_names(folders), strict=True)
    ]
