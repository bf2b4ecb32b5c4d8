"""Collect the results of an evaluation's rows: in order, with failures listed and progress reported."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from itertools import count
from typing import TypeVar

from clair.data.records import Dropped
from clair.inference.batch_service import Pending
from clair.inference.client import ModelClient, StopSignal
from clair.pipeline.rows import run_rows

Row = TypeVar("Row")
Result = TypeVar("Result")
OnProgress = Callable[[int, Mapping[str, ModelClient]], None]


async def collect_results(
    run_row: Callable[[Row], Awaitable[Result]],
    rows: Iterable[Row],
    clients: Mapping[str, ModelClient],
    stop: StopSignal,
    *,
    failures: list[str],
    on_progress: OnProgress,
) -> list[Result]:
    """The results of `run_row` in the order of the rows; incomplete if the run stops or rows fail.

    A row that raises Dropped has failed; the reason is added to `failures`. Raise it only for what another run may
    cure (`is_transient`), and return a result for a request that is refused for good. `on_progress` gets the number
    of results so far: 0 at the start, then as rows finish, in any order.
    """
    counter = count()

    def on_row_done(outcome: Result | Dropped | Pending) -> None:
        if not isinstance(outcome, Dropped):
            on_progress(next(counter), clients)

    results: list[Result] = []
    on_progress(next(counter), clients)
    async with aclosing(run_rows(run_row, rows, clients, stop, on_row_done=on_row_done)) as outcomes:
        async for _, outcome in outcomes:
            assert not isinstance(outcome, Pending), "evaluations use no Batch API"
            if isinstance(outcome, Dropped):
                failures.append(f"{outcome.stage}: {outcome.detail}")
            else:
                results.append(outcome)
    return results
