"""Inspections of the model: guard, token diagnostics, groups and sample answers, ten times in a run.

The guard is also measured before every evaluation and save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from apo.monitoring.guard import (
    GuardMeasurement,
    GuardSet,
    default_interval,
    guard_metrics,
    higher,
    measure_guard,
    violation,
)
from apo.monitoring.prediction import group_metrics, right_order

if TYPE_CHECKING:
    from apo.monitoring.sample_answers import SampleAnswers
    from apo.monitoring.throughput import Meter
    from apo.monitoring.token_diagnostics import TokenDiagnostics


class InspectedTrainer(Protocol):
    """What the callback needs of a trainer."""

    @property
    def meter(self) -> Meter: ...

    def response_logps(self, examples: Sequence[dict[str, Any]]) -> list[float]:
        """Return the log-prob of the chosen response of each example, in nats. Every process must call it."""
        ...

    def held_out_logratios(self) -> list[tuple[float, float, float, float]]:
        """Return log-ratios of chosen and rejected, rounding and loss of each held-out pair. Collective."""
        ...

    def log(self, logs: dict[str, float]) -> None:
        """Log metrics at the current step."""
        ...


class InspectionCallback(TrainerCallback):
    """Measures guard and token diagnostics, writes sample answers, and stops the run if the guard is violated.

    The guard is measured before every save, and a step that passes is saved (unless `save_strategy` is no). So the
    newest checkpoint is always the last good one. Runs before the MetricsCallback, which logs saved steps.
    """

    def __init__(self, guard_set: GuardSet | None) -> None:
        self.guard_set = guard_set
        self.diagnostics: TokenDiagnostics | None = None
        self.samples: SampleAnswers | None = None
        self.groups: Sequence[str | None] = ()
        self.violation: str | None = None
        self._trainer: InspectedTrainer | None = None
        self._baseline: GuardMeasurement | None = None
        self._highest: GuardMeasurement | None = None
        self._measured_step: int | None = None

    def begin(
        self,
        trainer: InspectedTrainer,
        diagnostics: TokenDiagnostics | None,
        samples: SampleAnswers | None,
        groups: Sequence[str | None] = (),
    ) -> None:
        """Measure the guard on the model before the first step, also if the run resumes from a later step.

        `groups` are the groups of the held-out pairs of a prediction.
        """
        self._trainer, self.diagnostics, self.samples, self.groups = trainer, diagnostics, samples, groups
        if self.guard_set is not None:
            self._baseline = self._highest = measure_guard(trainer.response_logps, self.guard_set)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log the baseline at step 0, and write the answers of the model before training.

        A run that resumes measures the winners of its checkpoint: the highest that it knows of.
        """
        if state.global_step > 0:
            if self.guard_set is not None and self.guard_set.winners and self._trainer and self._highest:
                self._highest = higher(self._highest, measure_guard(self._trainer.response_logps, self.guard_set))
            return
        self._write_samples(state)
        metrics = self._group_metrics()
        if self._baseline is not None:
            metrics |= guard_metrics(self._baseline, self._baseline)
        if metrics:
            self._log(metrics, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Inspect the model if an inspection is due."""
        step, last = state.global_step, state.global_step >= state.max_steps
        metrics = {}
        if last or step % default_interval(state.max_steps) == 0:
            if self._trainer is not None and self.diagnostics is not None:
                with self._trainer.meter.pause():
                    metrics = self.diagnostics.measure()
            metrics |= self._group_metrics()
            self._write_samples(state)
        periodic = self.guard_set is not None and step % self.guard_set.interval(state.max_steps) == 0
        due = last or control.should_save or control.should_evaluate or periodic
        self._inspect(args, state, control, metrics, measure=due)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the guard if the end of the epoch is saved or evaluated, and was not measured as a step."""
        if self.violation:
            control.should_save = False
        due = (control.should_save or control.should_evaluate) and self._measured_step != state.global_step
        self._inspect(args, state, control, {}, measure=due)

    def _inspect(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        *,
        measure: bool,
    ) -> None:
        """Measure the guard if there is one and `measure` is set, and log its metrics together with `metrics`."""
        if measure and self._trainer is not None and self.guard_set is not None and self._baseline is not None:
            with self._trainer.meter.pause():
                measurement = measure_guard(self._trainer.response_logps, self.guard_set)
            guarded = guard_metrics(self._baseline, measurement, self._highest)
            self._highest = higher(self._highest or measurement, measurement)
            metrics, self._measured_step = guarded | metrics, state.global_step
            self.violation = violation(self.guard_set.guard, guarded)
            if self.violation:
                control.should_training_stop, control.should_save = True, False
            elif args.save_strategy != "no":
                control.should_save = True
        if metrics:
            self._log(metrics, control)

    def _group_metrics(self) -> dict[str, float]:
        if self._trainer is None or not self.groups:
            return {}
        with self._trainer.meter.pause():
            pairs = self._trainer.held_out_logratios()
        rows = [(loss, right_order(chosen, rejected, rounding)) for chosen, rejected, rounding, loss in pairs]
        return group_metrics(self.groups, rows)

    def _write_samples(self, state: TrainerState) -> None:
        """Write the sample answers on the main process. The other processes continue, and wait in the next step."""
        if self.samples is not None and self._trainer is not None and state.is_world_process_zero:
            with self._trainer.meter.pause():
                self.samples.write(state.global_step)

    def _log(self, metrics: dict[str, float], control: TrainerControl) -> None:
        assert self._trainer is not None
        should_log = control.should_log  # any log resets it, although the step's own log is still to come
        self._trainer.log(metrics)
        control.should_log = should_log
