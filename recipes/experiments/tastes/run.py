"""The experiment with users who disagree: select, fit, train one policy for all and one per group, and compare them.

    python -m recipes.experiments.tastes.run --out runs/tastes      # a minute on two quiet cores

`run_experiment` runs the commands that a user would type, for one seed, and returns:

    plural, tastes, gain     what `apo reward select` recommends, and its gain in nats a comparison
    purity                   the share of users who belong to the majority of their inferred group
    pooled, by_group         for each true group the win rate against the base on held-out tasks, greedy, ties one half:
                             of one policy for all, and of the policies for the inferred groups
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from clair.core.errors import EXIT_INTERRUPTED
from recipes.experiments.paper_mini.answers import answers
from recipes.experiments.paper_mini.models import Habits, save_atomically, trained
from recipes.experiments.tastes.users import comparisons, group_of, mean_win_rates, win_rate
from recipes.world.tasks import distinct_tasks

RECIPES = Path(__file__).parents[2]
TRAIN, REWARDS = RECIPES / "tastes" / "apo_zero.yaml", RECIPES / "rewards"
HABITS = Habits(right=0.5, wording=(0.2, 0.6, 0.2), steps=100, seed=7)
"""The base model's greedy answers are plain, and it knows the other styles."""
USERS, EACH, HELDOUT = 20, 50, 100


def make_base(folder: Path) -> None:
    """Make the base model, unless it exists."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        model, tokenizer = trained(HABITS, torch.get_num_threads(), name="base", peak=2e-3, batch=32)
        save_atomically(model, tokenizer, folder, {"habits": asdict(HABITS)})


def apo(*arguments: object) -> None:
    """Run a command of `apo` in this process."""
    from apo.cli import app

    code = app([str(word) for word in arguments], standalone_mode=False)
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code)


def settings(**values: object) -> list[str]:
    """The options that put these values into a recipe."""
    return [argument for key, value in values.items() for argument in ("--set", f"{key}={value}")]


def select_tastes(base: Path, out: Path, seed: int, groups: int) -> dict[str, Any]:
    """Write the comparisons of users of `groups` groups, and run `apo reward select` on them."""
    out.mkdir(parents=True, exist_ok=True)
    rows = comparisons(USERS, EACH, seed, groups=groups)
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    values = settings(dataset=out / "pairs.jsonl", model=base, max_tastes=3, seed=seed)
    apo("reward", "select", REWARDS / "select.yaml", *values, "--out", out / "select.json")
    result = json.loads((out / "select.json").read_text("utf-8"))
    return {"plural": result["plural"], "tastes": result["tastes"], "gain": result["gain"]}


def policies(base: Path, out: Path, seed: int, tastes: int) -> dict[str, Any]:
    """Fit `tastes` groups to the comparisons of `select_tastes`, train the policies, and return their win rates."""
    values = settings(dataset=out / "pairs.jsonl", model=base, kind="pal", prototypes=tastes, seed=seed)
    apo("reward", "fit", REWARDS / "fit.yaml", *values, "--out", out / "taste")
    values = settings(dataset=out / "pairs.jsonl", reward=out / "taste")
    apo("reward", "score", REWARDS / "score.yaml", *values, "--out", out / "grouped.jsonl")
    options = settings(model=base, dataset=out / "grouped.jsonl", seed=seed)
    apo("train", TRAIN, *options, "--out", out / "policies")
    apo("train", TRAIN, *options, "--set", "by=null", "--out", out / "pooled")

    tasks = distinct_tasks("heldout", HELDOUT, seed)
    base_answers = answers(base, tasks)

    def rates(folder: Path) -> list[float]:
        policy_answers = answers(folder, tasks)
        return [win_rate(policy_answers, base_answers, group) for group in (0, 1)]

    groups = json.loads((out / "taste/reward.json").read_text("utf-8"))["groups"]
    folders = {name: out / "policies" / name.replace(" ", "-") for name in set(groups.values())}
    true = {name: [group_of(user, 2) for user in groups if groups[user] == name] for name in folders}
    by_group = mean_win_rates(groups, {name: rates(folder) for name, folder in folders.items()}, 2)
    majority = sum(max(members.count(0), members.count(1)) for members in true.values())
    return {"purity": majority / len(groups), "pooled": rates(out / "pooled"), "by_group": by_group}


def run_experiment(base: Path, out: Path, seed: int) -> dict[str, Any]:
    """Run the whole experiment for two groups; see the module's docstring."""
    result = select_tastes(base, out, seed, groups=2)
    return {**result, **policies(base, out, seed, result["tastes"])}


def main() -> None:
    parser = argparse.ArgumentParser(description="Gate, groups and policies for users who disagree.")
    parser.add_argument("--out", type=Path, default=Path("runs/tastes"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_base(args.out / "base")
    print(json.dumps(run_experiment(args.out / "base", args.out, args.seed), indent=2))


if __name__ == "__main__":
    main()
