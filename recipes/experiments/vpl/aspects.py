"""Users who each care for one aspect of an answer, from any data with aspect scores in UltraFeedback's format.

    python -m recipes.experiments.vpl.aspects UltraFeedback.jsonl --out data/users

A row is a prompt (`instruction` or `prompt`) with several `completions`, each a `response` with `annotations`: by
aspect, a `Rating` (or a number). Users are made as those of VPL's UltraFeedback-P (arXiv 2408.10075): a user prefers
the answer with the higher rating in the one aspect that they care for, and tosses a coin if both are rated alike. Only
controversial pairs are used, on which two of the aspects disagree strictly: on others all users are alike. Ratings
that are no numbers (`N/A`) leave a completion out.

`out` holds train.jsonl and test.jsonl, of other prompts and the same users, as `apo reward` reads them: `user` is
ASPECT-NUMBER, `group` the aspect, which no fit may read.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

from clair.core.errors import UserError, check_name
from clair.core.files import content_hash, write_atomically
from clair.data.row_files import file_rows

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


@dataclass(frozen=True)
class RatedPair:
    """Two answers to a prompt, with their ratings by aspect."""

    prompt: str
    answers: tuple[str, str]
    ratings: tuple[Mapping[str, float], Mapping[str, float]]

    def sign(self, aspect: str) -> int:
        """1 if the aspect prefers the first answer, -1 if the second, 0 if neither."""
        first, second = (ratings[aspect] for ratings in self.ratings)
        return (first > second) - (first < second)

    def is_controversial(self, aspects: Sequence[str]) -> bool:
        """True if two of the aspects disagree strictly."""
        return {1, -1} <= {self.sign(aspect) for aspect in aspects}


def rating(annotation: Any) -> float | None:
    """The number in an annotation, or None."""
    value: Any = annotation.get("Rating") if isinstance(annotation, Mapping) else annotation
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def controversial_pairs(rows: Iterable[tuple[str, Any]], aspects: Sequence[str], seed: int) -> Iterator[RatedPair]:
    """One controversial pair of each row that has one, drawn by seed. Rows are (location, value).

    Raises UserError for a row without prompt or completions, and for an aspect that no completion of it has.
    """
    for location, row in rows:
        prompt = row.get("instruction") or row.get("prompt") if isinstance(row, Mapping) else None
        completions = row.get("completions") if isinstance(row, Mapping) else None
        if not isinstance(prompt, str) or not isinstance(completions, list):
            raise UserError(f"{location}: instruction (or prompt) and completions needed, as UltraFeedback has them")
        annotated = [(c.get("response"), c.get("annotations") or {}) for c in completions]
        names = sorted({name for _, by_aspect in annotated for name in by_aspect})
        for aspect in aspects if completions else ():
            check_name(f"{location}: no completion is annotated with", aspect, names, "found")
        rated: list[tuple[str, dict[str, float]]] = []
        for text, by_aspect in annotated:
            ratings = {aspect: rating(by_aspect.get(aspect)) for aspect in aspects}
            numbers = {aspect: number for aspect, number in ratings.items() if number is not None}
            if isinstance(text, str) and text.strip() and len(numbers) == len(aspects):
                rated.append((text, numbers))
        pairs = [RatedPair(prompt, (a, b), (of_a, of_b)) for (a, of_a), (b, of_b) in combinations(rated, 2) if a != b]
        pairs = [pair for pair in pairs if pair.is_controversial(aspects)]
        if pairs:
            yield Random(f"{seed} {prompt}").choice(pairs)


def user_rows(
    pairs: Sequence[RatedPair], aspects: Sequence[str], users: int, each: int, seed: int
) -> list[dict[str, Any]]:
    """Comparisons of `users` users of each aspect, `each` of them drawn from the pairs."""
    rows = []
    for aspect in aspects:
        for number in range(users):
            random = Random(f"{seed} {aspect} {number}")
            for pair in random.sample(pairs, min(each, len(pairs))):
                sign = pair.sign(aspect) or random.choice((1, -1))
                chosen, rejected = pair.answers if sign > 0 else pair.answers[::-1]
                content = {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}
                user = f"{aspect}-{number}"
                rows.append({"id": content_hash([user, content])[:16], **content, "user": user, "group": aspect})
    return rows


def write_users(
    file: Path, out: Path, aspects: Sequence[str], *, users: int, each: int, test: float = 0.1, seed: int = 0
) -> dict[str, int]:
    """Write train.jsonl and test.jsonl into `out`, and return the numbers of pairs in each split.

    A share `test` of the prompts is held out. Raises UserError if fewer than two pairs of a split are controversial.
    """
    pairs = sorted(
        controversial_pairs(file_rows(file, "data"), aspects, seed), key=lambda pair: content_hash(pair.prompt)
    )
    Random(seed).shuffle(pairs)
    held_out = round(test * len(pairs))
    splits = {"train": pairs[held_out:], "test": pairs[:held_out]}
    for name, members in splits.items():
        if len(members) < 2:
            raise UserError(
                f"{file}: {len(members)} controversial pairs for {name}, on which two of {', '.join(aspects)} "
                "disagree; at least 2 are needed, so give more rows or other aspects"
            )
    for name, members in splits.items():
        rows = user_rows(members, aspects, users, each if name == "train" else max(5, each // 4), seed)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {name: len(members) for name, members in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Users who each care for one aspect, from data with aspect scores.")
    parser.add_argument("data", type=Path, help="rows in UltraFeedback's format: .jsonl, .json or .parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--aspects", nargs="+", default=list(ASPECTS))
    parser.add_argument("--users", type=int, default=10, help="users of each aspect")
    parser.add_argument("--each", type=int, default=40, help="comparisons of each user, of the training prompts")
    parser.add_argument("--test", type=float, default=0.1, help="the share of the prompts that is held out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        counts = write_users(
            args.data, args.out, args.aspects, users=args.users, each=args.each, test=args.test, seed=args.seed
        )
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{args.out}: {counts['train']} controversial pairs to train on, {counts['test']} held out")


if __name__ == "__main__":
    main()
