"""One evaluation: answers made or read, judged, scored and written; resumable, and nothing is paid for twice."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from apo.evaluation.config import goes_on, is_passing, same_settings
from apo.evaluation.mixeval.answers import Answer, Wanted, answer, no_answer, wanted
from apo.evaluation.mixeval.config import Checked, MixEvalConfig, check
from apo.evaluation.mixeval.judging import Judge, Judged, Verdict, by_rule, item_of, with_fallbacks
from apo.evaluation.mixeval.score import aggregate
from apo.evaluation.mixeval.upstream import write_upstream_files
from apo.evaluation.results import Item, JudgeUsed, ModelUsed, Score, Usage, write_results
from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.provenance import provenance
from clair.data.records import Dropped
from clair.inference.budget import role_prices
from clair.inference.client import ModelClient, Stopped, StopSignal
from clair.inference.local import LocalModel
from clair.inference.model import Refused
from clair.inference.open import Resources, map_ordered, open_clients, stop_on_interrupt
from clair.inference.rate_limit import Limiter
from clair.ledger.ledger import Ledger, Tokens
from clair.pipeline.build import lock_output

_HOPELESS = 20
"""Refusals before the first answer after which a model is taken to refuse everything."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an evaluation came to. It has no score where it ended early: `stopped` tells why, or `failed` how many
    items got no reply, with the first reason. `refused`: the first words of a server about an item that it refused.
    """

    out: Path
    score: Score | None
    requests: int = 0
    """Different judge requests that the score rests on."""
    failed: int = 0
    first_failure: str = ""
    stopped: str | None = None
    refused: str = ""


Progress = Callable[[int, Mapping[str, ModelClient]], None]


def evaluate(
    config: MixEvalConfig,
    *,
    checked: Checked | None = None,
    on_progress: Progress | None = None,
    resources: Resources | None = None,
) -> Evaluated:
    """Run an evaluation, going on from whatever its ledger holds, and write the result folder.

    `checked` is what `check` returned, if the caller has it already. `resources`: other models than the run's own, as
    `clair.pipeline.runner` has it. Raises UserError for the user's mistakes before any work, and for a model or a judge
    that refuses everything.
    """
    checked = checked or check(config)
    out = Path(config.out)
    with lock_output(out), Ledger(config.ledger_path) as ledger:
        same_settings(config, out, ledger)
        return run_async(_evaluate(config, checked, ledger, on_progress or (lambda *_: None), resources))


async def _evaluate(
    config: MixEvalConfig, checked: Checked, ledger: Ledger, on_progress: Progress, resources: Resources | None
) -> Evaluated:
    started = time.monotonic()
    stop = StopSignal()
    clients = open_clients(config, ledger, stop, resources=resources)
    try:
        run = Run(config, checked, clients, stop)
        with stop_on_interrupt(stop, clients):
            items = await run.items(run.work(), on_progress)
    except Refused as error:
        goes_on(error, clients)
        raise
    finally:
        for client in clients.values():
            await client.model.close()
    if stop.error:
        goes_on(stop.error, clients)
        raise stop.error
    if stop.reason or run.failures:
        first = run.failures[0] if run.failures else ""
        return Evaluated(Path(config.out), None, 0, len(run.failures), first, stop.reason)
    score = run.write(items, time.monotonic() - started)
    refused = [*run.refusals, *(run.judge.refusals if run.judge else ())]
    requests = len(run.judge.distinct) if run.judge else 0
    return Evaluated(Path(config.out), score, requests, refused=refused[0] if score.unanswered else "")


def work_items(config: MixEvalConfig, checked: Checked) -> list[tuple[int, Answer | Wanted]]:
    """What is to be judged, or answered first, each with its place in the result."""
    if checked.given is not None:
        return list(enumerate(checked.given))
    return list(enumerate(wanted(checked.benchmark, config.samples, alike=_greedy(config))))


def _greedy(config: MixEvalConfig) -> bool:
    """Whether equal questions get equal answers, so that asking them once is enough."""
    model = config.model
    assert model is not None
    if model.temperature is not None or model.path is None:
        return model.temperature == 0
    from apo.models.load import find_model, load_generation_config

    own = load_generation_config(find_model(model.path))
    return own is None or not own.do_sample


@dataclass
class Run:
    """An evaluation on its way: every item answered and judged by itself, all at once."""

    config: MixEvalConfig
    checked: Checked
    clients: Mapping[str, ModelClient]
    stop: StopSignal
    failures: list[str] = field(default_factory=list)
    """Why items got no reply that another run may get."""
    judge: Judge | None = field(init=False, default=None)
    answer_tokens: dict[tuple[str, int], Tokens] = field(default_factory=dict)
    """Tokens of each different answer that was asked for."""
    refusals: list[str] = field(default_factory=list)
    """What the model's server said to questions that it refused for good."""
    _answered: int = 0

    def __post_init__(self) -> None:
        if self.checked.words is not None:
            whose = self.clients["model"].model.identity if "model" in self.clients else self.config.out
            independent = whose if self.config.independent_judgements else None
            self.judge = Judge(self.clients["judge"], self.checked.words, self.config.profile, independent)

    def work(self) -> list[tuple[int, Answer | Wanted]]:
        """All work; longest questions first for a local model."""
        found = work_items(self.config, self.checked)
        if self.checked.given is None and isinstance(self.clients["model"].model, LocalModel):
            self.clients["model"].limiter = Limiter(len(found))  # it makes its own batches, the fuller the better
            found.sort(key=lambda placed: -len(placed[1].row.text))
        return found

    async def items(self, work: Sequence[tuple[int, Answer | Wanted]], on_progress: Progress) -> list[Item]:
        """The items of this work, in the order of their places; only some where the run stops or requests fail."""
        found: list[tuple[int, Item]] = []
        done = count()

        async def placed(what: tuple[int, Answer | Wanted]) -> tuple[int, Item | Dropped | Stopped]:
            result = await self._placed(what)
            if not isinstance(result[1], Dropped | Stopped):
                on_progress(next(done), self.clients)
            return result

        on_progress(next(done), self.clients)
        results = map_ordered(placed, work, len(work) + 1, self.stop.requested, self._drain)
        async with aclosing(results) as outcomes:
            async for place, outcome in outcomes:
                if isinstance(outcome, Stopped):
                    break
                if isinstance(outcome, Dropped):
                    self.failures.append(f"{outcome.stage}: {outcome.detail}")
                else:
                    found.append((place, outcome))
        if found and not self.stop.reason and all(_no_answer(item) for _, item in found):
            raise UserError(f"the model answered nothing: {self.refusals[0]}")
        return [item for _, item in sorted(found, key=lambda placed: placed[0])]

    async def _placed(self, placed: tuple[int, Answer | Wanted]) -> tuple[int, Item | Dropped | Stopped]:
        place, what = placed
        try:
            return place, await self._item(what)
        except (Dropped, Stopped) as outcome:
            return place, outcome
        except Exception as error:  # a ledger that cannot be written, a bug of ours: nothing else may go on spending
            self.stop.request(str(error), error)
            raise

    async def _item(self, what: Answer | Wanted) -> Item:
        given = what if isinstance(what, Answer) else await self._answer(what)
        if given.unresolved is not None:
            return item_of(given, Judged(Verdict(None, unresolved=given.unresolved)))
        return item_of(given, await self.judge.judge(given) if self.judge else by_rule(given, self.config.profile))

    async def _answer(self, want: Wanted) -> Answer:
        """The model's answer, or what stands for one it refuses. Ends the run where it refuses from the start."""
        try:
            made = await answer(self.clients["model"], want, self.config.system)
        except Dropped as dropped:
            if is_passing(dropped):
                raise
            self.refusals.append(f"{dropped.reason}: {dropped.detail}")
            by_server = dropped.reason.startswith("http_")
            if by_server and not self._answered and len(self.refusals) >= _HOPELESS:
                told = f"the model refused the first {len(self.refusals)} questions: {self.refusals[0]}"
                self.stop.request(told, UserError(told))
            return no_answer(want, dropped)
        if made.unresolved is not None:
            self.refusals.append(f"{made.unresolved.removeprefix('answer_')}: {made.text or 'no text'}")
        self._answered += 1
        self.answer_tokens[want.row.text, want.draw] = Tokens(made.prompt_tokens or 0, made.completion_tokens or 0)
        return made

    async def _drain(self) -> None:
        """Let what is paid for, or being generated, come to its end."""
        self.stop.request("no more rows are wanted")
        for client in self.clients.values():
            if isinstance(client.model, LocalModel):
                client.model.abandon()
        await asyncio.gather(*(client.drain() for client in self.clients.values()))

    # ---- the result

    def write(self, items: Sequence[Item], seconds: float) -> Score:
        """The score of finished items, with its folder written."""
        config, benchmark = self.config, self.checked.benchmark
        if config.profile == "faithful":
            rows = {(row.split, row.row): row for row in benchmark.all_rows}
            items = with_fallbacks(items, rows, config.seed)
        score = Score(
            version=benchmark.version,
            split=benchmark.split,
            profile=config.profile,
            judge=self._judge_used(),
            model=self._model_used(),
            system=config.system,
            samples=config.samples,
            limit=config.limit,
            seed=config.seed,
            **aggregate(items, config.profile),
            shared_judgements=not config.independent_judgements,
            usage=self._usage(),
            data=dict(benchmark.sha256),
            items_sha256="",
            **provenance(),
            seconds=round(seconds, 1),
        )
        written = write_results(config.out, score, items)
        if config.upstream_files:
            write_upstream_files(Path(config.out) / "upstream", benchmark, written, items)
        return written

    def _judge_used(self) -> JudgeUsed:
        if self.judge is None:
            return JudgeUsed(kind="rule")
        model = self.judge.client.model
        return JudgeUsed(
            kind="model",
            model=model.name,
            identity=model.identity,
            options=_shown(self.judge.client.options),
            answered_by=tuple(sorted(self.judge.answered_by)),
            prompts_sha256=self.judge.words.sha256,
        )

    def _model_used(self) -> ModelUsed:
        if self.checked.given is not None:
            assert self.config.responses is not None
            texts = "\x1e".join(given.text for given in self.checked.given)
            digest = hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest()
            return ModelUsed(name=Path(self.config.responses).resolve().name, identity=f"responses:{digest}")
        client = self.clients["model"]
        return ModelUsed(name=client.model.name, identity=client.model.identity, options=_shown(client.options))

    def _usage(self) -> dict[str, Usage]:
        """What the replies took that the score rests on, each counted once."""
        prices = role_prices(self.config.models)
        tokens = {"model": self.answer_tokens.values()}
        if self.judge:
            tokens["judge"] = self.judge.distinct.values()
        told = {}
        for role, client in self.clients.items():
            total = Tokens(sum(t[0] for t in tokens[role]), sum(t[1] for t in tokens[role]))
            cost = f"{prices[role].cost(total).normalize():f}" if role in prices else None
            tally = client.tally
            told[role] = Usage(
                prompt=total.prompt, completion=total.completion, calls=tally.calls, reused=tally.reused, cost=cost
            )
        return told


def _no_answer(item: Item) -> bool:
    return item.unresolved is not None and item.unresolved.startswith("answer_")


def _shown(options: Mapping[str, Any]) -> dict[str, Any]:
    """Request options without headers, which say who pays and not what is asked."""
    return {key: value for key, value in options.items() if key != "headers"}
