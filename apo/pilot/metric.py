"""The user's metric: gains of pilots over the base on the same rows, by a judge, a checker or a benchmark.

The judge compares each pilot's answers with the base's, in both orders. Answers and verdicts go through the ledger of
the advice, so that nothing is paid for or generated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apo.advice.config import AdviseConfig
from apo.advice.judge_evidence import compare_answers, generate_answers
from apo.evaluation.compare.rows import pair_rows
from apo.evaluation.config import BenchmarkConfig, Outcome
from apo.evaluation.ifeval.config import IFEvalConfig
from apo.evaluation.mixeval.config import MixEvalConfig
from apo.evaluation.results import read_results
from apo.evaluation.rows import collect_results
from apo.evaluation.winrate.verdicts import prompt_key
from clair.core.errors import UserError
from clair.core.event_loop import run_async
from clair.core.recipe import load_recipe, parse_yaml
from clair.data.records import Answer, Dropped, Prompt
from clair.inference.budget import BudgetConfig
from clair.inference.client import StopSignal
from clair.inference.config import ModelConfig
from clair.inference.open import running_clients
from clair.ledger.ledger import Ledger
from clair.pipeline.checker import Checker
from clair.prompting.templates import JUDGE_NEEDS, load_template
from clair.storage.location import Location
from clair.terminal import client_progress

BASE = "base"
PILOT_SAMPLE = 1_000_004
"""The sample number of these answers. No build and no evidence uses it."""
METRICS = {
    "judge": "win rate against the base, minus one half",
    "checker": "score of the checker, minus the base's",
    "benchmark": "score of the benchmark, minus the base's",
}


@dataclass
class Gains:
    """The gain of each pilot over the base by row, and the rows' clusters; without rows if it ended early."""

    by_pilot: dict[str, list[float]] = field(default_factory=dict)
    clusters: list[str] = field(default_factory=list)
    left_out: int = 0
    """Rows without a score of every model."""
    failures: list[str] = field(default_factory=list)
    stopped: str | None = None


def metric_name(config: AdviseConfig) -> str:
    """The name of the metric: a key of `METRICS`. Raises UserError if the recipe has none, or two."""
    pilot = config.pilot
    assert pilot is not None
    if pilot.checker and pilot.benchmark:
        raise UserError("pilot: give a checker or a benchmark to choose by, not both")
    if pilot.benchmark and pilot.prompts:
        raise UserError("pilot.prompts would be ignored: the benchmark has its own; leave it out")
    if pilot.benchmark and config.budget:
        raise UserError(f"budget would not limit the benchmark; leave it out, and give {pilot.benchmark} one")
    name = "benchmark" if pilot.benchmark else "checker" if pilot.checker else "judge" if config.judge else None
    if name is None:
        raise UserError("pilot: nothing to choose by; give a judge, pilot.checker or pilot.benchmark")
    return name


def measure_gains(
    config: AdviseConfig, models: Mapping[str, str], prompts: Sequence[Prompt], log: Callable[[str], None]
) -> Gains:
    """The gains of all `models` but the first, the base: folders by name."""
    if metric_name(config) == "benchmark":
        return _by_benchmark(config, models)
    with Ledger(config.ledger_path) as ledger:
        return run_async(_by_answers(config, models, prompts, ledger, log))


# ---- answers to prompts


async def _by_answers(
    config: AdviseConfig,
    models: Mapping[str, str],
    prompts: Sequence[Prompt],
    ledger: Ledger,
    log: Callable[[str], None],
) -> Gains:
    gains, stop = Gains(), StopSignal()
    answers: dict[str, dict[str, str]] = {}
    for name, folder in models.items():
        answering = config.model_copy(
            update={"model": config.model.model_copy(update={"path": folder}), "judge": None, "pilot": None}
        )
        async with running_clients(answering, ledger, stop) as clients:
            log(f"{len(prompts)} answers of {name}")
            replies = await generate_answers(clients["model"], prompts, stop, gains.failures, PILOT_SAMPLE)
        answers[name] = {key: answer.text for key, answer in replies.items()}
        if _must_end(gains, stop):
            return gains
    answered = [prompt for prompt in prompts if all(prompt_key(prompt) in texts for texts in answers.values())]
    gains.left_out = len(prompts) - len(answered)
    if config.pilot and config.pilot.checker:
        await _score(Checker(config.pilot.checker), answered, answers, stop, gains)
    else:
        await _judge(config, answered, answers, ledger, stop, gains, log)
    _must_end(gains, stop)
    return gains


def _must_end(gains: Gains, stop: StopSignal) -> bool:
    if stop.error:
        raise stop.error
    gains.stopped = stop.reason
    return bool(gains.stopped or gains.failures)


async def _score(
    checker: Checker,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Mapping[str, str]],
    stop: StopSignal,
    gains: Gains,
) -> None:
    """Score the answers of all models to a prompt at once. A prompt that the checker drops is left out."""

    async def score(prompt: Prompt) -> list[float] | None:
        try:
            (scores,) = await checker.score(prompt, [Answer(texts[prompt_key(prompt)]) for texts in answers.values()])
        except Dropped as dropped:
            reasons.append(dropped.detail)
            return None
        return scores

    reasons: list[str] = []
    try:
        with client_progress("checking", len(prompts), {}) as on_progress:
            scored = await collect_results(score, prompts, {}, stop, failures=gains.failures, on_progress=on_progress)
    finally:
        await checker.close()
    rows = [(prompt, scores) for prompt, scores in zip(prompts, scored, strict=False) if scores is not None]
    if not rows and not stop.reason:
        raise UserError(f"pilot.checker gives no score of any answer: {reasons[0] if reasons else 'there is none'}")
    _add(gains, [prompt_key(p) for p, _ in rows], [[v - s[0] for v in s[1:]] for _, s in rows], list(answers)[1:])
    gains.left_out += len(prompts) - len(rows)


async def _judge(
    config: AdviseConfig,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Mapping[str, str]],
    ledger: Ledger,
    stop: StopSignal,
    gains: Gains,
    log: Callable[[str], None],
) -> None:
    """Let the judge compare each pilot's answers with the base's, in both orders."""
    assert config.judge is not None
    template = load_template(config.judge.template, "judge.j2", JUDGE_NEEDS)
    values: dict[str, dict[str, float | None]] = {}
    limits = (config.budget, config.concurrency, config.attempts, config.seed, config.out)
    async with running_clients(_JudgeOnly({"judge": config.judge}, *limits), ledger, stop) as clients:
        for name in list(answers)[1:]:
            log(f"the judge compares {len(prompts)} answers of {name} with the base's, in both orders")
            compared, run = await compare_answers(
                config, template, clients["judge"], stop, prompts, answers[BASE], answers[name]
            )
            gains.failures += run.failures
            if stop.reason or gains.failures:
                return
            values[name] = {prompt_key(comparison.prompt): comparison.value for comparison in compared}
    keys = [key for key in map(prompt_key, prompts) if all(by[key] is not None for by in values.values())]
    rows = [[(by[key] or 0.0) - 0.5 for by in values.values()] for key in keys]
    if not rows:
        raise UserError("the judge gives no readable verdict on any answer of the pilots; use another judge")
    _add(gains, keys, rows, list(values))
    gains.left_out += len(prompts) - len(keys)


@dataclass(frozen=True)
class _JudgeOnly:
    """The settings of the advice that a client of the judge alone needs."""

    models: Mapping[str, ModelConfig]
    budget: BudgetConfig | None
    concurrency: int
    attempts: int
    seed: int
    out: Location


def _add(gains: Gains, clusters: Sequence[str], rows: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    gains.clusters = list(clusters)
    gains.by_pilot = {name: [row[index] for row in rows] for index, name in enumerate(names)}


# ---- a benchmark


def benchmark_config(path: str) -> IFEvalConfig | MixEvalConfig:
    """The recipe of a benchmark, told apart by its key for the questions. Raises UserError."""
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"pilot.benchmark: {path} does not exist; give a recipe of `apo eval ifeval` or `apo eval mixeval`"
        )
    values = parse_yaml(file.read_text("utf-8"))
    kind = MixEvalConfig if isinstance(values, dict) and "data" in values else IFEvalConfig
    config = load_recipe(kind, path)
    if config.model is None or config.model.path is None:
        raise UserError(f"pilot.benchmark: {path} needs a local model, whose folder the pilots replace")
    return config


def _by_benchmark(config: AdviseConfig, models: Mapping[str, str]) -> Gains:
    """Evaluate each model with its part of the benchmark's budget, which is the same if the guard stops pilots."""
    assert config.pilot is not None
    assert config.pilot.benchmark is not None
    recipe, folders = benchmark_config(config.pilot.benchmark), []
    for name, folder in models.items():
        assert recipe.model is not None
        evaluation = recipe.model_copy(
            update={
                "model": recipe.model.model_copy(update={"path": folder}),
                "out": config.out / "answers" / name,
                "ledger": recipe.ledger or str(config.ledger_path),
                "budget": recipe.budget and recipe.budget.share(1 + config.pilot.count),
            }
        )
        outcome = _evaluate(evaluation, name)
        if outcome.stopped or outcome.failed:
            return Gains(failures=[outcome.first_failure] * outcome.failed, stopped=outcome.stopped)
        folders.append(Path(evaluation.out))
    rows = pair_rows([read_results(folder) for folder in folders])
    overall = rows if isinstance(recipe, MixEvalConfig) else [row for row in rows if row.split == rows[0].split]
    answered = [row for row in overall if row.answered]
    gains = Gains(left_out=len(overall) - len(answered))
    differences = [[score - row.scores[0] for score in row.scores[1:]] for row in answered]
    _add(gains, [row.cluster for row in answered], differences, list(models)[1:])
    return gains


def _evaluate(config: BenchmarkConfig, name: str) -> Outcome:
    from apo.evaluation.ifeval import config as ifeval_config
    from apo.evaluation.ifeval import run as ifeval
    from apo.evaluation.mixeval import config as mixeval_config
    from apo.evaluation.mixeval import run as mixeval

    if isinstance(config, IFEvalConfig):
        inputs = ifeval_config.load_inputs(config)
        total = len(ifeval.work_items(config, inputs))
        with client_progress(f"evaluating {name}", total, dict.fromkeys(config.models, total)) as on_progress:
            return ifeval.evaluate(config, inputs=inputs, on_progress=on_progress)
    assert isinstance(config, MixEvalConfig)
    mixeval_inputs = mixeval_config.load_inputs(config)
    total = len(mixeval.work_items(config, mixeval_inputs))
    with client_progress(f"evaluating {name}", total, dict.fromkeys(config.models, total)) as on_progress:
        return mixeval.evaluate(config, inputs=mixeval_inputs, on_progress=on_progress)
