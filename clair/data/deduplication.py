"""Prompts that came before, that are nearly the same, or that a benchmark asks: found by hashes and shared words."""

from __future__ import annotations

import heapq
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from tempfile import SpooledTemporaryFile
from typing import Any

_BUCKETS, _SPOOLED = 64, 1 << 14
_KEYED = struct.Struct("<QQ")
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


class Repeats:
    """Which rows hold a 64-bit key that an earlier row holds too.

    Keys wait in temporary files, 16 bytes each, and are compared bucket by bucket: in memory is a 64th of them at most.
    """

    def __init__(self) -> None:
        self._buckets = [SpooledTemporaryFile(max_size=_SPOOLED) for _ in range(_BUCKETS)]  # noqa: SIM115 (by close)

    def add(self, key: int, row: int) -> None:
        """One more row, later than all before; it may carry bits of its own, below its number."""
        self._buckets[key % _BUCKETS].write(_KEYED.pack(key, row))

    def found(self, wanted: Callable[[Any], Any] | None = None) -> Iterator[Any]:
        """Rows whose key came before, as arrays. `wanted` says of an array of rows which of them count at all."""
        import numpy as np

        for file in self._buckets:
            file.seek(0)
            keyed = np.frombuffer(file.read(), dtype=[("key", "<u8"), ("row", "<i8")])
            if wanted is not None:
                keyed = keyed[wanted(keyed["row"])]
            order = np.argsort(keyed["key"], kind="stable")
            keys = keyed["key"][order]
            yield keyed["row"][order[1:][keys[1:] == keys[:-1]]]

    def close(self) -> None:
        """The files go."""
        for file in self._buckets:
            file.close()


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
