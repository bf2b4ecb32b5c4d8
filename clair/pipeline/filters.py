"""Filters of pairs. A filter is a function of a pair that returns a detail to drop it, or None; its name is the reason.

A recipe turns filters on and off by name or sets their options: `filters: {allusion: false, kept: {least: 0.2}}`.
Each drop is counted under the filter's name.
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from clair.core.errors import UserError, check_name, near_miss
from clair.data.records import Pair, fold_case, message_text
from clair.prompting.parse import is_refusal

Filters = Sequence[tuple[str, Callable[[Pair], str | None]]]
"""Names and filters in the order in which they are applied; a filter returns the detail of the drop, or None."""


def empty(pair: Pair) -> str | None:
    """An answer without text and tool calls teaches nothing."""
    if not (pair.chosen.strip() or pair.tool_calls[0]):
        return "the chosen answer is empty"
    return None if pair.rejected.strip() or pair.tool_calls[1] else "the rejected answer is empty"


def identical(pair: Pair) -> str | None:
    """Chosen and rejected differ in white space only: no contrast, no gradient."""
    chosen, rejected = pair.compared
    return "chosen and rejected are the same" if chosen.split() == rejected.split() else None


def refusal(pair: Pair) -> str | None:
    """The chosen answer refuses and the rejected one does not: the reviser's policy, not an improvement."""
    return pair.chosen[:200] if is_refusal(pair.chosen) and not is_refusal(pair.rejected) else None


# A model trained on answers that mention their own correction learns to announce corrections. Milder words ("this
# enhanced code") are allowed, because many tasks request just that.
_ALLUSION = re.compile(
    r"\b(?:corrected|revised|amended|rectified)\b(?! (?:by|in|for) (?:\d|the (?:year|author)))"
    r"|\b(?:improved|enhanced|updated|rewritten) (?:version|answer|solution|response|revision)\b"
    r"|\bstudent(?:'s|’s)? (?:solution|answer|response)\b|\b(?:original|previous) (?:solution|answer|response)\b"
    r"|\bhere(?:'s| is| are) (?:the|a|an|my) (?:correction|revision)\b",
    re.IGNORECASE,
)
_ALLUSION_KEYWORDS = (
    "corrected", "revised", "amended", "rectified", "improved ", "enhanced ", "updated ", "rewritten ", "student",
    "original ", "previous ", " correction", " revision",
)  # fmt: skip
_ASKS_FOR_CORRECTION = re.compile(
    r"\b(?:correct|fix|revise|edit|proofread|rewrite|amend|improve|rephrase|debug)\s+"
    r"(?:the|this|that|my|these|those|any|all|it|following|errors?|mistakes?|grammar|spelling)\b"
    r"|\b(?:student|correct(?:ed|ion)s?|revis(?:ed|ions?))\b",
    re.IGNORECASE,
)


def allusion(pair: Pair) -> str | None:
    """The chosen answer mentions the correction ("in this corrected solution ..."), and the task requested none."""
    match = _search(_ALLUSION, _ALLUSION_KEYWORDS, pair.chosen)
    if (
        not match
        or _ALLUSION.search(pair.rejected)
        or any(_ASKS_FOR_CORRECTION.search(message_text(message)) for message in pair.messages)
    ):
        return None
    return pair.chosen[max(0, match.start() - 40) : match.end() + 40]


_COMMENT = re.compile(
    r"\b(?:this (?:task|question|prompt)|the (?:task|prompt)) (?:asks|asked|requires|is asking|wants|instructs)\b"
    r"|\b(?:minimal|necessary) (?:changes|edits|corrections)\b"
    r"|\bno (?:changes|corrections) (?:are|were) (?:needed|made)\b",
    re.IGNORECASE,
)
_COMMENT_KEYWORDS = (
    " asks", " asked", " requires", " is asking", " wants", " instructs", "minimal ", "necessary ", "no changes ",
    "no corrections ",
)  # fmt: skip


def comment(pair: Pair) -> str | None:
    """The chosen answer talks about the task or the editing, and the rejected one does not."""
    match = _search(_COMMENT, _COMMENT_KEYWORDS, pair.chosen)
    return match.group() if match and not _COMMENT.search(pair.rejected) else None


def _search(pattern: re.Pattern[str], keywords: Sequence[str], text: str) -> re.Match[str] | None:
    """The first match of a pattern, each alternative of which holds a keyword; most texts hold none."""
    folded = fold_case(text)
    return pattern.search(text) if any(keyword in folded for keyword in keywords) else None


def fence(pair: Pair) -> str | None:
    """The chosen answer lost the code fences of the rejected one, or leaves one open."""
    rejected_fences, chosen_fences = (
        _count_fences("```", text) + _count_fences("~~~", text) for text in (pair.rejected, pair.chosen)
    )
    if rejected_fences >= 2 and chosen_fences == 0:
        return "the code fences of the rejected answer are gone"
    return "a code fence is left open" if chosen_fences % 2 and not rejected_fences % 2 else None


def _count_fences(mark: str, text: str) -> int:
    """The number of lines that begin with the mark of a fence."""
    return len(re.findall(rf"^[ \t]*{mark}", text, re.MULTILINE)) if mark in text else 0


def language(pair: Pair) -> str | None:
    """Chosen and rejected are mostly in different scripts: the reviser answered in another language."""
    scripts = [_script(text) for text in (pair.rejected, pair.chosen)]
    return f"{scripts[0]} became {scripts[1]}" if None not in scripts and scripts[0] != scripts[1] else None


def cut_off(pair: Pair) -> str | None:
    """The rejected answer is cut off: an open code fence, or a long last line that ends inside a sentence.

    The chosen answer would merely complete it. This is for answers that came with the prompts; the target's answers
    that reach max_tokens are dropped before.
    """
    if _count_fences("```", pair.rejected) % 2:
        return "the rejected answer leaves a code fence open"
    last = pair.rejected.rstrip().rpartition("\n")[2]
    inside = len(last) > 60 and len(pair.rejected) > 400 and re.search(r"(?:^|\s)[a-z,]+$", last)
    return f"the rejected answer breaks off: ...{last[-60:]}" if inside else None


def length(pair: Pair, least: float = 0.2, most: float = 5.0) -> str | None:
    """The ratio of words, chosen over rejected, lies outside [least, most]: another answer, not a revision."""
    ratio = pair.contrast["length_ratio"]
    return None if least <= ratio <= most else f"length ratio {ratio:.2f}"


def kept(pair: Pair, least: float = 0.1, most: float = 1.0) -> str | None:
    """The share of the rejected answer's words that the chosen one keeps in order lies outside [least, most]."""
    share = pair.contrast["kept"]
    return None if least <= share <= most else f"{share:.0%} of the words kept"


def gap(pair: Pair, above: float = 0.0) -> str | None:
    """The score of the chosen answer exceeds that of the rejected one by at most `above`, or there are no scores.

    `apo calibrate` computes the bound. As it guarantees only gaps above the bound, a gap equal to it is dropped.
    """
    if pair.scores is None:
        return "the pair has no scores"
    difference = pair.scores[0] - pair.scores[1]
    return None if difference > above else f"score gap {difference:g}"


_SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # Japanese mixes all three in any proportion
_MAIN_SHARE = 0.6


def _script(text: str) -> str | None:
    """The script of over 60 % of the letters (LATIN, CYRILLIC, CJK ...); None if mixed or fewer than 20 letters."""
    if text.isascii():
        return "LATIN" if any(islice(filter(str.isalpha, text[:4000]), 19, None)) else None
    letters = [c for c in text[:4000] if c.isalpha()]
    if len(letters) < 20:
        return None
    if sum(map(str.isascii, letters)) > _MAIN_SHARE * len(letters):
        return "LATIN"
    names = Counter(_SAME_SCRIPT.get(name, name) for name in (unicodedata.name(c, "?").split()[0] for c in letters))
    script, count = names.most_common(1)[0]
    return script if count > _MAIN_SHARE * len(letters) else None


_FILTERS = (empty, identical, refusal, allusion, comment, fence, language, cut_off, length, kept, gap)
FILTERS: dict[str, Callable[..., str | None]] = {f.__name__: f for f in _FILTERS}
"""All filters, in the order in which they are applied."""
OFF = frozenset({"kept", "gap"})
"""Filters that are off by default. Real minimal revisions keep as little as a tenth of the words, so a band of kept
words is a choice about the data; and only scored pairs have a gap."""
REVISIONS_ONLY = frozenset({"length"})
"""Filters that are off by default if the chosen answer is not a revision: a right answer of ten words beside a wrong
one of a hundred is a useful pair."""


def make_filters(settings: Mapping[str, bool | Mapping[str, Any]], *, revisions: bool = True) -> Filters:
    """The filters that a recipe turns on. Raises UserError for an unknown filter or option, with the nearest name.

    `revisions`: the chosen answers are revisions of the rejected ones.
    """
    off = OFF if revisions else OFF | REVISIONS_ONLY
    for name in settings:
        check_name("unknown filter", name, FILTERS)
    return [
        (name, _bind_options(name, settings.get(name, name not in off)))
        for name in FILTERS
        if settings.get(name, name not in off) is not False
    ]


def _bind_options(name: str, options: bool | Mapping[str, Any]) -> Callable[[Pair], str | None]:
    if options is True:
        return FILTERS[name]
    assert isinstance(options, Mapping)
    allowed_options = list(inspect.signature(FILTERS[name]).parameters)[1:]
    for option, value in options.items():
        if option not in allowed_options:
            allowed = ", ".join(allowed_options) or "none: it is turned on and off with true and false"
            raise UserError(
                f"filter {name}: unknown option {option!r}{near_miss(option, allowed_options)}; allowed: {allowed}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"filter {name}: {option} is {value!r}, not a number")
    return partial(FILTERS[name], **options)


def first_drop_reason(pair: Pair, filters: Filters) -> tuple[str, str] | None:
    """The name of the first filter that drops the pair, and its detail; None if no filter does."""
    reasons = ((name, detail) for name, function in filters if (detail := function(pair)) is not None)
    return next(reasons, None)
