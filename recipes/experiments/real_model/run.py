"""Run the experiment with the commands that a user types: pairs, training, IFEval before and after, comparison.

    python -m recipes.experiments.real_model.run [--small] [--cells NAME ...] [--seed N] [--out FOLDER]    # `make real`

It needs the model's folder (`make real-model`) and the data folder (instructions/, ifeval/, mixeval/; --data, or `data`
in CLAIR_SHARED, default ../shared). FOLDER lies outside the repository: by default real-model in the cache folder.

    prompts/        training and validation prompts, and split.json: the constraint types that never occur in them
    pairs/NAME      the two data sets, with dropped rows in dropped.jsonl
    runs/CELL/RATE  training runs, a checkpoint for each epoch
    validation/     the validation prompts answered by the base and by every checkpoint
    chosen.json     rate and epochs of each cell: the best on validation prompts, prompt-level loose
    evals/          IFEval and MixEval-Hard of the base and of each cell's choice; compare.json of all of them
    steps.jsonl     each finished step: command, seconds, peak memory

The primary cell comes first (cells.py). A finished step does not run again; an interrupted step resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clair.core.errors import UserError
from clair.core.files import content_hash, read_json, write_json
from clair.pipeline.output_dir import lock_output
from clair.storage.location import cache_root
from recipes.experiments.paper_mini import results
from recipes.experiments.real_model.cells import CELLS, EPOCHS, PRIMARY, Cell
from recipes.experiments.real_model.model import default_folder
from recipes.experiments.real_model.prompts import COUNTS, SMALL_COUNTS, PromptFiles, write_prompts
from recipes.experiments.real_model.server import program_id
from recipes.world.quickstart import SOME_ROWS_FAILED
from recipes.world.running import ROOT, ending_in_one_line, running_module

RECIPES = Path("recipes/experiments/real_model")
BASE = "base"


@dataclass(frozen=True)
class Size:
    """The size of the experiment. `ifeval` is a number of prompts, `mixeval` a number of questions of each kind."""

    prompts: Mapping[str, int]
    epochs: int
    rates: int
    ifeval: int | None
    mixeval: int


WHOLE = Size(COUNTS, EPOCHS, 2, None, 100)
SMALL = Size(SMALL_COUNTS, 1, 1, 24, 5)


@dataclass(frozen=True)
class Step:
    """One command. `settings` are keys of its recipe; `server` is the role that the server of this folder has."""

    name: str
    command: Sequence[str]
    recipe: str
    settings: Mapping[str, Any]
    server: str | None = None

    def key(self) -> str:
        """Return the identity of the step: its command, its recipe and its settings."""
        recipe = (ROOT / RECIPES / self.recipe).read_text("utf-8")
        return content_hash([self.name, list(self.command), recipe, dict(self.settings)])[:16]


class Experiment:
    """The experiment in a folder, described in this module's docstring."""

    def __init__(self, out: Path, model: Path, data: Path, size: Size, seed: int = 0) -> None:
        self.out, self.model, self.data, self.size, self.seed = out, model, data, size, seed
        self.prompts = PromptFiles(out / "prompts")
        self.log = out / "steps.jsonl"

    # ---- one step

    def run(self, step: Step) -> None:
        """Run a step unless it is finished, and record it. Raises SystemExit with the command's exit code."""
        if step.key() in {line["key"] for line in results.read(self.log)}:
            return
        with self._server(step) as settings:
            options = [f"--set={name}={json.dumps(value)}" for name, value in {**step.settings, **settings}.items()]
            arguments = [*step.command, str(RECIPES / step.recipe), *options]
            print(f"\n[{time.strftime('%H:%M:%S')}] {step.name}\n$ {' '.join(arguments)}", flush=True)
            started = time.monotonic()
            process = subprocess.Popen([Path(sys.executable).with_name(arguments[0]), *arguments[1:]])
            try:
                _, status, usage = os.wait4(process.pid, 0)  # Popen.wait does not return the resources used
                process.returncode = code = os.waitstatus_to_exitcode(status)
            except KeyboardInterrupt:
                process.wait()  # the command has received Ctrl-C as well, and ends by itself
                raise
        if code not in (0, SOME_ROWS_FAILED):
            print(f"real: {step.name} ended with exit code {code}; run the same command to continue", file=sys.stderr)
            raise SystemExit(code)
        seconds, peak = round(time.monotonic() - started, 1), round(usage.ru_maxrss / 1024)
        line = {"key": step.key(), "step": step.name, "command": arguments, "seconds": seconds, "peak_mib": peak}
        results.append(self.log, {**line, "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)})

    @contextmanager
    def _server(self, step: Step) -> Iterator[dict[str, str]]:
        """Run the server of a step, if it needs one, as long as the step. Yields its settings."""
        if step.server is None:
            yield {}
            return
        prompts = str(self.prompts.of("train"))
        with running_module("recipes.experiments.real_model.server", ["--prompts", prompts], 120) as server:
            yield {f"{step.server}.url": server.url}

    # ---- all steps

    def make_prompts(self) -> None:
        if not (self.prompts.folder / "split.json").exists():
            self.prompts.folder.mkdir(parents=True, exist_ok=True)
            write_prompts(self.data, self.prompts.folder, self.size.prompts)

    def build(self, name: str) -> None:
        """Build the pairs `clair` or `judged`."""
        role = {"clair": "reviser", "judged": "judge"}[name]
        settings = {
            "prompts.path": str(self.prompts.of("train")), "prompts.not_in": str(self.ifeval),
            "target.path": str(self.model), f"{role}.id": program_id(), "ledger": str(self.out / "ledger.sqlite"),
            "seed": self.seed, "out": str(self.out / "pairs" / name),
        }  # fmt: skip
        self.run(Step(f"pairs {name}", ["clair", "build"], f"{name}.yaml", settings, role))

    @property
    def ifeval(self) -> Path:
        return self.data / "ifeval" / "input_data.jsonl"

    def train(self, cell: Cell, rate: float) -> Path:
        """Train a cell at one rate. Returns the folder of the run."""
        out = self.out / "runs" / cell.name / f"{rate:g}"
        settings = {
            "model": str(self.model), "dataset": str(self.out / "pairs" / cell.pairs), "objective": cell.objective,
            "trainer.learning_rate": rate, "trainer.num_train_epochs": self.size.epochs, "seed": self.seed,
            **cell.settings, "out": str(out),
        }  # fmt: skip
        self.run(Step(f"train {cell.name} {rate:g}", ["apo", "train"], "train.yaml", settings))
        return out

    def evaluate(self, name: str, model: Path, prompts: Path, out: Path, limit: int | None = None) -> Path:
        """Answer and check prompts of IFEval's form. Returns the result folder."""
        settings = {"prompts": str(prompts), "model.path": str(model), "out": str(out)}
        settings |= {"limit": limit} if limit else {}
        self.run(Step(f"answers {name}", ["apo", "eval", "ifeval"], "ifeval.yaml", settings))
        return out

    def validate(self, name: str, model: Path) -> float:
        """Return the share of validation prompts whose constraints are all followed, loosely."""
        out = self.out / "validation" / name
        return read_json(self.evaluate(name, model, self.prompts.of("validation"), out) / "score.json")["prompt_loose"]

    def choose(self, cell: Cell) -> Path:
        """Train a cell at each of its rates, and choose rate and epoch. Returns the model's folder.

        The choice has the best score on the validation prompts; of equal ones, the lower rate, then fewer epochs.
        """
        candidates = []
        for rate in cell.rates[: self.size.rates]:
            run = self.train(cell, rate)
            for epoch, folder in epoch_checkpoints(run):
                score = self.validate(f"{cell.name}/{rate:g}/{epoch}", folder)
                candidates.append({"rate": rate, "epochs": epoch, "validation": score, "model": str(folder)})
        best = max(candidates, key=lambda candidate: candidate["validation"])
        file = self.out / "chosen.json"
        write_json(file, {**(read_json(file) if file.exists() else {}), cell.name: {**best, "candidates": candidates}})
        return Path(best["model"])

    def prove(self, name: str, model: Path) -> None:
        """Answer the benchmark."""
        self.evaluate(f"IFEval {name}", model, self.ifeval, self.out / "evals" / "ifeval" / name, self.size.ifeval)

    def guard(self, name: str, model: Path) -> None:
        """Answer questions of MixEval-Hard, scored by rules."""
        out = self.out / "evals" / "mixeval" / name
        settings = {"data": str(self.data / "mixeval"), "model.path": str(model), "limit": self.size.mixeval}
        step = Step(f"MixEval {name}", ["apo", "eval", "mixeval"], "mixeval.yaml", {**settings, "out": str(out)})
        self.run(step)

    def compare(self, cells: Sequence[Cell]) -> None:
        """Compare the cells with the base on both benchmarks. This takes seconds and is repeated each time."""
        for benchmark in ("ifeval", "mixeval"):
            folders = [str(self.out / "evals" / benchmark / name) for name in (BASE, *(cell.name for cell in cells))]
            folders = [folder for folder in folders if (Path(folder) / "score.json").exists()]
            if len(folders) > 1:
                print(
                    f"\n{benchmark}: {', '.join(Path(folder).name for folder in folders[1:])} against the base",
                    flush=True,
                )
                program = Path(sys.executable).with_name("apo")
                if code := subprocess.run([program, "compare", *folders], check=False).returncode:
                    raise SystemExit(code)

    def whole(self, cells: Sequence[Cell]) -> None:
        """Run every step of these cells, in their order, and compare after each cell."""
        self.make_prompts()
        for cell in cells:
            self.build(cell.pairs)
            self.validate(BASE, self.model)
            chosen = self.choose(cell)
            for name, model in ((BASE, self.model), (cell.name, chosen)):
                self.prove(name, model)
            for name, model in ((BASE, self.model), (cell.name, chosen)):
                self.guard(name, model)
            self.compare(cells)


def epoch_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints at the end of an epoch, with its number. A run that was stopped also has others."""
    from apo.run_dir.checkpoints import checkpoints

    epochs = [(read_json(folder / "trainer_state.json")["epoch"], folder) for folder in checkpoints(run)]
    return [(round(epoch), folder) for epoch, folder in epochs if epoch == round(epoch)]


def check_inputs(model: Path, data: Path) -> None:
    """Check the model and the data before any work. Raises UserError if one is missing."""
    if not (model / "model.safetensors").is_file():
        raise UserError(f"{model} holds no model; make it with: make real-model, or name another with --model")
    for name in ("instructions/seed_tasks.jsonl", "ifeval/input_data.jsonl", "mixeval"):
        if not (data / name).exists():
            raise UserError(f"{data / name} is missing; give the data folder with --data (docs/real_model.md)")


def main() -> None:
    shared = Path(os.environ.get("CLAIR_SHARED", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description="Run the experiment on a real model; finished steps do not run again.")
    parser.add_argument(
        "--small", action="store_true", help="a small version, 5 minutes: few prompts, one rate, one cell"
    )
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="+", choices=names, metavar="NAME", help=f"only these of {', '.join(names)}")
    parser.add_argument("--seed", type=int, default=0, help="of the samples, the split and the order of the pairs")
    parser.add_argument("--model", type=Path, default=default_folder())
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--out", type=Path, help="a folder outside the repository")
    args = parser.parse_args()
    folder = f"real-model{'-small' if args.small else ''}{f'-{args.seed}' if args.seed else ''}"
    out = (args.out or cache_root() / folder).resolve()
    model, data = args.model.resolve(), args.data.resolve()
    os.chdir(ROOT)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    cells = [cell for cell in CELLS if cell.name in (args.cells or ([PRIMARY.name] if args.small else names))]
    with ending_in_one_line("real", again="run the same command to continue"):
        check_inputs(model, data)
        out.mkdir(parents=True, exist_ok=True)
        with lock_output(out):
            Experiment(out, model, data, SMALL if args.small else WHOLE, args.seed).whole(cells)


if __name__ == "__main__":
    main()
