"""The answers that benchmarks score: requested from a model through the ledger, with what is recorded about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from apo.evaluation.config import BenchmarkConfig, check_result_folder, is_transient
from apo.evaluation.records.benchmark import ModelUsed, Usage
from clair.core.errors import UserError, one_line
from clair.data.records import Dropped, Message
from clair.inference.budget import Price
from clair.inference.client import ModelClient, StopSignal
from clair.inference.local import LocalModel
from clair.inference.model_folder import adapter_base
from clair.inference.open import check_models
from clair.inference.rate_limit import Limiter
from clair.ledger.ledger import Tokens

_MAX_REFUSALS = 20
"""Refusals before the first answer after which the model is assumed to refuse everything."""


class BenchmarkQuestion(Protocol):
    """The part of a benchmark's row that a request for an answer needs."""

    @property
    def name(self) -> str:
        """The row's name in the ledger."""
        ...

    @property
    def text(self) -> str:
        """The user turn that the model is sent."""
        ...


Row = TypeVar("Row", bound=BenchmarkQuestion)
Work = TypeVar("Work")


@dataclass(frozen=True, slots=True)
class RowAnswer(Generic[Row]):
    """One answer to one row. `unresolved` names the reason if there is none, or none that ended normally."""

    row: Row
    text: str
    sample: int = 0
    truncated: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    unresolved: str | None = None

    @property
    def name(self) -> str:
        """The row's name in the ledger."""
        return self.row.name


@dataclass(frozen=True, slots=True)
class AnswerRequest(Generic[Row]):
    """An answer to request from the model. `draw` differs for equal questions that get answers of their own."""

    row: Row
    sample: int
    draw: int


def messages_for(row: BenchmarkQuestion, system: str | None) -> list[Message]:
    """The messages of a request: one user turn, after a system prompt if there is one (the benchmark has none)."""
    first: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": row.text}]


async def _request_answer(client: ModelClient, request: AnswerRequest[Row], system: str | None) -> RowAnswer[Row]:
    """Request the model's answer, or take it from the ledger. Raises Dropped if there is none.

    An answer that the token limit cut off counts; one that was filtered, refused or interrupted is unresolved.
    """
    reply = await client.complete(list(messages_for(request.row, system)), row=request.row.name, sample=request.draw)
    incomplete = reply.incomplete()
    cut_off = incomplete == "truncated"
    unresolved = f"answer_{incomplete}" if incomplete and not cut_off else None
    return RowAnswer(
        request.row,
        reply.text or reply.refusal,
        request.sample,
        truncated=cut_off,
        prompt_tokens=reply.usage.get("prompt_tokens"),
        completion_tokens=reply.usage.get("completion_tokens"),
        unresolved=unresolved,
    )


@dataclass
class Answerer:
    """A model that answers a benchmark's questions, with the tokens of its answers and its refusals.

    Without a client it passes existing answers on.
    """

    client: ModelClient | None
    system: str | None
    stop: StopSignal
    tokens: dict[tuple[str, int], Tokens] = field(default_factory=dict)
    """Tokens of each different answer, by the question's text and draw."""
    refusals: list[str] = field(default_factory=list)
    """The server's messages about questions that it refused for good."""
    _answered: int = 0

    def fill_batches(self, work: list[Work], row_of: Callable[[Work], BenchmarkQuestion]) -> list[Work]:
        """The work, for a model that forms its own batches longest questions first and with all requests in flight."""
        if self.client is not None and isinstance(self.client.model, LocalModel):
            self.client.limiter = Limiter(len(work))
            work.sort(key=lambda item: -len(row_of(item).text))
        return work

    async def answer(self, request: RowAnswer[Row] | AnswerRequest[Row]) -> RowAnswer[Row]:
        """The model's answer, or an unresolved one if it refuses. Stops the run if it refuses all first questions."""
        if isinstance(request, RowAnswer):
            return request
        assert self.client is not None, "a request needs a model"
        try:
            answer = await _request_answer(self.client, request, self.system)
        except Dropped as dropped:
            if is_transient(dropped):
                raise
            self.refusals.append(f"{dropped.reason}: {dropped.detail}")
            by_server = dropped.reason.startswith("http_")
            if by_server and not self._answered and len(self.refusals) >= _MAX_REFUSALS:
                message = f"the model refused the first {len(self.refusals)} questions: {self.refusals[0]}"
                self.stop.request(message, UserError(message))
            return RowAnswer(request.row, "", request.sample, unresolved=f"answer_{dropped.reason}")
        if answer.unresolved is not None:
            self.refusals.append(f"{answer.unresolved.removeprefix('answer_')}: {answer.text or 'no text'}")
        self._answered += 1
        self.tokens[request.row.text, request.draw] = Tokens(answer.prompt_tokens or 0, answer.completion_tokens or 0)
        return answer

    def source(self, responses: str | None, ready_answers: Sequence[RowAnswer[Any]] | None) -> ModelUsed:
        """The model that answers; for existing answers their file or folder, with their hash as its identity."""
        if self.client is not None:
            return model_used(self.client)
        texts = "\x1e".join(answer.text for answer in ready_answers or ())
        digest = hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest()
        return ModelUsed(name=Path(responses or "").resolve().name, identity=f"responses:{digest}")


def model_used(client: ModelClient) -> ModelUsed:
    """The model that answers."""
    return ModelUsed(name=client.model.name, identity=client.model.identity, options=without_headers(client.options))


def usage_of(client: ModelClient, tokens: Iterable[tuple[int, int]], price: Price | None) -> Usage:
    """Tokens and cost of the replies that a score is based on, each counted once."""
    counts = list(tokens)
    total = Tokens(sum(prompt for prompt, _ in counts), sum(completion for _, completion in counts))
    cost = f"{price.cost(total).normalize():f}" if price else None
    tally = client.tally
    return Usage(prompt=total.prompt, completion=total.completion, calls=tally.calls, reused=tally.reused, cost=cost)


def without_headers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Request options without headers, which identify the payer and not the request."""
    return {key: value for key, value in options.items() if key != "headers"}


def check_folder_and_models(config: BenchmarkConfig, result: str) -> None:
    """Check the result folder, whose result file is `result`, and the models that get requests. Raises UserError."""
    check_result_folder(config, result)
    check_models(config.models, config.budget, config.seed)
    model = config.model
    if model is not None and model.is_local and model.path is not None and config.system is not None:
        _check_system_prompt(model.path, config.system)


def _check_system_prompt(path: str, system: str) -> None:
    """Check that a local model's template includes a system prompt. Raises UserError if it refuses or omits it."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    base = adapter_base(path)
    has_tokenizer = base is None or (Path(path) / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(path if has_tokenizer else base)
    turns = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        message = one_line(error)
        raise UserError(
            f"the chat template of {path} refuses a system prompt ({message}); leave out --system"
        ) from error
    if system.strip() not in text:
        raise UserError(f"the chat template of {path} omits a system prompt; leave out --system")
