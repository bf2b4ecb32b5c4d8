"""Settings that all evaluations share, how they end, and the check that a result folder belongs to them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from apo.evaluation.results import ITEMS
from clair.core.errors import EXIT_SOME_FAILED
from clair.core.files import read_json, write_json
from clair.core.out_folder import check_out_folder, check_unchanged
from clair.core.recipe import Recipe, changed_keys, resolved
from clair.data.records import Dropped
from clair.inference.budget import BudgetConfig
from clair.inference.client import ModelClient, StopSignal
from clair.inference.config import ModelConfig, content_settings, redacted_model
from clair.inference.model import LimitReached, PaymentRequired, Refused
from clair.inference.open import InferenceConfig, Resources, running_clients
from clair.ledger.ledger import Ledger
from clair.pipeline.build import lock_output
from clair.storage.location import Location, local

SETTINGS = "settings.json"
_MAY_CHANGE = ("concurrency", "attempts", "out", "ledger", "limit", "budget", "upstream_files", "groups")


class EvaluationConfig(Recipe):
    """Settings of every run that sends requests to models: budget, limits, ledger and result folder."""

    budget: BudgetConfig | None = None
    concurrency: int = Field(default=100, ge=1)
    attempts: int = Field(default=6, ge=1)
    ledger: str | None = None
    out: Location

    @model_validator(mode="after")
    def _sends_live(self) -> EvaluationConfig:
        for role, model in self.models.items():
            if model.batching:
                raise ValueError(f"{role}.batch: an evaluation sends every request by itself; leave it out")
        return self

    @property
    def models(self) -> Mapping[str, ModelConfig]:
        """The models that get requests, by role."""
        raise NotImplementedError

    @property
    def ledger_path(self) -> Path:
        """The ledger file: `ledger`, or ledger.sqlite in the result folder."""
        return Path(self.ledger) if self.ledger else Path(self.out) / "ledger.sqlite"


class BenchmarkConfig(EvaluationConfig):
    """Settings of a benchmark of one model, or of its responses."""

    model: ModelConfig | None = None
    """The model that answers; absent if there are responses."""
    responses: str | None = None
    """The file or folder of existing answers."""
    system: str | None = None
    samples: int = Field(default=1, ge=1)
    """Answers to each question."""
    limit: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    """Seed of a local model's sampling."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.model is None) == (self.responses is None):
            raise ValueError("give either a model that answers or responses")
        if self.responses is not None and (self.system is not None or self.samples > 1):
            raise ValueError("system and samples are for a model that answers; leave them out with responses")
        return self


def default_batch_tokens() -> int:
    """Tokens in a batch of a local model: many on a GPU; few on a CPU, whose caches hold no more."""
    import torch

    return 131_072 if torch.cuda.is_available() else 16_384


def with_batch_tokens(model: ModelConfig) -> ModelConfig:
    """The model with a batch size in tokens, if it is local and its recipe sets no batch size."""
    if not model.is_local or model.model_fields_set & {"batch_size", "batch_tokens"}:
        return model
    return model.model_copy(update={"batch_tokens": default_batch_tokens()})


@dataclass(frozen=True, kw_only=True, repr=False)
class Outcome:
    """How a run ended that sends requests to models: with a result in `out`, or with the reason why there is none.

    `stopped` is the reason if the run was stopped. Otherwise `failed` requests got no reply, the first one because of
    `first_failure`. `refused` is the server's message about a request that it refused for good.
    """

    out: Path
    failed: int = 0
    first_failure: str = ""
    stopped: str | None = None
    refused: str = ""

    @classmethod
    def early(cls, out: Path, stopped: str | None, failures: Sequence[str]) -> Self | None:
        """The outcome of a run that was stopped, or whose requests failed for these reasons; None if it is whole."""
        if not stopped and not failures:
            return None
        return cls(out=out, failed=len(failures), first_failure=next(iter(failures), ""), stopped=stopped)

    @property
    def headline(self) -> str | None:
        """The result in a few words; None if there is none."""
        raise NotImplementedError

    def __repr__(self) -> str:
        problem = self.stopped or f"{self.failed} requests got no reply ({self.first_failure})"
        return f"<{type(self).__name__} {self.out}: {self.headline or f'no result, {problem}; run it again'}>"


def check_result_folder(config: EvaluationConfig, result: str) -> None:
    """Check that `out` is new, empty, or the folder of such an evaluation, whose result file is `result`."""
    out = Path(config.out)
    local(out)
    check_out_folder(out, "result folder", (SETTINGS, result))


@contextmanager
def resumable_ledger(config: EvaluationConfig, items: str = ITEMS) -> Iterator[Ledger]:
    """The ledger of a locked result folder, whose settings are checked and written there before the first request.

    Settings may change as long as nothing is paid for, as after a run with a wrong key. `items` is the file that a
    finished run leaves. Raises UserError if the settings differ from those of the replies in the folder.
    """
    out = Path(config.out)
    with lock_output(out), Ledger(config.ledger_path) as ledger:
        file, settings = out / SETTINGS, redacted(config)
        started = (out / items).is_file() or any(sum(tokens) for tokens in ledger.spent(config.out.account).values())
        if file.is_file() and started:
            old, new = content_settings(read_json(file), _MAY_CHANGE), content_settings(settings, _MAY_CHANGE)
            remedy = ", so that results are never mixed"
            check_unchanged(str(out), "an evaluation with other settings", changed_keys(old, new), remedy)
        write_json(file, settings)
        yield ledger


def redacted(config: EvaluationConfig) -> dict[str, Any]:
    """The settings without secrets, as they are written to files."""
    settings = resolved(config, public=True)
    for role, model in config.models.items():
        settings[role] = redacted_model(model, settings[role])
    return settings


_ROW_ERRORS = {"http_400", "http_403", "http_413", "http_422", "http_451", "prompt_too_long", "tool_call"}
"""Reasons that are due to the row: too long, moderated, malformed for this server, or answered by a tool call."""


def is_transient(dropped: Dropped) -> bool:
    """True if a request failed for a reason that another run may not meet: no connection, no money, a broken reply.

    Such a failure must not become a verdict about the row.
    """
    return dropped.failed and dropped.reason not in _ROW_ERRORS


@asynccontextmanager
async def evaluation_clients(
    config: InferenceConfig, ledger: Ledger, stop: StopSignal, resources: Resources | None = None
) -> AsyncIterator[dict[str, ModelClient]]:
    """The clients of an evaluation. Raises the error that ended it, with the exit code of one that can go on."""
    async with running_clients(config, ledger, stop, resources=resources) as clients:
        try:
            yield clients
        except Refused as error:
            mark_resumable(error, clients)
            raise
    if stop.error:
        mark_resumable(stop.error, clients)
        raise stop.error


def mark_resumable(error: Exception, clients: Mapping[str, ModelClient]) -> None:
    """Set exit code 3 on an error after which the same command can go on: replies came before it, or money ran out."""
    replies = any(client.tally.calls or client.tally.reused for client in clients.values())
    if isinstance(error, LimitReached | PaymentRequired) or (isinstance(error, Refused) and replies):
        error.exit_code = EXIT_SOME_FAILED


def print_settings(config: Any) -> None:
    """Print the settings of an evaluation as YAML without their secrets, for a dry run."""
    import yaml

    print(yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True), end="")
