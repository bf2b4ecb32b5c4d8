"""What has to be asked for: the model's own answers, and a judge who is put to the test before it is believed.

Judgements are those of `apo eval winrate`: both orders, one half for a tie, through ledger and budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from apo.advice.config import AdviseConfig, Checked
from apo.evaluation.config import is_passing
from apo.evaluation.winrate import run as winrate
from apo.evaluation.winrate.verdicts import Answer, Compared, key_of
from clair.core.statistics import wilson
from clair.data.records import Dropped, Prompt
from clair.inference.client import ModelClient, Stopped, StopSignal
from clair.inference.local import LocalModel
from clair.inference.open import map_ordered, open_clients, stop_on_interrupt
from clair.inference.rate_limit import Limiter
from clair.ledger.ledger import Ledger
from clair.pipeline.steps import position_bias
from clair.terminal import client_progress

PLANTS = 64
"""Pairs whose better side is known, shown to the judge first: winners and losers in turn, against those of another
prompt.
"""
FRESH = 1_000_003
"""Which of several samples an own answer is: none that a build draws, or its losers would be met again."""
FEWEST = 8
"""Comparisons that it has to decide, in both orders."""
TOLERATED = 0.10
"""How far from one half the share of what is shown first may be: asked in both orders, so little decides nothing."""
Tell = Callable[[str], None]


@dataclass
class Asked:
    """The model's own answers by prompt, and the judge's comparisons, in which `tuned` is the winner (of a plant: the
    answer to the prompt).
    """

    own: dict[str, Answer] = field(default_factory=dict)
    plants: list[Compared] = field(default_factory=list)
    win: list[Compared] = field(default_factory=list)
    right: list[Compared] = field(default_factory=list)
    seen: Counter[int] = field(default_factory=Counter)
    distrust: str | None = None
    """Why the judge is not believed."""
    failures: list[str] = field(default_factory=list)
    stopped: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)


async def ask(config: AdviseConfig, checked: Checked, ledger: Ledger, tell: Tell, *, judge: bool) -> Asked:
    """Everything that is asked, going on from what the ledger holds; ends early where it stops or nobody answers."""
    stop, found = StopSignal(), Asked()
    clients = open_clients(config, ledger, stop)
    try:
        with stop_on_interrupt(stop, clients):
            found.own = await _own_answers(clients["model"], checked, stop, found.failures, tell)
            if judge and not (stop.reason or found.failures):
                await _judged(config, checked, clients["judge"], stop, found, tell)
    finally:
        for client in clients.values():
            await client.model.close()
    if stop.error:
        raise stop.error
    found.stopped = stop.reason
    found.usage = {
        role: {"calls": client.tally.calls, "reused": client.tally.reused, "prompt": client.tally.prompt_tokens,
               "completion": client.tally.completion_tokens}
        for role, client in clients.items()
    }  # fmt: skip
    return found


async def _own_answers(
    client: ModelClient, checked: Checked, stop: StopSignal, failures: list[str], tell: Tell
) -> dict[str, Answer]:
    """What the model says to each prompt, by `key_of`. A prompt that it cannot answer has none."""

    async def one(prompt: Prompt) -> tuple[str, Answer | None] | Stopped:
        try:
            reply = await client.ask(list(prompt.messages), row=prompt.id, sample=FRESH)
        except Dropped as dropped:
            if is_passing(dropped):
                failures.append(f"model: {dropped.detail}")
            return key_of(prompt), None
        except Stopped as stopped:
            return stopped
        except Exception as error:  # a ledger that cannot be written, a bug of ours: nothing else may go on spending
            stop.request(str(error), error)
            raise
        incomplete = reply.incomplete()
        answered = incomplete in (None, "truncated")
        return key_of(prompt), Answer(reply.text.strip(), incomplete == "truncated") if answered else None

    async def drain() -> None:
        stop.request("no more answers are wanted")
        if isinstance(client.model, LocalModel):
            client.model.abandon()
        await client.drain()

    prompts = [checked.prompt(row) for row in checked.rows]
    client.limiter = Limiter(len(prompts))  # it makes its own batches, the fuller the better
    tell(f"{len(prompts)} answers of the model's own")
    found: dict[str, Answer] = {}
    with client_progress("answering", len(prompts), {client.role: len(prompts)}) as on_progress:
        on_progress(0, {client.role: client})
        async with aclosing(map_ordered(one, prompts, len(prompts) + 1, stop.requested, drain)) as answers:
            async for answer in answers:
                if isinstance(answer, Stopped):
                    break
                if answer[1] is not None:
                    found[answer[0]] = answer[1]
                on_progress(len(found), {client.role: client})
    return found


async def _judged(
    config: AdviseConfig, checked: Checked, judge: ModelClient, stop: StopSignal, found: Asked, tell: Tell
) -> None:
    """The plants first; the pairs only where the judge has stood that test."""
    winners = {key_of(checked.prompt(row)): row["chosen"][-1]["content"].strip() for row in checked.rows}
    losers = {key_of(checked.prompt(row)): row["rejected"][-1]["content"].strip() for row in checked.rows}
    keys = list(winners)
    planted = {key: (losers if at % 2 else winners)[key] for at, key in enumerate(keys)}
    others = {key: planted[keys[(at + 2) % len(keys)]] for at, key in enumerate(keys)}
    own = {key: answer.text for key, answer in found.own.items()}

    async def compare(
        tuned: Mapping[str, str], base: Mapping[str, str], what: str, most: int | None = None
    ) -> list[Compared]:
        rows = [prompt for row in checked.rows if key_of(prompt := checked.prompt(row)) in base][:most]
        tell(f"the judge compares {len(rows)} {what}, in both orders")
        given = {side: {key: [text] for key, text in of.items()} for side, of in (("base", base), ("tuned", tuned))}
        run = winrate.Run(_settings(config), winrate.Checked(rows, {}, given, checked.template), {"judge": judge}, stop)
        with client_progress("judging", len(rows), {"judge": 2 * len(rows)}) as on_progress:
            compared = await run.outcomes(on_progress)
        found.failures += run.failures
        found.seen += run.judge.verdicts
        return compared

    def over() -> bool:
        found.distrust = distrust(found.plants, [*found.win, *found.right], found.seen)
        return bool(stop.reason or found.failures or found.distrust)

    found.plants = await compare(planted, others, "answers with those to other prompts, a test", PLANTS)
    if over():
        return
    found.win = await compare(winners, own, "winners with the model's own answers")
    found.right = await compare(winners, losers, "winners with their losers")
    over()


def _settings(config: AdviseConfig) -> winrate.WinrateConfig:
    assert config.judge is not None
    return winrate.WinrateConfig(
        prompts={"path": config.dataset}, base="other", tuned="winner", judge=config.judge, out=config.out
    )  # type: ignore[arg-type]


def distrust(plants: Sequence[Compared], others: Sequence[Compared], seen: Mapping[int, int]) -> str | None:
    """Why a judge is not to be believed, or None: it goes by position, by chance, or does not know a plant.

    `seen` counts its verdicts by position. By chance: of the comparisons decided in both orders, no more than half are
    decided alike. Unknowing: of the plants decided alike, no more than half for the answer to the prompt itself.
    """
    if not seen.get(1, 0) + seen.get(2, 0):
        return "it calls everything a tie" if seen.get(0, 0) else "none of its verdicts can be read"
    position = position_bias(seen)
    if position["biased"] and abs(position["share_first"] - 0.5) > TOLERATED:
        return f"it goes by position: what is shown first wins {position['share_first']:.0%} of its verdicts"
    decided = [one.verdicts for one in (*plants, *others) if {"base", "tuned"} >= set(one.verdicts)]
    if len(decided) < FEWEST:
        return f"it decides {len(decided)} of {len(plants) + len(others)} comparisons, too few to know it by"
    alike = sum(first == second for first, second in decided)
    if wilson(alike, len(decided)).lo <= 0.5:
        return f"it answers at random: in both orders alike in {alike} of {len(decided)} comparisons that it decides"
    known = Counter(one.verdicts[0] for one in plants if one.verdicts[0] == one.verdicts[1])
    tested = known["tuned"] + known["base"]
    if wilson(known["tuned"], tested).lo <= 0.5:
        return f"it prefers the answer to another prompt in {known['base']} of {tested} planted comparisons"
    return None
