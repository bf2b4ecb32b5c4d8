"""Open the models of a run: their clients within its limits and budget, rows through them in order, and Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, TypeVar

from clair.core.progress import duration, tell
from clair.core.urls import (
    api_key,
    environment_headers,
    environment_values,
    expand_environment,
    parse_endpoint,
    without_secrets,
)
from clair.inference.batch_client import Batches
from clair.inference.batch_queue import BatchQueue
from clair.inference.batch_service import BatchService
from clair.inference.budget import Budget, BudgetConfig, Price, check_budget, prices_of
from clair.inference.client import ModelClient, Spending, Stop
from clair.inference.config import ModelConfig
from clair.inference.local import LocalModel, check_code, check_model_folder, check_options
from clair.inference.model import Model, Refused
from clair.inference.openai import OpenAIModel
from clair.inference.pool import Pool
from clair.inference.rate_limit import Limiter, Rate
from clair.ledger.ledger import Ledger
from clair.storage.object_store import account_of

Item = TypeVar("Item")
Result = TypeVar("Result")


class Resources:
    """What a run asks with, all its own here: models, limits and money.

    `clair.cluster.leased_limits` has those that a job shares.
    """

    def model(self, role: str, config: ModelConfig) -> Model:
        """The model of a role, ready to be asked inside the running event loop."""
        return open_model(role, config)

    def limiter(self, role: str, most: int) -> Limiter:
        """At most so many requests of a role in flight."""
        return Limiter(most)

    def rates(self, role: str, requests: float | None, tokens: float | None) -> tuple[Rate, Rate]:
        """Requests and tokens a minute of a role."""
        return Rate(requests), Rate(tokens)

    def budget(self, config: BudgetConfig | None, prices: Mapping[str, Price], **spent: Any) -> Budget:
        """The money of a run; `spent` as Budget takes it."""
        return Budget(config, prices, **spent)

    @asynccontextmanager
    async def held(self, stop: Stop) -> AsyncIterator[None]:
        """They are in use inside of this."""
        yield


def check_models(models: Mapping[str, ModelConfig], budget: BudgetConfig | None, seed: int) -> None:
    """What can be wrong with the models of a run before any is asked. `models` by role. Raises UserError."""
    prices_of(models)
    check_budget(budget, models)
    for role, model in models.items():
        api_key(model.api_key_env, role)
        environment_headers(model.extra.get("headers", {}))
        expand_environment(model.extra, f"{role}.extra")
        for url in model.urls:
            expand_environment(parse_endpoint(url).query, f"{role}.url")
        if model.path is not None:
            check_model_folder(model.path, role)
            if not model.trust_remote_code:
                check_code(model.path, role)
            check_options(model.options(seed), role)


async def map_ordered(
    work: Callable[[Item], Awaitable[Result]],
    items: Iterable[Item],
    ahead: int,
    stopped: asyncio.Event,
    drain: Callable[[], Awaitable[None]],
) -> AsyncGenerator[Result]:
    """`work` on every item at once, at most `ahead` begun or waiting to be taken, results in the order of the items.

    Ends early once `stopped` is set, whatever the first of the waiting results is waiting for. However it ends,
    `drain` is awaited before the rest is cancelled, so that what is under way can be kept.
    """
    pending: deque[asyncio.Future[Result]] = deque()
    stop = asyncio.ensure_future(stopped.wait())
    try:
        for item in items:
            pending.append(asyncio.ensure_future(work(item)))
            while pending and (pending[0].done() or len(pending) >= ahead):
                if not await _done_first(pending[0], stop):
                    return
                yield pending.popleft().result()
        while pending:
            if not await _done_first(pending[0], stop):
                return
            yield pending.popleft().result()
    finally:
        stop.cancel()
        if pending:
            await drain()
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)


async def _done_first(task: asyncio.Future[Result], stop: asyncio.Future[Any]) -> bool:
    """Wait for either; whether the task is done."""
    if not task.done():
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    return task.done()


class Asking(Protocol):
    """What of a recipe decides how its models are asked."""

    @property
    def models(self) -> Mapping[str, ModelConfig]:
        """The models by role."""

    @property
    def budget(self) -> BudgetConfig | None:
        """The most that may be spent."""

    @property
    def concurrency(self) -> int:
        """Requests in flight for each role."""

    @property
    def attempts(self) -> int:
        """Tries of a request that gets no answer."""

    @property
    def seed(self) -> int:
        """What local models sample from."""

    @property
    def out(self) -> str:
        """The folder on whose account it goes."""


def open_clients(
    config: Asking, ledger: Ledger, stop: Stop, *, live: bool = False, means: Resources | None = None
) -> dict[str, ModelClient]:
    """A client for each role, its model open; all are checked before the first request. Close their models at the end.

    `live`: nothing goes into batches. Needs a running event loop.
    """
    means = means or Resources()
    clients: dict[str, ModelClient] = {}
    checked: asyncio.Future[None] | None = None

    async def check_all() -> None:
        # Weights last: an endpoint that is not there is told in a second, not after minutes of loading.
        for client in sorted(clients.values(), key=lambda client: isinstance(client.model, LocalModel)):
            await client.check()

    async def ready() -> None:
        nonlocal checked
        if checked is None:
            checked = asyncio.ensure_future(check_all())
        try:
            await asyncio.shield(checked)
        except Refused as error:
            stop.now(str(error), error)
            raise

    payer = account_of(config.out)
    budget = means.budget(
        config.budget,
        prices_of(config.models),
        spent=ledger.spent(payer),
        in_batches=ledger.spent(payer, in_batches=True),
        discounts={role: model.batching.discount for role, model in config.models.items() if model.batching},
    )
    passes = any(model.batching for model in config.models.values()) and not live
    for role, model in config.models.items():
        opened = means.model(role, model)
        failed: dict[str, tuple[str, str]] | None = {} if passes else None
        batch = None
        if model.batching and not live:
            assert isinstance(opened, OpenAIModel)
            assert failed is not None
            service = f"{role}: {opened.name} at {opened.url}"
            batch = Batches(
                role=role,
                service=BatchService(
                    opened, role, attempts=config.attempts, pause=model.batching.poll, stopped=stop.happened
                ),
                config=model.batching,
                queue=BatchQueue(ledger, service, payer),
                budget=budget,
                attempts=config.attempts,
                failed=failed,
                tell_error=lambda error: stop.now(str(error), error),
            )
        clients[role] = ModelClient(
            role=role,
            model=opened,
            batch=batch,
            failed=failed,
            options=model.options(config.seed),
            ledger=ledger,
            limiter=means.limiter(role, config.concurrency),
            spending=Spending(payer, budget, *means.rates(role, model.requests_per_minute, model.tokens_per_minute)),
            stop=stop,
            ready=ready,
            attempts=config.attempts,
            patience=model.patience,
        )
    return clients


def open_model(role: str, config: ModelConfig) -> Model:
    """The model that a recipe names, ready to be asked inside the running event loop."""
    if config.path is not None:
        return LocalModel(
            config.path,
            batch_size=config.batch_size,
            batch_tokens=config.batch_tokens,
            trust_remote_code=config.trust_remote_code,
        )
    assert config.model is not None
    secrets = environment_values(config.extra)
    without_secrets(config.extra, secrets)
    options: dict[str, Any] = {
        "key": api_key(config.api_key_env, role),
        "headers": config.extra.get("headers"),
        "secrets": secrets,
        "id": config.id,
        "timeout": config.timeout,
        "role": role,
    }
    endpoints = [OpenAIModel(url, config.model, **options) for url in config.urls]
    return endpoints[0] if len(endpoints) == 1 else Pool(endpoints)


@contextmanager
def ctrl_c(stop: Stop, clients: Mapping[str, ModelClient]) -> Iterator[None]:
    """Ctrl-C once: send nothing more, keep what is in flight. Twice: leave at once. Both say so when it is pressed."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: signal.Signals) -> None:
        stop.now("interrupted")
        tell(f"interrupted: {_waited_for(clients)}")
        loop.add_signal_handler(number, leave, number)

    def leave(number: signal.Signals) -> None:
        for each in numbers:
            loop.remove_signal_handler(each)
        tell(f"leaving at once: {_lost(clients)}")
        for client in clients.values():
            if isinstance(client.model, LocalModel):
                client.model.halt()
        raise KeyboardInterrupt

    for number in numbers:
        try:
            loop.add_signal_handler(number, interrupt, number)
        except (ValueError, RuntimeError):  # not in the main thread: signals are the caller's
            break
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _waited_for(clients: Mapping[str, ModelClient]) -> str:
    """What is in flight, how long that can take, and what to type, after the first Ctrl-C."""
    flying = {role: client for role, client in clients.items() if client.limiter.in_flight}
    if not flying:
        return "nothing is in flight, and every reply so far is kept"
    counts = ", ".join(f"{role} {client.limiter.in_flight}" for role, client in flying.items())
    longest = max((getattr(client.model, "timeout", 0.0) for client in flying.values()), default=0.0)
    most = f", at most {duration(longest)} more" if longest else ""
    return (
        f"waiting for the replies in flight ({counts}){most}; every reply so far is kept. Ctrl-C again leaves without "
        f"them; the same command goes on"
    )


def _lost(clients: Mapping[str, ModelClient]) -> str:
    """What is lost by the second Ctrl-C."""
    count = sum(client.limiter.in_flight for client in clients.values())
    lost = f"the {count} replies in flight are not kept, and will be asked for again; " if count else ""
    return f"{lost}every reply before is kept; the same command goes on from there"
