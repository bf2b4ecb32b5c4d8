"""The recipe of several rounds, and what it needs of the recipes that it names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from clair.core.errors import UserError
from clair.core.recipe import Recipe, load_recipe, resolved, text_override
from clair.core.urls import without_secrets
from clair.inference.config import content_settings
from clair.pipeline.config import MAY_CHANGE, BuildConfig, redacted
from clair.storage.location import local

_STOP_KEYS = ("rounds", "stop", "out")


class EvaluateConfig(Recipe):
    """`evaluate:` of the rounds: one kind of `apo eval`, and its recipe."""

    winrate: str | None = None
    ifeval: str | None = None
    mixeval: str | None = None

    @model_validator(mode="after")
    def _has_one_kind(self) -> EvaluateConfig:
        if len(self.model_fields_set) != 1 or not self.recipe:
            raise ValueError("give one evaluation and its recipe: {winrate: FILE}, {ifeval: FILE} or {mixeval: FILE}")
        return self

    @property
    def kind(self) -> str:
        """The command of `apo eval`."""
        (kind,) = self.model_fields_set
        return kind

    @property
    def recipe(self) -> str:
        """The path of its recipe."""
        return getattr(self, self.kind) or ""


class IterateConfig(Recipe):
    """The recipe of several rounds. See docs/rounds.md."""

    rounds: int = Field(default=3, ge=1)
    """The most rounds."""
    build: str
    """The data recipe of the first round."""
    train: str
    """The training recipe; its `model` and `dataset` are those of the round."""
    evaluate: EvaluateConfig
    stop: Literal["no_gain", "never"] = "no_gain"
    """`no_gain`: end after a round whose gain has an interval that does not lie above 0."""
    out: str


class TrainRecipe(Recipe):
    """The keys of a training recipe that rounds depend on. `apo train` checks the others."""

    model_config = ConfigDict(extra="allow")

    model: str
    dataset: Any = None
    by: str | None = None
    lora: Any = None


class EvaluationRecipe(Recipe):
    """The recipe of an evaluation, which `apo eval` checks."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True, slots=True)
class Recipes:
    """The recipes of the rounds, read and checked as far as this package knows them."""

    build: BuildConfig
    train: TrainRecipe
    evaluate: EvaluationRecipe

    def content(self, config: IterateConfig) -> dict[str, dict[str, Any]]:
        """What determines the results, by recipe, without secrets: recorded in the output and compared with it."""
        settings = {key: value for key, value in resolved(config).items() if key not in _STOP_KEYS}
        return without_secrets(
            {
                "rounds": {"evaluate": settings["evaluate"]},
                "build": content_settings(redacted(self.build), MAY_CHANGE),
                "train": resolved(self.train),
                "evaluate": content_settings(resolved(self.evaluate), MAY_CHANGE),
            }
        )


def read_recipes(config: IterateConfig) -> Recipes:
    """Read the recipes that `config` names. Raises UserError for a mistake, and where rounds cannot use them."""
    local(Path(config.out))
    first_pairs = text_override("out", str(Path(config.out) / "round-1" / "pairs"))
    recipes = Recipes(
        load_recipe(BuildConfig, config.build, [first_pairs]),
        load_recipe(TrainRecipe, config.train),
        load_recipe(EvaluationRecipe, config.evaluate.recipe),
    )
    train, target = recipes.train, recipes.build.target
    if recipes.build.answerer != "target":
        raise UserError(
            f"{config.build}: in the pipeline {recipes.build.pipeline!r} the trained model gives no answers, so that a "
            f"further round would have the same pairs; choose revised, judged or stronger"
        )
    if train.by is not None:
        raise UserError(f"{config.train}: by trains a model for each group, and a round has one model; leave it out")
    if isinstance(train.dataset, list) and len(train.dataset) > 1:
        raise UserError(
            f"{config.train}: dataset has {len(train.dataset)} sources, and a round trains on its own pairs alone; "
            f"leave all but one out"
        )
    if target and target.path is not None and os.path.realpath(target.path) != os.path.realpath(train.model):
        raise UserError(
            f"{config.build}: target.path is {target.path} and {config.train} trains {train.model}; the model that "
            f"answers is the one that is trained: give both the same folder"
        )
    return recipes


def override(key: str, value: Any) -> tuple[str, str]:
    """The arguments that set a key of a recipe to a text, a number or a mapping."""
    return "--set", text_override(key, value) if isinstance(value, str | Path) else f"{key}={json.dumps(value)}"


def changeable(build: BuildConfig) -> Mapping[str, Any]:
    """The values of the data recipe's own limits, which hold in every round."""
    values = build.model_dump(mode="json", exclude_defaults=True)
    return {key: values[key] for key in sorted(MAY_CHANGE - {"out", "ledger"}) if key in values}
