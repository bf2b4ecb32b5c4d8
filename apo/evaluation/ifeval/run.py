"""One evaluation on IFEval: answers are generated or read, checked, scored and written. It is resumable."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from apo.evaluation.answers import Answer, Answerer, AnswerRequest, model_used, responses_used, usage_of
from apo.evaluation.config import Outcome, check_resumable, evaluation_clients
from apo.evaluation.ifeval.benchmark import IFEvalRow
from apo.evaluation.ifeval.checkers import checker_versions
from apo.evaluation.ifeval.config import IFEvalConfig, IFEvalInputs, load_inputs
from apo.evaluation.ifeval.score import aggregate, make_item
from apo.evaluation.results import IFEvalItem, IFEvalScore, Role, Usage, read_results, write_results
from apo.evaluation.rows import Progress, collect_results
from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.files import content_hash
from clair.core.provenance import provenance
from clair.inference.budget import role_prices
from clair.inference.client import ModelClient, StopSignal
from clair.ledger.ledger import Ledger
from clair.pipeline.build import lock_output

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True, repr=False)
class IFEvalOutcome(Outcome):
    """The score of an evaluation; none if it ended early."""

    score: IFEvalScore | None = None

    @property
    def headline(self) -> str | None:
        """The share of prompts whose instructions are all followed, loosely, or its bracket."""
        if self.score is None:
            return None
        interval = self.score.intervals["prompt_loose"]
        low, high = (f"{100 * end:.1f}" for end in interval.ci95 or interval.bracket)
        if interval.mean is None:
            return f"prompt-level loose between {low} and {high} %, {self.score.unanswered} items were refused"
        ci95 = f", 95 % interval {low} to {high}" if interval.ci95 else ""
        return f"prompt-level loose {100 * interval.mean:.1f} %{ci95}"

    def table(self) -> Table:
        """The scores of all measures and types, as the command prints them. Raises UserError if there are none."""
        from apo.evaluation.tables import score_table

        return score_table(read_results(self.out))


def evaluate(
    config: IFEvalConfig, *, inputs: IFEvalInputs | None = None, on_progress: Progress | None = None
) -> IFEvalOutcome:
    """Run an evaluation, reusing the replies in its ledger, and write the result folder.

    `inputs` is the result of `load_inputs`, if the caller has it already. Raises UserError for the user's mistakes
    before any work, and if the model refuses everything.
    """
    inputs = inputs or load_inputs(config)
    out = Path(config.out)
    with lock_output(out), Ledger(config.ledger_path) as ledger:
        check_resumable(config, out, ledger)
        return run_async(_evaluate(config, inputs, ledger, on_progress or (lambda *_: None)))


async def _evaluate(config: IFEvalConfig, inputs: IFEvalInputs, ledger: Ledger, on_progress: Progress) -> IFEvalOutcome:
    started, stop, out = time.monotonic(), StopSignal(), Path(config.out)
    async with evaluation_clients(config, ledger, stop) as clients:
        run = IFEvalRun(config, inputs, clients, stop)
        items = await run.items(on_progress)
    if stop.reason or run.failures:
        first = run.failures[0] if run.failures else ""
        return IFEvalOutcome(out=out, failed=len(run.failures), first_failure=first, stopped=stop.reason)
    score = run.write(items, time.monotonic() - started)
    refusals = run.answerer.refusals if run.answerer else []
    refused = next((refusal for refusal in refusals if refusal.startswith("http_")), "")
    return IFEvalOutcome(out=out, score=score, refused=refused)


def work_items(config: IFEvalConfig, inputs: IFEvalInputs) -> list[Answer[IFEvalRow] | AnswerRequest[IFEvalRow]]:
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
    answerer: Answerer | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if "model" in self.clients:
            self.answerer = Answerer(self.clients["model"], self.config.system, self.stop)

    async def items(self, on_progress: Progress) -> list[IFEvalItem]:
        """The finished items; incomplete if the run stops or requests fail. Longest prompts first for a local model."""
        work = work_items(self.config, self.inputs)
        if self.answerer and self.answerer.fill_batches(len(work)):
            work.sort(key=lambda item: -len(item.row.text))
        items = await collect_results(
            self._item, work, self.clients, self.stop, failures=self.failures, on_progress=on_progress
        )
        if self.answerer and items and not self.stop.reason and all(item.unresolved for item in items):
            raise UserError(f"the model answered nothing: {self.answerer.refusals[0]}")
        return items

    async def _item(self, work: Answer[IFEvalRow] | AnswerRequest[IFEvalRow]) -> IFEvalItem:
        if isinstance(work, Answer):
            return make_item(work)
        assert self.answerer is not None, "a request needs a model"
        return make_item(await self.answerer.answer(work))

    def write(self, items: Sequence[IFEvalItem], seconds: float) -> IFEvalScore:
        """Score the finished items and write the result folder."""
        config, usage = self.config, dict[Role, Usage]()
        if self.answerer:
            client, price = self.answerer.client, role_prices(config.models).get("model")
            model, usage["model"] = model_used(client), usage_of(client, self.answerer.tokens.values(), price)
        else:
            assert config.responses is not None
            assert self.inputs.ready_answers is not None
            model = responses_used(config.responses, self.inputs.ready_answers)
        score = IFEvalScore(
            model=model,
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
