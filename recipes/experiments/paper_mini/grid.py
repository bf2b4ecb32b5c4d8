"""Run the paper's grid in miniature: four data sets, five objectives, several seeds, a checkpoint per epoch.

    python -m recipes.experiments.paper_mini.grid [--small] [--workers N]    # after its modules models and data

Each worker is a process with one thread that trains and evaluates one run after the other. Each finished run is one
line in recipes/experiments/paper_mini/results/runs.jsonl (with --small: runs/mini-small/runs.jsonl). An interrupted
grid resumes with what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import content_hash, read_json
from clair.core.provenance import provenance
from clair.data.dataset import read_rows
from clair.pipeline.build import lock_output
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.cells import SMALL, Cell, Design, cells, due, last_accuracy
from recipes.experiments.paper_mini.data import MODELS, run_folder
from recipes.world.running import ROOT
from recipes.world.tasks import Task, distinct_tasks

STEPS = 32
"""Optimizer steps per epoch for every data set; all have the same tokens, hence the same tokens per step."""
EVALUATIONS = 4
"""Evaluations on the held-out pairs per epoch, the last at the checkpoint."""
EVALUATION_METRICS = (
    "loss",
    "logps/chosen",
    "logps/rejected",
    "rewards/accuracies",
    "rewards/ties",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "chosen_falls",
)
"""The metrics that are recorded at each evaluation on the held-out pairs."""


PAIR_METRICS = tuple(f"{side}_{of}" for side in ("chosen", "rejected") for of in ("logratio", "logratio_shared", "kl"))
"""The metrics that are recorded of each held-out pair at the last checkpoint."""


@dataclass(frozen=True)
class GridPaths:
    """The paths of a grid: its folder, the target model, and the file of results."""

    run: Path
    target: Path
    results: Path


# ---- one run


def rhythm(pairs: int) -> tuple[int, int]:
    """Pairs per step, and steps between evaluations such that each epoch ends with an evaluation.

    Some numbers of pairs give a few steps less than `STEPS` per epoch, and fewer evaluations.
    """
    batch = math.ceil(pairs / STEPS)
    steps = math.ceil(pairs / batch)
    return batch, steps // next(evaluations for evaluations in range(EVALUATIONS, 0, -1) if steps % evaluations == 0)


def train_config(cell: Cell, paths: GridPaths, out: Path) -> Any:
    """The training recipe of a cell."""
    from apo.training.config import TrainConfig

    folder = paths.run / "pairs" / cell.data
    batch, every = rhythm(sum(1 for _ in read_rows(folder, ["train"])))
    trainer = {
        "learning_rate": cell.learning_rate,
        "num_train_epochs": cell.epochs,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 64,
        "logging_steps": 10,
        "save_strategy": "epoch",
        "save_only_model": True,
        "use_cpu": True,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": every,
    }
    recipe = {
        "model": str(paths.target),
        "dataset": str(folder),
        "objective": cell.objective,
        "beta": cell.beta,
        "seed": cell.seed,
        "probe": 0,
        "trainer": trainer,
        "out": str(out),
    }
    return TrainConfig.model_validate(recipe)


def run_cell(cell: Cell, paths: GridPaths, tasks: list[Task], out: Path) -> dict[str, Any]:
    """Train one cell and evaluate its checkpoints. `out` is emptied before and deleted afterwards.

    A run that training stops (a non-finite loss) is a result without checkpoints, with the reason.
    """
    from apo.monitoring.failures import Stopped
    from apo.run_dir.checkpoints import checkpoint_step, checkpoints
    from apo.run_dir.files import read_log
    from apo.training.train import train
    from recipes.experiments.paper_mini.answers import answers, scored

    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    line: dict[str, Any] = {**asdict(cell), "checkpoints": []}
    try:
        train(train_config(cell, paths, out), log=lambda _: None)
    except Stopped as stop:
        shutil.rmtree(out, ignore_errors=True)
        return {**line, "broke_off": str(stop), "seconds": round(time.monotonic() - started, 1)}
    trained = time.monotonic() - started
    evaluations = {
        row["step"]: _evaluation_metrics(row) for row in read_log(out / "metrics.jsonl") if "eval_loss" in row
    }
    folders = checkpoints(out)
    assert len(folders) == cell.epochs, f"{len(folders)} checkpoints of {cell.epochs} epochs"
    for index, folder in enumerate(folders):
        if cell.purpose == "grid" or folder == folders[-1]:
            scores = scored(tasks, answers(folder, tasks))
            line["checkpoints"].append({"epoch": index + 1, **scores, "pairs": evaluations[checkpoint_step(folder)]})
    line["start"] = evaluations[0]
    line["looks"] = {
        "step": list(evaluations),
        **{name: [metrics.get(name) for metrics in evaluations.values()] for name in evaluations[0]},
    }
    if cell.purpose == "grid":
        line["moved"] = moved(cell, paths, folders[-1])
    shutil.rmtree(out)
    return {**line, "train_seconds": round(trained, 1), "seconds": round(time.monotonic() - started, 1)}


def moved(cell: Cell, paths: GridPaths, folder: Path) -> dict[str, list[float]]:
    """The change of each held-out pair by a checkpoint, in nats: log-ratios of chosen and rejected, and the KL.

    The log-ratios are of all tokens and of shared tokens. All objectives have them, also SFT, which has no rewards
    during training.
    """
    from apo.evaluation.pairs import ROWS, PairsConfig, evaluate_pairs

    folder_of_pairs = folder.parent / "moved"
    settings = {"model": str(folder), "reference": str(paths.target), "dataset": str(paths.run / "pairs" / cell.data)}
    evaluate_pairs(PairsConfig.model_validate({**settings, "beta": cell.beta, "out": str(folder_of_pairs)}))
    rows = [json.loads(text) for text in (folder_of_pairs / ROWS).read_text("utf-8").splitlines()]
    return {name: [float(f"{row[name]:.4g}") for row in rows] for name in PAIR_METRICS}


def _evaluation_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    metrics = {name: row[f"eval_{name}"] for name in EVALUATION_METRICS if row.get(f"eval_{name}") is not None}
    return {name: float(f"{value:.5g}") for name, value in metrics.items()}


# ---- workers


def serve_cells(orders: Connection, paths: GridPaths, design: Design, number: int, parent: int) -> None:
    """The main loop of a worker: receive a cell, send its line or an error text. Exits when its parent does."""
    os.setsid()  # the parent handles Ctrl-C; and Linux divides the CPU among sessions
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()
    folder = paths.run / "work"
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"worker-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    torch.set_num_threads(1)
    tasks = {
        "grid": distinct_tasks("heldout", design.heldout, seed=0),
        "tuning": distinct_tasks("validation", design.validation, seed=0),
    }
    while True:
        try:
            cell = orders.recv()
        except EOFError:
            return
        try:
            line = run_cell(cell, paths, tasks["grid" if cell.purpose == "grid" else "tuning"], folder / str(number))
            orders.send((line, None))
        except Exception:
            orders.send((None, traceback.format_exc()))


def exit_with_parent(parent: int) -> None:
    """Exit the process when the parent is gone; runs in its own thread."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


class Pool:
    """Worker processes, each with one cell at a time. Leaving the `with` block ends them."""

    def __init__(self, paths: GridPaths, design: Design, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.busy: dict[Connection, Cell] = {}
        self.free: list[Connection] = []
        self.processes = []
        for number in range(workers):
            ours, theirs = context.Pipe()
            assert isinstance(ours, Connection)
            process = context.Process(
                target=serve_cells, args=(theirs, paths, design, number, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.free.append(ours)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for connection in (*self.busy, *self.free):
            connection.close()
        for process in self.processes:
            if error is None:
                process.join(10)  # an idle worker exits when its connection is closed
            process.kill()
            process.join()

    def start(self, cell: Cell) -> None:
        """Give a cell to a free worker."""
        connection = self.free.pop()
        connection.send(cell)
        self.busy[connection] = cell

    def finished(self) -> list[tuple[Cell, dict[str, Any] | None, str | None]]:
        """Wait for finished cells: cell, line or None, error or None. Raises UserError if a worker died."""
        results = []
        for connection in wait(list(self.busy)):
            assert isinstance(connection, Connection)
            try:
                line, error = connection.recv()
            except EOFError:
                raise UserError(
                    "a worker was killed, perhaps because memory ran out; start again with fewer --workers: finished "
                    "runs are kept"
                ) from None
            results.append((self.busy.pop(connection), line, error))
            self.free.append(connection)
        return results


# ---- the grid


def world_line(paths: GridPaths, design: Design) -> dict[str, Any]:
    """The common settings of all runs of this grid. Their id changes with the models, the pairs, and the questions."""
    from clair.inference.model_folder import weights_identity

    file = paths.run / "data.json"
    if not file.exists():
        raise UserError(f"{file} is not there; make the data sets with: python -m recipes.experiments.paper_mini.data")
    data = read_json(file)
    tasks = distinct_tasks("heldout", design.heldout, seed=0)
    identity = {
        "target": weights_identity(paths.target),
        "data": {name: data[name]["sha256"] for name in design.data},
        "questions": content_hash([task.id for task in tasks]),
        "design": asdict(design),
        "steps": STEPS,
    }
    return {
        "kind": "world",
        "world": content_hash(identity)[:16],
        **identity,
        "data": data,
        "skills": [task.skill for task in tasks],
        "templates": [task.template for task in tasks],
        **provenance(),
    }


def grid(paths: GridPaths, design: Design, workers: int, log: Callable[[str], None] = print) -> int:
    """Run the missing cells. Returns the number of cells that failed by an exception, which are not recorded."""
    with lock_output(paths.run):
        shutil.rmtree(paths.run / "work", ignore_errors=True)
        world = world_line(paths, design)
        lines = results.read(paths.results)
        if not any(line["kind"] == "world" and line["world"] == world["world"] for line in lines):
            from recipes.experiments.paper_mini.answers import answers, scored

            tasks = distinct_tasks("heldout", design.heldout, seed=0)
            results.append(paths.results, {**world, "base": scored(tasks, answers(paths.target, tasks))})
        runs = results.runs_of(lines, world["world"])
        if not due(design, runs, world["world"]):
            log(f"all {len(runs)} runs are in {paths.results}; nothing to do")
            return 0
        with Pool(paths, design, workers) as pool:
            return _fill(pool, paths, design, world["world"], runs, log)


def _fill(
    pool: Pool,
    paths: GridPaths,
    design: Design,
    world: str,
    runs: dict[str, dict[str, Any]],
    log: Callable[[str], None],
) -> int:
    failed: set[Cell] = set()
    while True:
        waiting = [c for c in due(design, runs, world) if c not in failed and c not in pool.busy.values()]
        for cell in waiting[: len(pool.free)]:
            pool.start(cell)
        if not pool.busy:
            return len(failed)
        for cell, line, error in pool.finished():
            name = f"{cell.data} {cell.objective} lr {cell.learning_rate:g} beta {cell.beta:g} seed {cell.seed}"
            if line is None:
                failed.add(cell)
                log(f"{name} failed:\n{error}")
                continue
            key = cell.key(world)
            runs[key] = {"kind": "run", "world": world, "key": key, **line}
            results.append(paths.results, runs[key])
            outcome = f"broke off ({line['broke_off']})" if "broke_off" in line else f"{last_accuracy(line):.1%} right"
            progress = f"{len(runs)}/{len(cells(design, runs, world))}"
            log(f"{progress} {name} ({cell.purpose}): {outcome}, {line['seconds']:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the missing runs of the mini grid.")
    parser.add_argument("--small", action="store_true", help="one seed, one epoch, no tuning, on the small data sets")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--models", type=Path, default=MODELS)
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
    # A worker that is killed during a run leaves a semaphore of its progress bars; Python's tracker removes it.
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore:resource_tracker"}
    run = run_folder(args.small)
    paths = GridPaths(run, args.models / "target", run / "runs.jsonl" if args.small else results.COMMITTED)
    try:
        failed = grid(paths, SMALL if args.small else Design(), args.workers, lambda text: print(text, flush=True))
    except UserError as error:
        raise SystemExit(f"mini: {error}") from None
    except KeyboardInterrupt:
        print("\nmini: stopped; run the same command to continue", file=sys.stderr)
        raise SystemExit(130) from None
    if failed:
        raise SystemExit(f"mini: {failed} runs failed; their errors are printed above")


if __name__ == "__main__":
    main()
