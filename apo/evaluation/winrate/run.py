"""Which of two models a judge prefers on held-out prompts: both orders, raw and at equal lengths, with intervals.

Every pair of answers is shown in both orders; a preference in either order counts one half, a tie a quarter for each
side, so that a judge who likes whatever comes first moves nothing. Judgements go through the same ledger, limits and
budget as everything else that is paid for.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from apo.evaluation.config import Evaluation, check_folder, goes_on, is_passing, public, same_settings
from apo.evaluation.winrate.verdicts import SIDES, Answer, Compared, key_of, reasons, summary
from clair.core.errors import UserError, one_line
from clair.core.event_loop import run_async
from clair.core.files import write_atomically, write_json
from clair.core.provenance import provenance
from clair.data.prompt_sources import PromptSource, each_prompt, read_prompts
from clair.data.records import Dropped, Prompt, task_text
from clair.inference.budget import role_prices
from clair.inference.client import ModelClient, Stopped, StopSignal
from clair.inference.config import JudgeConfig, ModelConfig
from clair.inference.local import LocalModel
from clair.inference.model import Refused, visible_answer
from clair.inference.open import check_models, map_ordered, open_clients, stop_on_interrupt
from clair.inference.rate_limit import Limiter
from clair.ledger.ledger import Ledger, Tokens
from clair.pipeline.build import lock_output
from clair.pipeline.steps import Judge, judge_once, position_bias
from clair.prompting.templates import JUDGE_NEEDS, load_template

RESULT = "winrate.json"
ITEMS = "winrate.jsonl"


class WinrateConfig(Evaluation):
    """A base and a tuned model, each a model to ask or a file of its answers; prompts, and the judge."""

    prompts: PromptSource
    base: ModelConfig | str
    """A model that answers, or a file of prompts with an `answer` each."""
    tuned: ModelConfig | str
    judge: JudgeConfig
    samples: int = Field(1, ge=1)
    """Answers of each side to each prompt; the first ones are compared, the second ones, and so on."""
    limit: int | None = Field(None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> WinrateConfig:
        if self.judge.order != "both":
            raise ValueError("judge.order: a win rate asks in both orders")
        if self.base == self.tuned:
            raise ValueError("base and tuned are the same; compare different models")
        return self

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models that are asked, by role."""
        given = {role: getattr(self, role) for role in (*SIDES, "judge")}
        return {role: model for role, model in given.items() if isinstance(model, ModelConfig)}


@dataclass(frozen=True, slots=True)
class Checked:
    """What a comparison starts from: the different prompts, and by side the ready answers to each (by content)."""

    prompts: Sequence[Prompt]
    left_out: Mapping[str, int]
    given: Mapping[str, Mapping[str, Sequence[str]]]
    template: str


def check(config: WinrateConfig) -> Checked:
    """Everything that can be wrong before a request is sent. Raises UserError; spends nothing, writes nothing."""
    check_folder(Path(config.out), RESULT)
    template = load_template(config.judge.template, "judge.j2", JUDGE_NEEDS)
    check_models(config.models, config.budget, config.seed)
    kept, left_out = {}, Counter()
    for prompt, reason in each_prompt(config.prompts, config.limit):
        if reason or key_of(prompt) in kept:
            left_out[reason or "duplicate"] += 1
        else:
            kept[key_of(prompt)] = prompt
    if not kept:
        raise UserError(f"{config.prompts.path} has no prompts; give at least one")
    files = {side: getattr(config, side) for side in SIDES if isinstance(getattr(config, side), str)}
    given = {side: _answers(side, file, kept, config.samples) for side, file in files.items()}
    return Checked(list(kept.values()), dict(left_out), given, template)


def _answers(side: str, file: str, prompts: Mapping[str, Prompt], samples: int) -> dict[str, list[str]]:
    """The answers in a file, by prompt. Raises UserError where a prompt has none, or not as many as are compared."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in read_prompts(PromptSource(path=file)):
        if row.answer is not None:
            found[key_of(row)].append(row.answer)
    missing = [prompt for key, prompt in prompts.items() if len(found[key]) != samples]
    if missing:
        count, opening = len(found[key_of(missing[0])]), one_line(task_text(missing[0].messages), 60)
        raise UserError(
            f"{side}: {file} has not {samples} answer(s) to {len(missing)} of {len(prompts)} prompts; first: {count} "
            f"to {opening!r}; give a row with `prompt` and `answer` for each, and --samples as they are"
        )
    return {key: found[key] for key in prompts}


# ---- one comparison


_WINNERS = {0: "tie", 1: "base", 2: "tuned"}


@dataclass
class Run:
    """A comparison on its way: every pair of answers made and judged by itself, all at once."""

    config: WinrateConfig
    checked: Checked
    clients: Mapping[str, ModelClient]
    stop: StopSignal
    judge: Judge = field(init=False)
    failures: list[str] = field(default_factory=list)
    """Why pairs got no reply that another run may get."""
    refusals: list[str] = field(default_factory=list)
    """What a server said to requests that it refused for good."""

    def __post_init__(self) -> None:
        own = self.config.judge
        self.judge = Judge(self.clients["judge"], self.checked.template, "both", own.system, own.ask_again)
        for side in SIDES:
            if side in self.clients and isinstance(self.clients[side].model, LocalModel):
                self.clients[side].limiter = Limiter(
                    len(self.work())
                )  # it makes its own batches, the fuller the better

    def work(self) -> list[tuple[Prompt, int]]:
        """Every prompt with the number of its sample."""
        return [(prompt, sample) for prompt in self.checked.prompts for sample in range(self.config.samples)]

    async def outcomes(self, on_progress: Callable[[int, Mapping[str, ModelClient]], None]) -> list[Compared]:
        """All comparisons, in the order of the prompts; only some where the run stops or requests fail."""
        work, found, done = self.work(), [], count()

        async def one(item: tuple[Prompt, int]) -> Compared | Dropped | Stopped:
            result = await self._one(item)
            if not isinstance(result, Dropped | Stopped):
                on_progress(next(done), self.clients)
            return result

        on_progress(next(done), self.clients)
        async with aclosing(map_ordered(one, work, len(work) + 1, self.stop.requested, self._drain)) as outcomes:
            async for outcome in outcomes:
                if isinstance(outcome, Stopped):
                    break
                if isinstance(outcome, Dropped):
                    self.failures.append(f"{outcome.stage}: {outcome.detail}")
                else:
                    found.append(outcome)
        return found

    async def _one(self, item: tuple[Prompt, int]) -> Compared | Dropped | Stopped:
        try:
            return await self._compare(*item)
        except (Dropped, Stopped) as outcome:
            return outcome
        except Exception as error:  # a ledger that cannot be written, a bug of ours: nothing else may go on spending
            self.stop.request(str(error), error)
            raise

    async def _compare(self, prompt: Prompt, sample: int) -> Compared:
        try:
            base, tuned = await _both(*(self._answer(side, prompt, sample) for side in SIDES))
        except Dropped as dropped:
            if is_passing(dropped):
                raise
            self.refusals += [f"{dropped.stage}: {dropped.detail}"] * dropped.failed
            nothing = Answer("")
            return Compared(prompt, sample, nothing, nothing, (None, None), ("", ""), f"answer_{dropped.reason}")
        made = Compared(prompt, sample, base, tuned, ("tie", "tie"))
        if made.identical:
            return made
        try:
            shown = (prompt, base.text, tuned.text, self.judge)
            verdicts = await _both(judge_once(*shown, False), judge_once(*shown, True))
        except Dropped as dropped:
            if is_passing(dropped):
                raise
            reason = f"judge_{dropped.reason}" if dropped.failed else dropped.reason
            self.refusals += [f"judge: {dropped.detail}"] * dropped.failed
            return Compared(prompt, sample, base, tuned, (None, None), ("", ""), reason)
        one, other = verdicts
        winners = _WINNERS[one.better], _WINNERS[other.better]
        return Compared(prompt, sample, base, tuned, winners, (one.reasoning, other.reasoning))

    async def _answer(self, side: str, prompt: Prompt, sample: int) -> Answer:
        """What a side says. Cut off or empty, it is judged as it is: that is what the model says.

        Raises Dropped where there is none, or one that was filtered, refused or broken off.
        """
        if side in self.checked.given:
            return Answer(visible_answer(self.checked.given[side][key_of(prompt)][sample]).strip())
        reply = await self.clients[side].ask(list(prompt.messages), row=prompt.id, sample=sample)
        incomplete = reply.incomplete()
        if incomplete and incomplete != "truncated":
            raise Dropped(side, incomplete, reply.refusal)
        return Answer(reply.text.strip(), incomplete == "truncated")

    async def _drain(self) -> None:
        """Let what is paid for, or being generated, come to its end."""
        self.stop.request("no more rows are wanted")
        for client in self.clients.values():
            if isinstance(client.model, LocalModel):
                client.model.abandon()
        await asyncio.gather(*(client.drain() for client in self.clients.values()))


async def _both(first: Any, second: Any) -> list[Any]:
    """Both coroutines at once; where one fails, its reason, once the other is through as well."""
    results = await asyncio.gather(first, second, return_exceptions=True)
    for result in sorted((r for r in results if isinstance(r, BaseException)), key=lambda e: isinstance(e, Dropped)):
        raise result
    return results


# ---- the result


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a comparison came to. Without a result it ended early: `stopped` tells why, or `failed` how many requests
    got no reply, with the first reason. `refused`: the first words of a server about a request that it refused.
    """

    out: Path
    result: Mapping[str, Any] | None
    failed: int = 0
    first_failure: str = ""
    stopped: str | None = None
    refused: str = ""


def compare(
    config: WinrateConfig,
    *,
    checked: Checked | None = None,
    on_progress: Callable[[int, Mapping[str, ModelClient]], None] = lambda *_: None,
) -> Outcome:
    """Compare two models, going on from whatever the ledger holds, and write winrate.json and winrate.jsonl.

    Raises UserError for the user's mistakes before any work, and for a model that refuses every request.
    """
    checked = checked or check(config)
    out = Path(config.out)
    with lock_output(out), Ledger(config.ledger_path) as ledger:
        same_settings(config, out, ledger, ITEMS)
        return run_async(_compare(config, checked, ledger, on_progress))


async def _compare(
    config: WinrateConfig, checked: Checked, ledger: Ledger, on_progress: Callable[..., None]
) -> Outcome:
    started, stop, out = time.monotonic(), StopSignal(), Path(config.out)
    clients = open_clients(config, ledger, stop)
    try:
        run = Run(config, checked, clients, stop)
        with stop_on_interrupt(stop, clients):
            compared = await run.outcomes(on_progress)
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
        return Outcome(out, None, len(run.failures), run.failures[0] if run.failures else "", stop.reason)
    if not any(one.value is not None for one in compared):
        told = ", ".join(f"{count} {reason}" for reason, count in reasons(compared).items())
        told += "".join(f" ({words})" for words in run.refusals[:1])
        raise UserError(f"no comparison has a verdict: {told}; look at one request by hand, or take another judge")
    lines = "".join(json.dumps(one.row(), ensure_ascii=False) + "\n" for one in compared)
    write_atomically(out / ITEMS, lines.encode("utf-8", "backslashreplace"))
    numbers = summary(compared)
    if numbers["unanswered"]:
        why = f"{numbers['unanswered']} comparisons were refused"
        numbers |= {"win_rate": None, "length_controlled": {"rate": None, "ci95": None, "why": why}}
    result = {
        "format": 1,
        **numbers,
        "position": position_bias(run.judge.verdicts) if run.judge.verdicts else None,
        "left_out": dict(checked.left_out),
        **{role: _model(config, role, clients) for role in (*SIDES, "judge")},
        "usage": _usage(config, clients),
        "settings": public(config),
        **provenance(),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / RESULT, result)
    return Outcome(out, result, refused=run.refusals[0] if numbers["unanswered"] else "")


def _model(config: WinrateConfig, role: str, clients: Mapping[str, ModelClient]) -> dict[str, Any]:
    if role not in clients:
        file = Path(getattr(config, role))
        return {"name": file.name, "identity": f"answers:{hashlib.sha256(file.read_bytes()).hexdigest()}"}
    client = clients[role]
    options = {key: value for key, value in client.options.items() if key != "headers"}
    return {"name": client.model.name, "identity": client.model.identity, "options": options}


def _usage(config: WinrateConfig, clients: Mapping[str, ModelClient]) -> dict[str, Any]:
    """Tokens of all replies that the result rests on, and what they cost where prices are known."""
    prices, told = role_prices(config.models), {}
    for role, client in clients.items():
        tally = client.tally
        counts = {"calls": tally.calls, "reused": tally.reused}
        tokens = Tokens(tally.prompt_tokens, tally.completion_tokens)
        cost = f"{prices[role].cost(tokens).normalize():f}" if role in prices else None
        told[role] = {"prompt": tokens.prompt, "completion": tokens.completion, **counts, "cost": cost}
    return told
