"""One run's way through a pipeline: its models open, its ledger at hand, rows in and outcomes out.

A build runs all prompts through a session, an estimate a few. However a session ends, what is in flight is waited for
and written down before its models are closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clair.data.records import Dropped, Pair, Prompt
from clair.inference.batch_client import results
from clair.inference.batch_service import Pending
from clair.inference.budget import BudgetReached
from clair.inference.client import ModelClient, Stop, Stopped
from clair.inference.config import JudgeConfig, ReviserConfig
from clair.inference.open import Resources, ctrl_c, map_ordered, open_clients
from clair.ledger.ledger import Ledger
from clair.pipeline.config import BuildConfig
from clair.pipeline.filters import make_filters
from clair.pipeline.pipelines import judged, revised, stronger
from clair.pipeline.steps import Judge, Reviser
from clair.prompting.parse import IDENTIFIERS, asks_for
from clair.prompting.templates import JUDGE_NEEDS, REVISER_NEEDS, load_template

_BEGUN_PER_REQUEST = 16
_MIN_BEGUN = 256
KILLED_WORKER = "killed_worker"
"""Why a row is left out whose process died of it before."""


@dataclass(frozen=True, slots=True)
class PipelineRun:
    """One run of a pipeline: its clients by role, its stop signal, and the function that makes a pair of a prompt."""

    config: BuildConfig
    clients: Mapping[str, ModelClient]
    stop: Stop
    run: Callable[[Prompt], Awaitable[Pair]]
    judge: Judge | None = None
    reviser: Reviser | None = None

    async def outcomes(
        self,
        prompts: Iterable[tuple[Prompt, str | None]],
        *,
        one_by_one: bool = False,
        on_row_done: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[tuple[str, Pair | Dropped | Pending]]:
        """(prompt id, pair or reason) of each prompt, in the order of the prompts; ends early where the run stops.

        Pending in the place of an outcome that needs a reply which comes with a batch: see `wait`. `on_end` is called
        where a row comes to its end, which may be long before its turn.
        """
        max_begun = _MIN_BEGUN + _BEGUN_PER_REQUEST * self.config.concurrency
        if self.config.accept:  # what is begun beyond the last pair wanted is paid for and not used: begin little
            max_begun = 2 * self.config.concurrency
        max_begun = 1 if one_by_one else max_begun

        async def row(item: tuple[Prompt, str | None]) -> tuple[str, Pair | Dropped | Pending | Stopped]:
            outcome = await self._row(item)
            if not isinstance(outcome[1], Stopped):
                on_row_done()
            return outcome

        async with aclosing(map_ordered(row, prompts, max_begun, self.stop.happened, self._drain)) as results:
            async for id, outcome in results:
                if isinstance(outcome, Stopped):
                    return
                yield id, outcome

    async def _row(self, item: tuple[Prompt, str | None]) -> tuple[str, Pair | Dropped | Pending | Stopped]:
        prompt, skip_reason = item
        if skip_reason == KILLED_WORKER:
            return prompt.id, Dropped(
                "prompts", KILLED_WORKER, "the process that built this row died of it, twice", failed=True
            )
        if skip_reason:
            return prompt.id, Dropped("prompts", skip_reason, _SKIP_REASONS[skip_reason])
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
        batches = [client.batch for client in self.clients.values() if client.batch]
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
        for client in self.clients.values():
            client.next_pass()
        if self.reviser:
            self.reviser.first_replies.clear()
        return True

    async def _drain(self) -> None:
        self.stop.now("no more rows are wanted")
        await asyncio.gather(*(client.drain() for client in self.clients.values()))


@asynccontextmanager
async def open_run(
    config: BuildConfig, ledger: Ledger, *, live: bool = False, resources: Resources | None = None
) -> AsyncIterator[PipelineRun]:
    """Open the recipe's models for one run; Ctrl-C inside it stops the sending and keeps what is in flight.

    `live`: nothing goes into batches, whatever the recipe says.
    """
    stop, resources = Stop(), resources or Resources()
    clients = open_clients(config, ledger, stop, live=live, means=resources)
    batches = [client.batch for client in clients.values() if client.batch]
    try:
        with ctrl_c(stop, clients):
            async with resources.held(stop):
                yield _assemble(config, clients, stop)
            for batch in batches:
                await batch.close()
    finally:
        for batch in batches:
            batch.abandon()
        for client in clients.values():
            await client.model.close()


def _assemble(config: BuildConfig, clients: Mapping[str, ModelClient], stop: Stop) -> PipelineRun:
    templates, target = load_templates(config), clients.get("target")
    filters = make_filters(config.filters, revisions=config.pipeline == "revised")
    make_run = partial(PipelineRun, config, clients, stop)
    if config.reviser:
        reviser_config = config.reviser
        reviser = Reviser(
            clients["reviser"],
            templates["reviser"],
            templates.get("edits"),
            reviser_config.system,
            reviser_config.ask_again,
        )
        return make_run(partial(revised, target=target, reviser=reviser, filters=filters), reviser=reviser)
    if config.pipeline == "stronger":
        return make_run(partial(stronger, target=target, stronger=clients.get("stronger"), filters=filters))
    judge = None
    if config.judge:
        judge = Judge(
            clients["judge"], templates["judge"], config.judge.order, config.judge.system, config.judge.ask_again
        )
    return make_run(partial(judged, target=target, judge=judge, samples=config.samples, filters=filters), judge)


def load_templates(config: BuildConfig) -> dict[str, str]:
    """The words for each role that has any: the recipe's own file or the built-in ones."""
    templates = {}
    if config.reviser:
        path, edits = config.reviser.template, config.reviser.mode == "edits"
        templates["reviser"] = load_template(None if edits else path, "reviser.j2", REVISER_NEEDS)
        if edits:
            templates["edits"] = load_template(path, "reviser_edits.j2", REVISER_NEEDS)
    if config.judge:
        templates["judge"] = load_template(config.judge.template, "judge.j2", JUDGE_NEEDS)
    return templates


def template_warnings(config: BuildConfig) -> list[str]:
    """What is amiss with templates of the user's own: they never ask for the part that is read from each reply."""
    warnings = []
    kinds = {
        "reviser": "edits" if config.reviser and config.reviser.mode == "edits" else "solution",
        "judge": "verdict",
    }
    for role, kind in kinds.items():
        model: ReviserConfig | JudgeConfig | None = getattr(config, role)
        if model is None or model.template is None:
            continue
        if not asks_for(kind, Path(model.template).read_text("utf-8") + (model.system or "")):
            warnings.append(
                f"{role}.template {model.template} never names {IDENTIFIERS[kind]}, under which the part that is used "
                f"is looked for; replies without it are dropped (docs/data.md#words-of-your-own)"
            )
    return warnings


_SKIP_REASONS = {
    "duplicate": "the same prompt came before",
    "near_duplicate": "nearly the same prompt came before",
    "in_benchmark": "the benchmark of prompts.not_in asks this",
}
