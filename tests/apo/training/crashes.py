"""Crashes at any point inside the save of a checkpoint."""

from __future__ import annotations

from transformers import Trainer

from apo.run_dir import checkpoints


class Crash(BaseException):
    """Stands for the end of the process: no code of this project may catch it."""


def crash_in(point, crash_step, monkeypatch):
    """Raise Crash inside the save of a step, before or after the function of the save that `point` names."""
    owner, name, run_first = point
    original = getattr(owner, name)

    def crashing(*args, **kwargs):
        step = args[0].state.global_step if isinstance(args[0], Trainer) else checkpoints.checkpoint_step(args[1])
        result = original(*args, **kwargs) if run_first or step != crash_step else None
        if step == crash_step:
            raise Crash
        return result

    monkeypatch.setattr(owner, name, crashing)


CRASHES = {
    "before the model is written": (Trainer, "save_model", False),
    "before the optimizer is written": (Trainer, "_save_optimizer_and_scheduler", False),
    "before the random state is written": (Trainer, "_save_rng_state", False),
    "before the checkpoint is declared complete": (checkpoints, "complete_checkpoint", False),
    "after the checkpoint is in place": (checkpoints, "complete_checkpoint", True),
}
