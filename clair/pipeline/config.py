"""The data recipe: its keys, their validation, and which of them determine the dataset's content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from clair.core.recipe import Recipe, changed_keys, resolved
from clair.data.prompt_sources import PromptSource
from clair.inference.budget import BudgetConfig
from clair.inference.config import JudgeConfig, ModelConfig, ReviserConfig, content_settings, redacted_model
from clair.pipeline.filters import make_filters
from clair.storage.location import Location

_ROLES = ("target", "reviser", "judge", "weaker", "stronger")
_PIPELINES = {
    "revised": ("target", "reviser"),
    "judged": ("target", "judge"),
    "stronger": ("target", "stronger"),
    "delta": ("weaker", "stronger"),
}


class BalanceConfig(Recipe):
    """`balance:` of a data recipe: leave pairs out until winners are not longer on average."""

    tokens: int = Field(ge=0)
    """A pair whose answers differ by more tokens than this is left out."""
    tokenizer: str | None = None
    """A folder or hub name with the tokenizer that counts; absent: that of a model that the recipe names by path."""


class BuildConfig(Recipe):
    """A data recipe. Every key, with its default, is in docs/data.md."""

    pipeline: Literal["revised", "judged", "stronger", "delta"]
    prompts: PromptSource
    target: ModelConfig | None = None
    reviser: ReviserConfig | None = None
    judge: JudgeConfig | None = None
    weaker: ModelConfig | None = None
    """`delta`: the model whose answers are rejected."""
    stronger: ModelConfig | None = None
    samples: int = Field(default=2, ge=2)
    """`judged`: how many answers the target gives to each prompt."""
    filters: Mapping[str, bool | Mapping[str, Any]] = {}
    balance: BalanceConfig | None = None
    budget: BudgetConfig | None = None
    """The most that may be spent, resumed runs and retries included: {money: 20} or {tokens: 5000000}."""
    accept: int | None = Field(default=None, ge=1)
    """Stop at exactly this many pairs: the first in the order of the prompts."""
    concurrency: int = Field(default=64, ge=1)
    attempts: int = Field(default=6, ge=1)
    """Tries of a request that gets no answer (server errors, timeouts, broken connections)."""
    seed: int = 0
    limit: int | None = Field(default=None, ge=1)
    test_fraction: float = Field(default=0.05, ge=0, lt=1)
    ledger: Location | None = None
    out: Location

    @model_validator(mode="after")
    def _roles_fit(self) -> BuildConfig:
        make_filters(self.filters)
        if self.ledger and (self.ledger.is_url or self.out.is_url):
            raise ValueError("ledger is a file of this machine, and cannot go with URLs; remove it: out has its own")
        used = _PIPELINES[self.pipeline]
        if self.filters.get("gap") and self.pipeline != "judged":
            raise ValueError(f"filter gap needs scores, and the pipeline {self.pipeline!r} has none; remove it")
        for role in _ROLES:
            if getattr(self, role) is not None and role not in used:
                raise ValueError(f"{role} is not used by the pipeline {self.pipeline!r}; remove it")
        if "stronger" in used and self.stronger is None and "stronger" not in self.prompts.columns:
            raise ValueError(
                f"the pipeline {self.pipeline!r} needs stronger, a model; or its answers: prompts.columns.stronger"
            )
        modes = [model.chat_template_kwargs for model in (self.weaker, self.stronger) if model]
        if self.pipeline == "delta" and any(mode != modes[0] for mode in modes):
            raise ValueError(
                "weaker and stronger differ in chat_template_kwargs, and a pair has one mode; make them equal"
            )
        if self.balance and self.accept:
            raise ValueError(
                "balance leaves pairs out when all are made, so accept cannot count them; remove accept, and use limit"
            )
        if self.balance and self.tokenizer is None:
            raise ValueError(
                "balance counts tokens and no model is named by path; give balance.tokenizer, the folder of the model "
                "that you will train"
            )
        if self.pipeline == "revised" and self.reviser is None:
            raise ValueError("the pipeline 'revised' needs reviser")
        if self.pipeline != "judged" and self.samples != type(self).model_fields["samples"].default:
            raise ValueError("samples is not used by this pipeline; remove it")
        return self

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models by role."""
        return {role: getattr(self, role) for role in _ROLES if getattr(self, role) is not None}

    @property
    def answerer(self) -> str:
        """The role whose answers are rejected, or compared."""
        return _PIPELINES[self.pipeline][0]

    @property
    def template_options(self) -> Mapping[str, Any] | None:
        """The variables of the chat template that each pair gets: those of the model that answers."""
        model = getattr(self, self.answerer) or (self.stronger if self.pipeline == "delta" else None)
        return model and model.chat_template_kwargs

    @property
    def tokenizer(self) -> str | None:
        """The folder or hub name of the tokenizer that balances lengths, if the recipe names one."""
        paths = (model.path for model in self.models.values() if model.path)
        return self.balance and (self.balance.tokenizer or next(paths, None))

    @property
    def ledger_path(self) -> Path:
        """The ledger: the recipe's, or the output folder's own."""
        return Path(self.ledger) if self.ledger else self.out.folder / "ledger.sqlite"


def redacted(config: BuildConfig) -> dict[str, Any]:
    """The resolved recipe without secrets, as outputs record it."""
    recipe = resolved(config)
    recipe["out"] = config.out.public
    recipe["prompts"]["path"] = config.prompts.path.public
    recipe["prompts"]["not_in"] = config.prompts.not_in and config.prompts.not_in.public
    for role, model in config.models.items():
        recipe[role] = redacted_model(model, recipe[role])
    return recipe


HASHES = ("template_sha256", "not_in_sha256")
"""Keys of an output's recipe that no recipe has: hashes of the files that the recipe names by path."""


_MAY_CHANGE = {"concurrency", "attempts", "out", "ledger", "limit", "accept", "budget"}
"""Keys that do not affect the dataset's content."""


def changed_content_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which two recorded recipes differ and that determine the dataset's content.

    A hash that one of them lacks is no difference: an older version did not record it.
    """
    keys = changed_keys(content_settings(old, _MAY_CHANGE), content_settings(new, _MAY_CHANGE))
    return [key for key in keys if not key.endswith(HASHES) or all(_nested_value(recipe, key) for recipe in (old, new))]


def without_file_hashes(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded recipe without the hashes of files, which can be resolved again."""
    return {
        name: {key: inner for key, inner in value.items() if key not in HASHES} if isinstance(value, Mapping) else value
        for name, value in recipe.items()
    }


def _nested_value(recipe: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return (recipe.get(section) or {}).get(name)
