"""One run's way through a pipeline: its models open, its ledger at hand, rows in and outcomes out.

A build runs all prompts through a session, an estimate a few. However a session ends, what is in flight is waited for
and written down before its models are closed.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from clair.budget import Budget, BudgetConfig, BudgetReached, Price, check_budget, prices_of
from clair.config import BuildConfig, JudgeConfig, ModelConfig, ReviserConfig
from clair.filters import make_filters
from clair.ledger import Ledger
from clair.limits import Limiter, Rate
from clair.models import Model, Refused
from clair.models.asking import Asker, Spending, Stop, Stopped
from clair.models.batch import Batches, results
from clair.models.batch_queue import BatchQueue
from clair.models.batch_service import BatchService, Pending
from clair.models.local import LocalModel, check_code, check_model_folder, check_options
from clair.models.openai import OpenAIModel
from clair.models.pool import Pool
from clair.parse import IDENTIFIERS, asks_for
from clair.pipelines import judged, revised, stronger
from clair.progress import duration, tell
from clair.prompts import JUDGE_NEEDS, REVISER_NEEDS, load_template
from clair.records import Dropped, Pair, Prompt
from clair.steps import Judge, Reviser
from clair.storage import account_of
from clair.urls import api_key, endpoint_of, environment_headers, environment_values, filled, without_secrets

_AHEAD_PER_PLACE = 16
_AHEAD_AT_LEAST = 256
_LEFT_OUT = {
    "duplicate": "the same prompt came before",
    "near_duplicate": "nearly the same prompt came before",
    "in_benchmark": "the benchmark of prompts.not_in asks this",
}
KILLER = "killed_worker"
"""Why a row is left out whose process died of it before."""


@dataclass(frozen=True, slots=True)
class Session:
    """An assembled pipeline with the askers of its roles, and what counts verdicts or first replies, if it has them."""

    config: BuildConfig
    askers: Mapping[str, Asker]
    stop: Stop
    run: Callable[[Prompt], Awaitable[Pair]]
    judge: Judge | None = None
    reviser: Reviser | None = None

    async def outcomes(
        self,
        prompts: Iterable[tuple[Prompt, str | None]],
        *,
        one_by_one: bool = False,
        on_end: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[tuple[str, Pair | Dropped | Pending]]:
        """(prompt id, pair or reason) of each prompt, in the order of the prompts; ends early where the run stops.

        Pending in the place of an outcome that needs a reply which comes with a batch: see `wait`. `on_end` is called
        where a row comes to its end, which may be long before its turn.
        """
        ahead = _AHEAD_AT_LEAST + _AHEAD_PER_PLACE * self.config.concurrency
        if self.config.accept:  # what is begun beyond the last pair wanted is paid for and not used: begin little
            ahead = 2 * self.config.concurrency
        ahead = 1 if one_by_one else ahead

        async def row(item: tuple[Prompt, str | None]) -> tuple[str, Pair | Dropped | Pending | Stopped]:
            outcome = await self._row(item)
            if not isinstance(outcome[1], Stopped):
                on_end()
            return outcome

        async with aclosing(in_order(row, prompts, ahead, self.stop.happened, self._drain)) as results:
            async for id, outcome in results:
                if isinstance(outcome, Stopped):
                    return
                yield id, outcome

    async def _row(self, item: tuple[Prompt, str | None]) -> tuple[str, Pair | Dropped | Pending | Stopped]:
        prompt, left_out = item
        if left_out == KILLER:
            return prompt.id, Dropped(
                "prompts", KILLER, "the process that built this row died of it, twice", failed=True
            )
        if left_out:
            return prompt.id, Dropped("prompts", left_out, _LEFT_OUT[left_out])
        try:
            return prompt.id, await self.run(prompt)
        except (Dropped, Pending, Stopped) as outcome:
            return prompt.id, outcome
        except Exception as error:  # a ledger that cannot be written, a bug of ours: no other row may go on spending
            self.stop.now(str(error), error)
            raise

    async def wait(self, tell: Callable[[], None]) -> bool:
        """After a pass with Pending rows: send what they wait for, and return once another pass is worth it.

        False where the run ends instead; `stop` says why. `tell` is called at every look at the batches.
        """
        batches = [asker.batch for asker in self.askers.values() if asker.batch]
        if self.stop.reason and not (self.stop.short and any(batch.open() for batch in batches)):
            return False
        self.stop.clear()
        try:
            live = sum([await batch.end_pass() for batch in batches])
            if not live:
                await results(batches, self.stop.happened, tell)
        except Pending:
            return False
        except BudgetReached as reached:
            self.stop.now(str(reached))
            return False
        for asker in self.askers.values():
            asker.next_pass()
        if self.reviser:
            self.reviser.first.clear()
        return True

    async def _drain(self) -> None:
        self.stop.now("no more rows are wanted")
        await asyncio.gather(*(asker.drain() for asker in self.askers.values()))


class Means:
    """What a run asks with, all its own here: models, limits and money. `clair.leases` has those that a job shares."""

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


@asynccontextmanager
async def session(
    config: BuildConfig, ledger: Ledger, *, live: bool = False, means: Means | None = None
) -> AsyncIterator[Session]:
    """Open the recipe's models for one run; Ctrl-C inside it stops the sending and keeps what is in flight.

    `live`: nothing goes into batches, whatever the recipe says.
    """
    stop, means = Stop(), means or Means()
    askers = open_askers(config, ledger, stop, live=live, means=means)
    batches = [asker.batch for asker in askers.values() if asker.batch]
    try:
        with ctrl_c(stop, askers):
            async with means.held(stop):
                yield _assembled(config, askers, stop)
            for batch in batches:
                await batch.close()
    finally:
        for batch in batches:
            batch.abandon()
        for asker in askers.values():
            await asker.model.close()


def _assembled(config: BuildConfig, askers: Mapping[str, Asker], stop: Stop) -> Session:
    words, target = templates(config), askers.get("target")
    filters = make_filters(config.filters, revisions=config.pipeline == "revised")
    made = partial(Session, config, askers, stop)
    if config.reviser:
        own = config.reviser
        reviser = Reviser(askers["reviser"], words["reviser"], words.get("edits"), own.system, own.ask_again)
        return made(partial(revised, target=target, reviser=reviser, filters=filters), reviser=reviser)
    if config.pipeline == "stronger":
        return made(partial(stronger, target=target, stronger=askers.get("stronger"), filters=filters))
    judge = None
    if config.judge:
        judge = Judge(askers["judge"], words["judge"], config.judge.order, config.judge.system, config.judge.ask_again)
    return made(partial(judged, target=target, judge=judge, samples=config.samples, filters=filters), judge)


def check_models(models: Mapping[str, ModelConfig], budget: BudgetConfig | None, seed: int) -> None:
    """What can be wrong with the models of a run before any is asked. `models` by role. Raises UserError."""
    prices_of(models)
    check_budget(budget, models)
    for role, model in models.items():
        api_key(model.api_key_env, role)
        environment_headers(model.extra.get("headers", {}))
        filled(model.extra, f"{role}.extra")
        for url in model.urls:
            filled(endpoint_of(url).query, f"{role}.url")
        if model.path is not None:
            check_model_folder(model.path, role)
            if not model.trust_remote_code:
                check_code(model.path, role)
            check_options(model.options(seed), role)


def templates(config: BuildConfig) -> dict[str, str]:
    """The words for each role that has any: the recipe's own file or the built-in ones."""
    words = {}
    if config.reviser:
        own, edits = config.reviser.template, config.reviser.mode == "edits"
        words["reviser"] = load_template(None if edits else own, "reviser.j2", REVISER_NEEDS)
        if edits:
            words["edits"] = load_template(own, "reviser_edits.j2", REVISER_NEEDS)
    if config.judge:
        words["judge"] = load_template(config.judge.template, "judge.j2", JUDGE_NEEDS)
    return words


def template_notes(config: BuildConfig) -> list[str]:
    """What is amiss with templates of the user's own: they never ask for the part that is read from each reply."""
    notes = []
    kinds = {
        "reviser": "edits" if config.reviser and config.reviser.mode == "edits" else "solution",
        "judge": "verdict",
    }
    for role, kind in kinds.items():
        model: ReviserConfig | JudgeConfig | None = getattr(config, role)
        if model is None or model.template is None:
            continue
        if not asks_for(kind, Path(model.template).read_text("utf-8") + (model.system or "")):
            notes.append(
                f"{role}.template {model.template} never names {IDENTIFIERS[kind]}, under which the part that is used "
                f"is looked for; replies without it are dropped (docs/data.md#words-of-your-own)"
            )
    return notes


Item = TypeVar("Item")
Result = TypeVar("Result")


async def in_order(
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


def open_askers(
    config: Asking, ledger: Ledger, stop: Stop, *, live: bool = False, means: Means | None = None
) -> dict[str, Asker]:
    """An asker for each role, its model open; all are checked before the first request. Close their models at the end.

    `live`: nothing goes into batches. Needs a running event loop.
    """
    means = means or Means()
    askers: dict[str, Asker] = {}
    checked: asyncio.Future[None] | None = None

    async def check_all() -> None:
        # Weights last: an endpoint that is not there is told in a second, not after minutes of loading.
        for asker in sorted(askers.values(), key=lambda asker: isinstance(asker.model, LocalModel)):
            await asker.check()

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
        askers[role] = Asker(
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
    return askers


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
def ctrl_c(stop: Stop, askers: Mapping[str, Asker]) -> Iterator[None]:
    """Ctrl-C once: send nothing more, keep what is in flight. Twice: leave at once. Both say so when it is pressed."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: signal.Signals) -> None:
        stop.now("interrupted")
        tell(f"interrupted: {_waited_for(askers)}")
        loop.add_signal_handler(number, leave, number)

    def leave(number: signal.Signals) -> None:
        for each in numbers:
            loop.remove_signal_handler(each)
        tell(f"leaving at once: {_lost(askers)}")
        for asker in askers.values():
            if isinstance(asker.model, LocalModel):
                asker.model.halt()
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


def _waited_for(askers: Mapping[str, Asker]) -> str:
    """What is in flight, how long that can take, and what to type, after the first Ctrl-C."""
    flying = {role: asker for role, asker in askers.items() if asker.limiter.in_flight}
    if not flying:
        return "nothing is in flight, and every reply so far is kept"
    counts = ", ".join(f"{role} {asker.limiter.in_flight}" for role, asker in flying.items())
    longest = max((getattr(asker.model, "timeout", 0.0) for asker in flying.values()), default=0.0)
    most = f", at most {duration(longest)} more" if longest else ""
    return (
        f"waiting for the replies in flight ({counts}){most}; every reply so far is kept. Ctrl-C again leaves without "
        f"them; the same command goes on"
    )


def _lost(askers: Mapping[str, Asker]) -> str:
    """What is lost by the second Ctrl-C."""
    count = sum(asker.limiter.in_flight for asker in askers.values())
    lost = f"the {count} replies in flight are not kept, and will be asked for again; " if count else ""
    return f"{lost}every reply before is kept; the same command goes on from there"
