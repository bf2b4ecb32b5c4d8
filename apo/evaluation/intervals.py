"""A mean as result files hold it: with standard error and 95 % interval if there are enough clusters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from clair.core.statistics import Estimate


def mean_with_interval(
    values: Sequence[float], clusters: Sequence[str], estimator: Callable[[Sequence[float], Sequence[str]], Estimate]
) -> dict[str, Any]:
    """The mean of `values` with `se` and `ci95` of a clustered `estimator`, which are None for a single cluster."""
    if len(set(clusters)) < 2:
        return {"mean": math.fsum(values) / len(values), "se": None, "ci95": None}
    estimate = estimator(values, clusters)
    return {"mean": estimate.mean, "se": estimate.se, "ci95": [estimate.lo, estimate.hi]}
