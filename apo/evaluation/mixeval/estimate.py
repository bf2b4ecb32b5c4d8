"""The cost of an evaluation: exact requests; tokens and money with an interval, from a probe of a few items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apo.evaluation.answers import AnswerRequest, RowAnswer, messages_for
from apo.evaluation.config import resumable_ledger
from apo.evaluation.mixeval.config import MixEvalConfig, MixEvalInputs, load_inputs
from apo.evaluation.mixeval.run import MixEvalRun, work_items
from apo.evaluation.rows import OnProgress
from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.files import content_hash
from clair.inference.budget import max_billed_tokens, role_prices
from clair.inference.client import StopSignal
from clair.inference.open import running_clients
from clair.ledger.ledger import Ledger, Tokens
from clair.pipeline.estimate import RoleEstimate, estimate_role, sample_by_size

MIN_PROBE = 3


@dataclass(frozen=True, slots=True)
class _Request:
    """A distinct item of work with the length in bytes of each role's request."""

    index: int
    item: RowAnswer | AnswerRequest
    sizes: dict[str, int]


def estimate(
    config: MixEvalConfig,
    probe: int = 0,
    inputs: MixEvalInputs | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> dict[str, RoleEstimate]:
    """Estimate the cost of the whole evaluation by role, paid replies included; runs and pays for `probe` items first.

    Equal requests count once if they share a reply. The estimate assumes that answers which do not exist yet differ,
    and that every verdict is read in the first round. Raises UserError as an evaluation does.
    """
    if 0 < probe < MIN_PROBE:
        raise UserError(f"--probe {probe}: an interval needs at least {MIN_PROBE} items")
    inputs = inputs or load_inputs(config)
    if not config.models:
        return {}
    if not probe:
        units = _units(config, inputs, work_items(config, inputs))
        return {role: RoleEstimate(len(units), None, None, None) for role in config.models}
    with resumable_ledger(config) as ledger:
        return run_async(_probed(config, inputs, ledger, probe, on_progress))


async def _probed(
    config: MixEvalConfig, inputs: MixEvalInputs, ledger: Ledger, probe: int, on_progress: OnProgress
) -> dict[str, RoleEstimate]:
    stop = StopSignal()
    async with running_clients(config, ledger, stop) as clients:
        run = MixEvalRun(config, inputs, clients, stop)
        units = _units(config, inputs, run.work())
        role = "judge" if "judge" in clients else "model"
        chosen = sorted(sample_by_size([unit.sizes[role] for unit in units], max(MIN_PROBE, probe)))
        items = await run.items([(index, units[index].item) for index in chosen], on_progress)
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


def _units(
    config: MixEvalConfig, inputs: MixEvalInputs, work: Sequence[tuple[int, RowAnswer | AnswerRequest]]
) -> list[_Request]:
    """The distinct items of work of an evaluation."""
    units: dict[str, _Request] = {}
    for index, item in work:
        text = item.text if isinstance(item, RowAnswer) else ""
        sizes = {"model": max_billed_tokens({"messages": messages_for(item.row, config.system)}).prompt}
        name: list[object] = [item.row.text, item.draw] if isinstance(item, AnswerRequest) else []
        if inputs.judge_prompts is not None:
            messages = inputs.judge_prompts.messages(item.row, text)
            sizes["judge"] = max_billed_tokens({"messages": messages}).prompt
            name = name or [messages]
        if config.independent_judgements:
            name = [index]
        units.setdefault(content_hash(name), _Request(index, item, sizes))
    return list(units.values())
