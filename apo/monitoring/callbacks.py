"""What watches a run: the metrics file, the bar, and the hand on Ctrl-C. All are callbacks of the trainer."""

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
from apo.monitoring.diagnosis import judge, log_of
from apo.run_dir.files import append_metrics
from clair.core.progress import EVERY, Progress, progress, tell


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, and has the last step and every saved step logged.

    Means never reach over a checkpoint that way, so a resumed run writes the lines of the uninterrupted one.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Log where the step is the last or is saved."""
        control.should_log |= control.should_save or state.global_step >= state.max_steps
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Log where the epoch's end is saved."""
        control.should_log |= control.should_save
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """One line, on the main process. The trainer's closing summary is none."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            append_metrics(self.out, {"step": state.global_step, **logs})


class Warner(TrainerCallback):
    """Says in words what the log shows to be wrong (diagnose.py), each thing once, and keeps it in `told`."""

    def __init__(self, objective: Any, tell: Callable[[str], None]) -> None:
        self.objective, self.tell = objective, tell
        self.told: dict[str, str] = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at all lines so far; on the main process."""
        if not state.is_world_process_zero or "loss" not in state.log_history[-1]:
            return
        for name, (words, advice) in judge(log_of(state.log_history, self.objective)).items():
            if name not in self.told:
                self.told[name] = words
                self.tell(f"warning: step {state.global_step}: {words}. What helps: {advice}")


class Bar(TrainerCallback):
    """The numbers that matter, a line a log, on stderr; below them how far training is, and an evaluation."""

    def __init__(self) -> None:
        self._shown = ExitStack()
        self._work: Progress | None = None
        self._held_out, self._batches, self._speed = 0, 0, ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show how far it is, from the step that is gone on from. Lines of the log are enough for a first look."""
        shown = progress(
            "training", state.max_steps, details=self._details, first=EVERY, shown=state.is_world_process_zero,
            begun=state.global_step,
        )  # fmt: skip
        self._work = self._shown.enter_context(shown)

    def _details(self) -> list[str]:
        held_out = [f"held out: {self._held_out:,}/{self._batches:,} batches"] if self._held_out else []
        return [*([self._speed] if self._speed else ()), *held_out]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move on."""
        if self._work is not None:
            self._work.update(state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, eval_dataloader: Any, **_: Any
    ) -> None:
        """Count the batches of an evaluation."""
        self._held_out, self._batches = self._held_out + 1, len(eval_dataloader)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The evaluation is over."""
        self._held_out = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Tell loss, rewards and speed, and what a look at the run found.

        In a terminal the speed stands in the display below, since a line with it is wider than 80 columns.
        """
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        self._speed = speed(logs) or self._speed
        words = summary(logs)
        if self._work is not None and self._work.in_terminal:
            words = words.removesuffix(f"  {speed(logs)}")
        for told in (*looks(logs), *([words] if "loss" in logs or "eval_loss" in logs else ())):
            tell(f"step {state.global_step}/{state.max_steps}  {told}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the display away."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        self._shown.close()
        self._work = None


_LOOKS = (
    (("guard/text_loss", "guard: loss on the text {:.4f}"), ("guard/text_loss_rise", " ({:+.4f}"),
     ("guard/text_loss_rise_noise", " +- {:.4f})")),
    (("guard/accuracy", "guard: tasks right {:.1%}"), ("guard/accuracy_drop", " ({:.1%} lost"),
     ("guard/accuracy_drop_noise", " +- {:.1%})")),
    (("probe/kl", "probe: KL {:.2g} nats a token"), ("probe/edited_chosen", ", chosen edited {:+.3f}"),
     ("probe/shared_chosen", ", shared {:+.3f}")),
)  # fmt: skip


def looks(logs: dict[str, Any]) -> list[str]:
    """What guard rails and probe found, a line each; none of a log of training or evaluation."""
    lines = ("".join(form.format(logs[key]) for key, form in forms if key in logs) for forms in _LOOKS)
    return [line for line in lines if line]


def summary(logs: dict[str, Any]) -> str:
    """One line of a log: loss, both rewards, accuracy, speed."""
    prefix = "eval_" if "eval_loss" in logs else ""
    words = [f"held-out loss {logs['eval_loss']:.4f}" if prefix else f"loss {logs.get('loss', float('nan')):.4f}"]
    for side in ("chosen", "rejected"):
        if (key := f"{prefix}rewards/{side}") in logs:
            words.append(f"{side} {round(logs[key], 3) + 0.0:+.3f}")  # no minus before zeros
    if (key := f"{prefix}rewards/accuracies") in logs:
        words.append(f"accuracy {logs[key]:.0%}")
    return "  ".join([*words, *([speed(logs)] if speed(logs) else ())])


def speed(logs: dict[str, Any]) -> str:
    """Pairs or unpaired rows a second, in words; nothing where a log has none."""
    if not (found := logs.get("pairs_per_second")):
        return ""
    rows = "rows" if any(f"{start}rows/chosen" in logs for start in ("", "eval_")) else "pairs"
    return f"{found:,.0f} {rows}/s" if found >= 100 else f"{found:.3g} {rows}/s"


class Interrupt(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) ends the run after the step under way, with a checkpoint; the second at once.

    A launcher hands the signal on to each process at another moment, so after every step they ask each other.
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or Group()
        self.asked = self.stopping = False
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take the signals over. Only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.group.count == 1:  # of several, one may be told because another has died
            told = "stopping after this step, with a checkpoint; once more to stop at once"
            print(f"\n{told}", file=sys.stderr, flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save and stop where it was asked for. Comes before the Recorder, which then logs the step."""
        self.stopping = self.group.any(self.asked)
        if self.stopping:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give the signals back."""
        self.close()

    def close(self) -> None:
        """Give the signals back, also after an error."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
