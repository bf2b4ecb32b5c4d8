"""Run the designs D0 to D4 as far as results are missing. Each result is one line of a file.

    python -m recipes.experiments.paper_mini.run D0 [D1 ...] [--workers N]    # continues a stopped design
    python -m recipes.experiments.paper_mini.run --small                      # a small version of all designs
    python -m recipes.experiments.paper_mini.run --collect                    # add the results to the committed file

A worker is a process with one thread. RUN/results.jsonl has one line per world, with its gates, and one per training
run, both with the commit that made them. If the command is killed, only the runs in progress are lost. Runs in the
committed file are not repeated.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from clair.core.errors import UserError
from clair.core.files import read_json
from clair.core.provenance import provenance
from clair.pipeline.build import lock_output
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.delta import build_delta
from recipes.experiments.paper_mini.design import (
    EPOCHS_TO_STOP,
    FULL,
    MARGIN_TO_STOP,
    SMALL,
    VERSION,
    Design,
    Name,
    Rows,
    Run,
    accuracy,
    due,
    is_regime,
    worlds_needed,
)
from recipes.experiments.paper_mini.workers import ENVIRONMENT, completed, make_pool
from recipes.experiments.paper_mini.worlds import (
    QUESTIONS_PER_TEMPLATE,
    TRAIN_PAIRS,
    make_world,
    questions,
    world_of,
)
from recipes.world.running import ROOT, ending_in_one_line
from recipes.world.tasks import is_right

RUN, SMALL_RUN = Path("runs/evidence"), Path("runs/evidence-small")
BATCH = 8
PAIR_METRICS = ("logps/chosen", "logps/rejected", "rewards/accuracies", "rewards/margins", "chosen_falls")
"""Metrics of the held-out pairs that each checkpoint records."""


# ---- one run


def train_config(run: Run, target: Path, pairs: Path, out: Path) -> Any:
    """Return the training recipe of a run."""
    from apo.training.config import TrainConfig

    count = read_json(pairs.with_name("delta.json"))["pairs"] if run.pairs == "delta" else TRAIN_PAIRS
    trainer = {
        "learning_rate": run.learning_rate,
        "num_train_epochs": run.epochs,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 64,
        "logging_steps": 100,
        "save_strategy": "no",
        "use_cpu": True,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": run.every * count // BATCH,
    }
    recipe = {
        "model": str(target),
        "dataset": str(pairs),
        "objective": run.objective,
        "beta": run.beta,
        "seed": run.seed,
        "probe": 0,
        "samples": 0,
        "trainer": trainer,
        "out": str(out),
    }
    return TrainConfig.model_validate(recipe)


def checkpoint_recorder(run: Run, answer: Callable[[Any], str], checkpoints: list[dict[str, Any]]) -> Any:
    """Return a callback that adds a checkpoint after each evaluation, and stops a run that harms the model."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **values: Any) -> None:
            metrics = {name: values["metrics"].get(f"eval_{name}") for name in PAIR_METRICS}
            pairs = {name: float(f"{value:.5g}") for name, value in metrics.items() if value is not None}
            checkpoint = {"epoch": round(state.epoch or 0), "right": answer(values["model"]), "pairs": pairs}
            checkpoints.append(checkpoint)
            harm = accuracy(checkpoints[0]) - accuracy(checkpoint)
            if checkpoint["epoch"] >= EPOCHS_TO_STOP and harm >= MARGIN_TO_STOP:
                control.should_training_stop = True

    return Recorder()


def train_run(run: Run, folder: Path) -> dict[str, Any]:
    """Train and evaluate a run. Returns its line, with the reason if a check stopped the training."""
    from apo.monitoring.failures import TrainingStopped
    from apo.training.plan import plan
    from apo.training.train import build_trainer
    from recipes.experiments.paper_mini.answers import answers_in_memory
    from recipes.experiments.paper_mini.models import BASE
    from recipes.world.evaluate import load

    world, out = world_of(run.world), folder / "work" / run.key
    target = BASE if world.target == "quickstart" else folder / "worlds" / run.world / "target"
    tasks = questions(world, run.split)
    _, tokenizer = load(target)
    started, checkpoints = time.process_time(), []

    def answer(model: Any) -> str:
        right = [
            is_right(task, text) for task, text in zip(tasks, answers_in_memory(model, tokenizer, tasks), strict=True)
        ]
        starts = range(0, len(tasks), QUESTIONS_PER_TEMPLATE)
        return "".join(f"{sum(right[start : start + QUESTIONS_PER_TEMPLATE]):x}" for start in starts)

    shutil.rmtree(out, ignore_errors=True)
    line: dict[str, Any] = {**asdict(run), "checkpoints": checkpoints}
    try:
        trainer = build_trainer(plan(train_config(run, target, folder / "worlds" / run.world / run.pairs, out)),
                                log=lambda _: None)  # fmt: skip
        trainer.add_callback(checkpoint_recorder(run, answer, checkpoints))
        trainer.train()
    except TrainingStopped as stop:
        line["broke_off"] = str(stop)
    shutil.rmtree(out, ignore_errors=True)
    if checkpoints[-1]["epoch"] < run.epochs:
        line.setdefault("stopped", checkpoints[-1]["epoch"])
    return {**line, "cpu_seconds": round(time.process_time() - started, 1)}


# ---- the designs


def passed_worlds(lines: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Return True for each existing world if all its gates are met."""
    return {line["name"]: all(line["gates"].values()) for line in lines if line["kind"] == "world"}


def rows_of(lines: Sequence[Mapping[str, Any]], version: int = VERSION) -> dict[str, Mapping[str, Any]]:
    """Return the finished runs of a version by their key."""
    return {line["key"]: line for line in lines if line["kind"] == "run" and line["version"] == version}


def run_designs(
    names: Sequence[Name],
    design: Design,
    folder: Path,
    workers: int,
    *,
    committed: Path,
    log: Callable[[str], None] = print,
) -> None:
    """Make the worlds of the designs, then run what is missing, design by design."""
    file = folder / "results.jsonl"
    with lock_output(folder), make_pool(workers, folder / "workers.log") as pool:
        shutil.rmtree(folder / "work", ignore_errors=True)
        lines = [*results.read(committed), *results.read(file)]
        passed, rows = passed_worlds(lines), rows_of(lines)
        values = provenance()
        origin = {"version": VERSION, "commit": values["git_commit"], "versions": values["versions"]}

        def record(line: dict[str, Any]) -> dict[str, Any]:
            results.append(file, {**line, **origin})
            return {**line, **origin}

        for name in names:
            unknown = [world for world in worlds_needed(name, design) if world not in passed]
            _make_worlds(pool, unknown, folder, passed, record, log)
            _run_due(pool, name, design, folder, passed, rows, record, log)


Record = Callable[[dict[str, Any]], dict[str, Any]]
"""Append a line to the file of results, and return it with the commit that made it."""


def _make_worlds(
    pool: Any, worlds: Sequence[str], folder: Path, passed: dict[str, bool], record: Record, log: Callable[[str], None]
) -> None:
    """Make or read worlds, and record the new ones."""
    for world, measured in completed(pool, make_world, {world: (world, folder) for world in worlds}):
        if world not in passed:
            passed |= passed_worlds([record({"kind": "world", "name": world, **measured})])
        unmet = ", ".join(gate for gate, met in measured["gates"].items() if not met)
        log(f"world {world}: {f'gates not met: {unmet}; it is not used' if unmet else 'all gates met'}")


def _run_due(
    pool: Any, name: Name, design: Design, folder: Path, passed: dict[str, bool],
    rows: dict[str, Mapping[str, Any]], record: Record, log: Callable[[str], None],
) -> None:  # fmt: skip
    started, completed_runs = time.monotonic(), 0
    while runs := due(name, design, passed, rows):
        runs = [run for run in runs if run.world in design.tuning] or runs  # they select the rates of the others
        worlds = dict.fromkeys(run.world for run in runs)
        missing = [world for world in worlds if not (folder / "worlds" / world / "world.json").exists()]
        _make_worlds(pool, missing, folder, passed, record, log)  # known by their committed measurements alone
        if name == "D4":
            unmade = {w: (w, folder) for w in worlds if not (folder / "worlds" / w / "delta.json").exists()}
            for world, measured in completed(pool, build_delta, unmade):
                record({"kind": "delta", "name": world, **measured})
        for key, line in completed(pool, train_run, {run.key: (run, folder) for run in runs}):
            rows[key] = record({"kind": "run", "key": key, **line})
            completed_runs += 1
            left = len(due(name, design, passed, rows))
            minutes = (time.monotonic() - started) / completed_runs * left / 60
            log(f"{name}: {_summary(rows[key])}; {left} runs left, about {minutes:.0f} min")
    log(f"{name}: {_state(name, design, passed, rows)}")


def _summary(row: Mapping[str, Any]) -> str:
    first, last = accuracy(row["checkpoints"][0]), accuracy(row["checkpoints"][-1])
    end = f", stopped after epoch {row['stopped']}" if "stopped" in row else ""
    cell = f"{row['world']} {row['pairs']} {row['objective']} rate {row['learning_rate']:g} beta {row['beta']:g}"
    return f"{cell}: {first:.1%} -> {last:.1%}{end}, {row['cpu_seconds']:.0f} CPU s"


def _state(name: Name, design: Design, passed: Mapping[str, bool], rows: Rows) -> str:
    tuning = [world for world in design.tuning if passed.get(world)]
    if name == "D2" and (failed := [p for p in ("weak", "strong") if not is_regime(design, p, tuning, rows)]):
        return f"the gate of the regime {' and '.join(failed)} is not met, so it is not tested"
    if name == "D3" and not any(row["pairs"] == "dose-1" for row in rows.values()):
        return "it needs the tuning runs of D1; run D1 first"
    return "complete"


def collect(run: Path, committed: Path) -> int:
    """Add the new lines of a run folder to the committed file. Returns their number."""
    committed_lines = results.read(committed)
    new = [line for line in results.read(run / "results.jsonl") if line not in committed_lines]
    for line in new:
        results.append(committed, line)
    return len(new)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the designs as far as results are missing.")
    parser.add_argument("designs", nargs="*", metavar="DESIGN", help="D0, D1, D2, D3, D4; all by default")
    parser.add_argument("--small", action="store_true", help=f"a small version of all designs, in {SMALL_RUN}")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--run", type=Path, help=f"the folder of worlds and results; {RUN} by default")
    parser.add_argument("--collect", action="store_true", help=f"only add the results to {results.COMMITTED}")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT
    names = get_args(Name)
    folder = args.run or (SMALL_RUN if args.small else RUN)
    with ending_in_one_line("paper-mini"):
        if unknown := [name for name in args.designs if name not in names]:
            raise UserError(f"{', '.join(unknown)}: no such design; one of: {', '.join(names)}")
        if args.collect:
            if args.small:
                raise UserError("--collect adds the results of full designs; remove --small")
            print(f"{collect(folder, results.COMMITTED)} lines are new in {results.COMMITTED}")
            return
        committed = folder / "none.jsonl" if args.small else results.COMMITTED
        design = SMALL if args.small else FULL
        run_designs(
            args.designs or names, design, folder, args.workers, committed=committed, log=lambda t: print(t, flush=True)
        )


if __name__ == "__main__":
    main()
