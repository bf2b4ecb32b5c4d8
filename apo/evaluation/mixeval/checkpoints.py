"""Evaluate several checkpoints with one judge: here one after the other, or their answers on a Ray cluster.

A judgement that two checkpoints need is requested once. On a cluster each checkpoint answers on any free node, into its
own ledger. The driver joins these answers into the judge's ledger, so that only one process has that one open.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apo.evaluation.mixeval.config import MixEvalConfig, MixEvalInputs
from apo.evaluation.mixeval.run import MixEvalOutcome, evaluate
from apo.evaluation.rows import OnProgress
from clair.cluster.ray_session import check_no_servers, connected
from clair.cluster.worker import enter_driver_environment
from clair.core.errors import EXIT_USER_ERROR, UserError
from clair.inference.config import ModelConfig
from clair.inference.model import Model, Refused
from clair.inference.model_folder import weights_identity
from clair.inference.open import Resources
from clair.ledger.join import join_ledgers

_ANSWERS = "answers"


def evaluate_each(
    work: Sequence[tuple[MixEvalConfig, MixEvalInputs]],
    *,
    ray: bool = False,
    address: str | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[tuple[MixEvalConfig, MixEvalOutcome]]:
    """Yield each finished evaluation, one after the other; with `ray` the answers come from a cluster, in any order.

    Raises UserError as `evaluate` does, and if Ray or its cluster cannot be used.
    """
    if not ray:
        for config, inputs in work:
            yield config, evaluate(config, inputs=inputs, on_progress=on_progress)
        return
    for config, _ in work:
        check_no_servers({"model": config.model} if config.model else {})
    for config, inputs in _answer_on_cluster(work, address):
        join_ledgers([_answers_config(config).ledger_path], config.ledger_path, config.out.account)
        yield config, evaluate(config, inputs=inputs, on_progress=on_progress, resources=_LedgerResources())


# ---- the answers, on a cluster


@dataclass(frozen=True, slots=True)
class _AnswerTask:
    config: MixEvalConfig
    inputs: MixEvalInputs
    folder: str
    version: str


@dataclass(frozen=True, slots=True)
class _AnswerStatus:
    """The end of a task; `code` is the exit code of its error."""

    error: str | None = None
    code: int = EXIT_USER_ERROR


def _answers_config(config: MixEvalConfig) -> MixEvalConfig:
    """The config that only makes the answers: the rule parser scores them, which sends no requests."""
    update = {"judge": "rule", "out": config.out / _ANSWERS, "ledger": None, "budget": None}
    return config.model_copy(update=update | {"independent_judgements": False, "upstream_files": False})


def answer(task: _AnswerTask) -> _AnswerStatus:
    """Generate the answers of one checkpoint, in a process of the cluster."""
    try:
        enter_driver_environment(task.folder, task.version, {})
        outcome = evaluate(task.config, inputs=task.inputs)
    except UserError as error:
        return _AnswerStatus(str(error), error.exit_code)
    if outcome.score is None:
        return _AnswerStatus(
            f"{task.config.out}: {outcome.stopped or outcome.first_failure}; run the same command again"
        )
    return _AnswerStatus()


def _answer_on_cluster(
    work: Sequence[tuple[MixEvalConfig, MixEvalInputs]], address: str | None
) -> Iterator[tuple[MixEvalConfig, MixEvalInputs]]:
    """Yield evaluations as their answers are complete. A process or node that dies is replaced."""
    with connected(address) as ray:
        devices = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {}
        task = ray.remote(num_cpus=1, max_retries=-1, **devices)(answer)
        waiting = {}
        for config, inputs in work:
            # The task carries the questions, so that a node needs no copy of the benchmark.
            order = _AnswerTask(
                _answers_config(config), MixEvalInputs(inputs.benchmark, None, None), os.getcwd(), version("clair-apo")
            )
            waiting[task.remote(order)] = (config, inputs)
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=0.5)
            for ref in ready:
                status = ray.get(ref)
                if status.error:
                    error = UserError(status.error)
                    error.exit_code = status.code
                    raise error
                yield waiting.pop(ref)


class _LedgerResources(Resources):
    """Resources of a run whose answers are in the ledger: weights are hashed and never loaded."""

    def model(self, role: str, config: ModelConfig) -> Model:
        """The judge itself; for a local model its name and identity in the ledger."""
        return _LedgerModel(config.path) if config.path and config.is_local else super().model(role, config)


class _LedgerModel:
    """A model whose answers are all in the ledger."""

    def __init__(self, path: str) -> None:
        self.name = Path(path).name
        self.identity = weights_identity(path)

    async def check(self) -> None:
        """Nothing to check: it gets no request."""

    async def complete(self, request: Mapping[str, Any], sample: int = 0) -> str:
        """Raise Refused: an answer is missing in the ledger."""
        raise Refused(f"an answer of {self.name} is missing in the ledger; run the same command again")

    async def close(self) -> None:
        """Nothing to close."""
