"""The recipe's settings of a model, a reviser and a judge."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from clair.core.recipe import Recipe, TemplateVariable, check_used
from clair.core.urls import parse_endpoint, without_secrets
from clair.inference.budget import Price

_RESERVED_KEYS = ("model", "messages", "n", "stream")
_TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")


class BatchConfig(Recipe):
    """`batch:` of a model: use the service's Batch API, later and cheaper. `true` takes the defaults."""

    requests: int = Field(default=50_000, ge=1, le=50_000)
    """Maximal requests in a file."""
    megabytes: float = Field(default=200.0, gt=0, le=200)
    """Maximal size of a file, in 10^6 bytes."""
    poll: float = Field(default=60.0, gt=0)
    """Seconds between two polls of open batches."""
    live_below: int = Field(default=0, ge=0)
    """If fewer requests than this wait, they are sent live, at the full price."""
    discount: float = Field(default=0.5, ge=0, le=1)
    """The fraction that the service takes off `price`."""
    lost: Literal["refuse", "ask_again"] = "refuse"
    """What to do if the service no longer knows a batch: its requests may have been paid for."""


class ModelConfig(Recipe):
    """A model: an endpoint (`url` and `model`), a local folder (`path`), or one that a command serves (`serve`)."""

    url: str | tuple[str, ...] | None = None
    """The base URL, or a list of them if several endpoints serve the same model."""
    model: str | None = None
    path: str | None = None
    serve: str | None = None
    """A command that serves the model as long as the run needs it: {port} is a free port, {model} is `path` or `model`.
    """
    id: str | None = None
    """The model's identity in the ledger; choose a new one when other weights are served under the same name."""
    temperature: float | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=512, ge=1)
    api_key_env: str | None = None
    extra: Mapping[str, Any] = {}
    """Request options passed through as they are (top_p, max_completion_tokens, reasoning_effort, headers ...)."""
    chat_template_kwargs: Mapping[str, TemplateVariable] | None = None
    """Variables of the chat template, such as {enable_thinking: false}; a pair gets those of the target."""
    price: Price | Literal["table"] | None = None
    """Per million tokens: {input: 2.50, output: 10}; `table`: the price in genai-prices for this model and URL."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    timeout: float = Field(default=600.0, gt=0)
    """Seconds for one try, from the start of its turn at the server to the last byte."""
    patience: float = Field(default=300.0, gt=0)
    """Seconds without any answer, while requests fail, after which the run ends; all replies so far are kept."""
    batch: bool | BatchConfig = False
    """Use the service's Batch API: replies within a day, at half the price. true, or a mapping with its options."""
    batch_size: int = Field(default=32, ge=1)
    batch_tokens: int | None = Field(default=None, ge=1)
    """Maximal tokens of a local batch, padding and room for answers included; replaces `batch_size`."""
    trust_remote_code: bool = False
    user: str | tuple[float, ...] | None = None
    """Whom a local model with a soft prompt answers for: a user it was trained on, or a user's state, as numbers."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.serve is not None:
            self._check_serve(self.serve)
        elif (self.url is None) == (self.path is None):
            raise ValueError("give either url and model (an endpoint) or path (a local model folder)")
        if self.url == ():
            raise ValueError("url is an empty list; give a base URL, or a list of at least one")
        if self.user is not None and not self.is_local:
            raise ValueError("user is for a local model (path) with a soft prompt, which no server knows; leave it out")
        for url in self.urls:
            if parse_endpoint(url).authorization and self.api_key_env:
                raise ValueError("url has a user name or password and api_key_env is set; a request carries only one")
            if not self.model:
                raise ValueError("an endpoint needs model, the name it serves")
        if not isinstance(self.extra.get("headers", {}), Mapping):
            raise ValueError("extra.headers is no mapping, such as {X-Team: pairs}")
        if self.batch and len(self.urls) != 1:
            raise ValueError(f"batch needs one url whose server has a Batch API, and there are {len(self.urls)}")
        reserved = [key for key in self.extra if key in _RESERVED_KEYS]
        if reserved:
            raise ValueError(f"extra.{reserved[0]} would break the request; it is set by the pipeline")
        if "chat_template_kwargs" in self.extra:
            raise ValueError("extra.chat_template_kwargs is a key of the model itself: chat_template_kwargs; move it")
        for name, value in self.extra.items():
            try:
                json.dumps({name: value}, allow_nan=False, ensure_ascii=False, default=str).encode()
            except ValueError as error:
                raise ValueError(
                    f"extra.{name} holds NaN, infinity or half a character, which no request can; change it"
                ) from error
        for name in _TOKEN_LIMITS:
            value = self.extra.get(name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and value == int(value) >= 1):
                raise ValueError(f"extra.{name} is {value!r}, not a whole number of at least 1 or null; change it")
        return self

    def _check_serve(self, command: str) -> None:
        if self.url is not None:
            raise ValueError("serve starts a server of its own and url names one that runs; leave one of them out")
        if self.path is None and not self.model:
            raise ValueError("serve needs path, the model that its command loads, or model, the name that it serves")
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"serve is no command ({error}); quote it as for a shell") from error
        if not any("{port}" in word for word in words[1:]):
            raise ValueError("serve names no {port}, the free port to listen on; add it, such as --port {port}")
        check_used(self, False, "a model in this process", "batch_size", "batch_tokens", "trust_remote_code")

    @property
    def is_local(self) -> bool:
        """True if the model runs in this process."""
        return self.path is not None and self.serve is None

    @property
    def urls(self) -> tuple[str, ...]:
        """All base URLs; none for a local model, or one that the run serves."""
        return (self.url,) if isinstance(self.url, str) else self.url or ()

    @property
    def batching(self) -> BatchConfig | None:
        """The options of its batches; None if its requests are sent live."""
        return self.batch if isinstance(self.batch, BatchConfig) else BatchConfig() if self.batch else None

    def options(self, seed: int) -> dict[str, Any]:
        """The body of every request without model and messages; all of it is part of the ledger's key."""
        options: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.is_local:
            options["seed"] = seed
        if self.chat_template_kwargs:
            options["chat_template_kwargs"] = dict(self.chat_template_kwargs)
        return {k: v for k, v in options.items() if v is not None} | dict(self.extra)


class PromptedConfig(ModelConfig):
    """A model whose requests are made from a template, and whose replies are parsed."""

    template: str | None = None
    """A Jinja file to use instead of the built-in one. It uses {{ task }} and {{ answer }} for a reviser; {{ task }},
    {{ first }} and {{ second }} for a judge."""
    system: str | None = None
    ask_again: bool = True
    """Ask once more, naming the problem, if a reply cannot be parsed."""


class ReviserConfig(PromptedConfig):
    """The stronger model and its prompt."""

    temperature: float | None = Field(default=0.7, ge=0)
    max_tokens: int | None = Field(default=4096, ge=1)
    mode: Literal["rewrite", "edits"] = "rewrite"
    """`edits`: the reviser names find/replace edits, and the program applies them; if they fail, it rewrites."""
    tool_calls: Literal["keep", "revise"] = "keep"
    """`revise`: the reviser may also change the arguments of an answer's tool calls, validated by the tool's schema."""


class JudgeConfig(PromptedConfig):
    """The model that compares two answers, and its prompt."""

    temperature: float | None = Field(default=0.0, ge=0)
    max_tokens: int | None = Field(default=2048, ge=1)
    order: Literal["both", "random"] = "both"
    """`both`: judge every pair in both orders, which must agree; `random`: in one, by hash, at half the price."""


class ScoreJudgeConfig(ModelConfig):
    """A model that gives one answer a score by a rubric."""

    temperature: float | None = Field(default=0.0, ge=0)
    max_tokens: int | None = Field(default=2048, ge=1)
    system: str | None = None
    ask_again: bool = True


class RewardConfig(Recipe):
    """A local reward model: a sequence classifier of transformers."""

    path: str
    label: str | None = None
    """The class whose probability is the score, if the classifier has several."""


_MAY_CHANGE = {
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


def content_settings(settings: Mapping[str, Any], may_change: Collection[str]) -> dict[str, Any]:
    """The keys of resolved settings that determine the result.

    Excluded: `may_change`, limits and prices of models, and the URLs and commands of models with an `id`.
    """
    return {key: _content(value) for key, value in settings.items() if key not in may_change}


def _content(value: Any) -> Any:
    """A value of a recipe; a model in it, wherever it stands, without what does not determine the result."""
    if isinstance(value, list | tuple):
        return [_content(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    if "url" not in value:
        return {key: _content(inner) for key, inner in value.items()}
    excluded = _MAY_CHANGE | ({"url", "serve"} if value.get("id") else set())
    remaining = {key: inner for key, inner in value.items() if key not in excluded}
    return {**remaining, "extra": without_secrets(value.get("extra", {}))}


def redacted_model(model: ModelConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `settings` of a model as they may be stored: without secrets."""
    urls = [parse_endpoint(url).public for url in model.urls]
    url = urls if len(urls) > 1 else urls[0] if urls else None
    return {**settings, "url": url, **without_secrets({name: settings[name] for name in ("serve", "extra")})}
