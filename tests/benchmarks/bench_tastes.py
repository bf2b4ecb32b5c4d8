"""Users who disagree, on the embedded world: does the gate see it, and whom do one policy or one for each group serve?

    python tests/benchmarks/run.py tastes

For each seed a world of two groups with opposite tastes goes the whole way of recipes/tastes/run.py, and of a world of
one group the gate is asked. `SEEDS` (10) sets how many. `pooled` and `by_group` are win rates against the base, for
each of the two groups; the mean of the two `pooled` ones is 0.5 whatever is trained, since the groups are opposites.
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
    """By world and seed what recipes/tastes/run.py finds, and the least, mean and greatest of it over the seeds."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from recipes.tastes.run import EACH, HELDOUT, USERS, gate, make_base, way

    seeds = range(int(os.environ.get("SEEDS", "10")))
    with tempfile.TemporaryDirectory() as place:
        os.environ["CLAIR_CACHE"] = f"{place}/cache"
        base = Path(place) / "base"
        make_base(base)
        two, one = [], []
        for seed in seeds:
            two.append(way(base, Path(place) / f"two-{seed}", seed))
            one.append(gate(base, Path(place) / f"one-{seed}", seed, groups=1))
            print(f"seed {seed}: {json.dumps([two[-1], one[-1]])}", file=sys.stderr, flush=True)
    worst = {name: [min(found[name]) for found in two] for name in ("pooled", "by_group")}
    return {
        "users": USERS,
        "comparisons_each": EACH,
        "heldout_tasks": HELDOUT,
        "seeds": len(seeds),
        "plural_of_two": sum(found["plural"] for found in two),
        "two_tastes_of_two": sum(found["tastes"] == 2 for found in two),
        "plural_of_one": sum(found["plural"] for found in one),
        "pooled": _spread([rate for found in two for rate in found["pooled"]]),
        "pooled_worst_off": _spread(worst["pooled"]),
        "by_group": _spread([rate for found in two for rate in found["by_group"]]),
        "by_group_worst_off": _spread(worst["by_group"]),
        "two_groups": two,
        "one_group": one,
    }


def _spread(values: list[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    return {name: round(value, 4) for name, value in (("least", min(values)), ("mean", mean), ("most", max(values)))}
