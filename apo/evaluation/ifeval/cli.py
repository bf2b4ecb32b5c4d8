"""Run `apo eval ifeval` with checked settings, for one model or several, and print the scores."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from apo.console import end_without_result, print_line
from apo.evaluation.checkpoints import configs_by_model
from apo.evaluation.config import print_settings
from apo.evaluation.ifeval.config import IFEvalConfig, IFEvalInputs, load_inputs
from apo.evaluation.ifeval.run import evaluate, work_items
from apo.evaluation.results import read_results
from apo.evaluation.tables import score_table
from clair.core.console import show as print_
from clair.core.errors import EXIT_SOME_FAILED
from clair.terminal import client_progress


def evaluate_models(config: IFEvalConfig, folders: Sequence[str], *, dry_run: bool) -> None:
    """Evaluate the models in `folders` one after another, or the model of the config if there are fewer than two."""
    configs = configs_by_model(config, folders) if len(folders) > 1 else [config]
    work = [(model_config, load_inputs(model_config)) for model_config in configs]
    if dry_run:
        for number, item in enumerate(work):
            print("---\n" * bool(number), end="")
            _print_plan(*item)
        return
    refused = [_run_single(*item) for item in work]
    if len(work) > 1:
        print_(f"are they better than the first? apo compare {' '.join(each.out for each in configs)}")
    if any(refused):
        raise typer.Exit(EXIT_SOME_FAILED)


def _run_single(config: IFEvalConfig, inputs: IFEvalInputs) -> bool:
    """Evaluate one model, and print its score. Returns True if its server refused prompts for good."""
    total = len(work_items(config, inputs))
    with client_progress("evaluating", total, dict.fromkeys(config.models, total), closing=True) as on_progress:
        outcome = evaluate(config, inputs=inputs, on_progress=on_progress)
    end_without_result(outcome, outcome.score, "prompts", "score")
    assert outcome.score is not None, "an outcome without a score ends the command"
    print_(score_table(read_results(config.out)))
    score = outcome.score
    if missing := score.unresolved_reasons.get("answer_missing"):
        print_line(f"{missing} of {len(inputs.rows)} prompts have no answer in {config.responses}: they count as wrong")
    if score.truncated:
        print_line(f"{score.truncated} of {score.items} answers reached the token limit; they are scored as they are")
    if score.unanswered:
        print_line(
            f"{config.out}: {score.unanswered} prompts were refused ({outcome.refused}), so there is no score, only "
            f"its bracket: all of them wrong, all right; run the same command again to ask for them again"
        )
    return bool(score.unanswered)


def _print_plan(config: IFEvalConfig, inputs: IFEvalInputs) -> None:
    print_settings(config)
    instructions = sum(len(row.instructions) for row in inputs.rows)
    print(f"# {len(inputs.rows):,} prompts, {instructions:,} instructions, {len(work_items(config, inputs)):,} answers")
