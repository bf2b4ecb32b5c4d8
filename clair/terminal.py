"""What a person sees in a terminal: tables, diffs and the progress of a build. User text is never read as markup."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from clair.core.progress import Rate, duration, pace_of, progress
from clair.data.contrast import word_diff
from clair.data.dataset import DatasetWriter, read_manifest
from clair.data.records import task_text
from clair.inference.client import ModelClient
from clair.inference.endpoint_check import Check
from clair.pipeline.estimate import Range, RoleEstimate, total_cost, total_time
from clair.storage.object_store import public_path

_SIGNS = {True: "ok", False: "WRONG", None: "?"}
_STYLES = {"same": "", "gone": "red strike", "new": "green"}


def summary(folders: Sequence[str | Path]) -> Table:
    """Counts, drop reasons, contrast and tokens of dataset folders or URLs, a column each."""
    manifests = [read_manifest(folder) for folder in folders]
    table = Table("", *(public_path(str(folder)) for folder in folders))
    lines = [dict(_summary_lines(manifest)) for manifest in manifests]
    for name in dict.fromkeys(name for line in lines for name in line):
        table.add_row(name, *(line.get(name, "") for line in lines))
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
        told = "BIASED: do not trust these labels" if position["biased"] else "no position bias seen"
        yield "judge prefers first", f"{position['share_first']:.0%} [{lo:.0%}, {hi:.0%}] ({told})"
    for role, tokens in manifest["tokens"].items():
        yield f"{role} calls", f"{tokens['calls']} ({tokens['reused']} reused, {tokens['retries']} retries)"
        yield f"{role} tokens", f"{tokens['prompt']} in, {tokens['completion']} out"


def pair_panel(row: Mapping[str, Any]) -> Panel:
    """One pair: the task, the way from loser to winner by words, and its contrast."""
    diff = Text()
    for kind, text in word_diff(row["rejected"][-1]["content"], row["chosen"][-1]["content"]):
        diff.append(text, style=_STYLES[kind])
    numbers = "  ".join(f"{name} {value:.2f}" for name, value in row["contrast"].items())
    task = Text(task_text(row["prompt"]), style="bold")
    return Panel(Group(task, Text(), diff, Text(numbers, style="dim")), title=Text(row["id"]))


def cost_table(roles: Mapping[str, RoleEstimate]) -> Table:
    """Calls, tokens and money of a build by role, each with its 95 % interval; and time, from the least to the most."""
    cost, time = total_cost(roles), total_time(roles)
    table = Table("role", "calls at most", "tokens in", "tokens out", "cost", *(["time"] if time else []))
    for role, told in roles.items():
        ranges = (_range(part) for part in (told.prompt, told.completion, told.cost))
        table.add_row(role, str(told.max_calls), *ranges, *([_times(told.time)] if time else []))
    if cost or time:
        table.add_row("all", "", "", "", _range(cost) if cost else "", *([_times(time)] if time else []))
    return table


def _times(part: tuple[float, float] | None) -> str:
    if part is None:
        return "?"
    shortest, longest = map(duration, part)
    return shortest if shortest == longest else f"{shortest} to {longest}"


def _range(part: Range | None) -> str:
    if part is None:
        return "?"
    digits = 0 if part.value >= 100 else 2 if part.value >= 1 else 4
    return f"{part.value:,.{digits}f} [{part.lo:,.{digits}f}, {part.hi:,.{digits}f}]"


def checks_table(checks: Mapping[str, Sequence[Check]]) -> Table:
    """What was found at each endpoint, a row each."""
    table = Table("endpoint", "check", "", "found")
    for url, found in checks.items():
        for check in found:
            table.add_row(url, check.name, _SIGNS[check.ok], check.told)
    return table


@contextmanager
def asking_progress(
    what: str, total: int, calls: Mapping[str, int], *, shown: bool = True, closing: bool = False
) -> Iterator[Callable[[int, Mapping[str, ModelClient], str], None]]:
    """How far work is that asks models: rows done, and for each role replies, requests in flight and time left.

    `calls` are the replies of each role that all rows need, about. Yields the function that takes the rows done, the
    clients, and more words; it is called where one of them changes.
    """
    asking = _Asking(total, calls)
    with progress(what, total, details=asking.lines, left=asking.left, shown=shown, closing=closing) as work:

        def update(done: int, clients: Mapping[str, ModelClient], words: str = "") -> None:
            asking.update(done, clients, words)
            work.update(done)

        yield update


class _Asking:
    """What clients are at, in lines: looked at whenever a line is wanted, from another thread than theirs."""

    def __init__(self, total: int, calls: Mapping[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.calls, self._clock = total, calls, clock
        self.done, self.words = 0, ""
        self.clients: Mapping[str, ModelClient] = {}
        self._rates: dict[str, Rate] = {}
        self._lock = threading.Lock()

    def update(self, done: int, clients: Mapping[str, ModelClient], words: str = "") -> None:
        """Rows done, and who is asked; the clock of each role's rate starts where it is first seen."""
        self.done, self.words = done, words
        for role in clients:
            self._rate(role, clients[role])
        self.clients = clients

    def lines(self) -> list[str]:
        """The words there are, and a line for each role."""
        return [*([self.words] if self.words else ()), *(self._line(role) for role in self.clients)]

    def left(self) -> float | None:
        """Seconds until the slowest role is through; None while one of them has not begun."""
        each = [self._left(role) for role in self.clients]
        return max((left for left in each if left is not None), default=None) if None not in each else None

    def _line(self, role: str) -> str:
        client, left = self.clients[role], self._left(role)
        tally, rate = client.told, self._rate(role, client)
        parts = [f"{tally.calls + tally.reused:,}/{max(self.calls[role], tally.calls + tally.reused):,} replies"]
        parts += [f"{tally.reused:,} of them reused"] if tally.reused else []
        parts += [f"{client.limiter.in_flight:,} in flight"] if not client.batch else []
        parts += [f"{client.batch.in_batches:,} in batches"] if client.batch else []
        parts += [words] if (words := pace_of(rate.a_second(self._clock()))) else []
        parts += [f"about {duration(left)} left"] if left else []
        parts += [words] if (words := client.waiting_for) else []
        return f"{role}: {', '.join(parts)}"

    def _rate(self, role: str, client: ModelClient) -> Rate:
        with self._lock:
            now = self._clock()
            rate = self._rates.setdefault(role, Rate(now, client.told.calls))
            rate.add(now, client.told.calls)
            return rate

    def _left(self, role: str) -> float | None:
        """A row that is done needs no more replies, whatever was expected of it."""
        tally, calls = self.clients[role].told, self.calls[role]
        rows_left = max(0, self.total - self.done)
        remaining = min(calls - tally.calls - tally.reused, rows_left * -(-calls // max(1, self.total)))
        return self._rate(role, self.clients[role]).left(self._clock(), remaining)


@contextmanager
def build_progress(
    total: int, calls: Mapping[str, int]
) -> Iterator[Callable[[DatasetWriter, Mapping[str, ModelClient]], None]]:
    """The same of a build; yields what it calls with every row."""
    with asking_progress("building", total, calls, closing=True) as update:
        # A build that waits for batches goes through its prompts again, and what is done with it.
        yield lambda writer, clients: update(writer.done, clients, _rows(writer))


def _rows(writer: DatasetWriter) -> str:
    waiting = f", {writer.ahead:,} done before their turn" if writer.ahead else ""
    return f"{writer.pairs:,} pairs, {writer.counts['dropped']:,} dropped{waiting}"


@contextmanager
def shards_progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """The same of a build in shards; the function takes the rows that are done, and words."""
    words: list[str] = []
    with progress("building", total, details=lambda: words, closing=True) as work:

        def update(rows: int, told: str) -> None:
            words[:] = [told]
            work.update(rows)

        yield update
