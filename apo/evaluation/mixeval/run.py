"""One evaluation: answers are generated or read, judged, scored and written. It is resumable and pays nothing twice."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from apo.evaluation.answers import Answerer, AnswerRequest, RowAnswer, usage_of, without_headers
from apo.evaluation.config import Outcome, evaluation_clients, resumable_ledger
from apo.evaluation.intervals import score_headline
from apo.evaluation.mixeval.answers import answer_requests
from apo.evaluation.mixeval.config import MixEvalConfig, MixEvalInputs, load_inputs
from apo.evaluation.mixeval.judging import JudgeResult, MixEvalJudge, Verdict, judge_by_rule, make_item, with_fallbacks
from apo.evaluation.mixeval.score import aggregate
from apo.evaluation.mixeval.upstream import write_upstream_files
from apo.evaluation.records.benchmark import Role, Usage
from apo.evaluation.records.mixeval import JudgeUsed, MixEvalItem, MixEvalScore
from apo.evaluation.results import read_results, write_results
from apo.evaluation.rows import OnProgress, collect_results
from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.provenance import provenance
from clair.inference.budget import role_prices
from clair.inference.client import ModelClient, StopSignal
from clair.inference.open import Resources
from clair.ledger.ledger import Ledger

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True, repr=False)
class MixEvalOutcome(Outcome):
    """The score of an evaluation and the number of different judge requests it rests on; no score if it ended early."""

    score: MixEvalScore | None = None
    requests: int = 0

    @property
    def headline(self) -> str | None:
        """The overall score in per cent, or its bracket if a server refused items."""
        if (score := self.score) is None:
            return None
        return score_headline("overall", score.overall, score.intervals["overall"], score.unanswered)

    def table(self) -> Table:
        """The scores of all splits and benchmarks, as the command prints them. Raises UserError if there are none."""
        from apo.evaluation.tables import score_table

        return score_table(read_results(self.out))


def evaluate(
    config: MixEvalConfig,
    *,
    inputs: MixEvalInputs | None = None,
    on_progress: OnProgress | None = None,
    resources: Resources | None = None,
) -> MixEvalOutcome:
    """Run an evaluation, reusing the replies in its ledger, and write the result folder.

    `inputs` is the result of `load_inputs`, if the caller has it already. `resources` opens the models and shares their
    limits (absent: the run's own). Raises UserError for the user's mistakes before any work, and if the model or the
    judge refuses everything.
    """
    inputs = inputs or load_inputs(config)
    with resumable_ledger(config) as ledger:
        return run_async(_evaluate(config, inputs, ledger, on_progress or (lambda *_: None), resources))


async def _evaluate(
    config: MixEvalConfig, inputs: MixEvalInputs, ledger: Ledger, on_progress: OnProgress, resources: Resources | None
) -> MixEvalOutcome:
    started, stop, out = time.monotonic(), StopSignal(), Path(config.out)
    async with evaluation_clients(config, ledger, stop, resources) as clients:
        run = MixEvalRun(config, inputs, clients, stop)
        items = await run.items(run.work(), on_progress)
    if early := MixEvalOutcome.early(out, stop.reason, run.failures):
        return early
    score = run.write(items, time.monotonic() - started)
    refused = [*run.answerer.refusals, *(run.judge.refusals if run.judge else ())]
    requests = len(run.judge.distinct) if run.judge else 0
    return MixEvalOutcome(out=out, score=score, requests=requests, refused=refused[0] if score.unanswered else "")


def work_items(config: MixEvalConfig, inputs: MixEvalInputs) -> list[tuple[int, RowAnswer | AnswerRequest]]:
    """(index in the result, ready answer or request for one) of every item to judge."""
    if inputs.ready_answers is not None:
        return list(enumerate(inputs.ready_answers))
    return list(enumerate(answer_requests(inputs.benchmark, config.samples, greedy=_is_greedy(config))))


def _is_greedy(config: MixEvalConfig) -> bool:
    """True if decoding is greedy, so that equal questions get equal answers."""
    model = config.model
    assert model is not None
    if model.temperature is not None or not model.is_local:
        return model.temperature == 0
    assert model.path is not None
    from apo.models.load import find_model, load_generation_config

    generation = load_generation_config(find_model(model.path))
    return generation is None or not generation.do_sample


@dataclass
class MixEvalRun:
    """A running evaluation: items are answered and judged concurrently, each independently."""

    config: MixEvalConfig
    inputs: MixEvalInputs
    clients: Mapping[str, ModelClient]
    stop: StopSignal
    failures: list[str] = field(default_factory=list)
    """Why items got no reply that another run may get."""
    judge: MixEvalJudge | None = field(init=False, default=None)
    answerer: Answerer = field(init=False)

    def __post_init__(self) -> None:
        self.answerer = Answerer(self.clients.get("model"), self.config.system, self.stop)
        if self.inputs.judge_prompts is not None:
            whose = self.clients["model"].model.identity if "model" in self.clients else self.config.out
            independent = whose if self.config.independent_judgements else None
            self.judge = MixEvalJudge(
                self.clients["judge"], self.inputs.judge_prompts, self.config.profile, independent
            )

    def work(self) -> list[tuple[int, RowAnswer | AnswerRequest]]:
        """All items of work; longest questions first for a local model."""
        return self.answerer.fill_batches(work_items(self.config, self.inputs), lambda indexed: indexed[1].row)

    async def items(
        self, work: Sequence[tuple[int, RowAnswer | AnswerRequest]], on_progress: OnProgress
    ) -> list[MixEvalItem]:
        """The finished items in the order of their indexes; incomplete if the run stops or requests fail."""

        async def run_item(indexed: tuple[int, RowAnswer | AnswerRequest]) -> tuple[int, MixEvalItem]:
            return indexed[0], await self._item(indexed[1])

        items = await collect_results(
            run_item, work, self.clients, self.stop, failures=self.failures, on_progress=on_progress
        )
        if items and not self.stop.reason and all(_no_answer(item) for _, item in items):
            raise UserError(f"the model answered nothing: {self.answerer.refusals[0]}")
        return [item for _, item in sorted(items, key=lambda indexed: indexed[0])]

    async def _item(self, work: RowAnswer | AnswerRequest) -> MixEvalItem:
        response = await self.answerer.answer(work)
        if response.unresolved is not None:
            return make_item(response, JudgeResult(Verdict(None, unresolved=response.unresolved)))
        return make_item(
            response, await self.judge.judge(response) if self.judge else judge_by_rule(response, self.config.profile)
        )

    # ---- the result

    def write(self, items: Sequence[MixEvalItem], seconds: float) -> MixEvalScore:
        """Score the finished items and write the result folder."""
        config, benchmark = self.config, self.inputs.benchmark
        if config.profile == "faithful":
            rows = {(row.split, row.row): row for row in benchmark.all_rows}
            items = with_fallbacks(items, rows, config.seed)
        score = MixEvalScore(
            version=benchmark.version,
            split=benchmark.split,
            profile=config.profile,
            judge=self._judge_used(),
            model=self.answerer.source(config.responses, self.inputs.ready_answers),
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
            options=without_headers(self.judge.client.options),
            answered_by=tuple(sorted(self.judge.answered_by)),
            prompts_sha256=self.judge.judge_prompts.sha256,
        )

    def _usage(self) -> dict[Role, Usage]:
        """Tokens and cost of the replies that the score is based on, each counted once."""
        prices = role_prices(self.config.models)
        tokens: dict[Role, Collection[tuple[int, int]]] = {"model": self.answerer.tokens.values()}
        tokens["judge"] = self.judge.distinct.values() if self.judge else ()
        return {
            role: usage_of(self.clients[role], counts, prices.get(role))
            for role, counts in tokens.items()
            if role in self.clients
        }


def _no_answer(item: MixEvalItem) -> bool:
    return item.unresolved is not None and item.unresolved.startswith("answer_")
