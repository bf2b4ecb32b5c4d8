"""Rows of the designs as if their runs were finished, from an accuracy by run and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from random import Random
from typing import Any

from recipes.experiments.paper_mini.analysis import DesignResults
from recipes.experiments.paper_mini.design import NAMES, Design, Run, due, worlds_needed
from recipes.experiments.paper_mini.worlds import sets_of, world_of

Accuracy = Callable[[Run, int], float]
PASSED = {f"{target}-{seed}": True for target in ("regions", "quickstart") for seed in (*range(10), 100, 101, 102)}


def digits(share: float) -> str:
    """The record of a checkpoint with this share of right answers, spread evenly over templates."""
    right = round(600 * share)
    return "".join(f"{right // 40 + (index < right % 40):x}" for index in range(40))


def row_of(run: Run, accuracy: Accuracy, nats: float = 1.0) -> dict[str, Any]:
    """The line of a finished run. Its held-out winners rise by `nats`."""
    epochs = [0, *range(run.every, run.epochs + 1, run.every)]
    checkpoints = [
        {"epoch": e, "right": digits(accuracy(run, e)),
         "pairs": {"logps/chosen": nats * e / run.epochs, "rewards/accuracies": 1.0 if e else 0.5}}
        for e in epochs
    ]  # fmt: skip
    line = {"kind": "run", "version": 1, "key": run.key, **asdict(run), "commit": "0" * 40, "cpu_seconds": 1.0}
    return {**line, "checkpoints": checkpoints}


def as_the_paper_says(run: Run, epoch: int) -> float:
    """Accuracies by which every claim holds, with a little of the world in them."""
    noise = Random(f"{run.world} {run.objective} {run.pairs}").uniform(-0.01, 0.01)
    base = 0.55 if run.world.startswith("quickstart") else 0.7
    if epoch == 0:
        return base
    gains = {
        "weak": {"sft": -0.2, "dpo": -0.05, "apo_zero": -0.1, "apo_down": 0.05},
        "strong": {"sft": 0.15, "dpo": 0.1, "apo_zero": 0.18, "apo_down": -0.05},
    }
    usual = {"sft": 0.1, "dpo": 0.08, "apo_zero": 0.2, "apo_down": -0.08}
    gain = gains.get(run.pairs, usual)[run.objective]
    if run.pairs.startswith("dose"):
        gain -= 0.03 * int(run.pairs[-1])
    return base + gain + noise


def finished(runs: Iterable[Run], accuracy: Accuracy = as_the_paper_says) -> dict[str, Any]:
    """The rows of these runs by their key; under DPO winners fall."""
    return {run.key: row_of(run, accuracy, _nats(run)) for run in runs}


def _nats(run: Run) -> float:
    size = 2 + Random(f"{run.world} {run.objective}").random()
    return -size if run.objective == "dpo" else size


def all_results(design: Design, names: Iterable[Any] = NAMES, accuracy: Accuracy = as_the_paper_says) -> DesignResults:
    """All worlds and runs of these designs."""
    rows: dict[str, Any] = {}
    worlds: dict[str, Any] = {}
    for name in names:
        worlds |= {world: _world(world) for world in worlds_needed(name, design)}
        while runs := due(name, design, PASSED, rows):
            rows |= finished(runs, accuracy)
    return DesignResults(design, worlds, rows)


def _world(name: str) -> dict[str, Any]:
    sets = {item: {"train": 160, "test": 60, "winners_right": 1.0} for item in sets_of(world_of(name))}
    return {
        "kind": "world", "version": 1, "name": name, "nats": -0.7, "well_formed": 0.99, "right": 0.7, "regional": 0.95,
        "sets": sets, "gates": {"98 % well formed": True}, "commit": "0" * 40,
    }  # fmt: skip
