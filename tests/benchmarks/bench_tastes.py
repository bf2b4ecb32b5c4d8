"""Users who disagree, on the embedded world: does the gate see it, and whom do one policy or one for each group serve?

    python tests/benchmarks/run.py tastes

For each seed the gate is asked of a world of two groups with opposite tastes and of a world of one group; then the
policies of recipes/experiments/tastes/run.py are trained. `SEEDS` (10) sets how many; Ctrl-C ends with what is done.
`pooled` and `by_group` are win rates against the base, for each of the two groups; the two `pooled` ones
add up to 1 whatever is trained, since the groups are opposites.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def measure() -> dict[str, Any]:
    """The results of the recipe for each seed, and their least, mean and greatest over the seeds."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from recipes.experiments.tastes.run import EACH, HELDOUT, USERS, make_base, policies, select_tastes

    two: list[dict[str, Any]] = []
    single: list[dict[str, Any]] = []
    served: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLAIR_CACHE"] = f"{folder}/cache"
        base, seeds = Path(folder) / "base", range(int(os.environ.get("SEEDS", "10")))
        make_base(base)
        try:
            for seed in seeds:
                _add(two, select_tastes(base, Path(folder) / f"two-{seed}", seed, groups=2))
                _add(single, select_tastes(base, Path(folder) / f"one-{seed}", seed, groups=1))
            for seed, result in zip(seeds, two, strict=True):
                _add(served, policies(base, Path(folder) / f"two-{seed}", seed, result["tastes"]))
        except KeyboardInterrupt:
            print("stopped: what is done is written", file=sys.stderr)
    return {
        "users": USERS,
        "comparisons_each": EACH,
        "heldout_tasks": HELDOUT,
        "two_groups": len(two),
        "two_groups_plural": sum(result["plural"] for result in two),
        "two_groups_two_tastes": sum(result["tastes"] == 2 for result in two),
        "one_group": len(single),
        "one_group_plural": sum(result["plural"] for result in single),
        "policies": len(served),
        "pooled": _spread([rate for result in served for rate in result["pooled"]]),
        "pooled_worst_off": _spread([min(result["pooled"]) for result in served]),
        "by_group": _spread([rate for result in served for rate in result["by_group"]]),
        "by_group_worst_off": _spread([min(result["by_group"]) for result in served]),
        "by_seed": {"two_groups": two, "one_group": single, "policies": served},
    }


def _add(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    print(f"{len(rows)}: {json.dumps(row)}", file=sys.stderr, flush=True)


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    mean = sum(values) / len(values)
    return {name: round(value, 4) for name, value in (("least", min(values)), ("mean", mean), ("most", max(values)))}
