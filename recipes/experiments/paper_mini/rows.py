"""Format tables as Markdown, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clair.core.statistics import Estimate


def points(value: float) -> str:
    """Return a fraction as points, with its sign."""
    return f"{100 * value:+.1f}"


def with_interval(estimate: Estimate) -> str:
    """Return fractions as points: `+7.1 [+4.0, +10.2]`, or `+7.1 [no interval]` without a standard error."""
    if math.isnan(estimate.se):
        return f"{points(estimate.mean)} [no interval]"
    return f"{points(estimate.mean)} [{points(estimate.lo)}, {points(estimate.hi)}]"


def in_nats(estimate: Estimate) -> str:
    """Return nats with their interval: `+7.12 [+4.03, +10.21]`."""
    return f"{estimate.mean:+.2f} [{estimate.lo:+.2f}, {estimate.hi:+.2f}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is the heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"
