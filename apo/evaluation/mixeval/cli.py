"""What `apo eval mixeval` does with its settings, for one model or several, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from apo.console import end_early, tell
from apo.evaluation.config import public
from apo.evaluation.mixeval.checkpoints import apart, evaluate_each
from apo.evaluation.mixeval.config import Checked, MixEvalConfig, check
from apo.evaluation.mixeval.run import Evaluated, evaluate, work_items
from apo.evaluation.results import read_results
from apo.evaluation.tables import score_table
from clair.core.console import show as print_
from clair.core.errors import EXIT_SOME_FAILED
from clair.terminal import client_progress


def run_one(config: MixEvalConfig, checked: Checked) -> None:
    """Evaluate one model, and print its score."""
    total = len(work_items(config, checked))
    with client_progress("evaluating", total, dict.fromkeys(config.models, total), closing=True) as on_progress:
        done = evaluate(config, checked=checked, on_progress=on_progress)
    _end_early(done)
    _print_score(config, done)
    _end_unanswered([done])


def run_many(
    config: MixEvalConfig, models: list[Any], runner: str | None, address: str | None, *, dry_run: bool
) -> None:
    """Evaluate several models, here or on a cluster, and print their scores in the order they were named."""
    work = [(one, check(one)) for one in apart(config, [model or {} for model in models])]
    for note in work[0][1].benchmark.notes:
        tell(f"note: {note}")
    if dry_run:
        for number, one in enumerate(work):
            print("---\n" * bool(number), end="")
            print_settings(*one)
        return
    rows = {one.out: len(work_items(one, checked)) for one, checked in work}
    finished: dict[str, Evaluated] = {}
    calls = dict.fromkeys(work[0][0].models, max(rows.values()))
    with client_progress("evaluating", sum(rows.values()), calls, closing=True) as bar:
        evaluations = evaluate_each(
            work,
            ray=runner == "ray",
            address=address,
            on_progress=lambda done, clients: bar(sum(rows[out] for out in finished) + done, clients),
        )
        for one, done in evaluations:
            _end_early(done)
            finished[one.out] = done
    for one, _ in work:
        _print_score(one, finished[one.out])
    _end_unanswered(list(finished.values()))
    if len(rows) > 1:
        print_(f"are they better than the first? apo compare {' '.join(rows)}")


def print_settings(config: MixEvalConfig, checked: Checked) -> None:
    """The settings as a dry run shows them."""
    import yaml

    print(yaml.safe_dump(public(config), sort_keys=False, allow_unicode=True), end="")
    rows = checked.benchmark.all_rows
    questions = len({row.question for row in rows})
    print(f"# {len(rows):,} rows, {questions:,} different questions, {len(work_items(config, checked)):,} answers")


def _end_early(done: Evaluated) -> None:
    failed = (
        f"{done.failed} items got no reply ({done.first_failure}), so there is no score; everything else is kept, "
        f"run the same command again"
    )
    end_early(done.stopped, failed if done.score is None else None)


def _end_unanswered(evaluated: Sequence[Evaluated]) -> None:
    """End the command where a server refused items for good: code 3, after everything else is told."""
    refused = [(done, done.score.unanswered) for done in evaluated if done.score and done.score.unanswered]
    for done, count in refused:
        tell(
            f"{done.out}: {count} items were refused ({done.refused}), so there is no score, only its bracket: all of "
            f"them wrong, all right; run the same command again to ask for them again"
        )
    if refused:
        raise typer.Exit(EXIT_SOME_FAILED)


def _print_score(config: MixEvalConfig, done: Evaluated) -> None:
    results = read_results(config.out)
    print_(score_table(results))
    if done.requests:
        told = "equal requests share a reply" if done.score.shared_judgements else "each asked for by itself"
        print_(f"{len(results.items):,} judgements from {done.requests:,} requests; {told}")
    if done.score.fallbacks:
        print_(f"{done.score.fallbacks} items have a RANDOM score, as upstream gives where there is no verdict")
