"""What the log of a run says, in words: each rule looks at the lines so far and finds something wrong, or nothing.

The same rules warn while a run trains, once each, and judge it afterwards (`apo diagnose`). A mean is taken for moved
where the mean of the last lines is more than two standard errors, by their spread, from where it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apo.monitoring.metrics import series

LINES = 5
"""Log lines that a mean is taken over."""
FEWEST = LINES + 1
"""Log lines of training before anything is said: that mean, and where the run began."""
_PREFIXES = 200
_DIFFERENCES = {"dpo", "robust", "ipo"}
"""Objectives that see the margin alone, so that both rewards may fall."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Log:
    """The lines of a run so far, and what it minimises: the names of its objectives, and them in one line."""

    rows: Rows
    names: frozenset[str]
    title: str

    @property
    def steps(self) -> list[int]:
        """Steps of the training lines."""
        return series(self.rows, "loss")[0]

    def of(self, key: str) -> list[float]:
        """All values of a metric, those that are numbers."""
        return [value for value in series(self.rows, key)[1] if not math.isnan(value)]

    def last(self, key: str) -> float | None:
        """The mean of the last lines of a metric; None without enough of them."""
        values = self.of(key)
        return statistics.fmean(values[-LINES:]) if len(values) >= LINES else None

    def range(self, key: str) -> tuple[float, float] | None:
        """The mean of the last lines, less and plus two standard errors."""
        values = self.of(key)[-LINES:]
        if len(values) < LINES:
            return None
        mean, half = statistics.fmean(values), 2 * statistics.stdev(values) / math.sqrt(LINES)
        return mean - half, mean + half

    def above(self, key: str, value: float) -> bool:
        """Whether a metric is clearly above a value."""
        return (found := self.range(key)) is not None and found[0] > value

    def below(self, key: str, value: float) -> bool:
        """Whether a metric is clearly below a value."""
        return (found := self.range(key)) is not None and found[1] < value


@dataclass(frozen=True)
class Verdict:
    """What was found, from which step on, what to do about it, and whether it still holds at the end."""

    rule: str
    step: int
    words: str
    advice: str
    holds: bool = True


Rule = Callable[[Log], tuple[str, str] | None]


def chosen_falls(log: Log) -> tuple[str, str] | None:
    """Chosen responses become less likely than under the reference, where they should not."""
    if "apo_down" in log.names or not log.below("rewards/chosen", 0) or (log.last("chosen_falls") or 0) < 0.5:
        return None
    if log.names & _DIFFERENCES and log.below("rewards/rejected", 0):
        return None
    return (
        f"chosen rewards are falling under {log.title}: {log.last('rewards/chosen'):+.3f} on average, below 0 in "
        f"{log.last('chosen_falls'):.0%} of the pairs",
        "lower the learning rate; if the winners are no better than the model's own answers, apo_down fits; else look "
        "at the pairs: near-duplicates pull both sides down",
    )


def both_fall(log: Log) -> tuple[str, str] | None:
    """Under an objective of the margin alone, both rewards fall."""
    falling = log.below("rewards/chosen", 0) and log.below("rewards/rejected", 0)
    if not falling or not log.names & _DIFFERENCES:
        return None
    return (
        f"both rewards fall under {log.title}: chosen {log.last('rewards/chosen'):+.3f}, rejected "
        f"{log.last('rewards/rejected'):+.3f}; it sees the margin alone, and likelihood moves to answers in neither",
        "take apo_zero, or add sft with a small weight; a lower learning rate slows it",
    )


def both_rise(log: Log) -> tuple[str, str] | None:
    """Rejected responses become more likely too."""
    if log.names == {"sft"} or not (log.above("rewards/chosen", 0) and log.above("rewards/rejected", 0)):
        return None
    return (
        f"rejected rewards are rising with the chosen ones under {log.title}: {log.last('rewards/rejected'):+.3f}",
        "the answers share most of their text; take pairs that differ in more than a few tokens",
    )


def stuck(log: Log) -> tuple[str, str] | None:
    """The loss is where it started and no reward has moved."""
    losses = log.of("loss")
    start = losses[0]
    if abs(statistics.fmean(losses[-LINES:]) - start) > 0.005 * max(abs(start), 1e-9):
        return None
    margin = log.range("rewards/margins")
    if margin is not None and not margin[0] <= 0 <= margin[1]:
        return None
    if margin is None and abs(losses[-1] - start) > 1e-4 * max(abs(start), 1e-9):
        return None
    frozen = (log.last("rewards/ties") or 0) > 0.99
    found = "no log-prob has changed" if frozen else "the rewards are 0 but for noise"
    return (
        f"the loss is stuck at its start, {start:.4g}, after {log.steps[-1]} steps: {found}",
        "a higher learning rate (about ten times for LoRA), fewer warm-up steps, or something that is trained at all",
    )


def saturated(log: Log) -> tuple[str, str] | None:
    """The objective pulls at few pairs any more."""
    share = log.last("saturation")
    if share is None or share < 0.5:
        return None
    lost = (log.last("rewards/accuracies") or 1) < 0.75
    return (
        f"{share:.0%} of the pairs are saturated: {log.title} pulls at them with less than 5 % of its greatest pull"
        + (", and many are on the wrong side" if lost else ""),
        "the rate is so high that pairs were lost; lower it, or a smaller beta"
        if lost
        else "stop here, or train on "
        "new pairs; fewer epochs next time. A smaller beta saturates later and goes further from the reference",
    )


def loss_zero(log: Log) -> tuple[str, str] | None:
    """Nothing is left to learn."""
    losses = log.of("loss")
    if "robust" in log.names or abs(statistics.fmean(losses[-3:])) > 1e-3 * abs(losses[0]):
        return None
    return (
        f"the loss is 0 ({losses[-1]:.2g} of {losses[0]:.2g} at the start): every pair is told apart",
        "the pairs are learned by heart or differ in something trivial; look at held-out accuracy, and at a few pairs",
    )


def wrong_way(log: Log) -> tuple[str, str] | None:
    """Rejected has the higher reward in most pairs."""
    if not log.below("rewards/accuracies", 0.5):
        return None
    return (
        f"rejected has the higher reward in most pairs: accuracy {log.last('rewards/accuracies'):.0%}",
        "see that chosen and rejected are not swapped in the dataset; else lower the learning rate",
    )


def runaway(log: Log) -> tuple[str, str] | None:
    """The margin is made by pushing rejected down alone."""
    chosen, rejected = log.last("rewards/chosen"), log.last("rewards/rejected")
    if chosen is None or rejected is None or "apo_down" in log.names or rejected > -1 or abs(chosen) > -0.1 * rejected:
        return None
    return (
        f"rejected runs away ({rejected:+.2f}) and chosen stays ({chosen:+.2f}): the model unlearns rather than learns",
        "a larger beta or fewer epochs; or add sft with a small weight",
    )


def by_heart(log: Log) -> tuple[str, str] | None:
    """Held-out loss rises while training loss falls."""
    held_out = log.of("eval_loss")
    if len(held_out) < 2 or held_out[-1] < min(held_out) + 0.01 * abs(held_out[0]):
        return None
    best = min(range(len(held_out)), key=held_out.__getitem__)
    step = series(log.rows, "eval_loss")[0][best]
    return (
        f"the held-out loss rises: {held_out[-1]:.4g} after {held_out[best]:.4g} at step {step}; the pairs are learned "
        "by heart",
        f"take the checkpoint nearest step {step}; fewer epochs, a lower rate, or more pairs",
    )


def shared_text(log: Log) -> tuple[str, str] | None:
    """Of chosen responses, the shared text falls and the edited does not."""
    shared, edited = log.of("probe/shared_chosen"), log.of("probe/edited_chosen")
    if len(shared) < 2 or not edited or shared[-1] > -0.01 or shared[-1] > min(edited[-1], 0):
        return None
    return (
        f"what falls in chosen responses is the text they share with rejected: {shared[-1]:+.3f} nats a token, edited "
        f"tokens {edited[-1]:+.3f}",
        "near-duplicate pairs drag their common text down; apo_zero in place of dpo, a lower rate, or sft beside it",
    )


def longer(log: Log) -> tuple[str, str] | None:
    """Chosen responses are much longer than rejected ones, or much shorter."""
    chosen, rejected = log.last("lengths/chosen"), log.last("lengths/rejected")
    if not chosen or not rejected or 2 / 3 < chosen / rejected < 1.5:
        return None
    return (
        f"chosen responses are {chosen / rejected:.2g} times as long as rejected ones "
        f"({chosen:.0f} tokens, {rejected:.0f})",
        "the model may learn length alone; `length_normalised: true`, or a filter on length",
    )


def padding(log: Log) -> tuple[str, str] | None:
    """Much of what is computed is padding."""
    share = log.last("padding")
    if share is None or share < 0.3:
        return None
    return f"{share:.0%} of the computed tokens are padding", "set trainer.shared_prefix: true, or smaller batches"


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        chosen_falls, both_fall, both_rise, stuck, saturated, loss_zero, wrong_way, runaway, by_heart, shared_text,
        longer, padding,
    )
}  # fmt: skip


def log_of(rows: Rows, objective: Any) -> Log:
    """The lines of a run whose recipe has this `objective` (plain, as run.json keeps it)."""
    from apo.losses.mixture import objective_title

    names = {objective} if isinstance(objective, str) else {str(name) for name in objective}
    return Log(rows, frozenset(names), objective_title(objective))


def judge(log: Log) -> dict[str, tuple[str, str]]:
    """What each rule finds in the lines so far, words and advice by its name; nothing before there are `FEWEST`."""
    if len(log.of("loss")) < FEWEST:
        return {}
    return {name: found for name, rule in RULES.items() if (found := rule(log)) is not None}


def verdicts(rows: Rows, objective: Any) -> list[Verdict]:
    """Everything that was wrong at any point of a run: first those that still hold, in the order they came up.

    Of a long log, `_PREFIXES` points are looked at.
    """
    apart = -(-len(rows) // _PREFIXES) or 1
    ends = sorted({*range(apart, len(rows) + 1, apart), len(rows)})
    first: dict[str, int] = {}
    words: dict[str, tuple[str, str]] = {}
    found: dict[str, tuple[str, str]] = {}
    for end in ends:
        found = judge(log_of(rows[:end], objective))
        for name, told in found.items():
            first.setdefault(name, rows[end - 1]["step"])
            words[name] = told
    every = [Verdict(name, step, *words[name], holds=name in found) for name, step in first.items()]
    return sorted(every, key=lambda verdict: (not verdict.holds, verdict.step))
