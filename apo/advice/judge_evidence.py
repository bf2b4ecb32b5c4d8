"""What has to be asked for: the model's own answers, and a judge who is put to the test before it is believed.

Judgements are those of `apo eval winrate`: both orders, one half for a tie, through ledger and budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from apo.advice.config import AdviceInputs, AdviseConfig
from apo.evaluation.config import is_transient
from apo.evaluation.winrate import run as winrate
from apo.evaluation.winrate.verdicts import AnswerText, Comparison, prompt_key
from clair.core.statistics import wilson
from clair.data.records import Dropped, Prompt
from clair.inference.client import ModelClient, Stopped, StopSignal
from clair.inference.local import LocalModel
from clair.inference.open import map_ordered, open_clients, stop_on_interrupt
from clair.inference.rate_limit import Limiter
from clair.ledger.ledger import Ledger
from clair.pipeline.steps import position_bias
from clair.terminal import asking_progress

MAX_PLANTS = 64
"""Pairs whose better side is known, shown to the judge first: winners and losers in turn, against those of another
prompt.
"""
OWN_ANSWER_SAMPLE = 1_000_003
"""Which of several samples an own answer is: none that a build draws, or its losers would be met again."""
MIN_DECIDED = 8
"""Comparisons that it has to decide, in both orders."""
MAX_POSITION_BIAS = 0.10
"""How far from one half the share of what is shown first may be: asked in both orders, so little decides nothing."""
Log = Callable[[str], None]


@dataclass
class CollectedReplies:
    """The model's own answers by prompt, and the judge's comparisons, in which `tuned` is the winner (of a plant: the
    answer to the prompt).
    """

    own_answers: dict[str, AnswerText] = field(default_factory=dict)
    plants: list[Comparison] = field(default_factory=list)
    win: list[Comparison] = field(default_factory=list)
    right: list[Comparison] = field(default_factory=list)
    seen: Counter[int] = field(default_factory=Counter)
    distrust_reason: str | None = None
    """Why the judge is not believed."""
    failures: list[str] = field(default_factory=list)
    stopped: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)


async def collect_replies(
    config: AdviseConfig, inputs: AdviceInputs, ledger: Ledger, log: Log, *, judge: bool
) -> CollectedReplies:
    """Everything that is asked, going on from what the ledger holds; ends early where it stops or nobody answers."""
    stop, replies = StopSignal(), CollectedReplies()
    clients = open_clients(config, ledger, stop)
    try:
        with stop_on_interrupt(stop, clients):
            replies.own_answers = await _generate_own_answers(clients["model"], inputs, stop, replies.failures, log)
            if judge and not (stop.reason or replies.failures):
                await _compare_by_judge(config, inputs, clients["judge"], stop, replies, log)
    finally:
        for client in clients.values():
            await client.model.close()
    if stop.error:
        raise stop.error
    replies.stopped = stop.reason
    replies.usage = {
        role: {"calls": client.tally.calls, "reused": client.tally.reused, "prompt": client.tally.prompt_tokens,
               "completion": client.tally.completion_tokens}
        for role, client in clients.items()
    }  # fmt: skip
    return replies


async def _generate_own_answers(
    client: ModelClient, inputs: AdviceInputs, stop: StopSignal, failures: list[str], log: Log
) -> dict[str, AnswerText]:
    """What the model says to each prompt, by `prompt_key`. A prompt that it cannot answer has none."""

    async def answer_prompt(prompt: Prompt) -> tuple[str, AnswerText | None] | Stopped:
        try:
            reply = await client.ask(list(prompt.messages), row=prompt.id, sample=OWN_ANSWER_SAMPLE)
        except Dropped as dropped:
            if is_transient(dropped):
                failures.append(f"model: {dropped.detail}")
            return prompt_key(prompt), None
        except Stopped as stopped:
            return stopped
        except Exception as error:  # a ledger that cannot be written, a bug of ours: nothing else may go on spending
            stop.request(str(error), error)
            raise
        incomplete = reply.incomplete()
        answered = incomplete in (None, "truncated")
        return prompt_key(prompt), AnswerText(reply.text.strip(), incomplete == "truncated") if answered else None

    async def drain() -> None:
        stop.request("no more answers are wanted")
        if isinstance(client.model, LocalModel):
            client.model.abandon()
        await client.drain()

    prompts = [inputs.prompt(row) for row in inputs.rows]
    client.limiter = Limiter(len(prompts))  # it makes its own batches, the fuller the better
    log(f"{len(prompts)} answers of the model's own")
    answers: dict[str, AnswerText] = {}
    with asking_progress("answering", len(prompts), {client.role: len(prompts)}) as on_progress:
        on_progress(0, {client.role: client})
        async with aclosing(map_ordered(answer_prompt, prompts, len(prompts) + 1, stop.requested, drain)) as outcomes:
            async for outcome in outcomes:
                if isinstance(outcome, Stopped):
                    break
                if outcome[1] is not None:
                    answers[outcome[0]] = outcome[1]
                on_progress(len(answers), {client.role: client})
    return answers


async def _compare_by_judge(
    config: AdviseConfig,
    inputs: AdviceInputs,
    judge: ModelClient,
    stop: StopSignal,
    replies: CollectedReplies,
    log: Log,
) -> None:
    """The plants first; the pairs only where the judge has stood that test."""
    winners = {prompt_key(inputs.prompt(row)): row["chosen"][-1]["content"].strip() for row in inputs.rows}
    losers = {prompt_key(inputs.prompt(row)): row["rejected"][-1]["content"].strip() for row in inputs.rows}
    keys = list(winners)
    planted = {key: (losers if index % 2 else winners)[key] for index, key in enumerate(keys)}
    others = {key: planted[keys[(index + 2) % len(keys)]] for index, key in enumerate(keys)}
    own_answers = {key: answer.text for key, answer in replies.own_answers.items()}

    async def compare(
        tuned: Mapping[str, str], base: Mapping[str, str], description: str, max_rows: int | None = None
    ) -> list[Comparison]:
        rows = [prompt for row in inputs.rows if prompt_key(prompt := inputs.prompt(row)) in base][:max_rows]
        log(f"the judge compares {len(rows)} {description}, in both orders")
        ready_answers = {
            side: {key: [text] for key, text in of.items()} for side, of in (("base", base), ("tuned", tuned))
        }
        run = winrate.WinrateRun(
            _winrate_config(config),
            winrate.WinrateInputs(rows, {}, ready_answers, inputs.template),
            {"judge": judge},
            stop,
        )
        with asking_progress("judging", len(rows), {"judge": 2 * len(rows)}) as on_progress:
            compared = await run.outcomes(on_progress)
        replies.failures += run.failures
        replies.seen += run.judge.verdicts
        return compared

    def over() -> bool:
        replies.distrust_reason = distrust_reason(replies.plants, [*replies.win, *replies.right], replies.seen)
        return bool(stop.reason or replies.failures or replies.distrust_reason)

    replies.plants = await compare(planted, others, "answers with those to other prompts, a test", MAX_PLANTS)
    if over():
        return
    replies.win = await compare(winners, own_answers, "winners with the model's own answers")
    replies.right = await compare(winners, losers, "winners with their losers")
    over()


def _winrate_config(config: AdviseConfig) -> winrate.WinrateConfig:
    assert config.judge is not None
    return winrate.WinrateConfig(
        prompts={"path": config.dataset}, base="other", tuned="winner", judge=config.judge, out=config.out
    )  # type: ignore[arg-type]


def distrust_reason(
    plants: Sequence[Comparison], others: Sequence[Comparison], position_counts: Mapping[int, int]
) -> str | None:
    """Why a judge is not to be believed, or None: it goes by position, by chance, or does not know a plant.

    `seen` counts its verdicts by position. By chance: of the comparisons decided in both orders, no more than half are
    decided alike. Unknowing: of the plants decided alike, no more than half for the answer to the prompt itself.
    """
    if not position_counts.get(1, 0) + position_counts.get(2, 0):
        return "it calls everything a tie" if position_counts.get(0, 0) else "none of its verdicts can be read"
    position = position_bias(position_counts)
    if position["biased"] and abs(position["share_first"] - 0.5) > MAX_POSITION_BIAS:
        return f"it goes by position: what is shown first wins {position['share_first']:.0%} of its verdicts"
    decided = [
        comparison.verdicts for comparison in (*plants, *others) if {"base", "tuned"} >= set(comparison.verdicts)
    ]
    if len(decided) < MIN_DECIDED:
        return f"it decides {len(decided)} of {len(plants) + len(others)} comparisons, too few to know it by"
    alike = sum(first == second for first, second in decided)
    if wilson(alike, len(decided)).lo <= 0.5:
        return f"it answers at random: in both orders alike in {alike} of {len(decided)} comparisons that it decides"
    consistent = Counter(
        comparison.verdicts[0] for comparison in plants if comparison.verdicts[0] == comparison.verdicts[1]
    )
    tested = consistent["tuned"] + consistent["base"]
    if wilson(consistent["tuned"], tested).lo <= 0.5:
        return f"it prefers the answer to another prompt in {consistent['base']} of {tested} planted comparisons"
    return None
