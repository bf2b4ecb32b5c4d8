"""Accuracy on users whom a reward was not fitted on, as a function of how many of their comparisons it is given.

In each of several random splits, a share of the users is set aside. The reward (PAL or VPL) and Bradley-Terry are
fitted on the others. Each user set aside is then located by n of their comparisons, and tested on the same further ones
for all n: those of the dataset's test split if the user has any there, else a fifth of theirs, at least `MIN_TEST`. A
reward of the user alone, ridge regression on the same n comparisons, shows what the others contribute.

    recipe.json       the recipe, and the hash of the comparisons and their features
    splits/N.json     the results of a finished split, which is not measured again
    curve.json/.png   the means over users, with intervals clustered by user, and their picture
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from apo.rewards.model_selection import fit_best
from apo.rewards.scorer import Comparisons, accuracy, split
from clair.core.errors import UserError
from clair.core.files import read_json, write_json
from clair.core.out_folder import check_out_folder, check_unchanged
from clair.core.recipe import changed_keys, resolved
from clair.core.statistics import clustered_mean, clustered_score

if TYPE_CHECKING:
    from apo.rewards.config import CurveConfig

METHODS = ("adapted", "bradley_terry", "alone")
"""The measured accuracies: of the located user's reward, of the reward for all users, of a reward of the user alone."""
MIN_TEST = 5
"""The fewest comparisons that an unseen user is tested on."""


def check_folder(config: CurveConfig, data: str | None = None) -> None:
    """Check that `out` is new, or of the same recipe and, if given, of the same hash of the data. Raises UserError."""
    file = config.out / "recipe.json"
    check_out_folder(config.out, "curve of unseen users", {file.name})
    recipe = {key: value for key, value in resolved(config).items() if key not in ("out", "splits")}
    if file.exists():
        old = read_json(file)
        changed = changed_keys(old, {**recipe, "data": data or old["data"]})
        check_unchanged(f"out {config.out}", "the curve of another recipe or dataset", changed)
    if data:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(file, {**recipe, "data": data})


def measure(
    config: CurveConfig, data: Comparisons, is_test: Sequence[bool], log: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Return the accuracies of every split, user and number of comparisons; finished splits are read from `out`.

    Raises UserError if no two users have comparisons enough, or if all would be set aside.
    """
    test_rows = torch.tensor(is_test)
    training, test = data.select((~test_rows).nonzero().squeeze(1)), data.select(test_rows.nonzero().squeeze(1))
    able = [user for user in range(len(data.users)) if _divide(training.by_user(user), test.by_user(user))]
    count = max(2, round(config.unseen * len(able)))
    if len(able) < 3:
        raise UserError(
            f"{len(able)} of {len(data.users)} users have one comparison to be located by and {MIN_TEST} to be tested "
            "on; at least three such users are needed"
        )
    results = []
    for number in range(config.splits):
        file = config.out / "splits" / f"{number}.json"
        if not file.exists():
            rows = _measure_split(config, training, test, able, min(count, len(able) - 1), config.seed + number)
            write_json(file, {"rows": [{"split": number, "user": data.users[user], **row} for user, row in rows]})
            log(f"split {number + 1} of {config.splits}")
        results += read_json(file)["rows"]
    return results


def _divide(training: Comparisons, test: Comparisons) -> tuple[Comparisons, Comparisons] | None:
    """Return the comparisons that locate a user and those that test them; None if there are too few."""
    if not len(test):
        held_out = max(MIN_TEST, len(training) // 5)
        test, training = (
            training.select(range(len(training))[-held_out:]),
            training.select(range(len(training))[:-held_out]),
        )
    return (training, test) if len(training) and len(test) >= MIN_TEST else None


def _measure_split(
    config: CurveConfig, training: Comparisons, test: Comparisons, able: Sequence[int], count: int, seed: int
) -> list[tuple[int, dict[str, Any]]]:
    random = torch.Generator().manual_seed(seed)
    unseen = [able[index] for index in torch.randperm(len(able), generator=random)[:count].tolist()]
    seen = training.select((~torch.isin(training.user, torch.tensor(unseen))).nonzero().squeeze(1))
    subsets = split(seen, (0.9, 0.1), seed)
    options = {**config.fit_options(), "seed": seed}
    scorer = fit_best(config.kind, training, *subsets, **options)
    bradley_terry = fit_best("bradley_terry", training, *subsets, seed=seed)
    rows = []
    for user in unseen:
        comparisons = training.by_user(user)
        order = torch.randperm(len(comparisons), generator=random)
        divided = _divide(comparisons.select(order), test.by_user(user))
        assert divided is not None
        context, held_out = divided
        shared = accuracy(bradley_terry, held_out, torch.zeros(len(held_out), 0))
        for shots in config.shots:
            if shots > len(context):
                break
            some = context.select(range(shots))
            adapted = accuracy(scorer, held_out, scorer.adapt(some).expand(len(held_out), -1))
            alone = _accuracy_alone(some, held_out)
            rows.append((user, {"shots": shots, "adapted": adapted, "bradley_terry": shared, "alone": alone}))
    return rows


def _accuracy_alone(context: Comparisons, test: Comparisons) -> float:
    """The accuracy of a linear reward of one user: ridge regression in which each difference is to score 1.

    It reads all directions of the features: projected ones made it worse on personas.
    """
    x = (context.chosen - context.rejected).double()
    x = x / x.norm(dim=1).mean().clamp(min=1e-12)
    penalty = 0.1 * torch.eye(len(x), dtype=x.dtype)
    weights = x.T @ torch.linalg.solve(x @ x.T + penalty, torch.ones(len(x), dtype=x.dtype))
    margin = (test.chosen - test.rejected).double() @ weights
    return float(((margin > 0).float() + (margin == 0).float() / 2).mean())


def summarise(results: Sequence[dict[str, Any]], config: CurveConfig) -> dict[str, Any]:
    """Return the means of the accuracies, and how far the located users' lead, with 95 % intervals clustered by user.

    A number of comparisons that fewer than two users have is left out, with a note.
    """
    points, notes = [], []
    for shots in config.shots:
        rows = [row for row in results if row["shots"] == shots]
        users = [row["user"] for row in rows]
        if len(set(users)) < 2:
            notes.append(
                f"{len(set(users))} users have {shots} comparisons and {MIN_TEST} more; that point is left out"
            )
            continue
        estimates = {name: clustered_score([row[name] for row in rows], users)._asdict() for name in METHODS}
        for name in METHODS[1:]:
            lead = clustered_mean([row["adapted"] - row[name] for row in rows], users)
            estimates[f"over_{name}"] = lead._asdict()
        points.append({"shots": shots, "users": len(set(users)), **estimates})
    return {"kind": config.kind, "splits": config.splits, "points": points, "notes": notes}
