"""How far apart the two answers of a pair are. All numbers are of the texts alone; none needs a model."""

from __future__ import annotations

import re
from typing import NamedTuple


class Contrast(NamedTuple):
    """The contrast of a pair.

    jaccard      shared distinct words over all distinct words, 0 to 1 (words are whitespace-separated)
    levenshtein  single-character edits that turn rejected into chosen, a count
    kept         share of rejected's words that chosen keeps in order, 0 to 1 (longest common subsequence)
    prefix       share of chosen's words before the first difference, 0 to 1
    length_ratio words of chosen over words of rejected
    """

    jaccard: float
    levenshtein: int
    kept: float
    prefix: float
    length_ratio: float


def contrast_of(chosen: str, rejected: str) -> Contrast:
    """The contrast between a chosen and a rejected answer. Source of the first two: arXiv 2408.06266, section 4."""
    from rapidfuzz.distance import LCSseq, Levenshtein, Prefix

    winner, loser = chosen.split(), rejected.split()
    distinct_winner, distinct_loser = set(winner), set(loser)
    union = len(distinct_winner | distinct_loser)
    return Contrast(
        jaccard=len(distinct_winner & distinct_loser) / union if union else 1.0,
        levenshtein=Levenshtein.distance(rejected, chosen),
        kept=LCSseq.similarity(loser, winner) / len(loser) if loser else 0.0,
        prefix=Prefix.similarity(winner, loser) / len(winner) if winner else 0.0,
        length_ratio=len(winner) / len(loser) if loser else float(len(winner)),
    )


def word_diff(rejected: str, chosen: str) -> list[tuple[str, str]]:
    """The way from rejected to chosen by words: ("same" | "gone" | "new", text) in reading order.

    Between two parts that are the same, what is gone stands before what is new. White space is kept.
    """
    from rapidfuzz.distance import LCSseq

    old, new = (re.findall(r"\s*\S+|\s+$", text) for text in (rejected, chosen))
    parts: list[tuple[str, str]] = []
    gone = came = ""
    for step in LCSseq.opcodes([w.strip() for w in old], [w.strip() for w in new]):
        if step.tag == "equal":
            parts += [(kind, text) for kind, text in (("gone", gone), ("new", came)) if text]
            parts.append(("same", "".join(new[step.dest_start : step.dest_end])))
            gone = came = ""
        else:
            gone += "".join(old[step.src_start : step.src_end])
            came += "".join(new[step.dest_start : step.dest_end])
    return parts + [(kind, text) for kind, text in (("gone", gone), ("new", came)) if text]
