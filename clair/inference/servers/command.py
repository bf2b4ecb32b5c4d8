"""The command of a server that a run starts: its arguments, its checks, and the identity of the model behind it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from clair.core.errors import UserError
from clair.core.urls import without_secrets
from clair.inference.config import ModelConfig
from clair.inference.model_folder import content_files, weights_identity


def server_command(config: ModelConfig, port: int) -> list[str]:
    """The arguments of `serve`, with {model} and {port} filled in."""
    assert config.serve is not None
    values = {"model": config.path or config.model or "", "port": str(port)}
    return [re.sub(r"\{(model|port)\}", lambda name: values[name[1]], word) for word in shlex.split(config.serve)]


def check_server(role: str, config: ModelConfig) -> None:
    """Check that the program of `serve` and the model at `path` exist. Raises UserError."""
    program = server_command(config, 1)[0]
    if shutil.which(program) is None:
        raise UserError(f"{role}.serve: there is no program {program!r}; install it, or give its path")
    path = None if config.path is None else Path(config.path)
    if path is not None and not (path.is_file() or (path.is_dir() and content_files(path))):
        raise UserError(f"{role}: {path} is no model file or folder; a model of a hub is named by {role}.model instead")


def served_identity(config: ModelConfig) -> str:
    """`id`, or else the weights and the command: not the port, and not where the weights lie."""
    assert config.serve is not None
    weights = config.model if config.path is None else weights_identity(config.path)
    return config.id or f"{weights}@{without_secrets(config.serve)}"
