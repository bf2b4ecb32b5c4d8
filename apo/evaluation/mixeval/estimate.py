"""What an evaluation will cost: requests for certain, tokens and money with an interval from a few that are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apo.evaluation.config import same_settings
from apo.evaluation.mixeval.answers import Answer, Wanted, messages_of
from apo.evaluation.mixeval.config import Checked, MixEvalConfig, check
from apo.evaluation.mixeval.run import Progress, Run, work_items
from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.files import content_hash
from clair.inference.budget import max_billed_tokens, role_prices
from clair.inference.client import StopSignal
from clair.inference.open import open_clients, stop_on_interrupt
from clair.ledger.ledger import Ledger, Tokens
from clair.pipeline.build import lock_output
from clair.pipeline.estimate import RoleEstimate, estimate_role, sample_by_size

MIN_PROBE = 3


@dataclass(frozen=True, slots=True)
class _Unit:
    """One different request of each role, and how long each is in bytes."""

    place: int
    what: Answer | Wanted
    sizes: dict[str, int]


def estimate(
    config: MixEvalConfig,
    probe: int = 0,
    checked: Checked | None = None,
    on_progress: Progress = lambda *_: None,
) -> dict[str, RoleEstimate]:
    """The cost of the whole evaluation by role, paid parts included; runs and pays for `probe` items first.

    Equal requests are counted once where they share a reply. Answers that do not exist yet are taken to differ. Every
    verdict is taken to be read in the first round. Raises UserError as an evaluation does.
    """
    if 0 < probe < MIN_PROBE:
        raise UserError(f"--probe {probe}: an interval needs at least {MIN_PROBE} items")
    checked = checked or check(config)
    if not config.models:
        return {}
    if not probe:
        units = _units(config, checked, work_items(config, checked))
        return {role: RoleEstimate(len(units), None, None, None) for role in config.models}
    out = Path(config.out)
    with lock_output(out), Ledger(config.ledger_path) as ledger:
        same_settings(config, out, ledger)
        return run_async(_probed(config, checked, ledger, probe, on_progress))


async def _probed(
    config: MixEvalConfig, checked: Checked, ledger: Ledger, probe: int, on_progress: Progress
) -> dict[str, RoleEstimate]:
    stop = StopSignal()
    clients = open_clients(config, ledger, stop)
    try:
        run = Run(config, checked, clients, stop)
        units = _units(config, checked, run.work())
        role = "judge" if "judge" in clients else "model"
        chosen = sorted(sample_by_size([unit.sizes[role] for unit in units], max(MIN_PROBE, probe)))
        with stop_on_interrupt(stop, clients):
            items = await run.items([(place, units[place].what) for place in chosen], on_progress)
    finally:
        for client in clients.values():
            await client.model.close()
    if stop.error or stop.reason or run.failures:
        raise stop.error or UserError(f"the probe ended early: {stop.reason or run.failures[0]}")
    paid = {
        "model": [Tokens(item.prompt_tokens or 0, item.completion_tokens or 0) for item in items],
        "judge": [Tokens(item.judge_prompt_tokens, item.judge_completion_tokens) for item in items],
    }
    prices = role_prices(config.models)
    return {
        role: estimate_role(prices.get(role), len(units), [u.sizes[role] for u in units], chosen, paid[role])
        for role in clients
    }


def _units(config: MixEvalConfig, checked: Checked, work: Sequence[tuple[int, Answer | Wanted]]) -> list[_Unit]:
    """The different requests of an evaluation."""
    units: dict[str, _Unit] = {}
    for place, what in work:
        text = what.text if isinstance(what, Answer) else ""
        sizes = {"model": max_billed_tokens({"messages": messages_of(what.row, config.system)}).prompt}
        name: list[object] = [what.row.text, what.draw] if isinstance(what, Wanted) else []
        if checked.words is not None:
            messages = checked.words.messages(what.row, text)
            sizes["judge"] = max_billed_tokens({"messages": messages}).prompt
            name = name or [messages]
        if config.independent_judgements:
            name = [place]
        units.setdefault(content_hash(name), _Unit(place, what, sizes))
    return list(units.values())
