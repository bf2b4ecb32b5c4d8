"""The pause before a repeated try."""

from __future__ import annotations

import random


def backoff(attempt: int, first: float, maximum: float = 60.0) -> float:
    """The seconds to wait after `attempt` tries: `first`, doubled by each further one, up to `maximum`.

    A random part, up to half, is taken off, so that clients that failed together do not return together.
    """
    return random.uniform(0.5, 1.0) * min(maximum, first * 2 ** max(0, attempt - 1))
