"""Trainer callbacks: the metrics file, warnings from the log, the progress bar, and stopping on Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from apo.distributed.launch import Group
from apo.monitoring.diagnosis import find_problems, training_log
from apo.run_dir.files import METRICS, append_log
from clair.core.progress import LINE_INTERVAL, Progress, print_line, progress


class MetricsCallback(TrainerCallback):
    """Writes metrics.jsonl, and makes the trainer log the last step and every step that it saves.

    Thereby no logged mean spans a checkpoint, and a resumed run writes the same lines as an uninterrupted run.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Request a log if the step is the last or will be saved."""
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Request a log if the end of the epoch will be saved."""
        control.should_log |= control.should_save

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Append one line on the main process, except for the trainer's final summary."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            append_log(self.out / METRICS, [{"step": state.global_step, **logs}])


class DiagnosisCallback(TrainerCallback):
    """Prints a warning for each problem that the log shows (diagnosis.py), once per rule."""

    def __init__(self, objective: Any, log: Callable[[str], None]) -> None:
        self.objective, self.log = objective, log
        self._warned: set[str] = set()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Apply the rules to all lines logged so far, on the main process."""
        if not state.is_world_process_zero or "loss" not in state.log_history[-1]:
            return
        for rule, (message, advice) in find_problems(training_log(state.log_history, self.objective)).items():
            if rule not in self._warned:
                self._warned.add(rule)
                self.log(f"warning: step {state.global_step}: {message}. What helps: {advice}")


class ProgressBarCallback(TrainerCallback):
    """Prints the main numbers of each log on stderr, and shows the training's progress below them."""

    def __init__(self) -> None:
        self._display = ExitStack()
        self._progress: Progress | None = None
        self._eval_batches, self._eval_total, self._speed = 0, 0, ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the display at the step that the run continues from.

        Without a terminal, the first progress line comes after the usual interval, because log lines come before it.
        """
        display = progress(
            "training",
            state.max_steps,
            details=self._details,
            first=LINE_INTERVAL,
            shown=state.is_world_process_zero,
            initial=state.global_step,
        )
        self._progress = self._display.enter_context(display)

    def _details(self) -> list[str]:
        evaluated = f"held out: {self._eval_batches:,}/{self._eval_total:,} batches" if self._eval_batches else ""
        return [detail for detail in (self._speed, evaluated) if detail]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance the display."""
        if self._progress is not None:
            self._progress.update(state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the batches of an evaluation."""
        self._eval_batches, self._eval_total = self._eval_batches + 1, len(kwargs["eval_dataloader"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Reset the count when the evaluation is over."""
        self._eval_batches = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Print loss, rewards and speed, and the results of an inspection.

        In a terminal the display shows the speed, because a line that includes it is wider than 80 columns.
        """
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        self._speed = format_speed(logs) or self._speed
        line = format_log(logs)
        if self._progress is not None and self._progress.in_terminal:
            line = line.removesuffix(f"  {format_speed(logs)}")
        for message in (*format_inspection(logs), *([line] if "loss" in logs or "eval_loss" in logs else ())):
            print_line(f"step {state.global_step}/{state.max_steps}  {message}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the display."""
        self.close()

    def close(self) -> None:
        """Release the terminal; also called after an error."""
        self._display.close()
        self._progress = None


_INSPECTION_FORMATS = (
    (
        ("guard/text_loss", "guard: loss on the text {:.4f}"),
        ("guard/text_loss_rise", " ({:+.4f}"),
        ("guard/text_loss_rise_noise", " +- {:.4f})"),
    ),
    (
        ("guard/accuracy", "guard: tasks right {:.1%}"),
        ("guard/accuracy_drop", " ({:.1%} lost"),
        ("guard/accuracy_drop_noise", " +- {:.1%})"),
    ),
    (
        ("guard/kl", "guard: own answers {:+.3f} nats a token lost"),
        ("guard/kl_noise", " (+- {:.3f})"),
    ),
    (
        ("guard/winners_fall", "guard: winners {:.3f} nats a token below their highest"),
        ("guard/winners_fall_noise", " (+- {:.3f})"),
    ),
    (
        ("probe/kl", "probe: KL {:.2g} nats a token"),
        ("probe/edited_chosen", ", chosen edited {:+.3f}"),
        ("probe/shared_chosen", ", shared {:+.3f}"),
    ),
)


def format_inspection(logs: dict[str, Any]) -> list[str]:
    """Return the results of guard and token diagnostics in a log, one line each."""
    lines = (
        "".join(template.format(logs[key]) for key, template in templates if key in logs)
        for templates in _INSPECTION_FORMATS
    )
    return [line for line in lines if line]


def format_log(logs: dict[str, Any]) -> str:
    """Return a log as one line: loss, both rewards, accuracy, speed."""
    prefix = "eval_" if "eval_loss" in logs else ""
    fields = [f"held-out loss {logs['eval_loss']:.4f}" if prefix else f"loss {logs.get('loss', float('nan')):.4f}"]
    for side in ("chosen", "rejected"):
        if (key := f"{prefix}rewards/{side}") in logs:
            fields.append(f"{side} {round(logs[key], 3) + 0.0:+.3f}")  # + 0.0 turns -0.0 into 0.0
    if (key := f"{prefix}rewards/accuracies") in logs:
        fields.append(f"accuracy {logs[key]:.0%}")
    return "  ".join([*fields, *([format_speed(logs)] if format_speed(logs) else ())])


def format_speed(logs: dict[str, Any]) -> str:
    """Return pairs or unpaired rows per second, such as `12.3 pairs/s`; empty if the log has none."""
    if not (rate := logs.get("pairs_per_second")):
        return ""
    unit = "rows" if any(f"{prefix}rows/chosen" in logs for prefix in ("", "eval_")) else "pairs"
    return f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s"


class InterruptCallback(TrainerCallback):
    """Stops the run with a checkpoint after the step in which Ctrl-C (or SIGTERM) comes. A second signal raises.

    A launcher delivers the signal to its processes at different moments, so the processes agree after every step.
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or Group()
        self.signalled = self.stopping = False
        self._handlers: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Install the signal handlers, which only a main thread can do."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True
        if self.group.count == 1:  # with several processes, the signal may come because another one has died
            print(
                "\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr, flush=True
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop if any process was signalled. Runs before the MetricsCallback, which then logs the step."""
        self.stopping = self.group.any(self.signalled)
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the signal handlers."""
        self.close()

    def close(self) -> None:
        """Restore the signal handlers; also called after an error."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
