"""One evaluation on IFEval: answers are generated or read, checked, scored and written. It is resumable."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from apo.evaluation.answers import Answerer, AnswerRequest, RowAnswer, usage_of
from apo.evaluation.config import Outcome, evaluation_clients, resumable_ledger
from apo.evaluation.ifeval.benchmark import IFEvalRow
from apo.evaluation.ifeval.checkers import checker_versions
from apo.evaluation.ifeval.config import IFEvalConfig, IFEvalInputs, load_inputs
from apo.evaluation.ifeval.score import aggregate, make_item
from apo.evaluation.intervals import score_headline
from apo.evaluation.records.benchmark import Role, Usage
from apo.evaluation.records.ifeval import IFEvalItem, IFEvalScore
from apo.evaluation.results import read_results, write_results
from apo.evaluation.rows import OnProgress, collect_results
from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.files import content_hash
from clair.core.provenance import provenance
from clair.inference.budget import role_prices
from clair.inference.client import ModelClient, StopSignal
from clair.ledger.ledger import Ledger

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True, repr=False)
class IFEvalOutcome(Outcome):
    """The score of an evaluation; none if it ended early."""

    score: IFEvalScore | None = None

    @property
    def headline(self) -> str | None:
        """The share of prompts whose instructions are all followed, loosely, or its bracket."""
        if (score := self.score) is None:
            return None
        interval = score.intervals["prompt_loose"]
        return score_headline("prompt-level loose", interval.mean, interval, score.unanswered)

    def table(self) -> Table:
        """The scores of all measures and types, as the command prints them. Raises UserError if there are none."""
        from apo.evaluation.tables import score_table

        return score_table(read_results(self.out))


def evaluate(
    config: IFEvalConfig, *, inputs: IFEvalInputs | None = None, on_progress: OnProgress | None = None
) -> IFEvalOutcome:
    """Run an evaluation, reusing the replies in its ledger, and write the result folder.

    `inputs` is the result of `load_inputs`, if the caller has it already. Raises UserError for the user's mistakes
    before any work, and if the model refuses everything.
    """
    inputs = inputs or load_inputs(config)
    with resumable_ledger(config) as ledger:
        return run_async(_evaluate(config, inputs, ledger, on_progress or (lambda *_: None)))


async def _evaluate(
    config: IFEvalConfig, inputs: IFEvalInputs, ledger: Ledger, on_progress: OnProgress
) -> IFEvalOutcome:
    started, stop, out = time.monotonic(), StopSignal(), Path(config.out)
    async with evaluation_clients(config, ledger, stop) as clients:
        run = IFEvalRun(config, inputs, clients, stop)
        items = await run.items(on_progress)
    if early := IFEvalOutcome.early(out, stop.reason, run.failures):
        return early
    score = run.write(items, time.monotonic() - started)
    refused = next((refusal for refusal in run.answerer.refusals if refusal.startswith("http_")), "")
    return IFEvalOutcome(out=out, score=score, refused=refused)


def work_items(config: IFEvalConfig, inputs: IFEvalInputs) -> list[RowAnswer[IFEvalRow] | AnswerRequest[IFEvalRow]]:
    """Every item: a ready answer, or the request for one. Equal prompts share an answer with the same number."""
    if inputs.ready_answers is not None:
        return list(inputs.ready_answers)
    return [AnswerRequest(row, sample, sample) for row in inputs.rows for sample in range(config.samples)]


@dataclass
class IFEvalRun:
    """A running evaluation: prompts are answered and checked concurrently, each independently."""

    config: IFEvalConfig
    inputs: IFEvalInputs
    clients: Mapping[str, ModelClient]
    stop: StopSignal
    failures: list[str] = field(default_factory=list)
    """Why items got no reply that another run may get."""
    answerer: Answerer = field(init=False)

    def __post_init__(self) -> None:
        self.answerer = Answerer(self.clients.get("model"), self.config.system, self.stop)

    async def items(self, on_progress: OnProgress) -> list[IFEvalItem]:
        """The finished items; incomplete if the run stops or requests fail. Longest prompts first for a local model."""
        work = self.answerer.fill_batches(work_items(self.config, self.inputs), lambda item: item.row)
        items = await collect_results(
            self._item, work, self.clients, self.stop, failures=self.failures, on_progress=on_progress
        )
        if self.answerer.client and items and not self.stop.reason and all(item.unresolved for item in items):
            raise UserError(f"the model answered nothing: {self.answerer.refusals[0]}")
        return items

    async def _item(self, work: RowAnswer[IFEvalRow] | AnswerRequest[IFEvalRow]) -> IFEvalItem:
        return make_item(await self.answerer.answer(work))

    def write(self, items: Sequence[IFEvalItem], seconds: float) -> IFEvalScore:
        """Score the finished items and write the result folder."""
        config, usage = self.config, dict[Role, Usage]()
        if self.answerer.client:
            price = role_prices(config.models).get("model")
            usage["model"] = usage_of(self.answerer.client, self.answerer.tokens.values(), price)
        score = IFEvalScore(
            model=self.answerer.source(config.responses, self.inputs.ready_answers),
            system=config.system,
            samples=config.samples,
            limit=config.limit,
            seed=config.seed,
            **aggregate(items, config.groups),
            usage=usage,
            data={"prompts": content_hash([[row.key, row.question] for row in self.inputs.rows])},
            checkers=checker_versions(),
            items_sha256="",
            **provenance(),
            seconds=round(seconds, 1),
        )
        return write_results(config.out, score, items)
