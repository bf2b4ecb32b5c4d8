"""What a person sees in a terminal: tables, diffs and the progress of a build. User text is never read as markup."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from clair.contrast import word_diff
from clair.dataset import read_manifest
from clair.endpoint import Check
from clair.estimate import Range, RoleEstimate, total_cost
from clair.prompts import task_text
from clair.storage import public_path

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
    """Calls, tokens and money of a build by role, each with its 95 % interval."""
    table = Table("role", "calls at most", "tokens in", "tokens out", "cost")
    for role, told in roles.items():
        table.add_row(role, str(told.most_calls), *(_range(part) for part in (told.prompt, told.completion, told.cost)))
    total = total_cost(roles)
    if total:
        table.add_row("all", "", "", "", _range(total))
    return table


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


def show(what: Any) -> None:
    """Print text or a table; brackets in text stay brackets."""
    Console(markup=False, highlight=False, soft_wrap=isinstance(what, str)).print(what)


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[Any, Mapping[str, Any]], None]]:
    """A bar on stderr; yields the function that a build calls after every row."""
    with shards_bar(total) as tell_rows:

        def tell(writer: Any, askers: Mapping[str, Any]) -> None:
            flying = sum(asker.limiter.in_flight for asker in askers.values())
            told = f"{writer.pairs} pairs, {writer.counts['dropped']} dropped, {flying} in flight"
            batched = sum(asker.batch.in_batches for asker in askers.values() if asker.batch)
            told += f", {batched} in batches" if batched else ""
            # A build that waits for batches goes through its prompts again, and the bar with it.
            tell_rows(writer.pairs + writer.counts["dropped"], told)

        yield tell


@contextmanager
def shards_bar(total: int) -> Iterator[Callable[[int, str], None]]:
    """The same for a build in shards; the function takes the rows that are done, and words."""
    numbers = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[told]}"))
    with Progress(TextColumn("building"), *numbers, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, told="")
        yield lambda rows, told: progress.update(task, completed=rows, told=told)
