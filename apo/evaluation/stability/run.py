"""Judge the same answers several times by one or two judges. A resumed run pays for no judgement twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from apo.evaluation.answers import model_used, usage_of
from apo.evaluation.config import Outcome, evaluation_clients, redacted, resumable_ledger
from apo.evaluation.mixeval.judging import JudgeResult, MixEvalJudge
from apo.evaluation.rows import OnProgress, collect_results
from apo.evaluation.stability.config import RESULT, ROWS, SIDES, StabilityConfig, StabilityInputs, load_inputs
from apo.evaluation.stability.summary import summarize
from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.files import write_atomically, write_json
from clair.core.provenance import provenance
from clair.inference.budget import role_prices
from clair.inference.client import StopSignal
from clair.ledger.ledger import Ledger

Work = tuple[int, str, str, int]
"""The index of a row, the model that answered, the judge, and the index of the judgement."""


@dataclass(frozen=True, kw_only=True, repr=False)
class StabilityOutcome(Outcome):
    """The content of stability.json; None if the run ended early."""

    result: Mapping[str, Any] | None = None

    @property
    def headline(self) -> str | None:
        """The share of flips of the judge, in per cent."""
        if self.result is None:
            return None
        return f"the judge flips {100 * self.result['judges']['judge']['flips']['overall']['flips']['mean']:.1f} %"


def work_items(config: StabilityConfig, inputs: StabilityInputs) -> list[Work]:
    """Return one item per judgement."""
    return list(product(range(len(inputs.answers["base"])), SIDES, config.models, range(config.repeats)))


def measure_stability(
    config: StabilityConfig, *, inputs: StabilityInputs | None = None, on_progress: OnProgress = lambda *_: None
) -> StabilityOutcome:
    """Judge all answers, reusing the replies in the ledger, and write stability.json and judgements.jsonl.

    Raises UserError for the user's mistakes before any work, and for a judge that refuses everything.
    """
    inputs = inputs or load_inputs(config)
    with resumable_ledger(config, ROWS) as ledger:
        return run_async(_run(config, inputs, ledger, on_progress))


async def _run(
    config: StabilityConfig, inputs: StabilityInputs, ledger: Ledger, on_progress: OnProgress
) -> StabilityOutcome:
    out, stop, failures = Path(config.out), StopSignal(), list[str]()
    async with evaluation_clients(config, ledger, stop) as clients:
        judges = {role: MixEvalJudge(client, inputs.judge_prompts, config.profile) for role, client in clients.items()}

        async def judge(work: Work) -> tuple[Work, JudgeResult]:
            row, side, role, repeat = work
            return work, await judges[role].judge(inputs.answers[side][row], repeat)

        judged = await collect_results(
            judge, work_items(config, inputs), clients, stop, failures=failures, on_progress=on_progress
        )
    if early := StabilityOutcome.early(out, stop.reason, failures):
        return early
    results = dict(judged)
    refused = {work[0] for work, result in results.items() if (result.verdict.unresolved or "").startswith("judge_")}
    rows = [row for row in range(len(inputs.answers["base"])) if row not in refused]
    refusals = [refusal for judge_ in judges.values() for refusal in judge_.refusals]
    if not rows:
        raise UserError(f"a judge refused every row ({refusals[0]}); send one request by hand, or use another judge")
    scores = {
        role: {side: [_scores(results, row, side, role, config.repeats) for row in rows] for side in SIDES}
        for role in clients
    }
    questions = [inputs.answers["base"][row].row for row in rows]
    lines = [
        json.dumps(_jsonl_row(results, inputs, row, side, list(clients), config.repeats), ensure_ascii=False) + "\n"
        for row in rows
        for side in SIDES
    ]
    write_atomically(out / ROWS, "".join(lines).encode("utf-8", "backslashreplace"))
    prices = role_prices(config.models)
    unreadable = Counter(work[2] for work, result in results.items() if result.verdict.unresolved and work[0] in rows)
    result = {
        "format": 1,
        "answers": len(SIDES) * len(rows),
        "questions": len({question.question for question in questions}),
        "repeats": config.repeats,
        "left_out": inputs.left_out,
        "refused": len(refused),
        "unreadable": {role: unreadable[role] / (len(SIDES) * len(rows) * config.repeats) for role in clients},
        **summarize(scores, [question.split for question in questions], [question.cluster for question in questions]),
        "models": dict(inputs.names),
        "judged_by": {role: model_used(client).model_dump() for role, client in clients.items()},
        "usage": {
            role: usage_of(clients[role], judges[role].distinct.values(), prices.get(role)).model_dump()
            for role in clients
        },
        "settings": redacted(config),
        **provenance(),
    }
    write_json(out / RESULT, result)
    return StabilityOutcome(out=out, result=result, refused=refusals[0] if refused else "")


def _scores(results: Mapping[Work, JudgeResult], row: int, side: str, role: str, repeats: int) -> list[float]:
    """Return the K scores of an answer; a judgement without a verdict counts as 0."""
    return [results[row, side, role, repeat].verdict.score for repeat in range(repeats)]


def _jsonl_row(
    results: Mapping[Work, JudgeResult],
    inputs: StabilityInputs,
    row: int,
    side: str,
    roles: Sequence[str],
    repeats: int,
) -> dict[str, Any]:
    answer = inputs.answers[side][row]
    question = {
        "split": answer.row.split,
        "row": answer.row.row,
        "sample": answer.sample,
        "question": answer.row.question,
    }
    verdicts = {role: [results[row, side, role, repeat].verdict.value for repeat in range(repeats)] for role in roles}
    scores = {f"{role}_scores": _scores(results, row, side, role, repeats) for role in roles}
    return {**question, "model": side, "response": answer.text, **verdicts, **scores}
