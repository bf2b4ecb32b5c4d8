"""The growth of a function's cost with its input: a ratio, so that no machine is too slow for it."""

from __future__ import annotations

import time
from collections.abc import Callable


def growth(function: Callable[[str], object], unit: str, *, small: int = 40_000, times: int = 8) -> float:
    """CPU time of `function` on `unit` repeated to `small * times` characters, over that on `small` characters.

    Each is the best of three tries. A linear function gives about `times`, a quadratic one `times` squared.
    """

    def seconds(size: int) -> float:
        text = unit * max(1, size // len(unit))
        best = float("inf")
        for _ in range(3):
            began = time.thread_time()
            function(text)
            best = min(best, time.thread_time() - began)
        return best

    return seconds(small * times) / seconds(small)
