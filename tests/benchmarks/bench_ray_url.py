"""The measurement of bench_ray.py in an object store: see there."""

from __future__ import annotations

import sys
from typing import Any

from tests.benchmarks import bench_ray


def measure() -> dict[str, Any]:
    """The same numbers, of S3 through moto's server and a lease of 5 s instead of a minute."""
    return bench_ray.measure(on_store=True)


if __name__ == "__main__":
    sys.exit("run it by tests/benchmarks/run.py")
