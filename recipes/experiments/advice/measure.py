"""Measure the regret of following `apo advise`, on 24 models and data sets made for this purpose.

    python -m recipes.experiments.advice.measure [--workers N]          # about 45 minutes on two quiet cores
    python -m recipes.experiments.advice.table --write          # docs/advice.md, from the results alone

There are six new targets with four data sets each: revised, judged, by a stronger or weaker writer, with exchanged
labels, or small ones; each has a judge with its own errors and biases. First `apo advise` runs on each data set. Then
its target is trained on it with three objectives and two seeds, at the advised beta and the objective's tuned learning
rate, and answers 240 held-out tasks. Each advice and each run is one line in
recipes/experiments/advice/results/advice.jsonl; an interrupted measurement resumes with what is missing.
The rule was committed before any of this, and is not tuned.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from clair.core.files import content_hash
from clair.core.provenance import provenance
from clair.core.recipe import resolve
from clair.pipeline.build import lock_output
from recipes.experiments.paper_mini import results
from recipes.experiments.paper_mini.models import Habits, make
from recipes.experiments.paper_mini.workers import ENVIRONMENT, completed, make_pool
from recipes.world.judge import Leanings
from recipes.world.running import ROOT, ending_in_one_line, running
from recipes.world.server import ServerOptions
from recipes.world.style import STYLES, add_style
from recipes.world.tasks import Task, distinct_tasks

RUN = Path("runs/advice-mini")
RESULTS = Path("recipes/experiments/advice/results/advice.jsonl")
SEEDS = (0, 1)
QUESTIONS, EPOCHS, BATCH = 240, 2, 8
PAIRS, SMALL = 128, 40
BETA = 0.1
"""Beta of the runs whose advice is not to train."""
RATES = {"apo_zero": 2.7e-4, "apo_down": 8.7e-6, "dpo": 5e-5}
"""Learning rate by objective: the median, on a log scale, of the rates tuned on the four data sets of the mini grid."""

Kind = Literal["revised", "on_policy", "off_policy", "stronger", "swapped", "exchanged"]
Writer = tuple[float, tuple[float, float, float]]
"""Share of right answers, and of each style (engaging, plain, padded)."""
STRONG: Writer = (0.97, (0.8, 0.15, 0.05))
GOOD: Writer = (0.85, (0.1, 0.3, 0.6))
POOR: Writer = (0.35, (0.05, 0.9, 0.05))
BAD: Writer = (0.10, (0.1, 0.3, 0.6))

TARGETS: Mapping[str, Habits] = {
    "weak": Habits(right=0.30, wording=(0.10, 0.60, 0.30), steps=100, seed=11),
    "middling": Habits(right=0.45, wording=(0.10, 0.30, 0.60), steps=60, seed=12),
    "fair": Habits(right=0.60, wording=(0.30, 0.50, 0.20), steps=80, seed=13),
    "able": Habits(right=0.75, wording=(0.20, 0.60, 0.20), steps=80, seed=14),
    "strong": Habits(right=0.88, wording=(0.50, 0.40, 0.10), steps=100, seed=15),
    "raw": Habits(right=0.55, wording=(0.05, 0.25, 0.70), steps=30, seed=16),
}
FINE = Leanings(style=True, judge_error=0.05, length_bias=0.1)
ERRING = Leanings(style=True, judge_error=0.2, length_bias=0.1)
LONG = Leanings(style=True, judge_error=0.05, length_bias=0.4)
FIRST = Leanings(style=True, position_bias=0.6)
CHANCE = Leanings(judge_error=0.5)


@dataclass(frozen=True)
class Combination:
    """A target and the pairs to train it on. `judge` judges the pairs of a judged set, and serves `apo advise`."""

    target: str
    kind: Kind
    judge: Leanings = FINE
    pairs: int = PAIRS
    reviser_error: float = 0.0
    polish: bool = False
    writers: tuple[Writer, ...] = ()

    def name(self, number: int) -> str:
        """The name: index in the list, target and kind."""
        return f"{number:02d}-{self.target}-{self.kind}"


COMBINATIONS: tuple[Combination, ...] = (
    Combination("weak", "revised"),
    Combination("weak", "on_policy", LONG),
    Combination("weak", "off_policy", writers=(GOOD, POOR)),
    Combination("weak", "stronger", writers=(STRONG,)),
    Combination("middling", "revised", ERRING, reviser_error=0.5, polish=True),
    Combination("middling", "on_policy", FINE),
    Combination("middling", "off_policy", ERRING, writers=(POOR, BAD)),
    Combination("middling", "swapped"),
    Combination("fair", "revised", pairs=SMALL),
    Combination("fair", "on_policy", ERRING, pairs=SMALL),
    Combination("fair", "off_policy", writers=(STRONG, POOR)),
    Combination("fair", "stronger", CHANCE, writers=(POOR,)),
    Combination("able", "revised", FIRST),
    Combination("able", "off_policy", writers=(POOR, BAD)),
    Combination("able", "stronger", writers=(POOR,)),
    Combination("able", "exchanged"),
    Combination("strong", "revised", polish=True),
    Combination("strong", "off_policy", LONG, writers=(GOOD, POOR)),
    Combination("strong", "stronger", writers=(GOOD,)),
    Combination("strong", "on_policy", FINE),
    Combination("raw", "revised", CHANCE, reviser_error=0.3),
    Combination("raw", "off_policy", writers=(BAD, BAD), pairs=SMALL),
    Combination("raw", "stronger", ERRING, writers=(STRONG,), pairs=SMALL),
    Combination("raw", "swapped", FIRST),
)


# ---- models and pairs


def written(writer: Writer, task: Task, rng: Random) -> str:
    """A writer's answer to a task, drawn by the writer's shares."""
    sentence = task.right if rng.random() < writer[0] else task.wrong
    return add_style(sentence, rng.choices(STYLES, writer[1])[0], rng)


def prompt_rows(combination: Combination, number: int, target: Path) -> list[dict[str, Any]]:
    """Three prompts per pair, with answers if the kind of data set needs them."""
    from recipes.experiments.paper_mini.answers import answers

    tasks, rng = distinct_tasks("train", 3 * combination.pairs, seed=100 + number), Random(f"writers-{number}")
    rows: list[dict[str, Any]] = [{"id": task.id, "prompt": task.prompt} for task in tasks]
    if combination.kind == "off_policy":
        return [
            {**row, "answers": [written(w, t, rng) for w in combination.writers]}
            for row, t in zip(rows, tasks, strict=True)
        ]
    if combination.kind == "stronger":
        target_answers = answers(target, tasks, temperature=1.0, seed=number)
        answer_pairs = [
            [answer, written(combination.writers[0], task, rng)]
            for answer, task in zip(target_answers, tasks, strict=True)
        ]
        return [{**row, "answers": pair, "scores": [0, 1]} for row, pair in zip(rows, answer_pairs, strict=True)]
    return rows


def build_pairs(combination: Combination, number: int, target: Path, folder: Path, url: str) -> Path:
    """Build the pairs of a combination, with swapped or exchanged labels if its kind says so. Returns their folder."""
    import json

    from clair.pipeline.build import build
    from clair.pipeline.config import BuildConfig

    folder.mkdir(parents=True, exist_ok=True)
    rows = prompt_rows(combination, number, target)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    target_config = {"path": str(target), "temperature": 1.0, "max_tokens": 96, "batch_size": 64}
    judge = {"url": url, "model": "world-judge", "id": f"judge-{number}", "order": "random"}
    recipe: dict[str, Any] = {
        "pipeline": "judged",
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "accept": combination.pairs,
        "test_fraction": 0.0,
        "concurrency": 32,
        "out": str(folder / "built"),
    }
    if combination.kind in ("revised", "swapped", "exchanged"):
        reviser = {"url": url, "model": "world-reviser", "id": f"reviser-{number}"}
        recipe |= {"pipeline": "revised", "target": target_config, "reviser": reviser}
    elif combination.kind == "on_policy":
        recipe |= {"target": target_config, "judge": judge}
    elif combination.kind == "off_policy":
        recipe |= {"judge": judge}
    build(resolve(BuildConfig, recipe))
    if combination.kind in ("swapped", "exchanged"):
        return relabelled(folder / "built", folder / combination.kind, number, half=combination.kind == "swapped")
    return folder / "built"


def relabelled(source: Path, out: Path, seed: int, *, half: bool) -> Path:
    """Write the pairs with chosen and rejected exchanged, in half of them or in all. Returns the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clair.data.dataset import read_rows, schema, split_file
    from recipes.world.swapped import swapped

    rows = list(read_rows(source))
    changed = swapped(rows, seed) if half else [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    file = out / split_file("train")
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(changed, schema=schema()), file)
    return out


# ---- advice and runs


def prepare(combination: Combination, number: int, run: Path) -> dict[str, Any]:
    """Build the pairs, run `apo advise` with and without the judge, and score the untrained target. Returns a line."""
    from apo.advice.config import AdviseConfig
    from apo.advice.rule import Evidence, advise
    from apo.advice.run import run as run_advice
    from apo.analysis.distinguishability import Interval
    from recipes.experiments.paper_mini.answers import answers, scored

    started, folder, target = time.monotonic(), run / combination.name(number), run / "models" / combination.target
    shutil.rmtree(folder, ignore_errors=True)
    options = ServerOptions(
        max_seconds=900,
        seed=number,
        leanings=combination.judge,
        reviser_error=combination.reviser_error,
        polish=combination.polish,
    )
    with running(options, start_seconds=120) as server:
        pairs = build_pairs(combination, number, target, folder, server.url)
        judge = {"url": server.url, "model": "world-judge", "id": f"advice-{number}"}
        model = {"path": str(target), "temperature": 1.0, "max_tokens": 96, "batch_size": 64}
        recipe = {"dataset": str(pairs), "model": model, "judge": judge, "out": str(folder / "advice")}
        result = run_advice(resolve(AdviseConfig, recipe)).result
    assert result is not None, f"{combination.name(number)}: the judge did not answer"
    evidence: dict[str, Any] = {
        key: Interval(**value) if isinstance(value, Mapping) else value for key, value in result["evidence"].items()
    }
    without_judge = advise(replace(Evidence(**evidence), win=None, right=None))
    tasks = distinct_tasks("heldout", QUESTIONS, seed=7)
    return {
        "pairs": result["sample"]["pairs"],
        "advice": result["advice"],
        "alone": asdict(without_judge),
        "distrust": (result["judge"] or {}).get("distrust"),
        "evidence": result["evidence"],
        "contrast": result["contrast"],
        "base": scored(tasks, answers(target, tasks)),
        "dataset": str(pairs),
        "seconds": round(time.monotonic() - started, 1),
    }


@dataclass(frozen=True)
class TrainingJob:
    """The settings of one training run."""

    name: str
    dataset: str
    target: str
    objective: str
    beta: float
    learning_rate: float
    seed: int
    out: str
    trainer: Mapping[str, Any] = field(default_factory=dict)


def training_jobs(advised: Mapping[str, Mapping[str, Any]], run: Path) -> Iterator[TrainingJob]:
    """All runs of the combinations that have an advice, seed by seed."""
    for seed in SEEDS:
        for number, combination in enumerate(COMBINATIONS):
            line = advised.get(combination.name(number))
            if line is None:
                continue
            beta = line["advice"]["beta"] or BETA
            for objective, rate in RATES.items():
                name = f"{combination.name(number)}/{objective}/{seed}"
                target = str(run / "models" / combination.target)
                out = str(run / "work" / name.replace("/", "-"))
                yield TrainingJob(name, line["dataset"], target, objective, beta, rate, seed, out)


def train_and_score(job: TrainingJob) -> dict[str, Any]:
    """Train and answer the held-out tasks. Returns a line. A run that training stops has no right answer."""
    from apo.monitoring.failures import TrainingStopped
    from apo.training.config import TrainConfig
    from apo.training.train import train
    from recipes.experiments.paper_mini.answers import answers, scored

    started, out = time.monotonic(), Path(job.out)
    shutil.rmtree(out, ignore_errors=True)
    trainer = {
        "learning_rate": job.learning_rate,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 20,
        "save_strategy": "no",
        "use_cpu": True,
    }
    config = TrainConfig.model_validate(
        {
            "model": job.target,
            "dataset": job.dataset,
            "objective": job.objective,
            "beta": job.beta,
            "seed": job.seed,
            "probe": 0,
            "eval": False,
            "trainer": trainer,
            "out": job.out,
        }
    )
    scores: dict[str, Any] = {"right": "0" * QUESTIONS}
    try:
        train(config, log=lambda _: None)
        tasks = distinct_tasks("heldout", QUESTIONS, seed=7)
        scores = scored(tasks, answers(out, tasks))
    except TrainingStopped as stop:
        scores["broke_off"] = str(stop)
    shutil.rmtree(out, ignore_errors=True)
    plan = {"objective": job.objective, "beta": job.beta, "learning_rate": job.learning_rate, "seed": job.seed}
    return {**plan, **scores, "seconds": round(time.monotonic() - started, 1)}


# ---- the measurement


def world() -> str:
    """The id of this design; results of another design do not count."""
    size = [QUESTIONS, EPOCHS, BATCH, tuple(RATES), SEEDS]
    return content_hash([[asdict(c) for c in COMBINATIONS], {k: asdict(v) for k, v in TARGETS.items()}, size])[:16]


def is_at_tuned_rate(line: Mapping[str, Any]) -> bool:
    """True if a line is a run at its objective's tuned rate. Earlier runs at the advised rate do not count."""
    return line["kind"] == "run" and line["learning_rate"] == RATES[line["objective"]]


def measure(run: Path, file: Path, workers: int, log: Callable[[str], None]) -> None:
    """Run the missing advice and training runs, and append a line for each to `file`."""
    with lock_output(run), make_pool(workers) as pool:
        for name in TARGETS:
            log(f"target {name}: {'trained' if make(name, run / 'models', 1, TARGETS) else 'exists already'}")
        lines = [line for line in results.read(file) if line["world"] == world()]
        advised = {line["name"]: line for line in lines if line["kind"] == "advice"}
        to_rebuild = {name for name, line in advised.items() if not Path(line["dataset"]).exists()}
        missing = {combination.name(n): (combination, n, run) for n, combination in enumerate(COMBINATIONS)}
        jobs = {name: job for name, job in missing.items() if name not in advised or name in to_rebuild}
        for name, line in completed(pool, prepare, jobs):
            if name not in to_rebuild:
                advised[name] = {"kind": "advice", "world": world(), "name": name, **line, **provenance()}
                results.append(file, advised[name])
            log(f"{name}: {line['advice']['objective']} ({line['advice']['sure']}), {line['seconds']:.0f} s")
        done_names = {line["name"] for line in lines if is_at_tuned_rate(line)}
        remaining = {job.name: (job,) for job in training_jobs(advised, run) if job.name not in done_names}
        log(f"{len(done_names)} runs are finished, {len(remaining)} are missing")
        for name, line in completed(pool, train_and_score, remaining):
            results.append(file, {"kind": "run", "world": world(), "name": name, **line})
            right = line["right"].count("1") / len(line["right"])
            log(f"{name}: {right:.1%} right, {line['seconds']:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the advice; finished runs are not repeated.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT
    with ending_in_one_line("advice"):
        measure(RUN, RESULTS, args.workers, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
