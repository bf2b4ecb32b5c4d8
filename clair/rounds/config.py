"""The recipe of `clair iterate`, and the three recipes that it names."""

from __future__ import annotations

import json
import os
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


class EvaluateConfig(Recipe):
    """`evaluate:` of the rounds: a subcommand of `apo eval` and its recipe."""

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
        """The subcommand of `apo eval`."""
        (kind,) = self.model_fields_set
        return kind

    @property
    def recipe(self) -> str:
        """The path of its recipe."""
        return getattr(self, self.kind) or ""


class IterateConfig(Recipe):
    """The recipe of several rounds. See docs/rounds.md."""

    rounds: int = Field(default=3, ge=1)
    """The maximum number of rounds."""
    build: str
    """The data recipe of the first round."""
    train: str
    """The training recipe. Each round replaces `model`, `dataset` and `out`."""
    evaluate: EvaluateConfig
    stop: Literal["no_gain", "never"] = "no_gain"
    """`no_gain`: stop after the first round whose gain does not have an interval above 0."""
    out: str


class ApoRecipe(Recipe):
    """A recipe whose keys `apo` checks."""

    model_config = ConfigDict(extra="allow")


class TrainRecipe(ApoRecipe):
    """A training recipe, with the keys that the rounds use."""

    model: str
    dataset: Any = None
    by: str | None = None
    lora: Any = None


@dataclass(frozen=True, slots=True)
class Recipes:
    """The three recipes of the rounds."""

    build: BuildConfig
    train: TrainRecipe
    evaluate: ApoRecipe

    def content(self, config: IterateConfig) -> dict[str, dict[str, Any]]:
        """Return the keys that determine the results, by recipe, without secrets. The output records them."""
        return without_secrets(
            {
                "rounds": {"evaluate": resolved(config)["evaluate"]},
                "build": content_settings(redacted(self.build), MAY_CHANGE),
                "train": resolved(self.train),
                "evaluate": content_settings(resolved(self.evaluate), MAY_CHANGE),
            }
        )


def read_recipes(config: IterateConfig) -> Recipes:
    """Read the recipes that `config` names. Raises UserError for a mistake, or if rounds cannot use a recipe."""
    local(Path(config.out))
    first_pairs = text_override("out", str(Path(config.out) / "round-1" / "pairs"))
    recipes = Recipes(
        load_recipe(BuildConfig, config.build, [first_pairs]),
        load_recipe(TrainRecipe, config.train),
        load_recipe(ApoRecipe, config.evaluate.recipe),
    )
    train, target = recipes.train, recipes.build.target
    sources = len(train.dataset) if isinstance(train.dataset, list) else 1
    answering = target and target.path
    mistakes = {
        f"{config.build}: in the pipeline {recipes.build.pipeline!r} the trained model gives no answers, so all rounds "
        f"would have the same pairs; choose revised, judged or stronger": recipes.build.answerer != "target",
        f"{config.train}: by trains a model for each group, and a round has one model; remove it": train.by is not None,
        f"{config.train}: dataset has {sources} sources, and a round trains only on its own pairs; keep one of them": (
            sources > 1
        ),
        f"{config.build}: target.path is {answering} and {config.train} trains {train.model}, but the model that "
        f"answers is the one that is trained: give both the same folder": (
            answering is not None and os.path.realpath(answering) != os.path.realpath(train.model)
        ),
    }
    for message, is_mistake in mistakes.items():
        if is_mistake:
            raise UserError(message)
    return recipes


def override(key: str, value: Any) -> tuple[str, str]:
    """Return the arguments that set a key of a recipe to text, a number or a mapping."""
    return "--set", text_override(key, value) if isinstance(value, str | Path) else f"{key}={json.dumps(value)}"
