"""The data recipe: every key, what it may be, and which of them decide about the dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from clair.budget import BudgetConfig, Price
from clair.filters import make_filters
from clair.models.batch import BatchConfig
from clair.recipe import Recipe, changed_keys, resolved
from clair.sources import PromptSource
from clair.storage import check_url, folder_of, is_url, public_path
from clair.urls import endpoint_of, without_secrets

_OWNED = ("model", "messages", "n", "stream")


class ModelConfig(Recipe):
    """A model to ask: an endpoint (`url` and `model`) or a local folder (`path`)."""

    url: str | tuple[str, ...] | None = None
    """The base URL; a list of them where several serve the same model."""
    model: str | None = None
    path: str | None = None
    id: str | None = None
    """What replies are filed under in the ledger; name a new one when other weights are served under an old name."""
    temperature: float | None = Field(None, ge=0)
    max_tokens: int | None = Field(512, ge=1)
    api_key_env: str | None = None
    extra: Mapping[str, Any] = {}
    """Request options passed through as they are (top_p, max_completion_tokens, reasoning_effort, headers ...)."""
    price: Price | Literal["table"] | None = None
    """For a million tokens: {input: 2.50, output: 10}; `table`: what genai-prices has for this model and URL."""
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    timeout: float = Field(600.0, gt=0)
    """Seconds for one try, from its turn at the server to the last byte."""
    patience: float = Field(300.0, gt=0)
    """Seconds without any answer, while requests are refused or fail, after which the run ends; all so far is kept."""
    batch: bool | BatchConfig = False
    """Ask through the service's Batch API: within a day, at half the price. true, or a mapping with its options."""
    batch_size: int = Field(16, ge=1)
    batch_tokens: int | None = Field(None, ge=1)
    """As many requests at once as fit into so many tokens, padding and room for answers included; not `batch_size`."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> ModelConfig:
        if (self.url is None) == (self.path is None):
            raise ValueError("give either url and model (an endpoint) or path (a local model folder)")
        for url in self.urls:
            if endpoint_of(url).authorization and self.api_key_env:
                raise ValueError("url has a user name or password and api_key_env is set; a request carries only one")
            if not self.model:
                raise ValueError("an endpoint needs model, the name it serves")
        if not isinstance(self.extra.get("headers", {}), Mapping):
            raise ValueError("extra.headers is no mapping, such as {X-Team: pairs}")
        if self.batch and len(self.urls) != 1:
            raise ValueError(f"batch needs one url whose server has a Batch API, and there are {len(self.urls)}")
        owned = [key for key in self.extra if key in _OWNED]
        if owned:
            raise ValueError(f"extra.{owned[0]} would break the request; it is set by the pipeline")
        for name, value in self.extra.items():
            try:
                json.dumps({name: value}, allow_nan=False, ensure_ascii=False, default=str).encode()
            except ValueError as error:
                what = "NaN, infinity or half a character"
                raise ValueError(f"extra.{name} holds {what}, which no request can; change it") from error
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """All base URLs; none for a local model."""
        return (self.url,) if isinstance(self.url, str) else self.url or ()

    @property
    def batching(self) -> BatchConfig | None:
        """The options of its batches; None where it is asked live."""
        return self.batch if isinstance(self.batch, BatchConfig) else BatchConfig() if self.batch else None

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
    mode: Literal["rewrite", "edits"] = "rewrite"
    """`edits`: the reviser names find/replace edits, which the program applies; rewriting is the way out."""
    template: str | None = None
    """A Jinja file of your own instead of the built-in one of the mode; it uses {{ task }} and {{ answer }}."""
    system: str | None = None
    ask_again: bool = True
    """Ask once more, naming what is wrong, when a reply cannot be read."""


class JudgeConfig(ModelConfig):
    """The model that compares two answers, and the words it is asked in."""

    temperature: float | None = Field(0.0, ge=0)
    max_tokens: int | None = Field(2048, ge=1)
    order: Literal["both", "random"] = "both"
    """`both`: every pair in both orders, which must agree; `random`: in one, chosen by hash, at half the price."""
    template: str | None = None
    """A Jinja file of your own instead of templates/judge.j2; it uses {{ task }}, {{ first }} and {{ second }}."""
    system: str | None = None
    ask_again: bool = True


_ROLES = ("target", "reviser", "judge", "stronger")
_PIPELINES = {"revised": ("target", "reviser"), "judged": ("target", "judge"), "stronger": ("target", "stronger")}


class BuildConfig(Recipe):
    """A data recipe. Every key, with its default, is in docs/data.md."""

    pipeline: Literal["revised", "judged", "stronger"]
    prompts: PromptSource
    target: ModelConfig | None = None
    reviser: ReviserConfig | None = None
    judge: JudgeConfig | None = None
    stronger: ModelConfig | None = None
    samples: int = Field(2, ge=2)
    """`judged`: how many answers the target gives to each prompt."""
    filters: Mapping[str, bool | Mapping[str, Any]] = {}
    budget: BudgetConfig | None = None
    """The most that may be spent, resumed runs and retries included: {money: 20} or {tokens: 5000000}."""
    accept: int | None = Field(None, ge=1)
    """Stop at exactly this many pairs: the first in the order of the prompts."""
    concurrency: int = Field(64, ge=1)
    attempts: int = Field(6, ge=1)
    """Tries of a request that gets no answer (server errors, timeouts, broken connections)."""
    seed: int = 0
    limit: int | None = Field(None, ge=1)
    test_fraction: float = Field(0.05, ge=0, lt=1)
    ledger: str | None = None
    out: str = Field(min_length=1)

    @model_validator(mode="after")
    def _roles_fit(self) -> BuildConfig:
        make_filters(self.filters)
        for key, path in _paths(self).items():
            check_url(key, path)
        if self.ledger and (is_url(self.ledger) or is_url(self.out)):
            raise ValueError("ledger is a file of this machine, and cannot go with URLs; remove it: out has its own")
        used = _PIPELINES[self.pipeline]
        if self.filters.get("gap") and self.pipeline != "judged":
            raise ValueError(f"filter gap needs scores, and the pipeline {self.pipeline!r} has none; remove it")
        for role in _ROLES:
            if getattr(self, role) is not None and role not in used:
                raise ValueError(f"{role} is not used by the pipeline {self.pipeline!r}; remove it")
        needed = used[1]
        if needed == "stronger" and self.stronger is None and "stronger" not in self.prompts.columns:
            raise ValueError(
                "the pipeline 'stronger' needs stronger, a model; or its answers: prompts.columns.stronger"
            )
        if needed == "reviser" and self.reviser is None:
            raise ValueError(f"the pipeline {self.pipeline!r} needs {needed}")
        if self.pipeline != "judged" and self.samples != type(self).model_fields["samples"].default:
            raise ValueError("samples is not used by this pipeline; remove it")
        return self

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models by role."""
        return {role: getattr(self, role) for role in _ROLES if getattr(self, role) is not None}

    @property
    def ledger_path(self) -> Path:
        """The ledger: the recipe's, or the output folder's own."""
        return Path(self.ledger) if self.ledger else folder_of(self.out) / "ledger.sqlite"


def _paths(config: BuildConfig) -> dict[str, str]:
    paths = {"out": config.out, "prompts.path": config.prompts.path, "prompts.not_in": config.prompts.not_in}
    return {key: path for key, path in paths.items() if path}


ROLE_PASSING = {
    "timeout",
    "patience",
    "batch",
    "batch_size",
    "batch_tokens",
    "api_key_env",
    "price",
    "requests_per_minute",
    "tokens_per_minute",
}


def public(config: BuildConfig) -> dict[str, Any]:
    """The resolved recipe as it may be written down: without secrets."""
    recipe = resolved(config)
    recipe["out"] = public_path(config.out)
    for key in ("path", "not_in"):
        recipe["prompts"][key] = recipe["prompts"][key] and public_path(recipe["prompts"][key])
    for role, model in config.models.items():
        recipe[role] = public_model(model, recipe[role])
    return recipe


def public_model(model: ModelConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `settings` of a model as they may be written down: without secrets."""
    urls = [endpoint_of(url).public for url in model.urls]
    url = urls if len(urls) > 1 else urls[0] if urls else None
    return {**settings, "url": url, "extra": without_secrets(settings["extra"])}


HASHES = ("template_sha256", "not_in_sha256")
"""Keys that an output's recipe has beside those of the recipe: hashes of the files that it names by their path."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which two recipes of outputs differ and that decide about the dataset.

    A hash that one of them lacks was not noted when it was written, and is no difference.
    """
    keys = changed_keys(lasting(old), lasting(new))
    return [key for key in keys if not key.endswith(HASHES) or all(_value_at(one, key) for one in (old, new))]


def without_hashes(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that an output's recipe was made of."""
    return {
        name: {key: inner for key, inner in value.items() if key not in HASHES} if isinstance(value, Mapping) else value
        for name, value in recipe.items()
    }


def _value_at(recipe: Mapping[str, Any], key: str) -> Any:
    part, _, name = key.partition(".")
    return (recipe.get(part) or {}).get(name)


def lasting(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved recipe decides about the dataset: not how fast it is asked, nor where a named model lives."""
    passing = {"concurrency", "attempts", "out", "ledger", "limit", "accept", "budget"}
    kept = {k: v for k, v in recipe.items() if k not in passing}
    for role in _ROLES:
        if isinstance(kept.get(role), Mapping):
            drop = ROLE_PASSING | ({"url"} if kept[role].get("id") else set())
            kept[role] = {k: v for k, v in kept[role].items() if k not in drop}
            kept[role]["extra"] = without_secrets(kept[role].get("extra", {}))
    return kept
