"""The win rate of a tuned model against its base by a judge on held-out prompts, raw and at equal lengths.

The judge sees every pair of answers in both orders. A preference in either order counts one half, a tie a quarter for
each side, so that a judge that prefers the first answer shifts nothing. Judgements use ledger, limits and budget.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from apo.evaluation.answers import model_used, usage_of
from apo.evaluation.config import (
    EvaluationConfig,
    Outcome,
    check_result_folder,
    evaluation_clients,
    is_transient,
    redacted,
    resumable_ledger,
    with_batch_tokens,
)
from apo.evaluation.rows import OnProgress, collect_results
from apo.evaluation.winrate.alpaca_eval import generator_of, with_columns, write_answer_files
from apo.evaluation.winrate.verdicts import (
    SIDES,
    AnswerText,
    Comparison,
    position_counts,
    prompt_key,
    summary,
    unresolved_counts,
)
from clair.core.errors import UserError, one_line
from clair.core.event_loop import run_async
from clair.core.files import write_atomically, write_json
from clair.core.provenance import provenance
from clair.data.prompt_sources import PromptSource, each_prompt, read_prompts
from clair.data.records import Dropped, Prompt, task_text
from clair.inference.budget import role_prices
from clair.inference.client import ModelClient, StopSignal
from clair.inference.config import JudgeConfig, ModelConfig
from clair.inference.local import LocalModel
from clair.inference.model import visible_answer
from clair.inference.open import check_models
from clair.inference.rate_limit import Limiter
from clair.ledger.ledger import Ledger
from clair.pipeline.steps import Judge, gather_all, judge_once, position_bias
from clair.prompting.templates import JUDGE_NEEDS, load_template

RESULT = "winrate.json"
ITEMS = "winrate.jsonl"


class AnswererConfig(ModelConfig):
    """A model whose answers are compared."""

    max_tokens: int | None = Field(default=1024, ge=1)


class WinrateConfig(EvaluationConfig):
    """Base and tuned model, each a model or a file of its answers; the prompts and the judge."""

    prompts: PromptSource
    base: AnswererConfig | str
    """A model that answers, or a file of prompts, each with an `answer`, or AlpacaEval's answer file."""
    tuned: AnswererConfig | str
    judge: JudgeConfig
    samples: int = Field(default=1, ge=1)
    """Answers of each side to each prompt; answers with the same number are compared."""
    limit: int | None = Field(default=None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> WinrateConfig:
        if self.judge.order != "both":
            raise ValueError("judge.order: a win rate needs both orders; leave it out")
        if self.base == self.tuned:
            raise ValueError("base and tuned are the same; compare different models")
        return self

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that get requests, by role."""
        roles = {role: getattr(self, role) for role in (*SIDES, "judge")}
        return {role: with_batch_tokens(model) for role, model in roles.items() if isinstance(model, ModelConfig)}


@dataclass(frozen=True, slots=True)
class WinrateInputs:
    """What a comparison starts from: the different prompts, and by side the ready answers to each (by content)."""

    prompts: Sequence[Prompt]
    left_out: Mapping[str, int]
    ready_answers: Mapping[str, Mapping[str, Sequence[str]]]
    template: str


def load_inputs(config: WinrateConfig) -> WinrateInputs:
    """Load and check all inputs before a request is sent or a file is written. Raises UserError."""
    check_result_folder(config, RESULT)
    template = load_template(config.judge.template, "judge.j2", JUDGE_NEEDS)
    check_models(config.models, config.budget, config.seed)
    prompts, left_out = {}, Counter()
    for prompt, reason in each_prompt(with_columns(config.prompts), config.limit):
        reason = reason or ("tools" if prompt.tools else "duplicate" if prompt_key(prompt) in prompts else None)
        if reason:
            left_out[reason] += 1
        else:
            prompts[prompt_key(prompt)] = prompt
    if not prompts:
        which = ", ".join(f"{count} left out: {reason}" for reason, count in left_out.items())
        raise UserError(
            f"{config.prompts.path.public} has no prompts to compare texts of ({which or '0 rows'}); give at least one"
        )
    files = {side: getattr(config, side) for side in SIDES if isinstance(getattr(config, side), str)}
    answers = {side: _read_answers(side, file, prompts, config.samples) for side, file in files.items()}
    return WinrateInputs(list(prompts.values()), dict(left_out), answers, template)


def _read_answers(side: str, file: str, prompts: Mapping[str, Prompt], samples: int) -> dict[str, list[str]]:
    """Read the answers in a file, by prompt. Raises UserError if a prompt has another number of them than `samples`."""
    if not Path(file).is_file():
        raise UserError(f"{side}: {file} is no file on this machine; give a model, or a file of its answers")
    answers: dict[str, list[str]] = defaultdict(list)
    source = with_columns(PromptSource.model_validate({"path": file}))
    generator_of(file)
    for row in read_prompts(source):
        if row.answer is not None or source.columns:  # an empty output is an answer
            answers[prompt_key(row)].append(row.answer or "")
    missing = [prompt for key, prompt in prompts.items() if len(answers[key]) != samples]
    if missing:
        count, opening = len(answers[prompt_key(missing[0])]), one_line(task_text(missing[0].messages), 60)
        raise UserError(
            f"{side}: {file} has not {samples} answer(s) to {len(missing)} of {len(prompts)} prompts; first: {count} "
            f"to {opening!r}; give a row with `prompt` and `answer` for each, and --samples as they are"
        )
    return {key: answers[key] for key in prompts}


# ---- one comparison


_WINNERS = {0: "tie", 1: "base", 2: "tuned"}


@dataclass
class WinrateRun:
    """A running comparison: pairs of answers are generated and judged concurrently, each independently."""

    config: WinrateConfig
    inputs: WinrateInputs
    clients: Mapping[str, ModelClient]
    stop: StopSignal
    judge: Judge = field(init=False)
    failures: list[str] = field(default_factory=list)
    """Reasons why pairs got no reply that another run may get."""
    refusals: list[str] = field(default_factory=list)
    """The server's messages about requests that it refused for good."""

    def __post_init__(self) -> None:
        judge = self.config.judge
        self.judge = Judge(self.clients["judge"], self.inputs.template, judge.system, judge.ask_again)
        for side in SIDES:
            if side in self.clients and isinstance(self.clients[side].model, LocalModel):
                self.clients[side].limiter = Limiter(
                    len(self.work())
                )  # it makes its own batches, the fuller the better

    def work(self) -> list[tuple[Prompt, int]]:
        """Every (prompt, sample number)."""
        return [(prompt, sample) for prompt in self.inputs.prompts for sample in range(self.config.samples)]

    async def outcomes(self, on_progress: OnProgress) -> list[Comparison]:
        """All comparisons in the order of the prompts; incomplete if the run stops or requests fail."""
        return await collect_results(
            self._compare, self.work(), self.clients, self.stop, failures=self.failures, on_progress=on_progress
        )

    async def _compare(self, row: tuple[Prompt, int]) -> Comparison:
        prompt, sample = row
        try:
            base, tuned = await gather_all(*(self._answer(side, prompt, sample) for side in SIDES))
        except Dropped as dropped:
            if is_transient(dropped):
                raise
            self.refusals += [f"{dropped.stage}: {dropped.detail}"] * dropped.failed
            nothing = AnswerText("")
            return Comparison(prompt, sample, nothing, nothing, (None, None), ("", ""), f"answer_{dropped.reason}")
        comparison = Comparison(prompt, sample, base, tuned, ("tie", "tie"))
        if comparison.identical:
            return comparison
        try:
            shown = (prompt, base.text, tuned.text, self.judge)
            base_first, tuned_first = await gather_all(judge_once(*shown, False), judge_once(*shown, True))
        except Dropped as dropped:
            if is_transient(dropped):
                raise
            reason = f"judge_{dropped.reason}" if dropped.failed else dropped.reason
            self.refusals += [f"judge: {dropped.detail}"] * dropped.failed
            return Comparison(prompt, sample, base, tuned, (None, None), ("", ""), reason)
        winners = _WINNERS[base_first.better], _WINNERS[tuned_first.better]
        return Comparison(prompt, sample, base, tuned, winners, (base_first.reasoning, tuned_first.reasoning))

    async def _answer(self, side: str, prompt: Prompt, sample: int) -> AnswerText:
        """The answer of a side. A cut off or empty one is judged as it is.

        Raises Dropped if there is none, or one that was filtered, refused or interrupted.
        """
        if side in self.inputs.ready_answers:
            return AnswerText(visible_answer(self.inputs.ready_answers[side][prompt_key(prompt)][sample]).strip())
        reply = await self.clients[side].complete(list(prompt.messages), row=prompt.id, sample=sample)
        incomplete = reply.incomplete()
        if incomplete and incomplete != "truncated":
            raise Dropped(side, incomplete, reply.refusal)
        return AnswerText(reply.text.strip(), incomplete == "truncated")


# ---- the result


@dataclass(frozen=True, kw_only=True, repr=False)
class WinrateOutcome(Outcome):
    """The content of winrate.json; None if the run ended early."""

    result: Mapping[str, Any] | None = None

    @property
    def headline(self) -> str | None:
        """The win rate in per cent, or its bracket if a server refused comparisons."""
        if self.result is None:
            return None
        if self.result["win_rate"] is None:
            return f"win rate between {100 * self.result['bracket'][0]:.1f} and {100 * self.result['bracket'][1]:.1f} %"
        return f"win rate {100 * self.result['win_rate']['mean']:.1f} %"


def measure_win_rate(
    config: WinrateConfig,
    *,
    inputs: WinrateInputs | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> WinrateOutcome:
    """Compare two models, reusing the replies in the ledger, and write winrate.json and winrate.jsonl.

    Raises UserError for the user's mistakes before any work, and for a model that refuses every request.
    """
    inputs = inputs or load_inputs(config)
    with resumable_ledger(config, ITEMS) as ledger:
        return run_async(_run(config, inputs, ledger, on_progress))


async def _run(config: WinrateConfig, inputs: WinrateInputs, ledger: Ledger, on_progress: OnProgress) -> WinrateOutcome:
    started, stop, out = time.monotonic(), StopSignal(), Path(config.out)
    async with evaluation_clients(config, ledger, stop) as clients:
        for client in clients.values():
            client.keys = defaultdict(set)
        run = WinrateRun(config, inputs, clients, stop)
        compared = await run.outcomes(on_progress)
    if early := WinrateOutcome.early(out, stop.reason, run.failures):
        return early
    if not any(comparison.value is not None for comparison in compared):
        counts = ", ".join(f"{count} {reason}" for reason, count in unresolved_counts(compared).items())
        counts += "".join(f" ({refusal})" for refusal in run.refusals[:1])
        raise UserError(f"no comparison has a verdict: {counts}; send one request by hand, or use another judge")
    models = {role: _model(config, role, clients) for role in (*SIDES, "judge")}
    write_answer_files(out, compared, {side: models[side]["name"] for side in SIDES})
    lines = "".join(json.dumps(comparison.row(), ensure_ascii=False) + "\n" for comparison in compared)
    write_atomically(out / ITEMS, lines.encode("utf-8", "backslashreplace"))
    numbers, verdicts = summary(compared), position_counts(compared)
    if numbers["unanswered"]:
        why = f"{numbers['unanswered']} comparisons were refused"
        numbers |= {"win_rate": None, "length_controlled": {"rate": None, "ci95": None, "why": why}}
    result = {
        "format": 1,
        **numbers,
        "position": position_bias(verdicts) if verdicts else None,
        "left_out": dict(inputs.left_out),
        **models,
        "usage": _usage(config, clients, ledger),
        "settings": redacted(config),
        **provenance(),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / RESULT, result)
    return WinrateOutcome(out=out, result=result, refused=run.refusals[0] if numbers["unanswered"] else "")


def _model(config: WinrateConfig, role: str, clients: Mapping[str, ModelClient]) -> dict[str, Any]:
    if role not in clients:
        file = Path(getattr(config, role))
        name = generator_of(str(file)) or file.name
        return {"name": name, "identity": f"answers:{hashlib.sha256(file.read_bytes()).hexdigest()}"}
    return model_used(clients[role]).model_dump()


def _usage(config: WinrateConfig, clients: Mapping[str, ModelClient], ledger: Ledger) -> dict[str, Any]:
    """Tokens of all requests that the result is based on, each counted once, and their cost if prices are known."""
    prices, usage = role_prices(config.models), {}
    for role, client in clients.items():
        keys = {key for of_prompt in (client.keys or {}).values() for key in of_prompt}
        usage[role] = usage_of(client, [ledger.paid(keys)], prices.get(role)).model_dump()
    return usage
