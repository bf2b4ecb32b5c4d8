"""Evidence from requests: the model's own answers, and verdicts of a judge that has to pass a test first.

Judgements are made as by `apo eval winrate`: in both orders, a tie counts one half, through ledger and budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apo.advice.config import AdviceInputs, AdviseConfig
from apo.evaluation.config import is_transient
from apo.evaluation.rows import collect_results
from apo.evaluation.winrate import run as winrate
from apo.evaluation.winrate.verdicts import AnswerText, Comparison, prompt_key
from clair.core.statistics import wilson
from clair.data.records import Dropped, Prompt
from clair.inference.client import ModelClient, StopSignal
from clair.inference.open import running_clients
from clair.inference.rate_limit import Limiter
from clair.ledger.ledger import Ledger
from clair.pipeline.steps import position_bias
from clair.terminal import client_progress

MAX_PLANTS = 64
"""Comparisons whose better side is known, shown to the judge first: an answer to the prompt against the answer to
another prompt, winners and losers in turn.
"""
OWN_ANSWER_SAMPLE = 1_000_003
"""The sample number of own answers. No build uses it: otherwise its losers would be returned as own answers."""
MIN_DECIDED = 8
"""Comparisons that the judge has to decide in both orders."""
MAX_POSITION_BIAS = 0.10
"""The tolerated distance from one half of the share won by the first answer; both orders cancel such a bias."""
Log = Callable[[str], None]


@dataclass
class CollectedReplies:
    """The model's own answers by prompt, and the judge's comparisons; `tuned` is the winner.

    `plants` are the test, in which `tuned` is the answer to the prompt. `win` compares winners with own answers,
    `right` with losers.
    """

    own_answers: dict[str, AnswerText] = field(default_factory=dict)
    plants: list[Comparison] = field(default_factory=list)
    win: list[Comparison] = field(default_factory=list)
    right: list[Comparison] = field(default_factory=list)
    verdicts_by_position: Counter[int] = field(default_factory=Counter)
    distrust_reason: str | None = None
    """The reason to distrust the judge."""
    failures: list[str] = field(default_factory=list)
    stopped: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)


async def collect_replies(
    config: AdviseConfig, inputs: AdviceInputs, ledger: Ledger, log: Log, *, judge: bool
) -> CollectedReplies:
    """Collect own answers and verdicts, reusing the replies in the ledger; incomplete if the run stops or fails."""
    stop, replies = StopSignal(), CollectedReplies()
    async with running_clients(config, ledger, stop) as clients:
        replies.own_answers = await _generate_own_answers(clients["model"], inputs, stop, replies.failures, log)
        if judge and not (stop.reason or replies.failures):
            await _compare_by_judge(config, inputs, clients["judge"], stop, replies, log)
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
    """The model's answer to each prompt, by `prompt_key`, without prompts that it cannot answer."""

    async def answer_prompt(prompt: Prompt) -> tuple[str, AnswerText | None]:
        try:
            reply = await client.complete(list(prompt.messages), row=prompt.id, sample=OWN_ANSWER_SAMPLE)
        except Dropped as dropped:
            if is_transient(dropped):
                raise
            return prompt_key(prompt), None
        incomplete = reply.incomplete()
        answered = incomplete in (None, "truncated")
        return prompt_key(prompt), AnswerText(reply.text.strip(), incomplete == "truncated") if answered else None

    prompts = [inputs.prompt(row) for row in inputs.rows]
    client.limiter = Limiter(len(prompts))  # the model forms its own batches, from all requests
    log(f"{len(prompts)} answers of the model's own")
    with client_progress("answering", len(prompts), {client.role: len(prompts)}) as on_progress:
        answers = await collect_results(
            answer_prompt, prompts, {client.role: client}, stop, failures=failures, on_progress=on_progress
        )
    return {key: answer for key, answer in answers if answer is not None}


async def _compare_by_judge(
    config: AdviseConfig,
    inputs: AdviceInputs,
    judge: ModelClient,
    stop: StopSignal,
    replies: CollectedReplies,
    log: Log,
) -> None:
    """Let the judge compare the plants, and if it passes that test the pairs."""
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
        with client_progress("judging", len(rows), {"judge": 2 * len(rows)}) as on_progress:
            compared = await run.outcomes(on_progress)
        replies.failures += run.failures
        replies.verdicts_by_position += run.judge.verdicts
        return compared

    def must_end() -> bool:
        replies.distrust_reason = distrust_reason(
            replies.plants, [*replies.win, *replies.right], replies.verdicts_by_position
        )
        return bool(stop.reason or replies.failures or replies.distrust_reason)

    replies.plants = await compare(planted, others, "answers with those to other prompts, a test", MAX_PLANTS)
    if must_end():
        return
    replies.win = await compare(winners, own_answers, "winners with the model's own answers")
    replies.right = await compare(winners, losers, "winners with their losers")
    must_end()


def _winrate_config(config: AdviseConfig) -> winrate.WinrateConfig:
    assert config.judge is not None
    values = {"prompts": {"path": config.dataset}, "base": "other", "tuned": "winner"}
    return winrate.WinrateConfig.model_validate({**values, "judge": config.judge, "out": config.out})


def distrust_reason(
    plants: Sequence[Comparison], others: Sequence[Comparison], position_counts: Mapping[int, int]
) -> str | None:
    """The reason to distrust a judge, or None: it decides by position or at random, or fails the test.

    `position_counts` counts its verdicts by position. At random: of the comparisons that it decides in both orders, it
    decides no more than half alike. Failed test: of the plants decided alike, no more than half prefer the answer to
    the prompt itself.
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
