"""Run prompts through a pipeline: the models and the ledger are open, prompts go in and outcomes come out.

A build runs all prompts, an estimate a few. However a run ends, the requests in flight are awaited and their replies
are written to the ledger before the models are closed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clair.core.files import content_hash, file_sha256
from clair.data.records import Dropped, Pair, Prompt
from clair.inference.batch_client import wait_for_results
from clair.inference.batch_service import Pending
from clair.inference.budget import BudgetExceeded
from clair.inference.client import ModelClient, StopSignal
from clair.inference.config import PromptedConfig
from clair.inference.model_folder import weights_identity
from clair.inference.open import Resources, running_clients
from clair.ledger.ledger import Ledger
from clair.pipeline.checker import Checker, check_checker
from clair.pipeline.config import BuildConfig, ScoresConfig
from clair.pipeline.filters import make_filters
from clair.pipeline.pipelines import judged, revised, stronger
from clair.pipeline.reward_model import RewardModel, check_reward
from clair.pipeline.rows import run_rows
from clair.pipeline.scores import Judges, ScoreSource, Scoring
from clair.pipeline.steps import Judge, Reviser, ScoreJudge
from clair.prompting.labels import IDENTIFIERS, names_part
from clair.prompting.templates import JUDGE_NEEDS, REVISER_NEEDS, load_template

_BEGUN_PER_REQUEST = 16
_MIN_BEGUN = 256
KILLED_WORKER = "killed_worker"
"""The drop reason of a row that killed the process which built it."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt to run, its index among all prompts, and the reason to skip it, if there is one."""

    index: int
    prompt: Prompt
    skip_reason: str | None = None


@dataclass(frozen=True, slots=True)
class PipelineRun:
    """One run of a pipeline: its clients by role, its stop signal, and the function that makes a pair of a prompt."""

    config: BuildConfig
    clients: Mapping[str, ModelClient]
    stop: StopSignal
    make_pair: Callable[[Prompt], Awaitable[Pair]]
    judge: Judge | None = None
    scoring: Scoring | None = None
    reviser: Reviser | None = None

    def outcomes(
        self,
        rows: Iterable[PromptRow],
        *,
        one_by_one: bool = False,
        on_row_done: Callable[[object], None] = lambda _: None,
    ) -> AsyncGenerator[tuple[PromptRow, Pair | Dropped | Pending]]:
        """Yield (row, outcome) for each row, in the order of the rows. Ends early if the run stops.

        An outcome is Pending if it needs a reply that comes with a batch; see `wait`. `on_row_done` is called when a
        row is done, which may be long before its outcome is yielded.
        """
        max_begun = _MIN_BEGUN + _BEGUN_PER_REQUEST * self.config.concurrency
        if self.config.accept:  # rows begun beyond the last accepted pair are paid for and not used: begin few
            max_begun = 2 * self.config.concurrency
        max_begun = 1 if one_by_one else max_begun
        return run_rows(self._run_row, rows, self.clients, self.stop, max_begun=max_begun, on_row_done=on_row_done)

    async def _run_row(self, row: PromptRow) -> Pair:
        if reason := row.skip_reason:
            raise Dropped("prompts", reason, _SKIP_REASONS[reason], failed=reason == KILLED_WORKER)
        return await self.make_pair(row.prompt)

    async def wait(self, on_poll: Callable[[], None]) -> bool:
        """Send the batches that Pending rows wait for, and return True when another pass over the rows is useful.

        Returns False if the run ends instead; `stop` has the reason. `on_poll` is called at every poll of the batches.
        """
        batches = [client.batch for client in self.clients.values() if client.batch]
        if self.stop.reason and not (self.stop.over_budget and any(batch.queue.open_batches() for batch in batches)):
            return False
        self.stop.clear()
        try:
            live = sum([await batch.end_pass() for batch in batches])
            if not live:
                await wait_for_results(batches, self.stop.requested, on_poll)
        except Pending:
            return False
        except BudgetExceeded as reached:
            self.stop.request(str(reached))
            return False
        for client in self.clients.values():
            client.next_pass()
        if self.reviser:
            self.reviser.first_replies.clear()
        if self.judge:
            self.judge.verdicts.clear()
        if self.scoring:
            self.scoring.clear()
        return True


@asynccontextmanager
async def open_run(
    config: BuildConfig, ledger: Ledger, *, live: bool = False, resources: Resources | None = None
) -> AsyncIterator[PipelineRun]:
    """Open the recipe's models for one run. Ctrl-C inside it stops the sending and keeps the replies in flight.

    `live`: send every request by itself, even if the recipe uses a Batch API.
    """
    stop = StopSignal()
    async with running_clients(config, ledger, stop, live=live, resources=resources) as clients:
        run = _assemble(config, clients, stop)
        try:
            yield run
        finally:
            if run.scoring and run.scoring.scorer:
                await run.scoring.scorer.close()


def _assemble(config: BuildConfig, clients: Mapping[str, ModelClient], stop: StopSignal) -> PipelineRun:
    templates, target = load_templates(config), clients.get("target")
    filters = make_filters(config.filters, revisions=config.pipeline == "revised")
    make_run = partial(PipelineRun, config, clients, stop)
    if config.reviser:
        reviser = Reviser(
            client=clients["reviser"],
            template=templates["reviser"],
            edits=templates.get("edits"),
            system=config.reviser.system,
            ask_again=config.reviser.ask_again,
            revises_calls=config.reviser.tool_calls == "revise",
        )
        return make_run(partial(revised, target=target, reviser=reviser, filters=filters), reviser=reviser)
    if config.pipeline in ("stronger", "delta"):
        models = {"answerer": clients.get(config.answerer), "stronger": clients.get("stronger")}
        return make_run(partial(stronger, **models, role=config.answerer, source=config.pipeline, filters=filters))
    judge = None
    if config.judge:
        judge = Judge(
            client=clients["judge"],
            template=templates["judge"],
            order=config.judge.order,
            system=config.judge.system,
            ask_again=config.judge.ask_again,
        )
    scoring = None
    if config.scores:
        names = tuple(clients[role].model.name for role in config.score_judges)
        scoring = Scoring(config.scores, _open_scorer(config, clients, templates), names)
    options = {"judge": judge, "scoring": scoring, "samples": config.samples, "filters": filters}
    answerers = [clients.get(role) for role in config.answerers]
    return make_run(partial(judged, answerers=answerers, **options), judge, scoring)


def _open_scorer(
    config: BuildConfig, clients: Mapping[str, ModelClient], templates: Mapping[str, str]
) -> ScoreSource | None:
    assert config.scores is not None
    if config.scores.checker:
        return Checker(config.scores.checker)
    if config.scores.reward:
        return RewardModel(config.scores.reward)
    judges = [
        ScoreJudge(
            client=clients[role],
            template=templates["score"],
            rubric=config.scores.rubric,
            scale=config.scores.scale,
            system=judge.system,
            ask_again=judge.ask_again,
        )
        for role, judge in config.score_judges.items()
    ]
    return Judges(judges) if judges else None


def check_scorer(scores: ScoresConfig) -> None:
    """Check what gives scores, before any request. Raises UserError."""
    if scores.checker:
        check_checker(scores.checker)
    if scores.reward:
        check_reward(scores.reward)


def scorer_sha256(scores: ScoresConfig) -> str | None:
    """The hash of the files that determine the scores, if there are any.

    Those are the files that a checker's command names, the folder of a reward model, or the template of judges.
    """
    if scores.checker:
        files = [Path(word) for word in scores.checker.command]
        return content_hash([file_sha256(file) for file in files if file.is_file()])
    if scores.reward:
        return weights_identity(scores.reward.path)
    return content_hash(load_template(None, "score.j2", ())) if scores.judges else None


def load_templates(config: BuildConfig) -> dict[str, str]:
    """The templates by name (`reviser`, `edits`, `judge`): the recipe's own files or the built-in ones."""
    templates = {}
    if config.reviser:
        path, edits = config.reviser.template, config.reviser.mode == "edits"
        templates["reviser"] = load_template(None if edits else path, "reviser.j2", REVISER_NEEDS)
        if edits:
            templates["edits"] = load_template(path, "reviser_edits.j2", REVISER_NEEDS)
    if config.judge:
        templates["judge"] = load_template(config.judge.template, "judge.j2", JUDGE_NEEDS)
    if config.score_judges:
        templates["score"] = load_template(None, "score.j2", ())
    return templates


def template_warnings(config: BuildConfig) -> list[str]:
    """Warnings about the user's own templates that never name the part which is parsed from each reply."""
    warnings = []
    kinds = {
        "reviser": "edits" if config.reviser and config.reviser.mode == "edits" else "solution",
        "judge": "verdict",
    }
    for role, kind in kinds.items():
        model: PromptedConfig | None = getattr(config, role)
        if model is None or model.template is None:
            continue
        if not names_part(kind, Path(model.template).read_text("utf-8") + (model.system or "")):
            warnings.append(
                f"{role}.template {model.template} never names {IDENTIFIERS[kind]}, the label of the part that is "
                f"parsed; replies without it are dropped (docs/data.md#your-own-templates)"
            )
    return warnings


_SKIP_REASONS = {
    "duplicate": "the same prompt came before",
    "near_duplicate": "nearly the same prompt came before",
    "in_benchmark": "the benchmark of prompts.not_in asks this",
    KILLED_WORKER: "the process that built this row died of it, twice",
}
