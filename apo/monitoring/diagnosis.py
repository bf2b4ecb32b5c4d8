"""Diagnosis of a run's log: each rule detects one problem in the logged metrics, and advises what to change.

The same rules warn during training, once each, and examine a run afterwards (`apo diagnose`). A metric counts as moved
if the mean of its last lines differs from its initial value by more than two standard errors of those lines.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apo.monitoring.metrics import series

WINDOW = 5
"""Log lines that a mean is taken over."""
MIN_LINES = WINDOW + 1
"""Training lines that the rules need: the window, and one line at the start of the run."""
_MAX_PREFIXES = 200
"""Prefixes of a long log to which the rules are applied."""
_MARGIN_OBJECTIVES = {"dpo", "robust", "ipo"}
"""Objectives of the margin alone, under which both rewards may fall."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TrainingLog:
    """The lines of a run so far, the names of its objectives, and the title of their mixture."""

    rows: Rows
    names: frozenset[str]
    title: str

    @property
    def steps(self) -> list[int]:
        """Return the steps of the training lines."""
        return series(self.rows, "loss")[0]

    def values(self, key: str) -> list[float]:
        """Return all values of a metric that are numbers."""
        return [value for value in series(self.rows, key)[1] if not math.isnan(value)]

    def last(self, key: str) -> float | None:
        """Return the mean of a metric over the last `WINDOW` lines; None if there are fewer."""
        values = self.values(key)
        return statistics.fmean(values[-WINDOW:]) if len(values) >= WINDOW else None

    def range(self, key: str) -> tuple[float, float] | None:
        """Return the mean over the last `WINDOW` lines minus and plus two standard errors; None for fewer lines."""
        values = self.values(key)[-WINDOW:]
        if len(values) < WINDOW:
            return None
        mean, half = statistics.fmean(values), 2 * statistics.stdev(values) / math.sqrt(WINDOW)
        return mean - half, mean + half

    def above(self, key: str, value: float) -> bool:
        """True if a metric's whole range is above `value`."""
        return (interval := self.range(key)) is not None and interval[0] > value

    def below(self, key: str, value: float) -> bool:
        """True if a metric's whole range is below `value`."""
        return (interval := self.range(key)) is not None and interval[1] < value


@dataclass(frozen=True)
class Problem:
    """A problem in a run: its rule, the step since which it exists, a message, and if it still exists at the end."""

    rule: str
    step: int
    message: str
    advice: str
    holds: bool = True


Rule = Callable[[TrainingLog], tuple[str, str] | None]
"""A function from a log to a message and advice, or None."""


def chosen_falls(log: TrainingLog) -> tuple[str, str] | None:
    """Chosen responses become less likely than under the reference, although the objective should raise them."""
    if "apo_down" in log.names or not log.below("rewards/chosen", 0) or (log.last("chosen_falls") or 0) < 0.5:
        return None
    if log.names & _MARGIN_OBJECTIVES and log.below("rewards/rejected", 0):
        return None
    return (
        f"chosen rewards are falling under {log.title}: {log.last('rewards/chosen'):+.3f} on average, below 0 in "
        f"{log.last('chosen_falls'):.0%} of the pairs",
        "lower the learning rate; if the winners are no better than the model's own answers, use apo_down; else look "
        "at the pairs: near-duplicates lower both sides",
    )


def both_fall(log: TrainingLog) -> tuple[str, str] | None:
    """Both rewards fall under an objective of the margin alone."""
    falling = log.below("rewards/chosen", 0) and log.below("rewards/rejected", 0)
    if not falling or not log.names & _MARGIN_OBJECTIVES:
        return None
    return (
        f"both rewards fall under {log.title}: chosen {log.last('rewards/chosen'):+.3f}, rejected "
        f"{log.last('rewards/rejected'):+.3f}; it depends on the margin alone, and likelihood moves to other answers",
        "use apo_zero, or add sft with a small weight; a lower learning rate slows the fall",
    )


def both_rise(log: TrainingLog) -> tuple[str, str] | None:
    """Rejected responses become more likely, like the chosen ones."""
    if log.names == {"sft"} or not (log.above("rewards/chosen", 0) and log.above("rewards/rejected", 0)):
        return None
    return (
        f"rejected rewards are rising with the chosen ones under {log.title}: {log.last('rewards/rejected'):+.3f}",
        "the answers share most of their text; use pairs that differ in more than a few tokens",
    )


def stuck(log: TrainingLog) -> tuple[str, str] | None:
    """The loss stays at its initial value and no reward moves."""
    losses = log.values("loss")
    start = losses[0]
    if abs(statistics.fmean(losses[-WINDOW:]) - start) > 0.005 * max(abs(start), 1e-9):
        return None
    margin = log.range("rewards/margins")
    if margin is not None and not margin[0] <= 0 <= margin[1]:
        return None
    if margin is None and abs(losses[-1] - start) > 1e-4 * max(abs(start), 1e-9):
        return None
    frozen = (log.last("rewards/ties") or 0) > 0.99
    evidence = "no log-prob has changed" if frozen else "the rewards are 0 within noise"
    return (
        f"the loss is stuck at its start, {start:.4g}, after {log.steps[-1]} steps: {evidence}",
        "raise the learning rate (about ten times for LoRA), shorten the warm-up, or check that any weight is trained",
    )


def saturated(log: TrainingLog) -> tuple[str, str] | None:
    """Half of the pairs or more have almost no gradient left."""
    share = log.last("saturation")
    if share is None or share < 0.5:
        return None
    message = f"{share:.0%} of the pairs are saturated: on them {log.title} has less than 5 % of its maximal gradient"
    accuracy = log.last("rewards/accuracies")
    if accuracy is not None and accuracy < 0.75:
        return (
            f"{message}, and many are in the wrong order",
            "lower the learning rate, which is too high, or lower beta",
        )
    return message, (
        "stop here, or train on new pairs; use fewer epochs next time. A smaller beta saturates later and goes further "
        "from the reference"
    )


def loss_zero(log: TrainingLog) -> tuple[str, str] | None:
    """The loss is 0: there is nothing left to learn."""
    losses = log.values("loss")
    if "robust" in log.names or abs(statistics.fmean(losses[-3:])) > 1e-3 * abs(losses[0]):
        return None
    return (
        f"the loss is 0 ({losses[-1]:.2g} of {losses[0]:.2g} at the start): every pair is in the right order",
        "the pairs are memorised or differ in something trivial; look at held-out accuracy, and at a few pairs",
    )


def wrong_way(log: TrainingLog) -> tuple[str, str] | None:
    """The rejected response has the higher reward in most pairs."""
    if not log.below("rewards/accuracies", 0.5):
        return None
    return (
        f"rejected has the higher reward in most pairs: accuracy {log.last('rewards/accuracies'):.0%}",
        "check that chosen and rejected are not swapped in the dataset; else lower the learning rate",
    )


def runaway(log: TrainingLog) -> tuple[str, str] | None:
    """The margin grows only because the rejected reward falls."""
    chosen, rejected = log.last("rewards/chosen"), log.last("rewards/rejected")
    if chosen is None or rejected is None or "apo_down" in log.names or rejected > -1 or abs(chosen) > -0.1 * rejected:
        return None
    return (
        f"rejected runs away ({rejected:+.2f}) and chosen stays ({chosen:+.2f}): the model unlearns rather than learns",
        "raise beta, use fewer epochs, or add sft with a small weight",
    )


def by_heart(log: TrainingLog) -> tuple[str, str] | None:
    """The held-out loss rises while the training loss falls."""
    held_out = log.values("eval_loss")
    if len(held_out) < 2 or held_out[-1] < min(held_out) + 0.01 * abs(held_out[0]):
        return None
    best = min(range(len(held_out)), key=held_out.__getitem__)
    step = series(log.rows, "eval_loss")[0][best]
    return (
        f"the held-out loss rises, {held_out[-1]:.4g} after {held_out[best]:.4g} at step {step}: pairs are memorised",
        f"use the checkpoint nearest to step {step}; use fewer epochs, a lower learning rate, or more pairs",
    )


def shared_text(log: TrainingLog) -> tuple[str, str] | None:
    """In chosen responses, the text shared with rejected becomes less likely and the edited text does not."""
    shared, edited = log.values("probe/shared_chosen"), log.values("probe/edited_chosen")
    if len(shared) < 2 or not edited or shared[-1] > -0.01 or shared[-1] > min(edited[-1], 0):
        return None
    return (
        f"in chosen responses, the text shared with rejected falls: {shared[-1]:+.3f} nats per token, edited tokens "
        f"{edited[-1]:+.3f}",
        "near-duplicate pairs lower their common text; use apo_zero instead of dpo, a lower learning rate, or add sft",
    )


def longer(log: TrainingLog) -> tuple[str, str] | None:
    """Chosen responses are much longer than rejected ones, or much shorter."""
    chosen, rejected = log.last("lengths/chosen"), log.last("lengths/rejected")
    if not chosen or not rejected or 2 / 3 < chosen / rejected < 1.5:
        return None
    return (
        f"chosen responses are {chosen / rejected:.2g} times as long as rejected ones "
        f"({chosen:.0f} tokens, {rejected:.0f})",
        "the model may learn length alone; set length_normalised: true, or filter by length",
    )


def padding(log: TrainingLog) -> tuple[str, str] | None:
    """A large share of the computed tokens is padding."""
    share = log.last("padding")
    if share is None or share < 0.3:
        return None
    return f"{share:.0%} of the computed tokens are padding", "set trainer.shared_prefix: true, or smaller batches"


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        chosen_falls,
        both_fall,
        both_rise,
        stuck,
        saturated,
        loss_zero,
        wrong_way,
        runaway,
        by_heart,
        shared_text,
        longer,
        padding,
    )
}


def training_log(rows: Rows, objective: Any) -> TrainingLog:
    """Return the log of a run; `objective` is the recipe's, as plain data, such as run.json holds."""
    from apo.losses.mixture import objective_title

    names = {objective} if isinstance(objective, str) else {str(name) for name in objective}
    return TrainingLog(rows, frozenset(names), objective_title(objective))


def find_problems(log: TrainingLog) -> dict[str, tuple[str, str]]:
    """Return message and advice of each rule that applies, by the rule's name; empty below `MIN_LINES` lines."""
    if len(log.values("loss")) < MIN_LINES:
        return {}
    return {name: problem for name, rule in RULES.items() if (problem := rule(log)) is not None}


def diagnose(rows: Rows, objective: Any) -> list[Problem]:
    """Return every problem at any point of a run: first those that still exist, then by the step they began at.

    The rules are applied to at most about `_MAX_PREFIXES` prefixes of the log.
    """
    stride = -(-len(rows) // _MAX_PREFIXES) or 1
    first: dict[str, int] = {}
    latest: dict[str, tuple[str, str]] = {}
    current: dict[str, tuple[str, str]] = {}
    for stop in sorted({*range(stride, len(rows) + 1, stride), len(rows)}):
        current = find_problems(training_log(rows[:stop], objective))
        for name in current:
            first.setdefault(name, rows[stop - 1]["step"])
        latest |= current
    problems = [Problem(name, step, *latest[name], holds=name in current) for name, step in first.items()]
    return sorted(problems, key=lambda problem: (not problem.holds, problem.step))
