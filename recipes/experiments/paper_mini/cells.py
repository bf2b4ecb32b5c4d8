"""The runs of the mini grid, and those that are due: tuning once per data set and objective, then all seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from clair.core.files import content_hash
from recipes.experiments.paper_mini.data import DATA

OBJECTIVES = ("sft", "dpo", "kto", "apo_zero", "apo_down")
WITHOUT_BETA = ("sft",)


@dataclass(frozen=True)
class Cell:
    """One training run. Runs whose `purpose` is tuning are scored on validation tasks."""

    data: str
    objective: str
    learning_rate: float
    beta: float
    seed: int
    epochs: int
    purpose: Literal["learning_rate", "beta", "grid"]

    def key(self, world: str) -> str:
        """The key of the run in the file of results."""
        return content_hash([world, asdict(self)])[:16]


@dataclass(frozen=True)
class Design:
    """The size of a grid. Learning rates are in ascending order and searched from the middle.

    Of betas with equal accuracy, the first is chosen.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    epochs: int = 3
    learning_rates: tuple[float, ...] = (5e-6, 1.5e-5, 5e-5, 1.5e-4, 5e-4, 1.5e-3)
    betas: tuple[float, ...] = (0.1, 0.03, 0.3)
    tuning_seed: int = 100
    data: tuple[str, ...] = DATA
    objectives: tuple[str, ...] = OBJECTIVES
    heldout: int = 300
    validation: int = 200


SMALL = Design(seeds=(0,), epochs=1, learning_rates=(1.5e-4,), betas=(0.1,), heldout=150, validation=50)


def last_accuracy(run: Mapping[str, Any]) -> float:
    """Share of right answers at the last checkpoint; -1 if training was stopped."""
    if not run["checkpoints"]:
        return -1.0
    right = run["checkpoints"][-1]["right"]
    return right.count("1") / len(right)


def chosen(cells: Sequence[Cell], runs: Mapping[str, Mapping[str, Any]], world: str) -> Cell | None:
    """The cell with the most right answers at the end of training, the first of equal ones; None if a run is missing.

    A single cell needs no run.
    """
    if len(cells) == 1:
        return cells[0]
    if any(cell.key(world) not in runs for cell in cells):
        return None
    return max(cells, key=lambda cell: last_accuracy(runs[cell.key(world)]))


def climb(cells: Sequence[Cell], runs: Mapping[str, Mapping[str, Any]], world: str) -> tuple[list[Cell], Cell | None]:
    """Hill-climb over cells in ascending order of a setting: the cells to run, and the best once it is known.

    The middle cell and its neighbours run first, then the neighbours of the best, until both have run. So the best is
    at an edge of the tried values only if it is at an edge of all values.
    """
    middle = len(cells) // 2
    tried = {index for index in (middle, middle - 1, middle + 1) if index in range(len(cells))}
    while True:
        named = [cells[index] for index in sorted(tried, key=lambda index: (abs(index - middle), index))]
        best = chosen(named, runs, world)
        if best is None:
            return named, None
        index = cells.index(best)
        more = {index - 1, index + 1} & set(range(len(cells))) - tried
        if not more:
            return named, best
        tried |= more


def pair_cells(
    design: Design, data: str, objective: str, runs: Mapping[str, Mapping[str, Any]], world: str
) -> Iterator[Cell]:
    """The cells of one data set and objective that are known so far, in order."""
    first = Cell(
        data, objective, design.learning_rates[0], design.betas[0], design.tuning_seed, design.epochs, "learning_rate"
    )
    rates = [replace(first, learning_rate=rate) for rate in design.learning_rates]
    tried, best = climb(rates, runs, world)
    yield from tried if len(rates) > 1 else ()
    if best is None:
        return
    others = () if objective in WITHOUT_BETA else design.betas[1:]
    betas = [best, *(replace(best, beta=beta, purpose="beta") for beta in others)]
    yield from betas[1:]
    best = chosen(betas, runs, world)
    if best is not None:
        yield from (replace(best, seed=seed, purpose="grid") for seed in design.seeds)


def cells(design: Design, runs: Mapping[str, Mapping[str, Any]], world: str) -> list[Cell]:
    """All cells that are known so far; tuning cells come first, because others depend on them."""
    named = [
        cell
        for data in design.data
        for objective in design.objectives
        for cell in pair_cells(design, data, objective, runs, world)
    ]
    return sorted(named, key=lambda cell: ("learning_rate", "beta", "grid").index(cell.purpose))


def due(design: Design, runs: Mapping[str, Mapping[str, Any]], world: str) -> list[Cell]:
    """The known cells without a result."""
    return [cell for cell in cells(design, runs, world) if cell.key(world) not in runs]
