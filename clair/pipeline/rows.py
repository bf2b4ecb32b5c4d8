"""Run rows through model clients: concurrently and in order, until all are done or the run stops.

Open the clients with `running_clients` (evaluations: `evaluation_clients`), then:

    async def run_row(row: Row) -> Result:
        reply = await clients["model"].complete(messages, row=row.id)  # raises Dropped if this row gets no reply
        return Result(reply)

    async with aclosing(run_rows(run_row, rows, clients, stop)) as outcomes:
        async for row, outcome in outcomes:
            ...  # `outcome` is what `run_row` returned, or the Dropped or Pending that it raised

`apo.evaluation.rows.collect_results` is the loop of evaluations: it counts failures and reports progress.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from itertools import chain
from typing import TypeVar

from clair.data.records import Dropped
from clair.inference.batch_service import Pending
from clair.inference.client import ModelClient, Stopped, StopSignal
from clair.inference.local import LocalModel

Row = TypeVar("Row")
Result = TypeVar("Result")


async def run_rows(
    run_row: Callable[[Row], Awaitable[Result]],
    rows: Iterable[Row],
    clients: Mapping[str, ModelClient],
    stop: StopSignal,
    *,
    max_begun: float = math.inf,
    on_row_done: Callable[[Result | Dropped | Pending], None] = lambda _: None,
) -> AsyncGenerator[tuple[Row, Result | Dropped | Pending]]:
    """Yield (row, outcome) of each row, in the order of `rows`. Ends early if the run stops; `stop` has the reason.

    At most `max_begun` rows are begun and not yet yielded. Without it all rows begin at once, so that a local model
    forms its batches from all requests; if the run stops, those that are in no batch yet are abandoned.
    `on_row_done` is called when a row is done, which may be long before its outcome is yielded.

    However the iteration ends, the requests in flight, which are paid for, are awaited. Any other exception of
    `run_row` (an unwritable ledger, a bug) stops the run, so that no other row spends money, and is raised.
    """

    async def outcome_of(row: Row) -> tuple[Row, Result | Dropped | Pending | Stopped]:
        try:
            outcome = await run_row(row)
        except Stopped as stopped:
            return row, stopped
        except (Dropped, Pending) as raised:
            outcome = raised
        except Exception as error:
            stop.request(str(error), error)
            raise
        on_row_done(outcome)
        return row, outcome

    async def drain() -> None:
        stop.request("no more rows are needed")
        for client in clients.values():
            if max_begun == math.inf and isinstance(client.model, LocalModel):
                client.model.abandon()
        await asyncio.gather(*(client.drain() for client in clients.values()))

    async with aclosing(_map_ordered(outcome_of, rows, max_begun, stop.requested, drain)) as outcomes:
        async for row, outcome in outcomes:
            if isinstance(outcome, Stopped):
                return
            yield row, outcome


async def _map_ordered(
    work: Callable[[Row], Awaitable[Result]],
    rows: Iterable[Row],
    max_begun: float,
    stopped: asyncio.Event,
    drain: Callable[[], Awaitable[None]],
) -> AsyncGenerator[Result]:
    """Run `work` on the rows concurrently and yield the results in the order of the rows.

    Ends early when `stopped` is set, even while the next result is pending. In any case `drain` is awaited before
    pending rows are cancelled.
    """
    pending: deque[asyncio.Future[Result]] = deque()
    stop = asyncio.ensure_future(stopped.wait())
    begun = (asyncio.ensure_future(work(row)) for row in rows)
    try:
        for task in chain(begun, (None,)):  # None: no row is left to begin
            if task:
                pending.append(task)
            while pending and (task is None or pending[0].done() or len(pending) >= max_begun):
                if not pending[0].done():
                    await asyncio.wait({pending[0], stop}, return_when=asyncio.FIRST_COMPLETED)
                if not pending[0].done():
                    return
                yield pending.popleft().result()
    finally:
        stop.cancel()
        if pending:
            await drain()
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
