"""One policy for all users, one for each group, or one that reads its user's taste: whom does each serve?

    python -m recipes.experiments.tastes.conditioned --out runs/conditioned --seeds 0 1 2 100

Twenty users of two groups with opposite tastes give 50 comparisons each; ten more, whom no policy is trained on, give
eight. All policies are trained on the same 1,000 pairs, from the same base, with the same options:

    pooled        one policy for all
    by_group      one for each group that PAL infers; a new user joins a group by the eight comparisons
    conditioned   one that reads z, VPL's mean for the user, as a soft prompt in front of the turn; a new user's z is
                  read from the eight comparisons
    mismatched    the same policy with the z of a user of the other group: if the prompt matters, it serves nobody

A line for each seed has, by policy and user, the wins against the base on held-out tasks, greedy, one digit a task:
2 for a win, 1 for a tie, 0 for a loss. Run it again to go on; finished seeds stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clair.core.files import write_atomically
from clair.core.statistics import Estimate, clustered_mean, wilson
from recipes.experiments.paper_mini.answers import MAX_NEW_TOKENS, answers
from recipes.experiments.tastes.run import EACH, HELDOUT, REWARDS, TRAIN, USERS, apo, make_base, settings
from recipes.experiments.tastes.users import comparisons, group_of, liking
from recipes.world.tasks import Task, distinct_tasks

NEW_USERS, NEW_EACH = 10, 8
POLICIES = ("pooled", "by_group", "conditioned", "mismatched")
RESULTS = Path(__file__).parent / "results" / "conditioned.jsonl"
BATCH = 500


def answers_for(folder: Path, states: Mapping[str, Sequence[float]], tasks: Sequence[Task]) -> dict[str, list[str]]:
    """The greedy answers of a policy with a soft prompt to all tasks, for each user by their state."""
    import apo as package

    loaded: tuple[Any, Any, Any] = package.load_for_user(folder, next(iter(states.values())))
    model, tokenizer, prompt = loaded
    prompt.states = torch.tensor([[*state] for state in states.values()])
    turns = [[{"role": "user", "content": task.prompt}] for task in tasks]
    ids = [tokenizer(str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)),
                     add_special_tokens=False)["input_ids"] for turn in turns]  # fmt: skip
    rows = sorted(
        ((user, task) for user in range(len(states)) for task in range(len(tasks))), key=lambda r: len(ids[r[1]])
    )
    texts: dict[tuple[int, int], str] = {}
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        length = max(len(ids[task]) for _, task in batch)
        pads = [[tokenizer.pad_token_id] * (length - len(ids[task])) for _, task in batch]
        marked = [pad + prompt.mark(ids[task], user) for pad, (user, task) in zip(pads, batch, strict=True)]
        mask = [[0] * len(pad) + [1] * (length - len(pad)) for pad in pads]
        with torch.no_grad():
            out = model.generate(torch.tensor(marked), attention_mask=torch.tensor(mask), do_sample=False,
                                 max_new_tokens=MAX_NEW_TOKENS)  # fmt: skip
        texts |= dict(zip(batch, tokenizer.batch_decode(out[:, length:], skip_special_tokens=True), strict=True))
    return {user: [texts[number, task] for task in range(len(tasks))] for number, user in enumerate(states)}


def wins(policy: Sequence[str], base: Sequence[str], group: int) -> str:
    """A digit for each task: 2 if the group prefers the policy's answer, 1 for a tie, 0 if it prefers the base's."""
    pairs = zip(policy, base, strict=True)
    return "".join(str(1 + (a > b) - (a < b)) for a, b in ((liking(x, group), liking(y, group)) for x, y in pairs))


def measure(base: Path, out: Path, seed: int) -> dict[str, Any]:
    """Run one seed in `out`, by the commands that a user would type; see the module's docstring."""
    out.mkdir(parents=True, exist_ok=True)
    new = {f"u{number}" for number in range(USERS, USERS + NEW_USERS)}
    rows = comparisons(USERS, EACH, seed)
    new_rows = [row for row in comparisons(USERS + NEW_USERS, NEW_EACH, seed + 1000) if row["user"] in new]
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for kind, more in (("pal", {"prototypes": 2}), ("vpl", {})):
        if not (out / kind / "reward.json").exists():
            values = settings(dataset=out / "pairs.jsonl", model=base, kind=kind, seed=seed, **more)
            apo("reward", "fit", REWARDS / "fit.yaml", *values, "--out", out / kind)
        for user in sorted(new):
            file = out / f"{user}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in new_rows if row["user"] == user), "utf-8")
            values = settings(reward=out / kind, comparisons=file)
            apo("reward", "adapt", REWARDS / "adapt.yaml", *values, "--user", user)
        values = settings(dataset=out / "pairs.jsonl", reward=out / kind)
        apo("reward", "score", REWARDS / "score.yaml", *values, "--out", out / f"{kind}.jsonl")
    options = settings(model=base, seed=seed)
    grouped, conditioned = settings(dataset=out / "pal.jsonl"), settings(dataset=out / "vpl.jsonl", by="null")
    apo("train", TRAIN, *options, *grouped, "--out", out / "by_group")
    apo("train", TRAIN, *options, *grouped, "--set", "by=null", "--out", out / "pooled")
    apo("train", TRAIN, *options, *conditioned, "--set", "soft_prompt={}", "--out", out / "conditioned")

    from apo.rewards.reward_dir import Reward

    pal, vpl = Reward.load(out / "pal"), Reward.load(out / "vpl")
    users = [f"u{number}" for number in range(USERS + NEW_USERS)]
    states = {user: vpl.states[user].tolist() for user in users}
    tasks = distinct_tasks("heldout", HELDOUT, seed)
    base_answers, pooled = answers(base, tasks), answers(out / "pooled", tasks)
    by_group = {name: answers(out / "by_group" / name.replace(" ", "-"), tasks) for name in set(pal.groups().values())}
    own = answers_for(out / "conditioned", states, tasks)
    other = {user: own[f"u{(number + 1) % USERS}"] for number, user in enumerate(users)}
    given = {
        user: dict(zip(POLICIES, (pooled, by_group[pal.groups()[user]], own[user], other[user]), strict=True))
        for user in users
    }
    return {
        "seed": seed,
        "wins": {
            policy: {user: wins(given[user][policy], base_answers, group_of(user, 2)) for user in users}
            for policy in POLICIES
        },
    }


def rate(digits: str) -> float:
    """The win rate that the digits of `wins` say."""
    return sum(map(int, digits)) / (2 * len(digits))


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Estimate]]:
    """For each policy the mean win rate of trained and of new users, and that of the user it serves worst in a seed.

    Intervals are over seeds, each another training; of a single seed over its tasks.
    """
    table: dict[str, dict[str, Estimate]] = {}
    for policy in POLICIES:
        table[policy] = {}
        for kind, is_new in (("trained", False), ("new", True)):
            digits = [
                (line["seed"] if len(lines) > 1 else task, int(digit) / 2)
                for line in lines
                for user, row in line["wins"][policy].items()
                if (int(user[1:]) >= USERS) == is_new
                for task, digit in enumerate(row)
            ]
            table[policy][kind] = clustered_mean([value for _, value in digits], [cluster for cluster, _ in digits])
        worst = [min(line["wins"][policy].values(), key=rate) for line in lines]
        rates = list(map(rate, worst))
        alone = len(lines) == 1
        table[policy]["worst"] = of_tasks(worst[0]) if alone else clustered_mean(rates, range(len(rates)))
    return table


def of_tasks(digits: str) -> Estimate:
    """The win rate of one user with its interval over the tasks (Wilson's)."""
    return wilson(rate(digits) * len(digits), len(digits))


def read_results(file: Path) -> list[dict[str, Any]]:
    """The finished seeds of a results file, by seed; none if it does not exist."""
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    return sorted(map(json.loads, lines), key=lambda line: line["seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Whom one policy, one for each group and a conditioned one serve.")
    parser.add_argument("--out", type=Path, default=Path("runs/conditioned"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 100])
    args = parser.parse_args()
    make_base(args.out / "base")
    for seed in args.seeds:
        lines = read_results(args.results)
        if seed not in {line["seed"] for line in lines}:
            lines.append(measure(args.out / "base", args.out / f"seed-{seed}", seed))
            args.results.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.results, "".join(json.dumps(line) + "\n" for line in lines))
    lines = read_results(args.results)
    for line in lines:
        for user in line["wins"][POLICIES[0]]:
            cells = (f"{policy} {cell(of_tasks(line['wins'][policy][user]))}" for policy in POLICIES)
            print(f"seed {line['seed']} {user:<4}", "; ".join(cells))
    for policy, row in summary(lines).items():
        print(f"{policy:<12}", "; ".join(f"{kind} {cell(estimate)}" for kind, estimate in row.items()))


def cell(estimate: Estimate) -> str:
    """A share with its interval, inside [0, 1]."""
    return f"{estimate.mean:.3f} [{max(0, estimate.lo):.3f}, {min(1, estimate.hi):.3f}]"


if __name__ == "__main__":
    main()
