"""Tables, diffs and progress in a terminal. User text is never read as markup."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from clair.core.progress import CompletionRate, duration, format_rate, progress
from clair.data.contrast import word_diff
from clair.data.dataset import DatasetWriter, read_manifest
from clair.data.dataset_card import balance_text, scores_texts
from clair.data.records import task_text
from clair.inference.client import ModelClient
from clair.inference.endpoint_check import Check
from clair.pipeline.estimate import Range, RoleEstimate, total_cost, total_time
from clair.prompting.calls import with_calls
from clair.storage.location import Location

_SIGNS = {True: "ok", False: "WRONG", None: "?"}
_STYLES = {"same": "", "gone": "red strike", "new": "green"}


def summary(folders: Sequence[str | Path]) -> Table:
    """A table of counts, drop reasons, contrast and tokens, with one column per dataset folder or URL."""
    manifests = [read_manifest(folder) for folder in folders]
    table = Table("", *(Location(folder).public for folder in folders))
    columns = [dict(_summary_lines(manifest)) for manifest in manifests]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    return table


def _summary_lines(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    counts = manifest["counts"]
    yield "prompts", str(counts["prompts"])
    yield "pairs", f"{counts['pairs']} ({counts['train']} train, {counts['test']} test)"
    yield "dropped", str(counts["dropped"])
    for reason, count in manifest["drop_reasons"].items():
        yield f"  {reason}", str(count)
    for name, value in manifest["contrast"].items():
        yield name, f"{value:.3f}"
    if position := manifest.get("position"):
        lo, hi = position["ci95"]
        verdict = "BIASED: do not trust these labels" if position["biased"] else "no position bias detected"
        yield "judge prefers first", f"{position['share_first']:.0%} [{lo:.0%}, {hi:.0%}] ({verdict})"
    if texts := scores_texts(manifest):
        yield "scores", "; ".join(texts)
    if balance := manifest.get("balance"):
        yield "length", balance_text(balance)
    for role, tokens in manifest["tokens"].items():
        yield f"{role} calls", f"{tokens['calls']} ({tokens['reused']} reused, {tokens['retries']} retries)"
        yield f"{role} tokens", f"{tokens['prompt']} in, {tokens['completion']} out"


def pair_panel(row: Mapping[str, Any]) -> Panel:
    """A panel of one pair: the task, the word diff from rejected to chosen, and the contrast."""
    diff = Text()
    turns = (row[side][-1] for side in ("rejected", "chosen"))
    for kind, text in word_diff(*(with_calls(turn["content"] or "", turn.get("tool_calls") or ()) for turn in turns)):
        diff.append(text, style=_STYLES[kind])
    numbers = "  ".join(f"{name} {value:.2f}" for name, value in row["contrast"].items())
    task = Text(task_text(row["prompt"]), style="bold")
    return Panel(Group(task, Text(), diff, Text(numbers, style="dim")), title=Text(row["id"]))


def cost_table(roles: Mapping[str, RoleEstimate]) -> Table:
    """A table of calls, tokens, money and time of a build by role; tokens and money with 95 % intervals."""
    cost, time = total_cost(roles), total_time(roles)
    table = Table("role", "calls at most", "tokens in", "tokens out", "cost", *(["time"] if time else []))
    for role, estimate in roles.items():
        ranges = map(_range, (estimate.prompt, estimate.completion, estimate.cost))
        table.add_row(role, str(estimate.max_calls), *ranges, *([_times(estimate.time)] if time else []))
    if cost or time:
        table.add_row("all", "", "", "", _range(cost) if cost else "", *([_times(time)] if time else []))
    return table


def _times(seconds: tuple[float, float] | None) -> str:
    if seconds is None:
        return "?"
    shortest, longest = map(duration, seconds)
    return shortest if shortest == longest else f"{shortest} to {longest}"


def _range(estimate: Range | None) -> str:
    if estimate is None:
        return "?"
    digits = 0 if estimate.value >= 100 else 2 if estimate.value >= 1 else 4
    return f"{estimate.value:,.{digits}f} [{estimate.lo:,.{digits}f}, {estimate.hi:,.{digits}f}]"


def checks_table(checks: Mapping[str, Sequence[Check]]) -> Table:
    """A table of endpoint checks, one row each; `checks` by URL."""
    table = Table("endpoint", "check", "", "found")
    for url, url_checks in checks.items():
        for check in url_checks:
            table.add_row(url, check.name, _SIGNS[check.ok], check.message)
    return table


class OnClientProgress(Protocol):
    """Report the rows that are done, the clients by role, and a note to show above their lines."""

    def __call__(self, rows: int, clients: Mapping[str, ModelClient], note: str = "", /) -> None: ...


@contextmanager
def client_progress(
    title: str, total: int, calls: Mapping[str, int], *, shown: bool = True, closing: bool = False
) -> Iterator[OnClientProgress]:
    """Show the progress of work that calls models: rows done, and for each role its replies, requests and time left.

    `calls` is the expected number of replies of each role over all `total` rows. Yields the function to call at every
    change.
    """
    status = _ClientStatus(total, calls)
    with progress(
        title, total, details=status.lines, seconds_left=status.seconds_left, shown=shown, closing=closing
    ) as display:

        def update(rows: int, clients: Mapping[str, ModelClient], note: str = "", /) -> None:
            status.update(rows, clients, note)
            display.update(rows)

        yield update


class _ClientStatus:
    """The status lines of model clients. The display reads them from another thread."""

    def __init__(self, total: int, calls: Mapping[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.calls, self._clock = total, calls, clock
        self.rows, self.note = 0, ""
        self.clients: Mapping[str, ModelClient] = {}
        self._rates: dict[str, CompletionRate] = {}
        self._lock = threading.Lock()

    def update(self, rows: int, clients: Mapping[str, ModelClient], note: str = "") -> None:
        """Set the rows that are done and the clients. The rate of a role is measured from its first update."""
        self.rows, self.note = rows, note
        for role in clients:
            self._rate(role, clients[role])
        self.clients = clients

    def lines(self) -> list[str]:
        """The note, if any, and a line for each role."""
        return [*([self.note] if self.note else ()), *(self._line(role) for role in self.clients)]

    def seconds_left(self) -> float | None:
        """Seconds until the slowest role is done; None while a role has no rate yet."""
        by_role = [self._seconds_left(role) for role in self.clients]
        return max((left for left in by_role if left is not None), default=None) if None not in by_role else None

    def _line(self, role: str) -> str:
        client, left = self.clients[role], self._seconds_left(role)
        tally, rate = client.total, self._rate(role, client)
        replies = tally.calls + tally.reused
        items = [f"{replies:,}/{max(self.calls[role], replies):,} replies"]
        items += [f"{tally.reused:,} of them reused"] if tally.reused else []
        items += [f"{client.limiter.in_flight:,} in flight"] if not client.batch else []
        items += [f"{client.batch.in_batches:,} in batches"] if client.batch else []
        items += [pace] if (pace := format_rate(rate.per_second(self._clock()))) else []
        items += [f"about {duration(left)} left"] if left else []
        items += [reason] if (reason := client.wait_reason) else []
        return f"{role}: {', '.join(items)}"

    def _rate(self, role: str, client: ModelClient) -> CompletionRate:
        with self._lock:
            now = self._clock()
            rate = self._rates.setdefault(role, CompletionRate(now, client.total.calls))
            rate.add(now, client.total.calls)
            return rate

    def _seconds_left(self, role: str) -> float | None:
        """Seconds until the role is done. A row that is done needs no more replies, whatever was expected of it."""
        tally, calls = self.clients[role].total, self.calls[role]
        rows_left = max(0, self.total - self.rows)
        remaining = min(calls - tally.calls - tally.reused, rows_left * -(-calls // max(1, self.total)))
        return self._rate(role, self.clients[role]).seconds_left(self._clock(), remaining)


@contextmanager
def build_progress(
    total: int, calls: Mapping[str, int], *, shown: bool = True
) -> Iterator[Callable[[DatasetWriter, Mapping[str, ModelClient]], None]]:
    """Show the progress of a build. Yields the function to call at every change with the writer and the clients."""
    with client_progress("building", total, calls, shown=shown, closing=shown) as update:
        # The count can fall: a build that waits for batches passes over its prompts more than once.
        yield lambda writer, clients: update(writer.finished, clients, _rows(writer))


def _rows(writer: DatasetWriter) -> str:
    ahead = f", {writer.waiting:,} done before their turn" if writer.waiting else ""
    return f"{writer.pairs:,} pairs, {writer.counts['dropped']:,} dropped{ahead}"


@contextmanager
def shards_progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """Show the progress of a build in shards. Yields the function to call with the rows that are done and a message."""
    lines: list[str] = []
    with progress("building", total, details=lambda: lines, closing=True) as display:

        def update(rows: int, message: str) -> None:
            lines[:] = [message]
            display.update(rows)

        yield update
