"""The pilots of a recipe: everything that can be checked and estimated before the first request or step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apo.advice.config import OWN_ANSWERS, AdviseConfig, PilotConfig
from apo.pilot.matching import MAX_STEPS
from apo.pilot.metric import benchmark_config, metric_name
from apo.sweep.grid import SweepRun, check_runs, make_run
from apo.training.config import TrainConfig
from apo.training.plan import plan, plan_run
from clair.core.errors import UserError, check_name
from clair.core.files import read_json
from clair.core.recipe import load_recipe
from clair.data.prompt_sources import read_prompts
from clair.data.records import Prompt, content_id
from clair.pipeline.checker import check_checker

FOLDER = "pilots"
RATES, RESULT, PICTURE = "rates.json", "pilot.json", "pilot.png"
RAISES_WINNERS = frozenset({"sft", "apo_zero", "apo_hinge_zero", "apo_zero_unpaired"})
"""Objectives that should make chosen answers more likely. The others may lower them, and are not stopped for it."""
_SCALED = ("max_steps", "warmup_steps")


@dataclass(frozen=True)
class PilotPlan:
    """The checked pilots: the training recipe, what all pilots change in it, the prompts, and the steps.

    `steps` are those of one pilot, `full_steps` those of the whole recipe.
    """

    config: AdviseConfig
    full: TrainConfig
    overrides: Sequence[str]
    prompts: Sequence[Prompt]
    steps: int
    full_steps: int

    @property
    def pilot(self) -> PilotConfig:
        """The section of the recipe."""
        assert self.config.pilot is not None
        return self.config.pilot

    @property
    def out(self) -> Path:
        """The result folder."""
        return Path(self.config.out)

    def share(self, matching_steps: int, pilot_steps: int) -> float:
        """The cost of so many steps as a share of the whole recipe's."""
        return (matching_steps + pilot_steps) / self.full_steps

    @property
    def max_share(self) -> float:
        """The highest cost in steps, as a share of the whole recipe's."""
        return self.share(MAX_STEPS * len(self.pilot.objectives), self.steps * self.pilot.count)

    def full_rate(self, rate: float) -> float:
        """The rate at which a full run moves the model about as far as a pilot at `rate`, which has fewer steps."""
        return float(f"{rate * self.steps / self.full_steps:.2g}")

    def run(self, objective: str, displacement: float, rate: float) -> SweepRun:
        """One pilot."""
        guard = self.full.guard.model_dump(exclude_unset=True) if self.full.guard else {}
        guard |= {"answers": str(self.out / OWN_ANSWERS), "max_kl": self.pilot.max_kl}
        guard["winners"] = objective in RAISES_WINNERS
        values = {"objective": objective, "trainer.learning_rate": rate, "guard": guard}
        return make_run(
            self.pilot.recipe, self.overrides, self.out / FOLDER / pilot_name(objective, displacement), values
        )


def pilot_name(objective: str, displacement: float) -> str:
    """The name of a pilot: `apo_zero-0.03`."""
    return f"{objective}-{displacement:g}"


def plan_pilots(config: AdviseConfig, *, then_train: bool = False) -> PilotPlan:
    """Check the recipe's pilots, one of each objective, and with `then_train` the `out` of the training recipe.

    Raises UserError for the user's mistakes.
    """
    from apo.losses.objectives import OBJECTIVES

    pilot = config.pilot
    if pilot is None:
        raise UserError("--pilot needs `pilot: {recipe: train.yaml}` in the recipe; see docs/advice.md")
    metric = metric_name(config)
    for name in pilot.objectives:
        check_name("pilot.objectives: no objective", name, OBJECTIVES)
    full = load_recipe(TrainConfig, pilot.recipe)
    _check_same(config, full)
    if pilot.checker:
        check_checker(pilot.checker, "pilot.checker")
    if pilot.benchmark:
        benchmark_config(pilot.benchmark)
    overrides = pilot_overrides(full, pilot.one_in)
    prompts = [] if metric == "benchmark" else _prompts(pilot, full)
    planned = PilotPlan(config, full, overrides, prompts, 0, plan(full).steps)
    if then_train:
        _check_full_out(planned)
    runs = []
    for name in pilot.objectives:
        # Without the guard, whose answers the model has not given yet, and in a folder that no pilot has.
        folder = planned.out / FOLDER / ".plan" / name
        try:
            runs += check_runs([make_run(pilot.recipe, overrides, folder, {"objective": name})])
        except UserError as error:
            raise UserError(f"pilot.objectives: {name}: {str(error).removeprefix(f'{name}: ')}") from error
    return PilotPlan(config, full, overrides, prompts, max(run.steps for run in runs), planned.full_steps)


def _check_full_out(planned: PilotPlan) -> None:
    """Raise UserError unless the training recipe's `out` is free, or holds the run that these pilots recommended."""
    file, result = planned.pilot.recipe, planned.out / RESULT
    recommended = read_json(result)["recommended"] if result.is_file() else None
    try:
        status = plan_run(load_recipe(TrainConfig, file, recommended or ()))[1]
    except UserError as error:
        raise UserError(f"pilot.recipe: {file} cannot be trained by --then-train: {error}") from error
    if status != "new" and not recommended:
        raise UserError(f"pilot.recipe: `out` of {file}, {planned.full.out}, holds a run; --then-train needs another")


def pilot_overrides(full: TrainConfig, one_in: int) -> list[str]:
    """What all pilots change in the recipe: one in so many pairs, and a schedule that is shorter by as much."""
    sources = [{**s.model_dump(mode="json", exclude_unset=True), "weight": s.weight / one_in} for s in full.dataset]
    overrides = [f"dataset={json.dumps(sources)}"]
    for key in _SCALED:
        if isinstance(steps := full.trainer.get(key), int) and steps > 0:
            overrides.append(f"trainer.{key}={math.ceil(steps / one_in)}")
    return overrides


def _check_same(config: AdviseConfig, full: TrainConfig) -> None:
    """Raises UserError if the training recipe is about another model or other pairs than the advice."""
    assert config.pilot is not None
    file = config.pilot.recipe
    if full.by is not None:
        raise UserError(f"pilot.recipe: {file} trains a model for each value of {full.by!r}; choose one by `where`")
    if not _same_path(full.model, str(config.model.path)):
        raise UserError(f"pilot.recipe: {file} trains {full.model}, and the advice is about {config.model.path}")
    if not any(_same_path(source.path, str(config.dataset)) for source in full.dataset):
        paths = ", ".join(source.path for source in full.dataset)
        raise UserError(f"pilot.recipe: {file} trains on {paths}, and the advice is about {config.dataset.public}")


def _same_path(first: str, second: str) -> bool:
    return first == second or Path(first).resolve() == Path(second).resolve()


def _prompts(pilot: PilotConfig, full: TrainConfig) -> list[Prompt]:
    """The prompts that all models answer: those of `pilot.prompts`, or of the held-out pairs, each once."""
    from apo.data.sources import load_eval

    if pilot.prompts:
        rows = list(read_prompts(pilot.prompts))
    else:
        pairs = load_eval(full.dataset, full.eval)
        held_out: Any = [] if pairs is None else list(pairs)
        rows = [Prompt(_row_id(row), tuple(row["prompt"])) for row in held_out if isinstance(row["prompt"], list)]
    different = {content_id(row.messages, None): row for row in rows}
    if len(different) < 2:
        raise UserError(
            f"pilot: {len(different)} different prompts to compare answers to; give pilot.prompts, or hold out pairs"
        )
    return list(different.values())


def _row_id(row: Mapping[str, Any]) -> str:
    return str(row.get("id") or content_id(row["prompt"], None))
