"""Balance of length: leave pairs out until winners are not longer than losers on average.

A model learns length faster than substance. OLMo 3 therefore limits the difference in length of its pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from clair.core.files import content_hash
from clair.core.statistics import clustered_mean
from clair.data.records import Dropped, message_text
from clair.inference.model_folder import load_tokenizer
from clair.pipeline.config import BuildConfig


class LengthBalance:
    """The differences in tokens of all pairs of a build, winner minus loser."""

    def __init__(self, max_tokens: int, tokenizer: Any) -> None:
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._differences: dict[str, int] = {}

    @classmethod
    def of(cls, config: BuildConfig) -> LengthBalance | None:
        """The balance that a recipe asks for, or None. Raises UserError if its tokenizer cannot be loaded."""
        if config.balance is None or config.tokenizer is None:
            return None
        return cls(config.balance.tokens, _tokenizer(config.tokenizer))

    def add(self, row: Mapping[str, Any]) -> None:
        """Count the tokens of a pair, given as `Pair.row` gives it; the thoughts of an answer count too."""
        texts = [
            f"{turn.get('reasoning_content') or ''}{message_text(turn)}"
            for turn in (row["chosen"][-1], row["rejected"][-1])
        ]
        chosen, rejected = map(len, self._tokenizer(texts, add_special_tokens=False)["input_ids"])
        self._differences[row["id"]] = chosen - rejected

    def surplus(self) -> dict[str, Dropped]:
        """The pairs to leave out, by id, with the reason.

        These are the pairs whose answers differ by more than `max_tokens`, and then those with the longest winners, as
        few as possible, until the sum of all differences is at most 0. Among equal differences the hash of the id
        decides, so the choice is the same in every build.
        """
        dropped = {
            id: Dropped("balance", "length_gap", f"the answers differ by {abs(difference)} tokens")
            for id, difference in self._differences.items()
            if abs(difference) > self.max_tokens
        }
        remaining = {id: difference for id, difference in self._differences.items() if id not in dropped}
        total = sum(remaining.values())
        for id in sorted(remaining, key=lambda id: (-remaining[id], content_hash(id))):
            if total <= 0:
                break
            total -= remaining[id]
            dropped[id] = Dropped("balance", "longer_winner", f"the winner is {remaining[id]} tokens longer")
        return dropped

    def summary(self) -> dict[str, Any]:
        """The mean difference before and after, each with its 95 % interval, for the manifest."""
        dropped = self.surplus()
        remaining = [difference for id, difference in self._differences.items() if id not in dropped]
        return {
            "tokens": self.max_tokens,
            "before": _estimate(list(self._differences.values())),
            "after": _estimate(remaining),
        }


def _estimate(differences: Sequence[int]) -> dict[str, Any]:
    mean = sum(differences) / len(differences) if differences else None
    interval = clustered_mean(differences, range(len(differences))) if len(differences) > 1 else None
    return {"pairs": len(differences), "mean": mean, "ci95": interval and [interval.lo, interval.hi]}


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Any:
    return load_tokenizer(path, "balance.tokenizer")
