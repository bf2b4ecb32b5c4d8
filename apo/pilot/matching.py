"""Learning rates that move the model equally far, whatever the objective: matched by displacement, not by a table.

After `WARM_UP` steps, a trial trains `WINDOW` steps at one rate and measures the displacement: the mean over held-out
responses, chosen and rejected, of the absolute change of their log-ratio in nats per token. The next trial starts from
the same weights and optimizer state at a scaled rate, until each target is reached.
"""

from __future__ import annotations

import copy
import gc
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from apo.training.config import TrainConfig

WARM_UP, WINDOW = 10, 20
MAX_TRIALS = 6
MAX_STEPS = WARM_UP + WINDOW * MAX_TRIALS
TOLERANCE = 1.15
"""A trial matches a target if its displacement is within this factor."""
MAX_FACTOR = 10.0
"""A trial's rate is at most so many times higher or lower than that of an earlier trial."""
RESPONSES = 64
"""Held-out pairs whose responses are measured."""

Trial = tuple[float, float]
"""A learning rate, and the displacement that it led to."""


def matched_rate(trials: Sequence[Trial], target: float) -> float:
    """The rate that should lead to the target, by the trials nearest to it on a log scale.

    With one trial the displacement is taken as proportional to the rate; with more, as a power of it between 1/2 and 2.
    """
    nearest = sorted(trials, key=lambda trial: abs(math.log(target / max(trial[1], 1e-12))))
    rate, moved = nearest[0]
    if moved <= 0:
        return rate * MAX_FACTOR
    power = 1.0
    if len(nearest) > 1 and nearest[1][1] > 0 and nearest[1][0] != rate:
        power = math.log(nearest[1][1] / moved) / math.log(nearest[1][0] / rate)
    factor = (target / moved) ** (1 / min(2.0, max(0.5, power)))
    return rate * min(MAX_FACTOR, max(1 / MAX_FACTOR, factor))


def matched_rates(
    trials: Mapping[str, Sequence[Sequence[float]]], displacements: Sequence[float]
) -> dict[tuple[str, float], float]:
    """The rate of each objective at each displacement, with two digits, by the objectives' trials."""
    return {
        (objective, displacement): float(f"{matched_rate([(r, m) for r, m in objective_trials], displacement):.2g}")
        for objective, objective_trials in trials.items()
        for displacement in displacements
    }


def next_rate(
    trials: Sequence[Trial], targets: Sequence[float], first: float, max_trials: int = MAX_TRIALS
) -> float | None:
    """The rate of the next trial: `first`, then the one for the first target that no trial matches; None at the end."""
    if not trials:
        return first
    if len(trials) >= max_trials:
        return None
    for target in targets:
        if not any(is_match(moved, target) for _, moved in trials):
            return matched_rate(trials, target)
    return None


def is_match(moved: float, target: float) -> bool:
    """True if a displacement is within `TOLERANCE` of the target."""
    return target / TOLERANCE <= moved <= target * TOLERANCE


class RateTrials(TrainerCallback):
    """Runs the trials of one objective inside one training run, and stops it after the last.

    `earlier` are trials of such a run before: they count as this run's own, which makes up to `MAX_TRIALS` more.
    """

    def __init__(
        self,
        measure: Callable[[], Sequence[float]],
        targets: Sequence[float],
        first: float,
        advance: Callable[[], object] = lambda: None,
        earlier: Sequence[Trial] = (),
    ) -> None:
        self.trials = list(earlier)
        self._max_trials = len(earlier) + MAX_TRIALS
        self._measure, self._targets, self._first, self._advance = measure, targets, first, advance
        self._rate = first
        self._before: Sequence[float] = ()
        self._weights: dict[str, Any] = {}
        self._optimizer: dict[str, Any] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Keep the state after the warm-up; measure each trial and begin the next from that state."""
        self._advance()
        step = state.global_step - WARM_UP
        if step == 0:
            trained = ((name, weight) for name, weight in objects["model"].named_parameters() if weight.requires_grad)
            self._weights = {name: weight.detach().to("cpu", copy=True) for name, weight in trained}
            self._optimizer = copy.deepcopy(objects["optimizer"].state_dict())
            self._before = self._measure()
            if self.trials:
                self._continue(control, objects)
        elif step > 0 and step % WINDOW == 0:
            changes = [abs(now - before) for before, now in zip(self._before, self._measure(), strict=True)]
            self.trials.append((self._rate, fmean(changes)))
            self._continue(control, objects)

    def _continue(self, control: TrainerControl, objects: dict[str, Any]) -> None:
        rate = next_rate(self.trials, self._targets, self._first, self._max_trials)
        if rate is None:
            control.should_training_stop = True
        else:
            self._begin(rate, objects)

    def _begin(self, rate: float, objects: dict[str, Any]) -> None:
        import torch

        with torch.no_grad():
            for name, weight in objects["model"].named_parameters():
                if name in self._weights:
                    weight.copy_(self._weights[name])
        # A deep copy: the optimizer would go on writing into the tensors that it is given.
        objects["optimizer"].load_state_dict(copy.deepcopy(self._optimizer))
        schedule = getattr(objects["lr_scheduler"], "scheduler", objects["lr_scheduler"])
        schedule.base_lrs = [base * rate / self._rate for base in schedule.base_lrs]
        for group, base in zip(objects["optimizer"].param_groups, schedule.base_lrs, strict=True):
            group["lr"] = base
        self._rate = rate


_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "num_train_epochs")


def matching_config(pilot: TrainConfig, first: float, out: Path) -> TrainConfig:
    """The recipe of a pilot as one run of trials: a constant rate after the warm-up, nothing saved or looked at."""
    kept = {key: value for key, value in pilot.trainer.items() if key not in _SCHEDULE}
    trainer = {
        **kept,
        "learning_rate": first,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": WARM_UP,
        "max_steps": MAX_STEPS,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
    }
    quiet = {"guard": None, "probe": 0, "samples": 0, "eval_rows": False, "out": str(out)}
    return pilot.model_copy(update={"trainer": trainer, **quiet})


def run_trials(
    config: TrainConfig,
    targets: Sequence[float],
    advance: Callable[[], object] = lambda: None,
    earlier: Sequence[Trial] = (),
) -> list[Trial]:
    """Train the trials of `config`, made by `matching_config`, that are missing after `earlier` ones.

    Returns the rates of all with their displacements.
    """
    from apo.monitoring.callbacks import InterruptCallback, MetricsCallback, ProgressBarCallback
    from apo.training.plan import plan
    from apo.training.train import build_trainer

    shutil.rmtree(config.out, ignore_errors=True)
    trainer = build_trainer(plan(config), log=lambda _: None)
    for callback in (InterruptCallback, MetricsCallback, ProgressBarCallback):  # nothing to save, nothing to show
        trainer.remove_callback(callback)
    pairs: Any = list(trainer.eval_dataset)
    examples = held_out_responses(pairs)

    def measure() -> list[float]:
        logps = trainer.response_logps(examples)
        return [logp / len(row["chosen_ids"]) for logp, row in zip(logps, examples, strict=True)]

    trials = RateTrials(measure, targets, float(config.trainer["learning_rate"]), advance, earlier)
    trainer.add_callback(trials)
    try:
        trainer.train()
    finally:
        shutil.rmtree(config.out, ignore_errors=True)
    return trials.trials


def free_memory() -> None:
    """Free the models of earlier trainers, which callbacks keep alive, for the processes of the pilots."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def held_out_responses(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both responses of up to `RESPONSES` pairs, spread over all, each as the chosen one of an example."""
    examples = []
    for index in range(0, len(pairs), -(-len(pairs) // RESPONSES)):
        for side in ("chosen", "rejected"):
            pair = pairs[index]
            example = {"prompt_ids": pair["prompt_ids"], "chosen_ids": pair[f"{side}_ids"], "rejected_ids": []}
            mask = {"chosen_mask": pair[f"{side}_mask"]} if f"{side}_mask" in pair else {}
            examples.append({**example, **mask})
    return examples
