"""Evidence from requests: the model's own answers, and the verdicts of a judge that first has to pass a test.

The judge compares as in `apo eval winrate`: in both orders, a tie counts one half, with ledger and budget.
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
"""Maximal number of comparisons that test the judge: an answer to the prompt against an answer to another prompt,
winners and losers in turn.
"""
OWN_ANSWER_SAMPLE = 1_000_003
"""The sample number of own answers. No build uses it; the ledger would return a build's losers as own answers."""
MIN_DECIDED = 8
"""Minimal number of comparisons that the judge has to decide in both orders."""
MAX_POSITION_BIAS = 0.10
"""The share won by the first answer may differ from one half by so much. Both orders cancel such a bias."""
Log = Callable[[str], None]


@dataclass
class CollectedReplies:
    """The model's own answers by prompt, and the judge's comparisons, in which `tuned` is the winner.

    `plants` are the comparisons of the test, in which `tuned` is the answer to the prompt. `win` compares winners with
    own answers, `right` compares winners with losers.
    """

    own_answers: dict[str, AnswerText] = field(default_factory=dict)
    plants: list[Comparison] = field(default_factory=list)
    win: list[Comparison] = field(default_factory=list)
    right: list[Comparison] = field(default_factory=list)
    verdicts_by_position: Counter[int] = field(default_factory=Counter)
    distrust_reason: str | None = None
    """Why the judge is not used, or None."""
    failures: list[str] = field(default_factory=list)
    stopped: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)


async def collect_replies(
    config: AdviseConfig, inputs: AdviceInputs, ledger: Ledger, log: Log, *, judge: bool
) -> CollectedReplies:
    """Collect own answers and verdicts, reusing the ledger's replies; incomplete if the run stops early."""
    stop, replies = StopSignal(), CollectedReplies()
    async with running_clients(config, ledger, stop) as clients:
        prompts = [inputs.prompt(row) for row in inputs.rows]
        log(f"{len(prompts)} answers of the model's own")
        replies.own_answers = await generate_answers(
            clients["model"], prompts, stop, replies.failures, OWN_ANSWER_SAMPLE
        )
        if judge and not (stop.reason or replies.failures):
            await _compare_by_judge(config, inputs, clients["judge"], stop, replies, log)
    if stop.error:
        raise stop.error
    replies.stopped = stop.reason
    replies.usage = {
        role: {
            "calls": client.tally.calls,
            "reused": client.tally.reused,
            "prompt": client.tally.prompt_tokens,
            "completion": client.tally.completion_tokens,
        }
        for role, client in clients.items()
    }
    return replies


async def generate_answers(
    client: ModelClient, prompts: Sequence[Prompt], stop: StopSignal, failures: list[str], sample: int
) -> dict[str, AnswerText]:
    """Return the model's answer to each prompt, by `prompt_key`, without prompts that it cannot answer.

    `sample` is the answers' number in the ledger.
    """

    async def answer_prompt(prompt: Prompt) -> tuple[str, AnswerText | None]:
        try:
            reply = await client.complete(list(prompt.messages), row=prompt.id, sample=sample)
        except Dropped as dropped:
            if is_transient(dropped):
                raise
            return prompt_key(prompt), None
        incomplete = reply.incomplete()
        answered = incomplete in (None, "truncated")
        return prompt_key(prompt), AnswerText(reply.text.strip(), incomplete == "truncated") if answered else None

    client.limiter = Limiter(len(prompts))  # the model forms its own batches, from all requests
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
    """Let the judge compare the plants, and the pairs if it passes that test."""
    winners = {prompt_key(inputs.prompt(row)): row["chosen"][-1]["content"].strip() for row in inputs.rows}
    losers = {prompt_key(inputs.prompt(row)): row["rejected"][-1]["content"].strip() for row in inputs.rows}
    keys = list(winners)
    planted = {key: (losers if index % 2 else winners)[key] for index, key in enumerate(keys)}
    misplaced = {key: planted[keys[(index + 2) % len(keys)]] for index, key in enumerate(keys)}
    own_answers = {key: answer.text for key, answer in replies.own_answers.items()}

    async def compare(
        tuned: Mapping[str, str], base: Mapping[str, str], description: str, max_rows: int | None = None
    ) -> list[Comparison]:
        rows = [prompt for row in inputs.rows if prompt_key(prompt := inputs.prompt(row)) in base][:max_rows]
        log(f"the judge compares {len(rows)} {description}, in both orders")
        compared, run = await compare_answers(config, inputs.template, judge, stop, rows, base, tuned)
        replies.failures += run.failures
        replies.verdicts_by_position += run.judge.verdicts
        return compared

    def must_end() -> bool:
        replies.distrust_reason = distrust_reason(
            replies.plants, [*replies.win, *replies.right], replies.verdicts_by_position
        )
        return bool(stop.reason or replies.failures or replies.distrust_reason)

    replies.plants = await compare(planted, misplaced, "answers with answers to other prompts, as a test", MAX_PLANTS)
    if must_end():
        return
    replies.win = await compare(winners, own_answers, "winners with the model's own answers")
    replies.right = await compare(winners, losers, "winners with their losers")
    must_end()


async def compare_answers(
    config: AdviseConfig,
    template: str,
    judge: ModelClient,
    stop: StopSignal,
    prompts: Sequence[Prompt],
    base: Mapping[str, str],
    tuned: Mapping[str, str],
) -> tuple[list[Comparison], winrate.WinrateRun]:
    """Let the judge compare two answers to each prompt, by `prompt_key`, in both orders; as in `apo eval winrate`."""
    values = {"prompts": {"path": config.dataset}, "base": "base", "tuned": "tuned"}
    settings = winrate.WinrateConfig.model_validate({**values, "judge": config.judge, "out": config.out})
    sides = {"base": base, "tuned": tuned}
    ready_answers = {side: {key: [text] for key, text in answers.items()} for side, answers in sides.items()}
    inputs = winrate.WinrateInputs(prompts, {}, ready_answers, template)
    run = winrate.WinrateRun(settings, inputs, {"judge": judge}, stop)
    with client_progress("judging", len(prompts), {"judge": 2 * len(prompts)}) as on_progress:
        return await run.outcomes(on_progress), run


def distrust_reason(
    plants: Sequence[Comparison], others: Sequence[Comparison], position_counts: Mapping[int, int]
) -> str | None:
    """Return why a judge is not to be trusted, or None. `position_counts` counts its verdicts by position.

    by position   the first answer wins far more, or far less, than half of the verdicts
    at random     of the comparisons decided in both orders, no more than half are decided alike
    failed test   of the plants decided alike, no more than half prefer the answer to the prompt itself
    """
    if not position_counts.get(1, 0) + position_counts.get(2, 0):
        return "all its verdicts are ties" if position_counts.get(0, 0) else "none of its verdicts can be read"
    position = position_bias(position_counts)
    if position["biased"] and abs(position["share_first"] - 0.5) > MAX_POSITION_BIAS:
        return f"it decides by position: the first answer wins {position['share_first']:.0%} of its verdicts"
    decided = [
        comparison.verdicts for comparison in (*plants, *others) if {"base", "tuned"} >= set(comparison.verdicts)
    ]
    if len(decided) < MIN_DECIDED:
        return f"it decides {len(decided)} of {len(plants) + len(others)} comparisons, too few to test it"
    alike = sum(first == second for first, second in decided)
    if wilson(alike, len(decided)).lo <= 0.5:
        return f"it decides at random: only {alike} of {len(decided)} decided comparisons are alike in both orders"
    consistent = Counter(
        comparison.verdicts[0] for comparison in plants if comparison.verdicts[0] == comparison.verdicts[1]
    )
    tested = consistent["tuned"] + consistent["base"]
    if wilson(consistent["tuned"], tested).lo <= 0.5:
        return f"it prefers the answer to another prompt in {consistent['base']} of {tested} test comparisons"
    return None
