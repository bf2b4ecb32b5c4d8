"""`apo.train`, `apo.evaluate`, `apo.evaluate_ifeval`, `apo.compare` and `apo.advise`: commands as Python functions.

They also work inside a running event loop, as in a notebook. Ctrl-C (a notebook's interrupt) stops them as it stops the
command: what is paid for or trained is saved, and the same call goes on later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from apo.advice.config import AdviseConfig
from apo.advice.config import load_inputs as load_advice_inputs
from apo.advice.run import AdviceOutcome
from apo.advice.run import run as run_advice
from apo.evaluation.compare.run import ComparisonResult, compare_folders
from apo.evaluation.config import Outcome
from apo.evaluation.ifeval.config import IFEvalConfig
from apo.evaluation.ifeval.config import load_inputs as load_ifeval_inputs
from apo.evaluation.ifeval.run import IFEvalOutcome
from apo.evaluation.ifeval.run import evaluate as evaluate_on_ifeval
from apo.evaluation.ifeval.run import work_items as ifeval_work_items
from apo.evaluation.mixeval.config import MixEvalConfig
from apo.evaluation.mixeval.config import load_inputs as load_mixeval_inputs
from apo.evaluation.mixeval.run import MixEvalOutcome, work_items
from apo.evaluation.mixeval.run import evaluate as evaluate_mixeval
from apo.training.config import TrainConfig
from clair.core.progress import print_line, progress
from clair.core.recipe import config_from
from clair.terminal import client_progress

if TYPE_CHECKING:
    from apo.pilot.run import PilotOutcome

FinishedOutcome = TypeVar("FinishedOutcome", bound=Outcome)


@dataclass(frozen=True, slots=True, repr=False)
class TrainingResult:
    """A finished training. `runs` holds the content of run.json by run folder: one run, or one a group with `by`."""

    runs: Mapping[str, Mapping[str, Any]]

    @property
    def out(self) -> Path:
        """The folder of the model. Raises ValueError if the recipe trains one model a group; `runs` names them all."""
        (folder,) = self.runs
        return Path(folder)

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The metrics of the model, by name: those of the last step, or of the best with `load_best_model_at_end`.

        Raises ValueError if there are several runs.
        """
        (run,) = self.runs.values()
        return run["metrics"]

    def __repr__(self) -> str:
        from apo.monitoring.callbacks import format_log
        from apo.run_dir.files import describe_steps

        runs = (f"{out}: {describe_steps(run)}, {format_log(run['metrics'])}" for out, run in self.runs.items())
        return f"<{type(self).__name__} {'; '.join(runs)}>"


def train(
    recipe: str | Path | Mapping[str, Any] | TrainConfig,
    *,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print_line,
) -> TrainingResult:
    """Train a model on preference pairs, or go on from the newest complete checkpoint of a stopped run.

    Args:
        recipe: the path of a YAML file, a mapping of its keys, or a `TrainConfig`.
        out: the run's folder, instead of the recipe's `out`.
        overrides: values by dotted key, such as `{"trainer.learning_rate": 1e-5}`.
        log: receives each line that the run reports; absent, they are written to stderr.

    Returns the content of run.json; the model lies in `out`.
    Raises UserError, in one line and before any work, for a mistake in the recipe, the pairs or the model.
    Raises KeyboardInterrupt after Ctrl-C, when a checkpoint is saved; the same call goes on.
    """
    _let_idle_threads_sleep()
    config = config_from(TrainConfig, recipe, overrides, out=out)
    from apo.training.train import train as train_model

    result = train_model(config, log=log)
    return TrainingResult(result if config.by else {config.out: result})


def evaluate(
    recipe: str | Path | Mapping[str, Any] | MixEvalConfig,
    *,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> MixEvalOutcome:
    """Score a model on MixEval-Hard, going on from the replies that the ledger holds.

    Args:
        recipe: the path of a YAML file, a mapping of its keys, or a `MixEvalConfig`: `data` (the benchmark's folder),
            `model` (`path`, or `url` and `model`), `judge` (likewise, or "rule"), `out` and more.
        out: the result folder, instead of the recipe's `out`.
        overrides: values by dotted key, such as `{"model.temperature": 0}`.
        show_progress: show the progress on stderr.

    Returns the score with its intervals; `table()` displays it. If the budget is used up or requests got no reply, it
    has no score, its text says why, and the same call goes on later.
    Raises UserError, in one line, for a mistake in the recipe or the data, and if the model or the judge refuses
    everything. Raises KeyboardInterrupt after Ctrl-C, when the replies in flight are in the ledger.
    """
    _let_idle_threads_sleep()
    config = config_from(MixEvalConfig, recipe, overrides, out=out)
    inputs = load_mixeval_inputs(config)
    for note in inputs.benchmark.notes:
        print_line(f"note: {note}")
    total = len(work_items(config, inputs))
    with client_progress("evaluating", total, dict.fromkeys(config.models, total), shown=show_progress) as on_progress:
        return _raise_interrupt(evaluate_mixeval(config, inputs=inputs, on_progress=on_progress))


def evaluate_ifeval(
    recipe: str | Path | Mapping[str, Any] | IFEvalConfig,
    *,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> IFEvalOutcome:
    """Score a model on IFEval, going on from the replies that the ledger holds.

    Args:
        recipe: the path of a YAML file, a mapping of its keys, or an `IFEvalConfig`: `prompts` (the benchmark's file),
            `model` (`path`, or `url` and `model`) or `responses` (a file of answers), `out` and more.
        out: the result folder, instead of the recipe's `out`.
        overrides: values by dotted key, such as `{"model.max_tokens": 512}`.
        show_progress: show the progress on stderr.

    Returns the score with its intervals; `table()` displays it. If the budget is used up or requests got no reply, it
    has no score, its text says why, and the same call goes on later.
    Raises UserError, in one line, for a mistake in the recipe or the prompts, and if the model refuses everything.
    Raises KeyboardInterrupt after Ctrl-C, when the replies in flight are in the ledger.
    """
    _let_idle_threads_sleep()
    config = config_from(IFEvalConfig, recipe, overrides, out=out)
    inputs = load_ifeval_inputs(config)
    total = len(ifeval_work_items(config, inputs))
    with client_progress("evaluating", total, dict.fromkeys(config.models, total), shown=show_progress) as on_progress:
        return _raise_interrupt(evaluate_on_ifeval(config, inputs=inputs, on_progress=on_progress))


def compare(
    base: str | Path,
    *tuned: str | Path,
    out: str | Path | None = None,
    difference: float = 0.02,
    data: str | Path | None = None,
) -> ComparisonResult:
    """Compare the result folders of tuned models with that of their base; `evaluate` and `evaluate_ifeval` make them.

    Args:
        base: the result folder of the base model.
        tuned: the result folders of one or more tuned models.
        out: the folder for compare.json and compare.html; absent, `compare` beside `base`.
        difference: the true difference, a share, whose power is computed.
        data: a folder of MixEval's data, to predict the power of its other splits too.

    Returns the differences with their intervals; `table()` and `notes()` display them.
    Raises UserError, in one line, for folders that hold no result or cannot be compared.
    """
    return compare_folders(base, tuned, out=out, difference=difference, data=data)


def advise(
    recipe: str | Path | Mapping[str, Any] | AdviseConfig,
    *,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    pilot: bool = False,
    log: Callable[[str], None] = print_line,
) -> AdviceOutcome | PilotOutcome:
    """Recommend objective, beta and learning rate for training a model on preference pairs, from evidence about both.

    Args:
        recipe: the path of a YAML file, a mapping of its keys, or an `AdviseConfig`: `dataset`, `model` (`path`),
            `judge` (`url` and `model`; absent: no judge), `out` and more.
        out: the result folder, instead of the recipe's `out`.
        overrides: values by dotted key, such as `{"difference": 0.2}`.
        pilot: choose by short training runs and a metric, as the recipe's `pilot` says.
        log: receives each line that the run reports; absent, they are written to stderr.

    Returns the advice, or with `pilot` the choice among the pilots; `lines()` gives it as text and `table()` displays
    the evidence. If it ended early it has none, its text says why, and the same call goes on later.
    Raises UserError, in one line, for a mistake in the recipe or the pairs.
    Raises KeyboardInterrupt after Ctrl-C, when the replies in flight are in the ledger.
    """
    _let_idle_threads_sleep()
    config = config_from(AdviseConfig, recipe, overrides, out=out)
    with progress("checking the pairs"):
        inputs = load_advice_inputs(config)
        planned = None
        if pilot:
            from apo.pilot.plan import plan_pilots

            planned = plan_pilots(config)
    if planned is None:
        return _raise_interrupt(run_advice(config, inputs=inputs, log=log))
    from apo.pilot.run import run as run_pilots

    return _raise_interrupt(run_pilots(planned, inputs=inputs, log=log))


def _raise_interrupt(outcome: FinishedOutcome) -> FinishedOutcome:
    if outcome.stopped == "interrupted":
        raise KeyboardInterrupt("every reply so far is kept; the same call goes on")
    return outcome


def _let_idle_threads_sleep() -> None:
    """Let OpenMP's idle threads sleep, not spin: small models train up to 100 times faster on a busy machine.

    OpenMP reads the variable when torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
