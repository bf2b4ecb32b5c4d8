"""Prompts that came before, that are nearly the same, or that a benchmark asks: found by hashes and shared words."""

from __future__ import annotations

import heapq
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable
from hashlib import blake2b

_FIRST_SLOTS = 1024
_WORD = re.compile(r"\w+")
_SHINGLE = 5
_SKETCH = 32
_PROBES = 8
_BENCHMARK_GRAM = 13


def _hashes(text: str, n: int) -> set[int]:
    """64-bit hashes of all runs of n words, lower case, punctuation ignored; of all the words where there are fewer."""
    words = _WORD.findall(text.lower())
    runs = (" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))
    return {int.from_bytes(blake2b(run.encode("utf-8", "replace"), digest_size=8).digest()) for run in runs}


class Seen:
    """Which 64-bit hashes came before: 11 to 21 bytes each, a fifth of what a set of them takes."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * _FIRST_SLOTS))  # a table of open addresses; 0 is a free one
        self._count = 0

    def add(self, number: int) -> bool:
        """Remember a number; whether it is new."""
        number = number or 1
        slots, mask = self._slots, len(self._slots) - 1
        place = number & mask
        while found := slots[place]:
            if found == number:
                return False
            place = (place + 1) & mask
        slots[place] = number
        self._count += 1
        if 4 * self._count > 3 * len(slots):
            self._grow()
        return True

    def _grow(self) -> None:
        slots = array("Q", bytes(16 * len(self._slots)))
        mask = len(slots) - 1
        for number in filter(None, self._slots):
            place = number & mask
            while slots[place]:
                place = (place + 1) & mask
            slots[place] = number
        self._slots = slots


class NearDuplicates:
    """Tells whether a text shares at least `threshold` of its 5-word runs (Jaccard) with one seen before.

    Jaccard is estimated on the 32 smallest hashes of both (bottom-k sketch, Broder 1997): standard error at most 0.09.
    Texts are compared where they share one of the 8 smallest.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._sketches: list[frozenset[int]] = []
        self._places: dict[int, list[int]] = defaultdict(list)

    def seen(self, text: str) -> bool:
        """Whether a near duplicate came before; a text that is none is remembered."""
        smallest = heapq.nsmallest(_SKETCH, _hashes(text, _SHINGLE))
        sketch = frozenset(smallest)
        candidates = {place for value in smallest[:_PROBES] for place in self._places.get(value, ())}
        if any(_jaccard(sketch, self._sketches[place]) >= self.threshold for place in candidates):
            return True
        for value in smallest[:_PROBES]:
            self._places[value].append(len(self._sketches))
        self._sketches.append(sketch)
        return False


def _jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    union = heapq.nsmallest(_SKETCH, first | second)
    return sum(value in first and value in second for value in union) / len(union)


class Benchmark:
    """Tells whether a text shares a run of 13 words with any question of a benchmark, or is all of a shorter one.

    13 words is the usual measure of contamination (Brown et al. 2020, appendix C).
    """

    def __init__(self, questions: Iterable[str]) -> None:
        self._runs: set[int] = set()
        for question in questions:
            self._runs |= _hashes(question, _BENCHMARK_GRAM)

    def asks(self, text: str) -> bool:
        """Whether the benchmark asks this."""
        return not self._runs.isdisjoint(_hashes(text, _BENCHMARK_GRAM))
