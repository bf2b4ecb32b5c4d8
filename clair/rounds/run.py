"""Run rounds of build, train and evaluate until the stop rule ends them, and resume rounds that were interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from clair.core.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from clair.core.files import read_json, write_atomically, write_json
from clair.core.out_folder import check_out_folder, check_unchanged
from clair.core.progress import duration, print_line, progress
from clair.core.provenance import provenance
from clair.core.recipe import changed_keys, resolved
from clair.core.watched_process import GRACE_SECONDS, WatchedProcess
from clair.data.dataset import read_manifest
from clair.data.prompt_sources import each_prompt
from clair.pipeline.build import check_recipe
from clair.pipeline.estimate import estimate
from clair.pipeline.output_dir import lock_output
from clair.rounds.config import IterateConfig, read_recipes
from clair.rounds.phases import Phase, Rounds
from clair.rounds.results import PICTURE, RoundResult, best_model, draw_rounds, read_round, stop_reason

RECIPE, RESULT = "iterate.json", "rounds.json"
_DUMMY_PAIRS = 1000
_DUMMY_WORDS = 128
_DUMMY = f"with two answers of {_DUMMY_WORDS} words, {_DUMMY_PAIRS:,} prompts at most"


class PhaseEnded(UserError):
    """A command ended without a result. `exit_code` is the command's."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


class _RoundsEnd(PhaseEnded):
    """No further round follows."""


@dataclass(frozen=True, slots=True)
class IterateResult:
    """The finished rounds, why no further one follows, and the best model."""

    rounds: list[RoundResult]
    reason: str
    best: str
    exit_code: int = 0
    """`EXIT_STOPPED` if training stopped because a check failed, such as a guard."""


def open_rounds(config: IterateConfig) -> Rounds:
    """Read all recipes, and check that the output folder belongs to them. Raises UserError."""
    rounds, out = Rounds(config, read_recipes(config)), Path(config.out)
    check_out_folder(out, "folder of rounds", (RECIPE,))
    if (out / RECIPE).is_file():
        recorded, recipes = read_json(out / RECIPE), rounds.recipes.content(config)
        # Only a recipe that a complete phase has used must not change.
        phases = (phase for number in range(config.rounds + 1) for phase in rounds.phases(number))
        used = {phase.name for phase in phases if phase.is_complete}
        for name in recipes:
            if name in used or (used and name == "rounds"):
                changed = [f"{name}.{key}" for key in changed_keys(recorded[name], recipes[name])]
                check_unchanged(str(out), "rounds with another recipe", changed)
    return rounds


def iterate(rounds: Rounds) -> IterateResult:
    """Run all phases that are not complete. Raises PhaseEnded if a command ends without a result."""
    out = Path(rounds.config.out)
    with lock_output(out, GRACE_SECONDS):
        if not (out / RECIPE).is_file():
            check_rounds(rounds)
        write_json(out / RECIPE, rounds.recipes.content(rounds.config))
        results: list[RoundResult] = []
        reason, exit_code = None, 0
        try:
            for phase in rounds.phases(0):
                _run(phase, rounds)
            for number in range(1, rounds.config.rounds + 1):
                _run_round(rounds, number, results)
                results.append(read_round(rounds, number))
                _write(rounds, results, None)
                if reason := stop_reason(results[-1], rounds.config.stop):
                    break
        except _RoundsEnd as end:
            reason, exit_code = str(end), end.exit_code
        reason = reason or f"all {rounds.config.rounds} rounds are complete"
        _write(rounds, results, reason)
    return IterateResult(results, reason, best_model(results, rounds.model(0)), exit_code)


def _run_round(rounds: Rounds, number: int, earlier: list[RoundResult]) -> None:
    """Run the phases of a round. Raises _RoundsEnd if the build gave no pair, or if a check stopped the training."""
    if number > 1:
        rounds.prepare(number)
    for phase in rounds.phases(number):
        if phase.name == "train" and not read_manifest(rounds.folder(number) / "pairs")["counts"]["train"]:
            raise _RoundsEnd(f"round {number} gave no pair to train on", 0)
        took = earlier[-1].seconds.get(phase.name) if earlier else None
        _run(phase, rounds, f" ({duration(took)} in the previous round)" if took else "")


def _run(phase: Phase, rounds: Rounds, note: str = "") -> None:
    """Run a command that is not complete. It writes to our stdout and stderr, and ends if this process ends."""
    if phase.is_complete:
        return
    print_line(f"round {phase.round} of {rounds.config.rounds}, {phase.name}{note}: {phase.shown}")
    if phase.out.is_dir():  # the command of a killed run may hold the folder until it has ended
        with lock_output(phase.out, GRACE_SECONDS + 5):
            pass
    code = _wait(phase.command)
    if code in phase.allowed and phase.is_complete:
        return
    name = f"round {phase.round}, {phase.name}"
    if code == EXIT_INTERRUPTED:
        raise PhaseEnded(f"{name} was interrupted; run the same command to continue", code)
    if code == EXIT_STOPPED and phase.name == "train":
        stops = read_json(phase.result).get("stopped") if phase.result.is_file() else None
        raise _RoundsEnd(f"{name} stopped because a check failed: {stops[-1]['why'] if stops else 'see above'}", code)
    raise PhaseEnded(f"{name} ended with exit code {code}, see above; run the same command to continue", code or 1)


def _wait(command: tuple[str, ...]) -> int:
    """Run a command to its end and return its exit code. It receives our SIGINT (Ctrl-C) and SIGTERM."""
    process = WatchedProcess(command)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda received, _: process.send_signal(received)) for number in numbers]
    try:
        return process.wait()
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        process.stop()


def _write(rounds: Rounds, results: list[RoundResult], reason: str | None) -> None:
    """Write rounds.json and the plot. `reason` is None while a further round may follow."""
    out = Path(rounds.config.out)
    rows, best = [asdict(result) for result in results], best_model(results, rounds.model(0))
    if results:
        draw_rounds(results, out / PICTURE)
    values = {"format": 1, "rounds": rows, "ended": reason, "best": best, "recipe": resolved(rounds.config)}
    write_json(out / RESULT, values | provenance())


# ---- before any work


def check_rounds(rounds: Rounds) -> dict[str, list[str]]:
    """Check all recipes before any work. Returns what each `apo` command notes on its cost, by phase.

    Training is planned on dummy pairs: each prompt of the build with two answers of `_DUMMY_WORDS` words. Raises
    UserError.
    """
    notes = {}
    with progress("checking", details=lambda: ["the recipes of build, train and evaluate"]):
        check_recipe(rounds.recipes.build)
        with _dummy_pairs(rounds) as pairs:
            for phase in rounds.checks(pairs):
                result = subprocess.run(phase.command, capture_output=True, text=True, check=False)  # noqa: S603
                if result.returncode:
                    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
                    problem = errors[-1].removeprefix("error: ") if errors else result.stderr[-2000:]
                    recipe = rounds.config.train if phase.name == "train" else rounds.config.evaluate.recipe
                    raise UserError(f"{recipe}: {problem}")
                notes[phase.name] = [line for line in result.stdout.splitlines() if line.startswith("# ")]
    return notes


@contextmanager
def _dummy_pairs(rounds: Rounds) -> Iterator[Path]:
    build = rounds.recipes.build
    prompts = (prompt for prompt, skip_reason in each_prompt(build.prompts, build.limit) if skip_reason is None)
    lines = []
    for prompt in islice(prompts, _DUMMY_PAIRS):
        row: dict[str, Any] = {"prompt": list(prompt.messages)}
        row |= {"tools": list(prompt.tools)} if prompt.tools else {}
        for side, word in (("chosen", "yes "), ("rejected", "no ")):
            row[side] = [{"role": "assistant", "content": word * _DUMMY_WORDS}]
        lines.append(json.dumps(row) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        write_atomically(file, "".join(lines))
        yield file


def plan_lines(rounds: Rounds) -> Iterator[str]:
    """Yield the lines of `--dry-run`: the recipe, the commands of each round, and the maximal cost of a round.

    A later round has no more prompts than the first. Raises UserError as `check_rounds` does.
    """
    notes, roles = check_rounds(rounds), estimate(rounds.recipes.build)
    yield yaml.safe_dump(resolved(rounds.config), sort_keys=False, allow_unicode=True).rstrip()
    calls = ", ".join(f"{role} {of_role.max_calls:,}" for role, of_role in roles.items())
    for number in range(rounds.config.rounds + 1):
        for phase in rounds.phases(number):
            yield f"# round {number}, {phase.name}{' (complete)' if phase.is_complete else ''}: {phase.shown}"
        if number and all(phase.is_complete for phase in rounds.phases(number)):
            result = read_round(rounds, number)
            cost = ", ".join(f"{role} {money}" for role, money in result.cost.items()) or "no price"
            yield f"#   was {result.pairs:,} pairs, {duration(sum(result.seconds.values()))}, cost: {cost}"
        elif number:
            yield f"#   calls at most: {calls}"
    yield f"# build: tokens and money of a round: clair estimate {rounds.config.build} --probe 5"
    for name, lines in notes.items():
        yield f"# {name}, of a round" + (f", as if each prompt gave a pair {_DUMMY}:" if name == "train" else ":")
        yield from (f"#   {line.removeprefix('# ')}" for line in lines)
