"""VPL's accuracy on users it was not fitted on, after 2, 4 and 8 of their comparisons: random ones, or chosen ones.

    python -m recipes.experiments.vpl.contexts --seeds 3                                 # vectors: four types of user
    python -m recipes.experiments.vpl.contexts --data data/users --model M --seeds 3     # users of aspects.py

A seed is another fit, another set of unseen users (a fifth of those of the data) and another draw of contexts. Chosen
comparisons are those whose answer says most about the user (`next_question`, BALD), from the same pool as the random
ones; all are tested on the same further comparisons. With `--bounded`, the latent is clamped and scaled as in the
released code. A line for each seed goes to the results; finished seeds are not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from apo.rewards.model_selection import fit_best
from apo.rewards.scorer import Comparisons, accuracy, split
from apo.rewards.vpl import VPL, next_question
from clair.core.errors import UserError
from clair.core.files import write_atomically
from clair.core.statistics import Estimate, clustered_mean
from recipes.world import toy

SIZES = (2, 4, 8)
POOL = 30
"""Comparisons of an unseen user that a context is drawn from, at most half of theirs."""
RESULTS = Path(__file__).parent / "results" / "contexts.jsonl"
Data = tuple[Comparisons, Comparisons]
"""Comparisons of the users to fit on, and of unseen ones."""


def four_types(seed: int) -> Data:
    """Users who each care for one of four coordinates of eight."""

    def as_comparisons(drawn: toy.ToyComparisons, count: int) -> Comparisons:
        chosen, rejected = (torch.tensor(side, dtype=torch.float32) for side in (drawn.chosen, drawn.rejected))
        names = tuple(map(str, range(count)))
        return Comparisons(torch.zeros(len(chosen), 1), chosen, rejected, torch.tensor(drawn.user), names)

    seen, unseen = toy.four_types(400, 40, 1000 * seed), toy.four_types(80, 60, 1000 * seed + 77)
    return as_comparisons(seen, 400), as_comparisons(unseen, 80)


def of_aspects(folder: Path, model: str) -> Callable[[int], Data]:
    """The users of `aspects.py`, with features of a frozen model: each pair is read once, whoever compared it."""
    from apo.analysis.features import encode_rows, read_rows

    rows = read_rows([str(folder)])
    pairs: dict[str, dict[str, Any]] = {}
    keys = []
    for row in rows:
        if row["user"] is None:
            raise UserError(f"{folder}: row {row['id']} has no user; give the folder that aspects.py wrote")
        key = json.dumps([row["prompt"], *sorted(map(json.dumps, (row["chosen"], row["rejected"])))])
        keys.append(key)
        pairs.setdefault(key, {**row, "id": str(len(pairs))})
    encoded = encode_rows([*pairs.values()], model)
    index = {row["id"]: number for number, row in enumerate(encoded.rows)}  # without those too long for the model
    known = [(row, pairs[key]) for row, key in zip(rows, keys, strict=True) if pairs[key]["id"] in index]
    rows, order = [row for row, _ in known], [index[pair["id"]] for _, pair in known]
    same = torch.tensor([row["chosen"] == pair["chosen"] for row, pair in known])[:, None]
    prompt, first, second = (getattr(encoded.features, name)[order] for name in ("prompt", "chosen", "rejected"))
    names = tuple(dict.fromkeys(row["user"] for row in rows))
    user = torch.tensor([names.index(row["user"]) for row in rows])
    data = Comparisons(prompt, first.where(same, second), second.where(same, first), user, names)
    held_out = torch.tensor([row["split"] == "test" for row in rows])

    def draw(seed: int) -> Data:
        shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        is_new = torch.isin(user, shuffled[: max(2, len(names) // 5)])
        seen, unseen = (data.select(rows.nonzero().squeeze(1)) for rows in (~is_new & ~held_out, is_new))
        return seen, unseen

    return draw


def measure(data: Data, seed: int, *, bounded: bool) -> dict[str, Any]:
    """The accuracy of Bradley-Terry and of VPL, by way and size of the context, for each unseen user."""
    seen, unseen = data
    training, valid = split(seen, (0.9, 0.1), seed)
    vpl = fit_best("vpl", seen, training, valid, bounded=bounded, seed=seed)
    assert isinstance(vpl, VPL)
    shared = fit_best("bradley_terry", seen, training, valid, seed=seed)
    random = torch.Generator().manual_seed(seed)
    users: dict[str, dict[str, float]] = {}
    for user in unseen.user.unique().tolist():
        comparisons = unseen.by_user(user)
        order = torch.randperm(len(comparisons), generator=random)
        stop = min(POOL, len(order) // 2)
        if stop < SIZES[-1]:
            raise UserError(f"user {unseen.users[user]!r} has {len(order)} comparisons; {2 * SIZES[-1]} are needed")
        pool, test = comparisons.select(order[:stop]), comparisons.select(order[stop:])
        chosen: list[int] = []
        while len(chosen) < SIZES[-1]:
            chosen.append(next_question(vpl, pool, pool.select(chosen), excluded=set(chosen), seed=len(chosen))[0])
        result = {"bradley_terry": accuracy(shared, test, torch.zeros(len(test), 0))}
        for size in SIZES:
            for way, indices in (("random", range(size)), ("active", chosen[:size])):
                state = vpl.adapt(pool.select(indices))
                result[f"{way} {size}"] = accuracy(vpl, test, state.expand(len(test), -1))
        users[unseen.users[user]] = result
    return {"seed": seed, "bounded": bounded, "active_units": vpl.health(training).active_units, "users": users}


def estimates(lines: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """The mean of each accuracy over users, with its interval over the seeds."""
    by_name = {}
    for name in next(iter(lines[0]["users"].values())):
        means = [sum(r[name] for r in line["users"].values()) / len(line["users"]) for line in lines]
        by_name[name] = clustered_mean(means, range(len(means)))
    return by_name


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of VPL by the number of comparisons, random and chosen.")
    parser.add_argument("--data", type=Path, help="a folder of aspects.py; without it vectors of four types")
    parser.add_argument("--model", help="the frozen model that reads the pairs of --data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bounded", action="store_true")
    args = parser.parse_args()
    if (args.data is None) != (args.model is None):
        parser.error("--data needs --model, and the other way round")
    try:
        draw = of_aspects(args.data, args.model) if args.data else four_types
        world = args.data.name if args.data else "four types"
        text = args.results.read_text("utf-8") if args.results.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        for seed in range(args.seeds):
            if not any((line["world"], line["bounded"], line["seed"]) == (world, args.bounded, seed) for line in lines):
                lines.append({"world": world, **measure(draw(seed), seed, bounded=args.bounded)})
                args.results.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(args.results, "".join(json.dumps(line) + "\n" for line in lines))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    mine = [line for line in lines if (line["world"], line["bounded"]) == (world, args.bounded)]
    if len(mine) > 1:
        for name, estimate in estimates(mine).items():
            print(f"{name:<14} {estimate.mean:.3f} [{estimate.lo:.3f}, {estimate.hi:.3f}]")


if __name__ == "__main__":
    main()
