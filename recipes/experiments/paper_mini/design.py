"""The designs D0 to D4 and their runs, as docs/log/2026-11-29-evidence.md and -delta.md fixed them beforehand.

D0   clean CLAIR pairs on the quickstart's model: objectives, rates and betas
D1   CLAIR pairs at rates that all objectives share
D2   pairs of two writers who are worse than the target (weak) or better (strong), by objective
D3   CLAIR pairs whose winners are rewritten beyond the correction, by dose
D4   CLAIR pairs against pairs of two writers who are both worse than the target, at equal tokens, by objective
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from clair.core.files import content_hash
from clair.core.statistics import clustered_mean
from recipes.experiments.paper_mini.worlds import CONTRASTED, DOSES, QUESTIONS_PER_TEMPLATE, TEMPLATES

VERSION = 1
"""Part of the key of each run. Raise it if a run's meaning changes."""
NAMES = ("D0", "D1", "D2", "D3", "D4")
OBJECTIVES = ("sft", "dpo", "apo_zero", "apo_down")
MARGIN_TO_STOP, EPOCHS_TO_STOP = 0.10, 3
Name = Literal["D0", "D1", "D2", "D3", "D4"]
Rows = Mapping[str, Mapping[str, Any]]
"""Finished runs by their key."""


@dataclass(frozen=True)
class Run:
    """A training run, evaluated at its start and every `every` epochs. Tuning worlds have seeds of 100 and more."""

    world: str
    pairs: str
    objective: str
    learning_rate: float
    beta: float
    epochs: int
    every: int

    @property
    def key(self) -> str:
        return content_hash([VERSION, asdict(self)])[:16]

    @property
    def seed(self) -> int:
        return int(self.world.rpartition("-")[2])

    @property
    def split(self) -> str:
        """The split of the world's questions. Tuning never uses held-out questions."""
        return "validation" if self.seed >= 100 else "heldout"


@dataclass(frozen=True)
class Design:
    """The sizes of all designs."""

    draws: int = 3
    rates: tuple[float, ...] = (1.5e-5, 5e-5, 1.5e-4, 5e-4)
    betas: tuple[float, ...] = (0.1, 1.0)
    short: int = 3
    shared_rates: tuple[float, ...] = (1.5e-5, 5e-5, 1.5e-4)
    beta: float = 0.1
    worlds: int = 10
    regime_worlds: int = 6
    tuning_worlds: int = 3
    epochs: int = 18
    every: int = 2
    dose_objectives: tuple[str, ...] = ("sft", "dpo", "apo_zero")

    def worlds_of(self, name: Name) -> list[str]:
        """Return the worlds in which a design is tested; those of D4 are D2's and D3's."""
        if name == "D0":
            return [f"quickstart-{draw}" for draw in range(self.draws)]
        return [f"regions-{seed}" for seed in range(self.worlds if name == "D1" else self.regime_worlds)]

    @property
    def tuning(self) -> list[str]:
        """The worlds in which rates and checkpoints are selected."""
        return [f"regions-{100 + seed}" for seed in range(self.tuning_worlds)]

    @property
    def checkpoints(self) -> list[int]:
        """The epochs at which a run of D1 to D3 is evaluated."""
        return list(range(self.every, self.epochs + 1, self.every))

    def run(self, world: str, pairs: str, objective: str, rate: float) -> Run:
        """Return a run of D1 to D3."""
        return Run(world, pairs, objective, rate, self.beta, self.epochs, self.every)


FULL = Design()
SMALL = Design(
    draws=2, rates=(5e-5,), betas=(0.1,), short=2, shared_rates=(5e-5,), worlds=2, regime_worlds=2, tuning_worlds=2,
    epochs=2, every=1, dose_objectives=("apo_zero",),
)  # fmt: skip
"""A small version of every step. Its results decide nothing."""


# ---- values of a run


def accuracy(checkpoint: Mapping[str, Any]) -> float:
    """Return the share of right answers at a checkpoint; `right` has one hexadecimal digit per template."""
    return sum(int(digit, 16) for digit in checkpoint["right"]) / (len(TEMPLATES) * QUESTIONS_PER_TEMPLATE)


def at_epoch(row: Mapping[str, Any], epoch: int) -> Mapping[str, Any]:
    """Return the newest checkpoint up to an epoch: a run that was stopped keeps its last value."""
    return [checkpoint for checkpoint in row["checkpoints"] if checkpoint["epoch"] <= epoch][-1]


def gain(row: Mapping[str, Any], epoch: int) -> float:
    """Return the accuracy at an epoch minus that at the start."""
    return accuracy(at_epoch(row, epoch)) - accuracy(row["checkpoints"][0])


# ---- selection


@dataclass(frozen=True)
class Setting:
    """A selected rate and checkpoint."""

    learning_rate: float
    epoch: int


def select(design: Design, pairs: str, objective: str, worlds: Sequence[str], rows: Rows) -> Setting | None:
    """Select the rate and the checkpoint for one set of pairs and one objective.

    Settings are compared by their mean gain over the tuning worlds, the number that is reported. Of all settings within
    one standard error of the best, select the smallest rate, and at that rate the best checkpoint. None if a tuning run
    is missing, or if there are fewer than two tuning worlds.
    """
    if len(worlds) < 2:
        return None
    gains: dict[Setting, list[float]] = {}
    for rate in design.shared_rates:
        for world in worlds:
            row = rows.get(design.run(world, pairs, objective, rate).key)
            if row is None:
                return None
            for epoch in design.checkpoints:
                gains.setdefault(Setting(rate, epoch), []).append(gain(row, epoch))
    means = {setting: math.fsum(values) / len(values) for setting, values in gains.items()}
    best = max(means, key=lambda setting: means[setting])
    lowest = means[best] - clustered_mean(gains[best], range(len(worlds))).se
    rate = min(setting.learning_rate for setting, mean in means.items() if mean >= lowest)
    at_rate = {setting: mean for setting, mean in means.items() if setting.learning_rate == rate and mean >= lowest}
    return max(at_rate, key=lambda setting: at_rate[setting])


def regime_gains(design: Design, pairs: str, worlds: Sequence[str], rows: Rows) -> list[float] | None:
    """Return SFT's gain by tuning world, at the middle rate and the last checkpoint; None if a run is missing."""
    rate = design.shared_rates[len(design.shared_rates) // 2]
    sft = [rows.get(design.run(world, pairs, "sft", rate).key) for world in worlds]
    return None if None in sft else [gain(row, design.epochs) for row in sft if row is not None]


# ---- missing runs


def runs_of(name: Name, design: Design, passed: Mapping[str, bool], rows: Rows) -> list[Run]:
    """Return the runs of a design that can be determined so far: tuning runs first, as others depend on them.

    Once D1's rates are selected, the runs that its claims take come before those at other rates.

    `passed` is True for the existing worlds whose gates are met. Other worlds have no runs.
    """
    worlds = [world for world in design.worlds_of(name) if passed.get(world)]
    tuning = [world for world in design.tuning if passed.get(world)]
    if name == "D0":
        return [
            Run(world, "clair", objective, rate, beta, design.short, 1)
            for world in worlds
            for objective in OBJECTIVES
            for rate in design.rates
            for beta in (design.betas if objective != "sft" else design.betas[:1])
        ]
    if name == "D4":
        result = [
            run
            for pairs in CONTRASTED
            for run in _at_all_rates(design, tuning, pairs)
            if run.objective in design.dose_objectives
        ]
        for pairs in CONTRASTED:
            for objective in design.dose_objectives:
                if setting := select(design, pairs, objective, tuning, rows):
                    result += [design.run(world, pairs, objective, setting.learning_rate) for world in worlds]
        return result
    if name == "D3":
        return [
            design.run(world, pairs, objective, setting.learning_rate)
            for objective in design.dose_objectives
            if (setting := select(design, "clair", objective, tuning, rows))
            for world in worlds
            for pairs in DOSES
        ]
    sets = ("clair",) if name == "D1" else ("weak", "strong")
    result = [run for pairs in sets for run in _at_all_rates(design, tuning, pairs)]
    if name == "D1":
        settings = {o: select(design, "clair", o, tuning, rows) for o in OBJECTIVES}
        rates = {o: setting.learning_rate for o, setting in settings.items() if setting}
        # The claims take an objective at its own rate, and all but SFT at that of APO-zero.
        claimed = {*rates.items(), *((o, rates.get("apo_zero")) for o in OBJECTIVES if o != "sft")}
        tests = _at_all_rates(design, worlds, "clair")
        return result + sorted(tests, key=lambda run: (run.objective, run.learning_rate) not in claimed)
    for pairs in sets:
        for objective in OBJECTIVES:
            setting = select(design, pairs, objective, tuning, rows)
            if setting and is_regime(design, pairs, tuning, rows):
                result += [design.run(world, pairs, objective, setting.learning_rate) for world in worlds]
    return result


def _at_all_rates(design: Design, worlds: Sequence[str], pairs: str) -> Iterator[Run]:
    for world in worlds:
        for objective in OBJECTIVES:
            yield from (design.run(world, pairs, objective, rate) for rate in design.shared_rates)


def is_regime(design: Design, pairs: str, tuning: Sequence[str], rows: Rows) -> bool | None:
    """Return True if SFT on the winners loses (weak) or gains (strong) in all tuning worlds; None: runs are missing."""
    gains = regime_gains(design, pairs, tuning, rows)
    if gains is None or not gains:
        return None
    return all(value < 0 for value in gains) if pairs == "weak" else all(value > 0 for value in gains)


def due(name: Name, design: Design, passed: Mapping[str, bool], rows: Rows) -> list[Run]:
    """Return the runs of a design that have no result, each once."""
    runs = dict.fromkeys(runs_of(name, design, passed, rows))
    return [run for run in runs if run.key not in rows]


def worlds_needed(name: Name, design: Design) -> list[str]:
    """Return the worlds of a design, tuning worlds first."""
    return (design.tuning if name != "D0" else []) + design.worlds_of(name)
