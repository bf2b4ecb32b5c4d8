"""Detect repeated prompts, near duplicates, and questions of a benchmark, by hashes of runs of words."""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_WORD = re.compile(r"\w+")
_SHINGLE = 5
_SKETCH_SIZE = 32
_PROBES = 8
_BENCHMARK_GRAM = 13


def _hashes(text: str, n: int) -> set[int]:
    """64-bit hashes of all runs of n words, lower case, without punctuation. A shorter text is one run."""
    words = _WORD.findall(text.lower())
    runs = (" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))
    return {int.from_bytes(blake2b(run.encode("utf-8", "replace"), digest_size=8).digest()) for run in runs}


def repeated_keys(keys: np.ndarray) -> np.ndarray:
    """True for each key that is equal to an earlier one, [N]."""
    import numpy as np

    repeated = np.ones(len(keys), dtype=bool)
    repeated[np.unique(keys, return_index=True)[1]] = False
    return repeated


@dataclass(slots=True)
class NearDuplicates:
    """Detects texts that share at least `threshold` of their 5-word runs (Jaccard index) with an earlier text.

    The index is estimated on the 32 smallest hashes of both texts (bottom-k sketch, Broder 1997), with a standard error
    of at most 0.09. Only texts that share one of their 8 smallest hashes are compared.
    """

    threshold: float
    _sketches: list[frozenset[int]] = field(default_factory=list)
    _candidates: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def is_duplicate(self, text: str) -> bool:
        """True if an earlier text is a near duplicate. Otherwise the text is remembered."""
        smallest = heapq.nsmallest(_SKETCH_SIZE, _hashes(text, _SHINGLE))
        sketch = frozenset(smallest)
        candidates = {index for value in smallest[:_PROBES] for index in self._candidates.get(value, ())}
        if any(_jaccard(sketch, self._sketches[index]) >= self.threshold for index in candidates):
            return True
        for value in smallest[:_PROBES]:
            self._candidates[value].append(len(self._sketches))
        self._sketches.append(sketch)
        return False


def _jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    union = heapq.nsmallest(_SKETCH_SIZE, first | second)
    return sum(value in first and value in second for value in union) / len(union)


class BenchmarkQuestions:
    """Detects texts that share a run of 13 words with a question of a benchmark, or equal a shorter question.

    13 words is the usual measure of contamination (Brown et al. 2020, appendix C).
    """

    def __init__(self, questions: Iterable[str]) -> None:
        self._runs: set[int] = set()
        for question in questions:
            self._runs |= _hashes(question, _BENCHMARK_GRAM)

    def overlaps(self, text: str) -> bool:
        """True if the text overlaps a question of the benchmark."""
        return not self._runs.isdisjoint(_hashes(text, _BENCHMARK_GRAM))
