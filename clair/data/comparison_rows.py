"""Rows of comparisons with the user's choice, as rows of pairs with a column `user`.

    TL;DR     info (with post or article), summaries (two, with text), choice (0 or 1), worker
    PAL       prompt, response_1, response_2, y (1: the first is preferred, -1: the second), user_id

TL;DR is the part `comparisons` of openai/summarize_from_feedback (Stiennon et al. 2020), PAL the sample that the
repository of arXiv 2406.08469 describes. Files of other formats are not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from clair.core.errors import UserError

_FORMATS = {"TL;DR": ("info", "summaries", "choice"), "PAL": ("response_1", "response_2", "y")}


def is_comparison(columns: Collection[str]) -> bool:
    """True if rows with these columns are comparisons with a choice."""
    return "chosen" not in columns and any(set(names) <= set(columns) for names in _FORMATS.values())


def as_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return prompt, chosen, rejected and user of a comparison, or any other row as it is.

    Raises UserError for a comparison without two answers, or with a choice that is none of them.
    """
    if not is_comparison(row):
        return dict(row)
    if "summaries" in row:
        prompt, (first, second), choice = _tldr(row)
        user = row.get("worker")
    else:
        prompt, first, second = (row.get(name) for name in ("prompt", "response_1", "response_2"))
        choice = _choice(row, "y", {"1": 0, "-1": 1})
        user = row.get("user_id")
    chosen, rejected = (second, first) if choice else (first, second)
    labels = {name: row[name] for name in ("id", "group", "behaviour", "source") if row.get(name) is not None}
    user = None if user is None else str(user)
    return {**labels, "prompt": prompt, "chosen": chosen, "rejected": rejected, "user": user}


def _tldr(row: Mapping[str, Any]) -> tuple[Any, list[Any], int]:
    info, summaries = row["info"], row["summaries"]
    texts = [s.get("text") for s in summaries if isinstance(s, Mapping)] if isinstance(summaries, list) else []
    if len(texts) != 2:
        raise UserError(f"'summaries' holds {len(texts)} texts; two needed, the compared ones")
    if not isinstance(info, Mapping):
        raise UserError(f"'info' is {type(info).__name__}; an object with 'post' or 'article' needed")
    return info.get("post") or info.get("article"), texts, _choice(row, "choice", {"0": 0, "1": 1})


def _choice(row: Mapping[str, Any], column: str, allowed: Mapping[str, int]) -> int:
    value = str(row[column])
    if value not in allowed:
        raise UserError(f"{column!r} is {row[column]!r}; allowed: {' and '.join(allowed)}")
    return allowed[value]
