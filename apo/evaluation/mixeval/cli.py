"""Run `apo eval mixeval` with checked settings, for one model or several, and print the scores."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from apo.console import end_without_result, print_line
from apo.evaluation.checkpoints import configs_by_model
from apo.evaluation.config import print_settings
from apo.evaluation.mixeval.checkpoints import evaluate_each
from apo.evaluation.mixeval.config import MixEvalConfig, MixEvalInputs, load_inputs
from apo.evaluation.mixeval.run import MixEvalOutcome, evaluate, work_items
from apo.evaluation.results import read_results
from apo.evaluation.tables import score_table
from clair.core.console import show as print_
from clair.core.errors import EXIT_SOME_FAILED
from clair.terminal import client_progress


def run_single(config: MixEvalConfig, inputs: MixEvalInputs) -> None:
    """Evaluate one model, and print its score."""
    total = len(work_items(config, inputs))
    with client_progress("evaluating", total, dict.fromkeys(config.models, total), closing=True) as on_progress:
        outcome = evaluate(config, inputs=inputs, on_progress=on_progress)
    end_without_result(outcome, outcome.score, "items", "score")
    _print_score(config, outcome)
    _end_unanswered([outcome])


def run_several(
    config: MixEvalConfig, folders: Sequence[str], runner: str | None, address: str | None, *, dry_run: bool
) -> None:
    """Evaluate several models, here or on a cluster, and print their scores in the order of the command line."""
    work = [(model_config, load_inputs(model_config)) for model_config in configs_by_model(config, folders)]
    for note in work[0][1].benchmark.notes:
        print_line(f"note: {note}")
    if dry_run:
        for number, model_config in enumerate(work):
            print("---\n" * bool(number), end="")
            print_plan(*model_config)
        return
    rows: dict[str, int] = {model_config.out: len(work_items(model_config, inputs)) for model_config, inputs in work}
    finished: dict[str, MixEvalOutcome] = {}
    calls = dict.fromkeys(work[0][0].models, max(rows.values()))
    with client_progress("evaluating", sum(rows.values()), calls, closing=True) as bar:
        evaluations = evaluate_each(
            work,
            ray=runner == "ray",
            address=address,
            on_progress=lambda outcome, clients: bar(sum(rows[out] for out in finished) + outcome, clients),
        )
        for model_config, outcome in evaluations:
            end_without_result(outcome, outcome.score, "items", "score")
            finished[model_config.out] = outcome
    for model_config, _ in work:
        _print_score(model_config, finished[model_config.out])
    _end_unanswered(list(finished.values()))
    if len(rows) > 1:
        print_(f"are they better than the first? apo compare {' '.join(rows)}")


def print_plan(config: MixEvalConfig, inputs: MixEvalInputs) -> None:
    """Print the settings and the size of the evaluation, for a dry run."""
    print_settings(config)
    rows = inputs.benchmark.all_rows
    questions = len({row.question for row in rows})
    print(f"# {len(rows):,} rows, {questions:,} different questions, {len(work_items(config, inputs)):,} answers")


def _end_unanswered(evaluated: Sequence[MixEvalOutcome]) -> None:
    """End the command where a server refused items for good: code 3, after everything else is told."""
    refused = [
        (outcome, outcome.score.unanswered) for outcome in evaluated if outcome.score and outcome.score.unanswered
    ]
    for outcome, count in refused:
        print_line(
            f"{outcome.out}: {count} items were refused ({outcome.refused}), so there is no score, "
            f"only its bracket: all "
            f"of them wrong, all right; run the same command again to ask for them again"
        )
    if refused:
        raise typer.Exit(EXIT_SOME_FAILED)


def _print_score(config: MixEvalConfig, outcome: MixEvalOutcome) -> None:
    assert outcome.score is not None, "an outcome without a score ends the command"
    results = read_results(config.out)
    print_(score_table(results))
    if outcome.requests:
        sharing = "equal requests share a reply" if outcome.score.shared_judgements else "each asked for by itself"
        print_(f"{len(results.items):,} judgements from {outcome.requests:,} requests; {sharing}")
    if outcome.score.fallbacks:
        print_(f"{outcome.score.fallbacks} items have a RANDOM score, as upstream gives where there is no verdict")
