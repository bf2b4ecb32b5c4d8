"""Measure `apo advise --pilot`: its choice on sets of pairs, and the truth by training. Made to resume.

    python -m recipes.experiments.advice.measure [--targets N] [--workers N]    # continue where it was stopped
    python -m recipes.experiments.advice.measure --collect                      # add the results to the committed file

The designs were written down before their first runs: docs/log/2026-11-29-pilot.md and docs/log/2026-11-30-pilot.md.
The first is complete; this command runs the second. Worlds and training runs are those of the paper's miniature. Each
world, each pilot and each run is one line of RUN/results.jsonl, with the commit that made it. No regret is printed
here; recipes.experiments.advice.table prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clair.core.errors import UserError
from clair.core.files import read_json, write_atomically
from clair.core.provenance import provenance
from clair.core.recipe import load_recipe
from clair.core.watched_process import WatchedProcess
from clair.pipeline.build import lock_output
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.design import Run
from recipes.experiments.paper_mini.run import BATCH, collect, passed_worlds, rows_of, train_run
from recipes.experiments.paper_mini.workers import ENVIRONMENT, completed, make_pool
from recipes.experiments.paper_mini.worlds import QUESTIONS_PER_TEMPLATE, make_world, questions, world_of
from recipes.world.running import ROOT, ending_in_one_line

RUN = Path("runs/advice-mini")
COMMITTED = Path("recipes/experiments/advice/results/advice.jsonl")
SETS = (("clair", "weak"), ("strong", "swapped"))
"""The sets of targets with an even and with an odd seed. `swapped` is clair with half of its labels exchanged."""
DISPLACEMENTS = (0.03, 0.1)
EPOCHS, EVERY, ORDERS, BETA = 6, 3, (0, 1), 0.1


@dataclass(frozen=True)
class Measurement:
    """A measurement on 13 targets, the worlds from a first seed on. `version` is part of its lines."""

    version: int
    first_seed: int
    prompts_per_template: int
    """Validation questions of each phrasing that the pilots are chosen by."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of its worlds."""
        return tuple(f"regions-{self.first_seed + number}" for number in range(13))


FIRST, SECOND = Measurement(2, 200, 5), Measurement(3, 213, 15)
"""The full runs of the first have the rates of the pilots; those of the second have the rates for their own steps."""


@dataclass(frozen=True)
class TruthRun(Run):
    """A training run on all pairs in one of two orders, evaluated on held-out questions."""

    order: int

    @property
    def seed(self) -> int:
        """The seed of the training run: its order of the pairs."""
        return self.order

    @property
    def split(self) -> str:
        """The questions of the truth, which no pilot was chosen by."""
        return "heldout"


def sets_of_target(world: str) -> tuple[str, ...]:
    """The names of a target's sets of pairs."""
    return SETS[world_of(world).seed % 2]


def truth_runs(pilot: Mapping[str, Any]) -> list[TruthRun]:
    """The runs that measure the truth for the line of a pilot, at the rates in it."""
    return [
        TruthRun(pilot["world"], pilot["pairs"], option.rsplit("-", 1)[0], rate, BETA, EPOCHS, EVERY, order)
        for option, rate in pilot["rates"].items()
        for order in ORDERS
    ]


# ---- one pilot


def write_recipes(world: str, pairs: str, folder: Path, out: Path) -> Path:
    """Write the prompts and the recipes of a pilot. Returns the recipe of the advice."""
    home = folder / "worlds" / world
    target = str(home / "target")
    trainer = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 64,
        "logging_steps": 100,
        "use_cpu": True,
    }
    train = {"model": target, "dataset": str(home / pairs), "beta": BETA, "trainer": trainer}
    train |= {"probe": 0, "samples": 0, "out": str(out / "full")}
    tasks = questions(world_of(world), "validation")
    chosen = [task for n, task in enumerate(tasks) if n % QUESTIONS_PER_TEMPLATE < SECOND.prompts_per_template]
    checker = {"command": [sys.executable, "-m", "recipes.world.checker", "--right"], "seconds": 300, "processes": 1}
    pilot = {
        "recipe": str(out / "train.yaml"),
        "checker": checker,
        "prompts": {"path": str(out / "prompts.jsonl")},
        "displacements": list(DISPLACEMENTS),
    }
    model = {"path": target, "max_tokens": 96, "batch_size": 64}
    advise = {"dataset": str(home / pairs), "model": model, "pilot": pilot, "out": str(out / "advice")}
    rows = "".join(json.dumps({"id": task.id, "prompt": task.prompt}) + "\n" for task in chosen)
    write_atomically(out / "prompts.jsonl", rows)
    for name, recipe in (("train.yaml", train), ("advise.yaml", advise)):
        write_atomically(out / name, yaml.safe_dump(recipe, sort_keys=False))
    return out / "advise.yaml"


def run_pilot(world: str, pairs: str, folder: Path) -> dict[str, Any]:
    """Run `apo advise --pilot` as a user does. Returns its line. A stopped one resumes."""
    from apo.advice.config import AdviseConfig
    from apo.pilot.plan import plan_pilots
    from recipes.world.swapped import write_swapped

    home, out = folder / "worlds" / world, folder / "pilots" / f"{world}-{pairs}"
    if pairs == "swapped":
        write_swapped(home / "clair", home / pairs, world_of(world).seed)
    out.mkdir(parents=True, exist_ok=True)
    recipe, before = write_recipes(world, pairs, folder, out), _children_seconds()
    with open(out / "messages.log", "ab") as log:
        code = WatchedProcess([sys.executable, "-m", "apo", "advise", str(recipe), "--pilot"], log).wait()
    if not (out / "advice/rates.json").is_file() or code not in (0, 2):
        raise UserError(f"the pilot of {world} {pairs} ended with code {code}; see {out}/messages.log")
    # Code 2 after the rates were matched: the guard stopped every pilot, so that nothing is recommended.
    result = read_json(out / "advice/pilot.json") if code == 0 else {"verdict": {"choice": None, "sure": "low"}}
    matched, planned = read_json(out / "advice/rates.json"), plan_pilots(load_recipe(AdviseConfig, recipe))
    return {
        "world": world,
        "pairs": pairs,
        "choice": result["verdict"]["choice"] or "none",
        "sure": result["verdict"]["sure"],
        "verdict": result["verdict"],
        "pilots": result.get("pilots", []),
        "cost": result.get("cost"),
        "rule": read_json(out / "advice/advice.json")["advice"]["objective"],
        "rates": {name: planned.full_rate(rate) for name, rate in matched["rates"].items()},
        "trials": matched["trials"],
        "cpu_seconds": round(_children_seconds() - before, 1),
    }


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# ---- the measurement


def pilots_of(lines: Sequence[Mapping[str, Any]], measurement: Measurement) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The pilots of a measurement by world and set."""
    return {(x["world"], x["pairs"]): x for x in lines if x["kind"] == "pilot" and x["version"] == measurement.version}


def truth_of(lines: Sequence[Mapping[str, Any]], measurement: Measurement) -> dict[str, Mapping[str, Any]]:
    """The finished runs of a measurement's truth by their key."""
    return rows_of([line for line in lines if line.get("order") is not None], measurement.version)


def of_last_draws(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Leave out what was measured on an earlier draw of a world.

    One seed gives another target on a processor with other instructions. Such a world has a second line, and the pilots
    and runs before it belong to another target.
    """
    current: list[Mapping[str, Any]] = []
    draws: dict[str, Any] = {}
    for line in lines:
        if line["kind"] == "world":
            name, draw = str(line["name"]), (line["nats"], line["sets"])
            if draws.setdefault(name, draw) != draw:
                current = [earlier for earlier in current if name not in (earlier.get("world"), earlier.get("name"))]
            draws[name] = draw
        current.append(line)
    return current


def missing_parts(
    world: str, lines: Sequence[Mapping[str, Any]], measurement: Measurement = SECOND
) -> tuple[list[str], list[TruthRun]]:
    """The sets of a world without a pilot, and the missing runs of the sets with one."""
    pilots, rows = pilots_of(lines, measurement), truth_of(lines, measurement)
    sets = sets_of_target(world)
    runs = [run for name in sets if (world, name) in pilots for run in truth_runs(pilots[world, name])]
    return [name for name in sets if (world, name) not in pilots], [run for run in runs if run.key not in rows]


def measure(targets: Sequence[str], folder: Path, workers: int, log: Callable[[str], None]) -> None:
    """Make the worlds in which a part is missing, then run the missing pilots and the missing runs of the truth."""
    file = folder / "results.jsonl"
    with lock_output(folder), make_pool(workers, folder / "workers.log") as pool:
        lines = of_last_draws([*results.read(ROOT / COMMITTED), *results.read(file)])
        values = provenance()
        origin = {"version": SECOND.version, "commit": values["git_commit"], "versions": values["versions"]}

        def record(line: Mapping[str, Any]) -> None:
            nonlocal lines
            results.append(file, {**line, **origin})
            lines = of_last_draws([*lines, {**line, **origin}])

        targets = [world for world in targets if any(missing_parts(world, lines))]
        for world, measured in completed(pool, make_world, {world: (world, folder) for world in targets}):
            line = {"kind": "world", "name": world, **measured}
            if not any(line.items() <= recorded.items() for recorded in lines):
                record(line)
            state = "all gates met" if all(measured["gates"].values()) else "a gate is not met; it is left out"
            log(f"world {world}: {state}")
        passed = passed_worlds(lines)
        targets = [world for world in targets if passed[world]]
        cells = [(world, pairs) for world in targets for pairs in missing_parts(world, lines)[0]]
        jobs = {" ".join(cell): (*cell, folder) for cell in cells}
        for name, line in completed(pool, run_pilot, jobs):
            record({"kind": "pilot", "name": name, **line})
            log(f"pilot {name}: done, {line['cpu_seconds']:.0f} CPU s")
        missing = {run.key: (run, folder) for world in targets for run in missing_parts(world, lines)[1]}
        log(f"{len(missing)} runs of the truth are missing")
        for left, (key, line) in enumerate(completed(pool, train_run, missing), 1):
            record({"kind": "run", "key": key, **line})
            log(f"{line['world']} {line['pairs']} {line['objective']}: {line['cpu_seconds']:.0f} CPU s; "
                f"{len(missing) - left} left")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure advice by pilots; finished parts are not repeated.")
    parser.add_argument("--targets", type=int, default=len(SECOND.targets), help="the first so many targets")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--run", type=Path, default=RUN, help="the folder of worlds, pilots and results")
    parser.add_argument("--collect", action="store_true", help=f"only add the results to {COMMITTED}")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT
    with ending_in_one_line("advice"):
        if args.collect:
            print(f"{collect(args.run, COMMITTED)} lines are new in {COMMITTED}")
            return
        measure(SECOND.targets[: args.targets], args.run, args.workers, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
