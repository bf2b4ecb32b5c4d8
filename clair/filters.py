"""A pair in; a reason to drop it, or None, out. Each filter is one function of a pair, named by its reason.

A recipe turns filters on and off by name (`filters: {allusion: false}`); every drop is counted under its reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from clair.parse import is_refusal
from clair.records import Pair

Filter = Callable[[Pair], str | None]
"""Returns what to tell about the drop, or None to keep the pair."""


def empty(pair: Pair) -> str | None:
    """An answer without text teaches nothing."""
    if not pair.chosen.strip():
        return "the chosen answer is empty"
    return None if pair.rejected.strip() else "the rejected answer is empty"


def identical(pair: Pair) -> str | None:
    """Winner and loser are the same but for white space: no contrast, no gradient."""
    same = pair.chosen.split() == pair.rejected.split()
    return "the reviser changed nothing" if same else None


def refusal(pair: Pair) -> str | None:
    """The winner refuses where the loser answered: the reviser's policy, not the task's."""
    refuses = is_refusal(pair.chosen) and not is_refusal(pair.rejected)
    return pair.chosen[:200] if refuses else None


# The winner says of itself that it mends something: a model trained on it learns to announce corrections. Milder
# praise ("this enhanced code") is left alone, because many tasks ask for just that.
_ALLUSION = re.compile(
    r"\b(?:corrected|revised|amended|rectified)\b(?! (?:by|in|for) (?:\d|the (?:year|author)))"
    r"|\b(?:improved|enhanced|updated|rewritten) (?:version|answer|solution|response|revision)\b"
    r"|\bstudent(?:'s|’s)? (?:solution|answer|response)\b|\b(?:original|previous) (?:solution|answer|response)\b"
    r"|\bhere(?:'s| is| are) (?:the|a|an|my) (?:correction|revision)\b",
    re.IGNORECASE,
)
_ASKS_FOR_CORRECTION = re.compile(
    r"\b(?:correct|fix|revise|edit|proofread|rewrite|amend|improve|rephrase|debug)\s+"
    r"(?:the|this|that|my|these|those|any|all|it|following|errors?|mistakes?|grammar|spelling)\b"
    r"|\b(?:student|correct(?:ed|ion)s?|revis(?:ed|ions?))\b",
    re.IGNORECASE,
)


def allusion(pair: Pair) -> str | None:
    """The winner alludes to the correction ("in this corrected solution ..."), and the task did not ask for one."""
    found = _ALLUSION.search(pair.chosen)
    if not found or _ALLUSION.search(pair.rejected):
        return None
    if any(_ASKS_FOR_CORRECTION.search(message["content"]) for message in pair.messages):
        return None
    return pair.chosen[max(0, found.start() - 40) : found.end() + 40]


FILTERS: dict[str, Filter] = {f.__name__: f for f in (empty, identical, refusal, allusion)}
"""The filters in the order in which they are asked; all are on unless the recipe says otherwise."""


def first_reason(pair: Pair, names: Iterable[str]) -> tuple[str, str] | None:
    """The first of the named filters that drops the pair, with its detail; None to keep it."""
    for name in names:
        detail = FILTERS[name](pair)
        if detail is not None:
            return name, detail
    return None
