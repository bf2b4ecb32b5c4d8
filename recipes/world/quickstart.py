"""The quickstart: prompts, pairs, APO-zero, and held-out accuracy before and after, on the embedded world.

    python -m recipes.world.quickstart          # from the repository's root; `make quickstart` does just this

Everything lands in runs/quickstart. Run again, it does only what is not done yet. `summary.json` holds accuracies and
their differences as fractions (0.05 is 5 points):

    base, tuned       accuracy of the model before, and after APO-zero, on the held-out tasks, greedy, exact answer
    delta, ci95       tuned - base, and its 95 % interval [lo, hi], clustered by task template
    sft               accuracy after training on the winners only, same budget
    swapped           the same for APO-zero on pairs of which a random half is swapped: the mean of two runs, the second
                      on the mirror image of the first (see `swapped.py`); each is in swapped_runs
    n, templates      held-out tasks, and the clusters they form
    by_skill          the accuracies for each skill
    pairs, dropped    of the dataset; they add up to the prompts
    seconds           of all steps, each counted when it was last done; by_step tells them apart
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes.world.reviser import Misbehaviour
from recipes.world.running import ROOT, running
from recipes.world.server import ServerOptions
from recipes.world.swapped import write_swapped
from recipes.world.tasks import Task, distinct_tasks, write_prompts

RUN = Path("runs/quickstart")
RECIPES = Path("recipes/quickstart")
MODELS = {
    "base": Path("recipes/world/model"),
    "tuned": RUN / "apo_zero",
    "sft": RUN / "sft",
    "swapped": RUN / "swapped",
    "mirrored": RUN / "mirrored",
}
PROMPTS = 1200
HELDOUT = 600
SOME_ROWS_FAILED = 3  # exit code of `clair build`; the dataset is complete without those rows

# A realistic server. Each rate is a share of the requests.
SERVER = ServerOptions(
    max_seconds=1800,
    slow_seconds=1.5,
    misbehaviour=Misbehaviour(
        too_many=0.03,
        server_error=0.02,
        slow=0.01,
        refusal=0.02,
        label_in_reasoning=0.03,
        truncation=0.02,
        allusion=0.02,
    ),
)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Measure one step and record its seconds in runs/quickstart/seconds.json."""
    started = time.monotonic()
    yield
    file = RUN / "seconds.json"
    seconds = json.loads(file.read_text("utf-8")) if file.exists() else {}
    # A step that was done before takes no time; record the time that it took when it did the work.
    seconds[name] = max(seconds.get(name, 0.0), round(time.monotonic() - started, 1))
    file.write_text(json.dumps(seconds, indent=2) + "\n", "utf-8")


def command(*arguments: str | Path, allowed: tuple[int, ...] = (0,)) -> None:
    """Print a command of `clair` or `apo` and run it as a user would. Raises SystemExit if it fails."""
    shown = " ".join(map(str, arguments))
    print(f"\n$ {shown}", flush=True)
    program = Path(sys.executable).with_name(str(arguments[0]))
    code = subprocess.run([program, *map(str, arguments[1:])], check=False).returncode
    if code not in allowed:
        print(
            f"quickstart: `{shown}` ended with exit code {code}; `make quickstart` goes on from here", file=sys.stderr
        )
        raise SystemExit(code)


def make_prompts(path: Path) -> None:
    """Write the training prompts: texts and ids, no answers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_prompts(path, distinct_tasks("train", PROMPTS, seed=0))
    print(f"{PROMPTS} training prompts in {path}")


def build_pairs() -> None:
    """Build the pairs: answers of the tiny model, revisions of the embedded server."""
    with running(SERVER) as server:
        command(
            "clair",
            "build",
            RECIPES / "clair.yaml",
            "--set",
            f"reviser.url={server.url}",
            allowed=(0, SOME_ROWS_FAILED),
        )
        stats = server.stats()
    statuses = ", ".join(f"{count} x {status}" for status, count in stats["statuses"].items()) or "nothing"
    print(f"the reviser's server answered {statuses}; {stats['paid_more_than_once']} requests were paid for twice")


def train_all() -> None:
    """Train on the pairs, on the chosen answers alone, and on both sets of swapped pairs."""
    with step("apo_zero"):
        command("apo", "train", RECIPES / "apo_zero.yaml")
    with step("sft"):
        command("apo", "train", RECIPES / "sft.yaml")
    for name in ("swapped", "mirrored"):
        pairs = RUN / f"{name}_pairs"
        write_swapped(RUN / "pairs", pairs, seed=0, mirror=name == "mirrored")
        with step(name):
            command("apo", "train", RECIPES / "apo_zero.yaml", "--set", f"dataset={pairs}", "--out", MODELS[name])


def answers_of(name: str, tasks: list[Task]) -> list[str]:
    """The greedy answers of one of the models; read from a file if these weights answered these tasks before."""
    from clair.inference.model_folder import weights_identity
    from recipes.world.evaluate import greedy_answers

    file = RUN / "answers" / f"{name}.json"
    request = {"model": weights_identity(MODELS[name]), "tasks": [task.id for task in tasks]}
    if file.exists():
        stored = json.loads(file.read_text("utf-8"))
        if stored["asked"] == request:
            return stored["answers"]
    answers = greedy_answers(MODELS[name], tasks)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"asked": request, "answers": answers}, indent=1) + "\n", "utf-8")
    return answers


def accuracies(tasks: list[Task], scored: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """For `all` and for each skill: the accuracy of each model; `swapped` is the mean of the two swapped runs."""
    from recipes.world.evaluate import by_skill

    scored = {
        **{name: scored[name] for name in ("base", "tuned", "sft")},
        "swapped": [(left + right) / 2 for left, right in zip(scored["swapped"], scored["mirrored"], strict=True)],
    }
    skills = {name: by_skill(tasks, values) for name, values in scored.items()}
    table = {skill: {name: skills[name][skill] for name in scored} for skill in skills["base"]}
    return {"all": {name: sum(values) / len(values) for name, values in scored.items()}} | table


def summarize(tasks: list[Task], scored: dict[str, list[float]]) -> dict[str, Any]:
    """The content of summary.json; see the top of this file."""
    from clair.core.statistics import clustered_mean

    differences = [tuned - base for base, tuned in zip(scored["base"], scored["tuned"], strict=True)]
    gain = clustered_mean(differences, [task.template for task in tasks])
    table = accuracies(tasks, scored)
    overall = table.pop("all")
    counts = json.loads((RUN / "pairs" / "manifest.json").read_text("utf-8"))["counts"]
    seconds = json.loads((RUN / "seconds.json").read_text("utf-8"))
    return {
        "base": overall["base"],
        "tuned": overall["tuned"],
        "delta": gain.mean,
        "ci95": [gain.lo, gain.hi],
        "n": gain.n,
        "templates": gain.clusters,
        "by_skill": table,
        "sft": overall["sft"],
        "swapped": overall["swapped"],
        "swapped_runs": [sum(scored[name]) / gain.n for name in ("swapped", "mirrored")],
        "pairs": counts["pairs"],
        "dropped": counts["dropped"],
        "seconds": round(sum(seconds.values()), 1),
        "by_step": seconds,
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table, the difference with its interval, and the files to look at."""
    from rich.console import Console
    from rich.table import Table

    rows = {
        "base": "as it was",
        "tuned": "APO-zero",
        "sft": "SFT on the winners",
        "swapped": "APO-zero, swapped pairs",
    }
    table = Table(title=f"Right answers to {summary['n']} held-out tasks, per cent")
    for heading in ("model", "all", *summary["by_skill"]):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, label in rows.items():
        values = [summary[name], *(skill[name] for skill in summary["by_skill"].values())]
        table.add_row(label, *(f"{100 * value:.1f}" for value in values))
    console = Console(highlight=False, soft_wrap=True)
    console.print()
    console.print(table)
    low, high = summary["ci95"]
    console.print(
        f"APO-zero minus base: {100 * summary['delta']:+.1f} points, "
        f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}\n"
        f"(clustered by {summary['templates']} task templates). {summary['pairs']} pairs from "
        f"{summary['pairs'] + summary['dropped']} prompts, {summary['seconds']:.0f} s in all.\n\n"
        f"Where to look:\n"
        f"  {RUN}/summary.json               these numbers\n"
        f"  clair show {RUN}/pairs           the pairs, word by word (clair report: a page)\n"
        f"  {RUN}/pairs/dropped.jsonl        why a prompt gave no pair\n"
        f"  {RUN}/apo_zero/dynamics.png      what training did to winners and losers\n"
        f"  {RUN}/answers/tuned.json         what the trained model says"
    )


def main() -> None:
    os.chdir(ROOT)
    # Idle OpenMP threads sleep instead of spinning: on a busy machine small models run many times faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    make_prompts(RUN / "prompts.jsonl")
    with step("pairs"):
        build_pairs()
    train_all()
    with step("evaluation"):
        from recipes.world.evaluate import scores

        tasks = distinct_tasks("heldout", HELDOUT, seed=0)
        scored = {name: scores(tasks, answers_of(name, tasks)) for name in MODELS}
    summary = summarize(tasks, scored)
    (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    show(summary)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nquickstart: stopped; run it again to go on from here", file=sys.stderr)
        raise SystemExit(130) from None
