"""Open the model clients of a run within its limits and budget, stop on an interrupt, and close them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

from clair.core.event_loop import await_shielded
from clair.core.progress import duration, print_line
from clair.core.urls import (
    api_key,
    environment_headers,
    environment_values,
    expand_environment,
    parse_endpoint,
    without_secrets,
)
from clair.inference.batch_client import BatchClient
from clair.inference.batch_queue import BatchQueue
from clair.inference.batch_service import BatchService
from clair.inference.budget import Budget, BudgetConfig, Price, Spending, check_budget, role_prices
from clair.inference.client import ModelClient, StopSignal
from clair.inference.config import ModelConfig
from clair.inference.endpoint_health import EndpointHealth
from clair.inference.local import LocalModel, check_options
from clair.inference.model import Model, Refused
from clair.inference.model_folder import check_model_folder, check_remote_code, check_template_variables, check_user
from clair.inference.openai import OpenAIModel
from clair.inference.pool import EndpointPool
from clair.inference.rate_limit import Limiter, Rate
from clair.inference.servers.command import check_server
from clair.inference.servers.served_model import ServedModel
from clair.ledger.ledger import Ledger
from clair.storage.location import Location


class Resources:
    """The models, rate limits and budget of a single run.

    `clair.cluster.leased_limits` has the resources that the shards of a job share.
    """

    def model(self, role: str, config: ModelConfig) -> Model:
        """Open the model of a role inside the running event loop."""
        return open_model(role, config)

    def limiter(self, role: str, max_in_flight: int) -> Limiter:
        """The limit on a role's requests in flight."""
        return Limiter(max_in_flight)

    def rates(self, role: str, requests: float | None, tokens: float | None) -> tuple[Rate, Rate]:
        """The limits on a role's requests and tokens per minute."""
        return Rate(requests), Rate(tokens)

    def budget(self, config: BudgetConfig | None, prices: Mapping[str, Price], **spent: Any) -> Budget:
        """The budget of a run; `spent` as for Budget."""
        return Budget(config, prices, **spent)

    @asynccontextmanager
    async def in_use(self, stop: StopSignal) -> AsyncIterator[None]:
        """Hold the resources for the length of the block."""
        yield


def check_models(models: Mapping[str, ModelConfig], budget: BudgetConfig | None, seed: int) -> None:
    """Check the configs of a run's models (by role) before any request is sent. Raises UserError."""
    role_prices(models)
    check_budget(budget, models)
    for role, model in models.items():
        api_key(model.api_key_env, role)
        environment_headers(model.extra.get("headers", {}))
        expand_environment(model.extra, f"{role}.extra")
        for url in model.urls:
            expand_environment(parse_endpoint(url).query, f"{role}.url")
        if model.serve is not None:
            check_server(role, model)
            check_user(model.path or "", None, role)
        elif model.path is not None:
            check_model_folder(model.path, role)
            check_user(model.path, model.user, role)
            if not model.trust_remote_code:
                check_remote_code(model.path, role)
            check_options(model.options(seed), role)
            check_template_variables(model.path, model.chat_template_kwargs or (), role)


class InferenceConfig(Protocol):
    """The part of a recipe that its model clients need."""

    @property
    def models(self) -> Mapping[str, ModelConfig]:
        """The models by role."""
        ...

    @property
    def budget(self) -> BudgetConfig | None:
        """The limit on spending."""
        ...

    @property
    def concurrency(self) -> int:
        """Maximal requests in flight per role."""
        ...

    @property
    def attempts(self) -> int:
        """Tries of a request that gets no answer."""
        ...

    @property
    def seed(self) -> int:
        """The seed of local models."""
        ...

    @property
    def out(self) -> Location:
        """The output folder or URL, to whose account calls are billed."""
        ...


def open_clients(
    config: InferenceConfig, ledger: Ledger, stop: StopSignal, *, live: bool = False, resources: Resources | None = None
) -> dict[str, ModelClient]:
    """Open a client for each role; all models are checked before the first request. The caller closes the models.

    `live`: nothing goes into batches. Needs a running event loop.
    """
    resources = resources or Resources()
    clients: dict[str, ModelClient] = {}
    shared_calls: dict[str, asyncio.Future[Any]] = {}
    check: asyncio.Future[None] | None = None

    async def check_all() -> None:
        # Weights last: a missing endpoint is reported in a second, not after minutes of loading.
        for client in sorted(clients.values(), key=lambda client: isinstance(client.model, LocalModel | ServedModel)):
            await client.check()

    async def ready() -> None:
        nonlocal check
        if check is None:
            check = asyncio.ensure_future(check_all())
        try:
            await await_shielded(check)
        except Refused as error:
            stop.request(str(error), error)
            raise

    account = config.out.account
    budget = resources.budget(
        config.budget,
        role_prices(config.models),
        spent=ledger.spent(account),
        in_batches=ledger.spent(account, in_batches=True),
        discounts={role: model.batching.discount for role, model in config.models.items() if model.batching},
    )
    repeats = any(model.batching for model in config.models.values()) and not live
    for role, model in config.models.items():
        opened = resources.model(role, model)
        failed: dict[str, tuple[str, str]] | None = {} if repeats else None
        batch = None
        if model.batching and not live:
            assert isinstance(opened, OpenAIModel)
            assert failed is not None
            service = f"{role}: {opened.name} at {opened.url}"
            batch = BatchClient(
                role=role,
                service=BatchService(
                    opened, role, attempts=config.attempts, pause=model.batching.poll, stopped=stop.requested
                ),
                config=model.batching,
                queue=BatchQueue(ledger, service, account),
                budget=budget,
                attempts=config.attempts,
                failed=failed,
                on_error=lambda error: stop.request(str(error), error),
            )
        clients[role] = ModelClient(
            role=role,
            model=opened,
            batch=batch,
            failed=failed,
            shared_calls=shared_calls,
            health=EndpointHealth(role, getattr(opened, "url", opened.name), model.patience),
            options=model.options(config.seed),
            ledger=ledger,
            limiter=resources.limiter(role, config.concurrency),
            spending=Spending(
                account, budget, *resources.rates(role, model.requests_per_minute, model.tokens_per_minute)
            ),
            stop=stop,
            ready=ready,
            attempts=config.attempts,
        )
    return clients


def open_model(role: str, config: ModelConfig) -> Model:
    """Open the model that a recipe names; call it inside the running event loop."""
    if config.is_local:
        assert config.path is not None
        return LocalModel(
            config.path,
            batch_size=config.batch_size,
            batch_tokens=config.batch_tokens,
            trust_remote_code=config.trust_remote_code,
            user=config.user,
        )
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
    if config.serve is not None:
        return ServedModel(role, config, options)
    assert config.model is not None
    endpoints = [OpenAIModel(url, config.model, **options) for url in config.urls]
    return endpoints[0] if len(endpoints) == 1 else EndpointPool(endpoints)


@asynccontextmanager
async def running_clients(
    config: InferenceConfig, ledger: Ledger, stop: StopSignal, *, live: bool = False, resources: Resources | None = None
) -> AsyncIterator[dict[str, ModelClient]]:
    """Open a client for each role, stop on Ctrl-C, and close models and batches at the end.

    `live`: send every request by itself, even if the recipe uses a Batch API.
    """
    resources = resources or Resources()
    clients = open_clients(config, ledger, stop, live=live, resources=resources)
    batches = [client.batch for client in clients.values() if client.batch]
    try:
        with stop_on_interrupt(stop, clients):
            async with resources.in_use(stop):
                yield clients
            for batch in batches:
                await batch.close()
    finally:
        for batch in batches:
            batch.abandon()
        for client in clients.values():
            await client.model.close()


@contextmanager
def stop_on_interrupt(stop: StopSignal, clients: Mapping[str, ModelClient]) -> Iterator[None]:
    """On the first Ctrl-C or SIGTERM, stop and keep the replies in flight; on the second, exit at once."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: signal.Signals) -> None:
        stop.request("interrupted")
        print_line(f"interrupted: {_waiting_message(clients)}")
        loop.add_signal_handler(number, exit_at_once, number)

    def exit_at_once(number: signal.Signals) -> None:
        for handled in numbers:
            loop.remove_signal_handler(handled)
        print_line(f"leaving at once: {_exit_message(clients)}")
        for client in clients.values():
            if isinstance(client.model, LocalModel):
                client.model.halt()
        raise KeyboardInterrupt

    for number in numbers:
        try:
            loop.add_signal_handler(number, interrupt, number)
        except (ValueError, RuntimeError):  # not in the main thread: the caller handles signals
            break
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _waiting_message(clients: Mapping[str, ModelClient]) -> str:
    """The message after the first Ctrl-C: requests in flight, how long they can take, and what a second one does."""
    busy = {role: client for role, client in clients.items() if client.limiter.in_flight}
    if not busy:
        return "nothing is in flight, and every reply so far is kept"
    counts = ", ".join(f"{role} {client.limiter.in_flight}" for role, client in busy.items())
    longest = max((getattr(client.model, "timeout", 0.0) for client in busy.values()), default=0.0)
    limit = f", at most {duration(longest)} more" if longest else ""
    return (
        f"waiting for the replies in flight ({counts}){limit}; every reply so far is kept. Ctrl-C again leaves without "
        f"them; the same command goes on"
    )


def _exit_message(clients: Mapping[str, ModelClient]) -> str:
    """The message after the second Ctrl-C: the replies that are lost."""
    count = sum(client.limiter.in_flight for client in clients.values())
    lost = f"the {count} replies in flight are not kept, and will be asked for again; " if count else ""
    return f"{lost}every reply before is kept; the same command goes on from there"
