"""Estimate the cost of a build: its calls exactly; tokens, money and time from a probe, a few rows that are run.

The probe's rows are taken at even steps through the bytes of all rows, so that each represents an equal share of the
text that is sent. Their replies stay in the ledger. For each role, a line is fitted to the tokens of a row over its
size, weighted because longer rows vary more; the interval is the 95 % prediction interval of the sum over all rows
(Cochran, Sampling Techniques, 7.4 and 9A; Royall 1970).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count, islice

from clair.core.event_loop import run_async
from clair.core.progress import print_line
from clair.core.student_t import t_quantile
from clair.data.prompt_sources import Scan, each_prompt
from clair.data.records import Dropped, Prompt
from clair.inference.budget import Price, discounted_share, max_billed_tokens, role_prices
from clair.inference.client import ModelClient
from clair.inference.config import ModelConfig, ReviserConfig
from clair.ledger.ledger import Ledger, Tokens
from clair.pipeline.build import check_recipe, check_resumable
from clair.pipeline.config import BuildConfig
from clair.pipeline.output_dir import lock_output
from clair.pipeline.runner import PromptRow, open_run

MIN_PROBE = 3
"""The minimum of rows for an interval."""
_COMMON = 1000
"""Bytes that are added to every row, about: the template and a little reasoning."""


@dataclass(frozen=True, slots=True)
class Range:
    """An estimated total with its 95 % interval, in tokens or money."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True, slots=True)
class RoleEstimate:
    """The estimate of one role over all prompts. Without a probe all but `max_calls` are None."""

    max_calls: int
    prompt: Range | None
    completion: Range | None
    cost: Range | None
    time: tuple[float, float] | None = None
    """Seconds: if the server takes as many concurrent requests as the recipe allows, and at the pace of the probe."""


def estimate(
    config: BuildConfig, probe: int = 0, on_progress: Callable[[int, Mapping[str, ModelClient]], None] = lambda *_: None
) -> dict[str, RoleEstimate]:
    """Estimate the whole build by role, replies already paid for included. Runs and pays for `probe` rows first.

    A probe has at least 3 rows, which an interval needs. Its requests are sent one by one; if the build will use a
    Batch API, the estimate is at the price of batches. Raises UserError as a build does.
    """
    prompt_scan = check_recipe(config)
    sizes, replies = array("q"), Counter[str]()
    for prompt in _prompts(config, prompt_scan):
        sizes.append(_size(prompt))
        replies.update({role: _replies(config, role, prompt) for role in config.models})
    calls = {role: replies[role] * _max_calls_per_reply(config, role) for role in config.models}
    if config.accept and config.accept < len(sizes):
        print_line(
            f"note: the estimate is for all {len(sizes)} rows; accept ends the build at {config.accept} pairs, which "
            f"the first {config.accept} rows give if none is dropped"
        )
    if not probe:
        return {role: RoleEstimate(calls[role], None, None, None) for role in config.models}
    chosen = sample_by_size(sizes, max(MIN_PROBE, probe))
    paid, seconds = _run(config, prompt_scan, chosen, on_progress)
    prices = {role: _discounted(price, config.models[role]) for role, price in role_prices(config.models).items()}
    return {
        role: replace(
            estimate_role(prices.get(role), calls[role], sizes, chosen, paid[role]),
            time=time_range(model, replies[role], seconds[role], config.concurrency),
        )
        for role, model in config.models.items()
    }


def time_range(
    model: ModelConfig, calls: int, seconds: Sequence[float], concurrency: int
) -> tuple[float, float] | None:
    """Estimate the seconds of `calls` calls from those of a few concurrent ones; None if there are none, or batches.

    The shorter time: each reply takes as long as in the probe, with as many in flight as the recipe allows. The longer
    time: the server's throughput is that of the probe, as with a server that answers one request at a time.
    """
    if not seconds or model.batching:
        return None
    in_flight = min(model.batch_size if model.is_local else concurrency, max(1, calls))
    limited = 60 * calls / model.requests_per_minute if model.requests_per_minute else 0.0
    slow = max(limited, calls * max(seconds) / len(seconds))
    fast = max(limited, calls * sum(seconds) / len(seconds) / in_flight)
    return min(fast, slow), slow


def total_time(roles: Mapping[str, RoleEstimate]) -> tuple[float, float] | None:
    """Seconds for all roles: the slowest role if they overlap fully, and their sum if they do not overlap."""
    times = [role.time for role in roles.values() if role.time]
    return (max(fast for fast, _ in times), sum(slow for _, slow in times)) if times else None


def _run(
    config: BuildConfig, prompt_scan: Scan, chosen: Sequence[int], on_progress: Callable[..., None]
) -> tuple[dict[str, list[Tokens]], dict[str, list[float]]]:
    """Run the rows at the `chosen` indices. Returns by role the tokens of each row, and the seconds of each reply."""
    indices = set(chosen)
    prompts = [prompt for index, prompt in enumerate(_prompts(config, prompt_scan)) if index in indices]
    with lock_output(config.out) as output:
        check_resumable(config, output.folder, update=False)
        output.upload("recipe.json")
        with output.ledger(config.ledger_path) as ledger:
            keys = run_async(_ask(config, ledger, prompts, on_progress))
            paid = {role: [ledger.paid(keys[role][prompt.id]) for prompt in prompts] for role in config.models}
            seconds = {role: [s for p in prompts for s in ledger.seconds(keys[role][p.id])] for role in config.models}
            return paid, seconds


async def _ask(
    config: BuildConfig, ledger: Ledger, prompts: Sequence[Prompt], on_progress: Callable[..., None]
) -> Mapping[str, Mapping[str, set[str]]]:
    """Run the prompts. Returns the keys of their requests in the ledger by role and prompt id."""
    async with open_run(config, ledger, live=True) as run:
        keys: dict[str, defaultdict[str, set[str]]] = {role: defaultdict(set) for role in run.clients}
        for role, client in run.clients.items():
            client.keys = keys[role]
        rows_done = count()

        def on_row_done(_: object = None) -> None:
            on_progress(next(rows_done), run.clients)

        on_row_done()
        async with aclosing(run.outcomes(map(PromptRow, count(), prompts), on_row_done=on_row_done)) as outcomes:
            incomplete = Counter(
                [
                    f"{outcome.stage}.{outcome.reason}"
                    async for _, outcome in outcomes
                    if isinstance(outcome, Dropped)
                    and (outcome.failed or outcome.stage in (config.answerer, "stronger"))
                ]
            )
    if run.stop.error:
        raise run.stop.error
    if run.stop.reason == "interrupted":
        raise KeyboardInterrupt("every reply so far is kept; the same call goes on")
    if incomplete:
        reasons = ", ".join(f"{number} {reason}" for reason, number in incomplete.items())
        print_line(
            f"note: {incomplete.total()} of the probe's {len(prompts)} rows ended before every role had answered "
            f"({reasons}); if other rows do not end early, this estimate is too low"
        )
    return keys


def estimate_role(
    price: Price | None, calls: int, sizes: Sequence[int], chosen: Sequence[int], paid: Sequence[Tokens]
) -> RoleEstimate:
    """Estimate a role's total over rows of these sizes from the tokens of at least 3 rows.

    `chosen` are the indices of those rows, in any order; `paid` are their tokens, in ascending order of the indices.
    """
    x = [sizes[index] for index in sorted(chosen)]
    cost = None
    if price:
        cost = _total(sizes, x, [float(price.cost(tokens)) for tokens in paid])
    prompt, completion = (_total(sizes, x, [float(tokens[i]) for tokens in paid]) for i in (0, 1))
    return RoleEstimate(calls, prompt, completion, cost)


def _discounted(price: Price, model: ModelConfig) -> Price:
    share = discounted_share(model.batching.discount if model.batching else 0.0)
    return Price(input=price.input * share, output=price.output * share)


def _total(sizes: Sequence[int], x: Sequence[float], y: Sequence[float]) -> Range:
    """The sum of y over all rows by weighted least squares on their sizes, with a t interval on len(x) - 2 degrees.

    The standard deviation of a row is assumed to be proportional to its size.
    """
    n, k = len(sizes), len(x)
    if n == k:
        return Range(sum(y), sum(y), sum(y))
    weights = [(size + _COMMON) ** -2 for size in x]
    weight = sum(weights)
    mean_x, mean_y = (sum(w * v for w, v in zip(weights, values, strict=True)) / weight for values in (x, y))
    spread = sum(w * (a - mean_x) ** 2 for w, a in zip(weights, x, strict=True))
    joint = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True))
    slope = joint / spread if spread else 0.0
    distance = sum(sizes) / n - mean_x
    value = n * (mean_y + slope * distance)
    residual = sum(w * (b - mean_y - slope * (a - mean_x)) ** 2 for w, a, b in zip(weights, x, y, strict=True))
    line_variance = n * n * (1 / weight + (distance**2 / spread if spread else 0.0))
    row_variance = sum((size + _COMMON) ** 2 for size in sizes)
    half = t_quantile(0.975, k - 2) * math.sqrt(residual / (k - 2) * (line_variance + row_variance))
    return Range(value, max(0.0, value - half), value + half)


def sample_by_size(sizes: Sequence[int], probe: int) -> list[int]:
    """The indices of `probe` rows at even steps through the bytes of all rows, shortest row first; each row once."""
    order = sorted(range(len(sizes)), key=lambda index: (sizes[index], index))
    k = min(probe, len(order))
    step = (sum(sizes) + _COMMON * len(sizes)) / k
    chosen: list[int] = []
    passed = 0
    for index in order:
        passed += sizes[index] + _COMMON
        if passed >= (len(chosen) + 0.5) * step and len(chosen) < k:
            chosen.append(index)
    # A row larger than a step is chosen once for all its steps: the next largest rows fill the sample.
    remaining = (index for index in reversed(order) if index not in set(chosen))
    return [*chosen, *islice(remaining, k - len(chosen))]


def _prompts(config: BuildConfig, prompt_scan: Scan) -> Iterator[Prompt]:
    """The prompts of which a build makes pairs."""
    prompts = each_prompt(config.prompts, config.limit, prompt_scan)
    return (prompt for prompt, skip_reason in prompts if skip_reason is None)


def _size(prompt: Prompt) -> int:
    answers = "".join((prompt.answer or "", *prompt.answers))
    return max_billed_tokens({"messages": prompt.messages}).prompt + len(answers.encode("utf-8", "replace"))


def _replies(config: BuildConfig, role: str, prompt: Prompt) -> int:
    """Count the replies of a role for a prompt if each can be parsed and no answer drops the row."""
    judged = config.pipeline == "judged"
    if role in config.answerers:
        ready = (judged and prompt.answers) or (role == config.answerer and prompt.answer is not None)
        return 0 if ready else config.samples if judged else 1
    if role == "stronger":
        return int(prompt.stronger is None)
    answers = len(prompt.answers) or config.samples * len(config.answerers)
    if role in config.score_judges:
        return answers
    if config.judge and role == "judge":
        scores_decide = prompt.scores and not any(map(math.isnan, prompt.scores))
        return 0 if scores_decide else math.comb(answers, 2) * (2 if config.judge.order == "both" else 1)
    return 1


def _max_calls_per_reply(config: BuildConfig, role: str) -> int:
    """The maximum of calls for one reply: with a repetition, and in the edit mode the same for the whole text."""
    model = config.models[role]
    edits = isinstance(model, ReviserConfig) and model.mode == "edits"
    return (1 + getattr(model, "ask_again", False)) * (1 + edits)


def expected_replies(config: BuildConfig, prompt_scan: Scan) -> dict[str, int]:
    """The expected replies of a build by role, if each can be parsed and no row is dropped.

    A scan does not know how many ready answers a row has: a judge's replies are counted as for sampled answers.
    """
    provided = prompt_scan.compared if config.pipeline == "judged" else prompt_scan.answered
    rows = prompt_scan.held * prompt_scan.unique / max(1, prompt_scan.rows)
    provided_by_role = dict.fromkeys(config.answerers, provided) | {"stronger": prompt_scan.preferred}
    rows_to_request = {
        role: rows * (1 - count / max(1, prompt_scan.unique)) for role, count in provided_by_role.items()
    }
    empty = Prompt("empty", ())
    return {role: math.ceil(rows_to_request.get(role, rows) * _replies(config, role, empty)) for role in config.models}


def total_cost(roles: Mapping[str, RoleEstimate]) -> Range | None:
    """The cost of all roles that have a price, or None. Interval ends add up, as if the errors of roles correlated."""
    costs = [role.cost for role in roles.values() if role.cost]
    return Range(*(sum(getattr(c, n) for c in costs) for n in ("value", "lo", "hi"))) if costs else None
