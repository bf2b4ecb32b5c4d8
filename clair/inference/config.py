"""The settings of a model, a reviser and a judge in a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from clair.core.recipe import Recipe
from clair.core.urls import parse_endpoint, without_secrets
from clair.inference.batch_client import BatchConfig
from clair.inference.budget import Price

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
            if parse_endpoint(url).authorization and self.api_key_env:
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
    """A Jinja file of your own instead of prompting/judge.j2; it uses {{ task }}, {{ first }} and {{ second }}."""
    system: str | None = None
    ask_again: bool = True


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


def public_model(model: ModelConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `settings` of a model as they may be written down: without secrets."""
    urls = [parse_endpoint(url).public for url in model.urls]
    url = urls if len(urls) > 1 else urls[0] if urls else None
    return {**settings, "url": url, "extra": without_secrets(settings["extra"])}
