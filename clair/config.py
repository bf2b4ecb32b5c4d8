"""The data recipe: every key, what it may be, and which of them decide about the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from clair.filters import FILTERS
from clair.recipe import Recipe, near_miss, resolved
from clair.sources import PromptSource
from clair.urls import public_url

_OWNED = ("model", "messages", "n", "stream")


class ModelConfig(Recipe):
    """A model to ask: an endpoint (`url` and `model`) or a local folder (`path`)."""

    url: str | None = None
    model: str | None = None
    path: str | None = None
    id: str | None = None
    """What replies are filed under in the ledger; name a new one when other weights are served under an old name."""
    temperature: float | None = Field(None, ge=0)
    max_tokens: int | None = Field(512, ge=1)
    api_key_env: str | None = None
    extra: Mapping[str, Any] = {}
    """Request options passed through as they are (top_p, max_completion_tokens, reasoning_effort, headers ...)."""
    timeout: float = Field(600.0, gt=0)
    batch_size: int = Field(16, ge=1)
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> ModelConfig:
        if (self.url is None) == (self.path is None):
            raise ValueError("give either url and model (an endpoint) or path (a local model folder)")
        if self.url is not None:
            if not self.url.startswith(("http://", "https://")):
                raise ValueError(f"url {public_url(self.url)!r} is no http(s) URL, such as http://127.0.0.1:8000/v1")
            if not self.model:
                raise ValueError("an endpoint needs model, the name it serves")
        owned = [key for key in self.extra if key in _OWNED]
        if owned:
            raise ValueError(f"extra.{owned[0]} would break the request; it is set by the pipeline")
        return self

    def options(self, seed: int) -> dict[str, Any]:
        """The body of every request beside model and messages; all of it is part of the ledger's key."""
        own: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.path is not None:
            own["seed"] = seed
        return {k: v for k, v in own.items() if v is not None} | dict(self.extra)


class ReviserConfig(ModelConfig):
    """The stronger model, and the words it is asked in."""

    temperature: float | None = Field(0.7, ge=0)
    max_tokens: int | None = Field(4096, ge=1)
    template: str | None = None
    """A Jinja file of your own instead of clair/templates/reviser.j2; it uses {{ task }} and {{ answer }}."""
    system: str | None = None


class BuildConfig(Recipe):
    """A data recipe. Every key, with its default, is in docs/data.md."""

    pipeline: Literal["revised"]
    prompts: PromptSource
    target: ModelConfig | None = None
    reviser: ReviserConfig
    filters: Mapping[str, bool] = {}
    concurrency: int = Field(64, ge=1)
    attempts: int = Field(6, ge=1)
    """Tries of a request that gets no answer (server errors, timeouts, broken connections)."""
    seed: int = 0
    limit: int | None = Field(None, ge=1)
    test_fraction: float = Field(0.05, ge=0, lt=1)
    ledger: str | None = None
    out: str = Field(min_length=1)

    @model_validator(mode="after")
    def _filters_exist(self) -> BuildConfig:
        for name in self.filters:
            if name not in FILTERS:
                raise ValueError(
                    f"unknown filter {name!r}{near_miss(name, FILTERS)}; allowed: {', '.join(FILTERS)}"
                )
        return self

    @property
    def active_filters(self) -> list[str]:
        """The filters that are on, in the order in which they are asked."""
        return [name for name in FILTERS if self.filters.get(name, True)]

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models by role."""
        return {"target": self.target, "reviser": self.reviser} if self.target else {"reviser": self.reviser}

    @property
    def ledger_path(self) -> Path:
        """The ledger: the recipe's, or the output folder's own."""
        return Path(self.ledger) if self.ledger else Path(self.out) / "ledger.sqlite"


def public(config: BuildConfig) -> dict[str, Any]:
    """The resolved recipe as it may be written down: without what a URL can carry of a password."""
    recipe = resolved(config)
    for role in config.models:
        if recipe[role]["url"]:
            recipe[role]["url"] = public_url(recipe[role]["url"])
    return recipe


def lasting(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved recipe decides about the dataset: not how fast it is asked, nor where a named model lives."""
    passing = {"concurrency", "attempts", "out", "ledger", "limit"}
    kept = {k: v for k, v in recipe.items() if k not in passing}
    for role in ("target", "reviser"):
        if isinstance(kept.get(role), Mapping):
            drop = {"timeout", "batch_size", "api_key_env"} | ({"url"} if kept[role].get("id") else set())
            kept[role] = {k: v for k, v in kept[role].items() if k not in drop}
    return kept
