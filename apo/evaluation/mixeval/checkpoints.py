"""Many checkpoints, one judge: each answers by itself, here or on a Ray cluster, and all are judged from one ledger.

A judgement that two checkpoints need is asked for once. On a cluster a checkpoint answers wherever there is room, into
a ledger of its own; the driver takes its answers over and judges them, so that the judge's ledger is open in one place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apo.evaluation.mixeval.config import Checked, MixEvalConfig
from apo.evaluation.mixeval.run import Evaluated, Progress, evaluate
from clair.cluster.ray_session import connected
from clair.cluster.worker import enter_driver_environment
from clair.core.errors import EXIT_USER_ERROR, UserError
from clair.inference.config import ModelConfig
from clair.inference.model import Model, Refused
from clair.inference.model_folder import weights_identity
from clair.inference.open import Resources
from clair.ledger.join import join_ledgers

LEDGER = "ledger.sqlite"
_BY_RULE = "answers"


def names_of(models: Sequence[str]) -> list[str]:
    """A folder name for each: the end of its path, as much of it as tells them apart. Raises UserError for twins."""
    paths = [Path(model).resolve() for model in models]
    if len(set(paths)) < len(paths):
        raise UserError("--model names the same folder twice; leave one out")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["-".join(path.parts[-length:]).strip("/") for path in paths]


def apart(config: MixEvalConfig, models: Sequence[Mapping[str, Any]]) -> list[MixEvalConfig]:
    """The evaluation of each model, in a folder of its own under `config.out`, with one ledger and its part of the
    budget. Raises UserError for models that are no folders."""
    for model in models:
        if not model.get("path"):
            raise UserError("several --model are for folders; evaluate an endpoint by itself, with --ledger to share")
    ledger = config.ledger or str(Path(config.out) / LEDGER)
    budget = config.budget
    if budget:
        money, tokens = budget.money, budget.tokens
        part = {"money": money and money / len(models), "tokens": tokens and tokens // len(models)}
        budget = budget.model_copy(update=part)
    return [
        config.model_copy(
            update={
                "model": ModelConfig.model_validate(model),
                "out": str(Path(config.out) / name),
                "ledger": ledger,
                "budget": budget,
            }
        )
        for model, name in zip(models, names_of([str(model["path"]) for model in models]), strict=True)
    ]


def evaluate_each(
    work: Sequence[tuple[MixEvalConfig, Checked]],
    *,
    ray: bool = False,
    address: str | None = None,
    on_progress: Progress | None = None,
) -> Iterator[tuple[MixEvalConfig, Evaluated]]:
    """Each evaluation as it is done, one after the other; with `ray` the answers come from a cluster, in any order.

    Raises UserError as `evaluate` does, and where Ray or its cluster does not fit.
    """
    if not ray:
        for config, checked in work:
            yield config, evaluate(config, checked=checked, on_progress=on_progress)
        return
    for config, checked in _answered(work, address):
        join_ledgers([_own(config).ledger_path], config.ledger_path, str(Path(config.out).resolve()))
        yield config, evaluate(config, checked=checked, on_progress=on_progress, resources=_Taken())


# ---- the answers, on a cluster


@dataclass(frozen=True, slots=True)
class _Order:
    config: MixEvalConfig
    checked: Checked
    folder: str
    version: str


@dataclass(frozen=True, slots=True)
class _Told:
    """How answering ended; `code` is the exit code of an error."""

    error: str | None = None
    code: int = EXIT_USER_ERROR


def _own(config: MixEvalConfig) -> MixEvalConfig:
    """The same answers, by themselves: scored by the rule parser, which asks nobody."""
    out = Path(config.out) / _BY_RULE
    update = {"judge": "rule", "out": str(out), "ledger": None, "budget": None}
    return config.model_copy(update=update | {"independent_judgements": False, "upstream_files": False})


def answer(order: _Order) -> _Told:
    """Make the answers of one checkpoint, in a process of the cluster."""
    try:
        enter_driver_environment(order.folder, order.version, {})
        done = evaluate(order.config, checked=order.checked)
    except UserError as error:
        return _Told(str(error), error.exit_code)
    if done.score is None:
        return _Told(f"{order.config.out}: {done.stopped or done.first_failure}; run the same command again")
    return _Told()


def _answered(
    work: Sequence[tuple[MixEvalConfig, Checked]], address: str | None
) -> Iterator[tuple[MixEvalConfig, Checked]]:
    """The evaluations whose answers are made, as they come; a process or node that dies is replaced."""
    with connected(address) as ray:
        devices = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {}
        task = ray.remote(num_cpus=1, max_retries=-1, **devices)(answer)
        waiting = {}
        for config, checked in work:
            # The questions go along, so that a node needs no copy of the benchmark.
            order = _Order(_own(config), Checked(checked.benchmark, None, None), os.getcwd(), version("clair-apo"))
            waiting[task.remote(order)] = (config, checked)
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=0.5)
            for ref in ready:
                told = ray.get(ref)
                if told.error:
                    error = UserError(told.error)
                    error.exit_code = told.code
                    raise error
                yield waiting.pop(ref)


class _Taken(Resources):
    """Answers are in the ledger: the weights are looked at, and never loaded."""

    def model(self, role: str, config: ModelConfig) -> Model:
        """A judge as it is; a model as what its answers are filed under."""
        return _Filed(config.path) if config.path is not None else super().model(role, config)


class _Filed:
    """A model that has answered already."""

    def __init__(self, path: str) -> None:
        self.name = Path(path).name
        self.identity = weights_identity(path)

    async def check(self) -> None:
        """It is asked nothing."""

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """Raises Refused: an answer is missing."""
        raise Refused(f"an answer of {self.name} is missing though all were made; run the same command again")

    async def close(self) -> None:
        """Nothing is open."""
