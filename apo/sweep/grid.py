"""The runs of a sweep: one recipe with every combination of the grid's values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from apo.cost.fitting import check_fits
from apo.cost.memory import run_flops
from apo.data.sources import hash_pairs
from apo.run_dir.files import Status
from apo.training.by_group import value_folder
from apo.training.config import TrainConfig
from apo.training.plan import estimate, plan_run
from clair.core.errors import UserError, one_line
from clair.core.out_folder import check_out_folder
from clair.core.recipe import load_recipe, parse_yaml, resolved

RESULT = "sweep.json"
PICTURE = "sweep.png"
_FIXED = {
    "out": "each run has its own folder in that of the sweep",
    "by": "a sweep trains one model for each combination",
    "eval": "all runs are compared on the same held-out pairs",
    "eval_rows": "a sweep sets it",
}
"""Keys that a grid cannot have, and why."""


@dataclass(frozen=True)
class SweepRun:
    """One combination of the grid: the name of its folder, the values by key, and the config.

    `flops` are the FLOPs of training (None if they cannot be estimated), `reference_flops` those of the reference's
    log-probs, and `speed` the FLOPs per second of this machine.
    """

    name: str
    values: Mapping[str, Any]
    config: TrainConfig
    status: Status = "new"
    steps: int = 0
    flops: float | None = None
    reference_flops: float = 0.0
    speed: float = 0.0

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.config.out)

    @property
    def overrides(self) -> list[str]:
        """The arguments of `--set` for this run; `eval_rows` writes the held-out rows that a sweep compares."""
        return _overrides(self.values)

    @property
    def reference(self) -> str:
        """A key that is equal for runs that may share reference log-probs."""
        keys = ("model", "dataset", "seed", "quantize")
        return json.dumps([resolved(self.config)[key] for key in keys], sort_keys=True)


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parse `--grid key=value,value` into values by key. They are YAML, as in `--set`. Raises UserError."""
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not (equals and values.strip() and all(key.split("."))):
            raise UserError(f"--grid takes key=value,value, got {text!r}; for example --grid beta=0.05,0.1")
        if reason := _FIXED.get(key.partition(".")[0]):
            raise UserError(f"--grid {key}: {reason}; leave it out, or set it for all runs with --set")
        if key in grid:
            raise UserError(f"--grid {key} is given twice; write all values into one --grid")
        try:
            grid[key] = parse_yaml(f"[{values}]")
        except yaml.YAMLError as error:
            raise UserError(
                f"--grid {key}: {values!r} is not a list of YAML values with commas ({one_line(error)})"
            ) from error
        distinct = {json.dumps(value, sort_keys=True) for value in grid[key]}
        if len(distinct) < 2 or len(distinct) < len(grid[key]):
            problem = "is one value" if len(grid[key]) < 2 else "has a value twice"
            raise UserError(
                f"--grid {key}: {values!r} {problem}; give different values, or set it with --set {key}=..."
            )
    if not grid:
        raise UserError("a sweep needs a grid, such as --grid beta=0.05,0.1")
    return grid


def expand_grid(
    recipe: str | Path, grid: Mapping[str, Sequence[Any]], overrides: Sequence[str], out: str | None = None
) -> list[SweepRun]:
    """Return the runs of a sweep; the last key varies fastest. Raises UserError for a recipe that is not valid."""
    base = load_recipe(TrainConfig, recipe, overrides)
    folder = Path(out or base.out)
    if base.by is not None:
        raise UserError("by: a sweep trains one model per combination; remove it, or choose a group by `where`")
    check_out_folder(folder, "sweep", [RESULT])
    short = [key.rpartition(".")[2] for key in grid]
    labels = short if len(set(short)) == len(grid) else list(grid)
    runs: dict[str, SweepRun] = {}
    for combination in product(*grid.values()):
        texts = (value if isinstance(value, str) else json.dumps(value).replace("e+", "e") for value in combination)
        name = "_".join(value_folder(f"{label}-{text}") for label, text in zip(labels, texts, strict=True))
        values = dict(zip(grid, combination, strict=True))
        if earlier := runs.get(name.casefold()):
            raise UserError(f"--grid: {dict(earlier.values)} and {values} would share the folder {name}")
        runs[name.casefold()] = make_run(recipe, overrides, folder / name, values)
    return list(runs.values())


def make_run(recipe: str | Path, overrides: Sequence[str], out: Path, values: Mapping[str, Any]) -> SweepRun:
    """The run of one combination of values in the folder `out`. Raises UserError for values that no recipe can have."""
    config = load_recipe(TrainConfig, recipe, [*overrides, *_overrides(values)])
    return SweepRun(out.name, values, config.model_copy(update={"out": str(out)}))


def _overrides(values: Mapping[str, Any]) -> list[str]:
    return [*(f"{key}={json.dumps(value)}" for key, value in values.items()), "eval_rows=true"]


def check_runs(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """Check all runs as `apo train` does, without loading weights. Returns them with status, steps and cost.

    Raises UserError for the first run that cannot be trained or is of pairs or a model that have changed since, and if
    the held-out pairs of two runs differ.
    """
    checked, held_out = [], set()
    for run in runs:
        try:
            planned, status = plan_run(run.config)
            costs = estimate(planned)
            if not isinstance(costs, str):
                check_fits(costs.here, costs.machine)
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from error
        assert planned.eval is not None, "eval_rows needs held-out pairs"
        held_out.add(hash_pairs(planned.eval.dataset))
        if len(held_out) > 1:
            raise UserError(
                f"{run.name} has other held-out pairs than {runs[0].name}; set `eval` to one file or split for all"
            )
        run = replace(run, status=status, steps=planned.steps)
        if not isinstance(costs, str):
            total, reference = run_flops(costs.here)
            reference = reference if planned.args.precompute_ref_log_probs else 0.0
            run = replace(run, flops=total - reference, reference_flops=reference, speed=costs.machine.flops)
        checked.append(run)
    return checked
