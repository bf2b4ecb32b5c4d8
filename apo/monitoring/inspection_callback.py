"""Looks that a run takes at itself, ten times and where it evaluates or saves: guard rails and the probe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from apo.monitoring import guard

if TYPE_CHECKING:
    from apo.monitoring.token_diagnostics import Probe
    from apo.training.trainer import APOTrainer


class Watch(TrainerCallback):
    """Looks at the guard rails and the probe, logs what it finds, and stops the run where a rail is crossed.

    Every step that is saved is looked at before, and every look that is passed is saved (unless `save_strategy` is no):
    so the newest checkpoint is always the last good one. Comes before the Recorder, which logs what is saved.
    """

    def __init__(self, rails: guard.GuardSet | None) -> None:
        self.rails = rails
        self.probe: Probe | None = None
        self.crossed: str | None = None
        self._trainer: APOTrainer | None = None
        self._before: guard.Look | None = None
        self._looked_at: int | None = None

    def begin(self, trainer: APOTrainer, probe: Probe | None) -> None:
        """Look at the model before the first step, also where the run goes on from a later one."""
        self._trainer, self.probe = trainer, probe
        if self.rails is not None:
            self._before = guard.look(trainer, self.rails)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log where the run starts."""
        if state.global_step == 0 and self._before is not None:
            self._log(guard.compare(self._before, self._before), control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Look where a look is due."""
        step, last = state.global_step, state.global_step >= state.max_steps
        tenth = max(1, -(-state.max_steps // guard.LOOKS))
        found = {}
        if self.probe is not None and (last or step % tenth == 0):
            with self._trainer.meter.pause():
                found = self.probe.measure(self._trainer)
        every = self.rails.every(state.max_steps) if self.rails is not None else 0
        due = last or control.should_save or control.should_evaluate or (every and step % every == 0)
        return self._look(args, state, control, found, guarded=bool(every and due))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Look where the epoch's end is saved or evaluated, and was not looked at."""
        if self.crossed:
            control.should_save = False
        due = (control.should_save or control.should_evaluate) and self._looked_at != state.global_step
        return self._look(args, state, control, {}, guarded=self.rails is not None and due)

    def _look(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, found: dict[str, float], *,
        guarded: bool,
    ) -> TrainerControl:  # fmt: skip
        if guarded:
            with self._trainer.meter.pause():
                now = guard.look(self._trainer, self.rails)
            seen = guard.compare(self._before, now)
            found, self._looked_at = seen | found, state.global_step
            self.crossed = guard.crossed(self.rails.guard, seen)
            if self.crossed:
                control.should_training_stop, control.should_save = True, False
            elif args.save_strategy != "no":
                control.should_save = True
        if found:
            self._log(found, control)
        return control

    def _log(self, found: dict[str, float], control: TrainerControl) -> None:
        logs_soon = control.should_log  # which the trainer takes for done after any log
        self._trainer.log(found)
        control.should_log = logs_soon
