"""A pair in; a reason to drop it, or None, out. Each filter is one function of a pair, named by its reason.

A recipe turns filters on and off by name, or gives their options: `filters: {allusion: false, kept: {least: 0.2}}`.
Every drop is counted under its filter's name.
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from clair.core.errors import UserError, near_miss
from clair.data.records import Pair, message_text
from clair.prompting.parse import is_refusal

Filters = Sequence[tuple[str, Callable[[Pair], str | None]]]
"""Filters by name in the order in which they are asked; each returns what to tell about the drop, or None."""


def empty(pair: Pair) -> str | None:
    """An answer without text teaches nothing."""
    if not pair.chosen.strip():
        return "the chosen answer is empty"
    return None if pair.rejected.strip() else "the rejected answer is empty"


def identical(pair: Pair) -> str | None:
    """Winner and loser are the same but for white space: no contrast, no gradient."""
    return "chosen and rejected are the same" if pair.chosen.split() == pair.rejected.split() else None


def refusal(pair: Pair) -> str | None:
    """The winner refuses where the loser answered: the reviser's policy, not the task's."""
    return pair.chosen[:200] if is_refusal(pair.chosen) and not is_refusal(pair.rejected) else None


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
    match = _ALLUSION.search(pair.chosen)
    if not match or _ALLUSION.search(pair.rejected) or _prompt_matches(pair, _ASKS_FOR_CORRECTION):
        return None
    return pair.chosen[max(0, match.start() - 40) : match.end() + 40]


_COMMENT = re.compile(
    r"\b(?:this (?:task|question|prompt)|the (?:task|prompt)) (?:asks|asked|requires|is asking|wants|instructs)\b"
    r"|\b(?:minimal|necessary) (?:changes|edits|corrections)\b"
    r"|\bno (?:changes|corrections) (?:are|were) (?:needed|made)\b",
    re.IGNORECASE,
)


def comment(pair: Pair) -> str | None:
    """The winner talks about the task or the editing, where the loser just answered."""
    match = _COMMENT.search(pair.chosen)
    return match.group() if match and not _COMMENT.search(pair.rejected) else None


def fence(pair: Pair) -> str | None:
    """The loser has code in fences and the winner has none, or leaves one open: the form of the answer was lost."""
    rejected_fences, chosen_fences = (
        len(re.findall(r"^[ \t]*(?:```|~~~)", text, re.MULTILINE)) for text in (pair.rejected, pair.chosen)
    )
    if rejected_fences >= 2 and chosen_fences == 0:
        return "the code fences of the rejected answer are gone"
    return "a code fence is left open" if chosen_fences % 2 and not rejected_fences % 2 else None


def language(pair: Pair) -> str | None:
    """Winner and loser are mostly in different scripts: the reviser answered in another language."""
    scripts = [_script(text) for text in (pair.rejected, pair.chosen)]
    return f"{scripts[0]} became {scripts[1]}" if None not in scripts and scripts[0] != scripts[1] else None


def cut_off(pair: Pair) -> str | None:
    """The loser breaks off: an open code fence, or a long last line that ends inside a sentence.

    The winner then merely finishes it. Answers of the target that hit max_tokens never come this far; this is for
    answers that came with the prompts.
    """
    if len(re.findall(r"^[ \t]*```", pair.rejected, re.MULTILINE)) % 2:
        return "the rejected answer leaves a code fence open"
    last = pair.rejected.rstrip().rpartition("\n")[2]
    inside = len(last) > 60 and len(pair.rejected) > 400 and re.search(r"(?:^|\s)[a-z,]+$", last)
    return f"the rejected answer breaks off: ...{last[-60:]}" if inside else None


def length(pair: Pair, least: float = 0.2, most: float = 5.0) -> str | None:
    """The winner's words over the loser's lie outside [least, most]: not a revision but another answer."""
    ratio = pair.contrast["length_ratio"]
    return None if least <= ratio <= most else f"length ratio {ratio:.2f}"


def kept(pair: Pair, least: float = 0.1, most: float = 1.0) -> str | None:
    """The share of the loser's words that the winner keeps in order lies outside [least, most]."""
    share = pair.contrast["kept"]
    return None if least <= share <= most else f"{share:.0%} of the words kept"


def gap(pair: Pair, above: float = 0.0) -> str | None:
    """The scores of winner and loser lie no more than `above` apart, or there are none.

    `apo calibrate` finds the bound. Strict, as its promise is: scores tie, and a gap of exactly `above` is dropped.
    """
    if pair.scores is None:
        return "the pair has no scores"
    difference = pair.scores[0] - pair.scores[1]
    return None if difference > above else f"score gap {difference:g}"


def _prompt_matches(pair: Pair, pattern: re.Pattern[str]) -> bool:
    return any(pattern.search(message_text(message)) for message in pair.messages)


_SAME_SCRIPT = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # Japanese writes with all three, in any proportion


def _script(text: str) -> str | None:
    """The script of most letters (LATIN, CYRILLIC, CJK ...) where there are enough of them to tell; else None."""
    if text.isascii():
        return "LATIN" if sum(map(str.isalpha, text[:4000])) >= 20 else None
    letters = [c for c in text[:4000] if c.isalpha()]
    if len(letters) < 20:
        return None
    names = Counter(_SAME_SCRIPT.get(name, name) for name in (unicodedata.name(c, "?").split()[0] for c in letters))
    script, count = names.most_common(1)[0]
    return script if count > 0.6 * len(letters) else None


_FILTERS = (empty, identical, refusal, allusion, comment, fence, language, cut_off, length, kept, gap)
FILTERS: dict[str, Callable[..., str | None]] = {f.__name__: f for f in _FILTERS}
"""Every filter, in the order in which they are asked."""
OFF = frozenset({"kept", "gap"})
"""Filters that a recipe must turn on. Real minimal revisions keep as little as a tenth of the words, so a kept-words
band is a choice about the data, not a matter of soundness; and only scored pairs have a gap."""
REVISIONS_ONLY = frozenset({"length"})
"""Filters that a recipe must turn on where the winner is no revision of the loser: a right answer of ten words to a
wrong one of a hundred is what such pairs are for."""


def make_filters(settings: Mapping[str, bool | Mapping[str, Any]], *, revisions: bool = True) -> Filters:
    """The filters that a recipe asks for. Raises UserError for an unknown filter or option, naming the near miss.

    `revisions`: the winner is made from the loser, by as few changes as it takes.
    """
    off = OFF if revisions else OFF | REVISIONS_ONLY
    for name in settings:
        if name not in FILTERS:
            raise UserError(f"unknown filter {name!r}{near_miss(name, FILTERS)}; allowed: {', '.join(FILTERS)}")
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
    """The name of the first filter that drops the pair, with its detail; None to keep it."""
    for name, function in filters:
        detail = function(pair)
        if detail is not None:
            return name, detail
    return None
